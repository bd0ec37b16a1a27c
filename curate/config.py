"""Configuration and command lines: frozen pydantic models, read from YAML and dotted flags by jsonargparse.

A config class sits beside the code that it configures; its attribute docstrings are the command's `--help`.
"""

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Annotated, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from curate.errors import UserError
from curate.interrupts import Interrupted, raise_on_signals

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


class Config(BaseModel):
    """Base of every configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=Config)


def parse_tokens(value: int | str) -> int:
    """Read a token count: `50_000_000`, `"50M"`, `"1.5B"` (K, M, B, T are powers of 1000).

    Raises:
        ValueError: the text is not a positive token count.
    """
    match = _TOKENS.fullmatch(str(value).replace("_", "").strip())
    count = round(float(match["number"]) * _UNITS[match["unit"].upper()]) if match else 0
    if count < 1:
        raise ValueError(f"{value!r} is not a token count; write for example 500000, 50M or 1.5B")
    return count


TokenCount = Annotated[int | str, BeforeValidator(parse_tokens)]


def parse_command(config: type[ConfigT], prog: str, description: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config` from the command line: `--config FILE.yaml`, then dotted overrides; `--print_config` shows it.

    Dashes and underscores in option names are the same (`--budget-tokens`, `--budget_tokens`); a top-level option of
    type bool needs no value (`--once`).

    Raises:
        UserError: an option is unknown, missing, or its value is not valid.
    """
    from argparse import ArgumentError

    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="a YAML file with any of the options below")
    parser.add_class_arguments(config, None)
    given = [_underscored(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    switches = {f"--{name}" for name, field in config.model_fields.items() if field.annotation is bool}
    arguments = [
        f"{argument}=true" if argument in switches and (after is None or after.startswith("--")) else argument
        for argument, after in zip_longest(given, given[1:])
    ]
    try:
        namespace = parser.parse_args(arguments)
        namespace.pop("config", None)
        return config(**vars(parser.instantiate(namespace)))
    except ValidationError as error:
        raise UserError(f"--{first_problem(error)}; see --help") from None
    except ArgumentError as error:
        raise UserError(f"{' '.join(str(error).split())}; see --help") from None


def first_problem(error: ValidationError) -> str:
    """The first thing that a validation found wrong, as "field.inner: what"."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _underscored(argument: str) -> str:
    """`--budget-tokens=5` -> `--budget_tokens=5`; values, and what follows a dot (a domain's name), stay."""
    option = re.match(r"--[\w-]+", argument)
    return option[0][:2] + option[0][2:].replace("-", "_") + argument[option.end() :] if option else argument


def run_command(command: Callable[[], None]) -> None:
    """Run a command's main function and turn what a user can meet into one sentence and an exit status.

    Raises:
        SystemExit: 2 for bad input (`UserError`) and for what the system refuses (`OSError`: a full disk, a folder that
            is read-only), 128 + signal for Ctrl-C, SIGTERM and SIGHUP.
    """
    raise_on_signals()
    try:
        command()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno is None:
            raise
        sys.stderr.write(f"error: {system_refusal(error)}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt as error:
        interrupted = error if isinstance(error, Interrupted) else Interrupted()
        sys.stderr.write(f"{interrupted}\n")
        raise SystemExit(interrupted.status) from None


def system_refusal(error: OSError) -> str:
    """What the system refused, where, and what to do: one sentence."""
    place = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    advice = next((text for numbers, text in _ADVICE if error.errno in numbers), "make it available, or set another")
    return f"{place}{(error.strerror or str(error)).lower()}; {advice}"
