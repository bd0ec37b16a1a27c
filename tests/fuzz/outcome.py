"""What one input does to one reader: accepted with a value that an oracle accepts too, or refused in a sentence."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis.strategies import SearchStrategy

from curate.core.errors import UserError

ACCEPTED, REFUSED = "accepted", "refused"


class WrongAcceptanceError(AssertionError):
    """A reader took an input that the oracle does not, or took it for something else."""


@dataclass(frozen=True, kw_only=True)
class FuzzTarget:
    """A reader of a file that a user or a program wrote.

    Attributes:
        name: what it is called.
        file: name that the input has on disk.
        inputs: bytes to try.
        read: the real reader, of the file's path.
        oracle: whether a value may be what the file says; slow and obvious, and nothing of the reader's code.
        corpus: inputs that are tried each time, with their outcome.
        named: what a refusal names; none: the file.
    """

    name: str
    file: str
    inputs: SearchStrategy[bytes]
    read: Callable[[Path], Any]
    oracle: Callable[[bytes, Any], None]
    corpus: tuple[tuple[bytes, str], ...] = ()
    named: str | None = None

    def outcome(self, data: bytes, folder: Path) -> str:
        """Try one input.

        Raises:
            WrongAcceptanceError: see there.
            AssertionError: the refusal is too long, or names neither file nor setting.
            Exception: whatever else the reader raised.
        """
        path = folder / self.file
        path.write_bytes(data)
        try:
            value = self.read(path)
        except UserError as error:
            check_message(str(error), self.named or path.name)
            return REFUSED
        self.oracle(data, value)
        return ACCEPTED


def check_message(message: str, name: str) -> None:
    """A refusal has two sentences at most and a length that can be read, and names the file or an option."""
    assert name in message or re.match(r"--\w", message), f"names neither file nor option: {message}"
    assert sentences(message) <= 2, f"{sentences(message)} sentences: {message}"
    assert len(message) < 1000, f"{len(message)} characters: {message}"
    assert "errors.pydantic.dev" not in message


def sentences(message: str) -> int:
    """How many a message has; what it repeats of an input, in quotes or brackets, does not count."""
    plain = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}", "_", message)
    return 1 + len(re.findall(r"[.!?]\s+(?=[A-Z_`-])", plain))


def demand(condition: bool, what: str) -> None:
    """An oracle's objection.

    Raises:
        WrongAcceptanceError: the condition does not hold.
    """
    if not condition:
        raise WrongAcceptanceError(what)
