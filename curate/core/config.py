"""Configuration: frozen pydantic models, and the border where a command's errors become one sentence for its user.

A config class sits beside the code that it configures; its attribute docstrings are the command's `--help`.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationInfo, field_validator

from curate.core.arguments import parse
from curate.core.errors import UserError
from curate.core.escape import terminal
from curate.core.interrupts import Interrupted, raise_on_signals
from curate.core.paths import local_path
from curate.core.renamed import Renamed
from curate.core.trust import take_option
from curate.core.validation import TypeName, is_list, kinds_of

# What to do, by what the system refused; where none fits, a general sentence is used.
_ADVICE = (
    ((errno.ENOSPC, errno.EDQUOT), "free some space and run the same command again to continue"),
    ((errno.EFBIG,), "raise the limit on the size of a file (ulimit -f) and run the same command again to continue"),
    ((errno.EROFS, errno.EACCES, errno.EPERM), "make it accessible to this user, or set another path"),
    ((errno.EEXIST, errno.ENOTDIR), "there is a file where a folder is needed: set another path"),
    ((errno.EISDIR,), "there is a folder where a file is needed: set another path"),
    ((errno.EMFILE, errno.ENFILE), "raise the limit on open files (ulimit -n)"),
)
_TOKENS = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[KMBT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
# What tables, arrays and JSON of others can hold.
_INTEGERS = range(-(2**63), 2**63)


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error.

    One value where a list is expected is a list of one; paths are of this machine and may start with `~`; numbers are
    finite (a field that may be infinite says so) and no truth values; integers fit into 64 bits.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    RENAMED: ClassVar[Renamed] = Renamed()
    """Old names of settings; those of a command stand in its own config class."""

    @field_validator("*", mode="before")
    @classmethod
    def _as_meant(cls, given: Any, info: ValidationInfo) -> Any:
        return as_meant(cls.model_fields[str(info.field_name)].annotation, given)

    @field_validator("*", mode="after")
    @classmethod
    def _of_64_bits(cls, value: Any) -> Any:
        if not all(number in _INTEGERS for number in _integers(value)):
            raise ValueError("is an integer of more than 64 bits")
        return value


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_tokens(value: int | str) -> int:
    """Read a token count: `50_000_000`, `"50M"`, `"1.5B"` (K, M, B and T are powers of 1000).

    Raises:
        ValueError: the text is not a positive token count.
    """
    match = _TOKENS.fullmatch(str(value).replace("_", "").strip())
    # Cut, so that thousands of digits are too large a number and not an overflow of `float`.
    count = round(float(match["number"][:99]) * _UNITS[match["unit"].upper()]) if match else 0
    if count < 1 or count not in _INTEGERS:
        raise ValueError(f"{str(value)[:99]!r} is not a token count; write for example 500000, 50M or 1.5B")
    return count


TokenCount = Annotated[int | str, BeforeValidator(parse_tokens), TypeName("token count such as 500000, 50M or 1.5B")]
FileName = Annotated[str, AfterValidator(lambda name: str(local_path(name))), TypeName("path")]
"""A path that stays text."""


def as_meant(annotation: Any, given: Any) -> Any:
    """Read a value as its user meant it, see `Config`; what does not fit is left to the validation.

    Raises:
        ValueError: a truth value for a number, or a path that cannot be one.
    """
    kinds = kinds_of(annotation)
    # `bool` is an `int` in Python, and pydantic would read `true` as 1.
    if isinstance(given, bool) and bool not in kinds and (int in kinds or float in kinds):
        raise ValueError(f"is {str(given).lower()}, expected a number")
    # In a union the validation chooses: what is meant depends on the member.
    if len(kinds) != 1 or given is None:
        return given
    kind, inner = kinds[0], get_args(kinds[0])
    if kind is Path and isinstance(given, str | Path):
        return local_path(given)
    if is_list(kind):
        items = given if isinstance(given, list | tuple | set | frozenset) else [given]
        return [as_meant(inner[0], item) for item in items]
    if get_origin(kind) is tuple and isinstance(given, list | tuple) and len(given) == len(inner):
        return [as_meant(item_type, item) for item_type, item in zip(inner, given, strict=True)]
    if get_origin(kind) is dict and isinstance(given, Mapping):
        return {key: as_meant(inner[1], item) for key, item in given.items()}
    return given


def _integers(value: Any) -> Iterator[int]:
    """Yield the integers in a value, but for those in groups of settings, whose own validation saw them."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | tuple | dict):
        for member in value.values() if isinstance(value, dict) else value:
            yield from _integers(member)


def parse_command(config: type[ConfigT], prog: str, description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config` from the command line: `--config FILE.yaml`, then dotted overrides; `--print_config` shows it.

    See `curate.core.arguments`.

    Raises:
        UserError: an option is unknown, missing, or its value is not valid.
    """
    return parse(config, prog, description, take_option(list(sys.argv[1:] if argv is None else argv)))


def run_command(command: Callable[[], None]) -> None:
    """Run a command's main function; each error that a user can cause becomes one sentence and an exit status.

    Raises:
        SystemExit: 2 for bad input (`UserError`) and for what the system refuses (`OSError`: a full disk, a folder that
            is read-only), 128 + signal for Ctrl-C, SIGTERM and SIGHUP.
    """
    # Replaces what `guard_imports` set: from here on there is work to put in order.
    raise_on_signals()
    try:
        command()
    except UserError as error:
        sys.stderr.write(f"error: {terminal(str(error))}\n")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno is None:  # made by a library, not by the system: a bug
            raise
        sys.stderr.write(f"error: {terminal(system_refusal(error))}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted()
        sys.stderr.write(f"{interrupted}\n")
        raise SystemExit(interrupted.status) from None


def system_refusal(error: OSError) -> str:
    """Say in one sentence what the system refused, where, and what to do."""
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    advice = next((text for numbers, text in _ADVICE if error.errno in numbers), "make it available, or set another")
    return f"{place}{(error.strerror or str(error)).lower()}; {advice}"
