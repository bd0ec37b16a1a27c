"""Which code may run: a file that names a Python function is data until the caller trusts the function's module.

A run folder, or a description, names its model as `module:function`; to build the model is to run that function with
the arguments that stand there. So a module is imported only where it, or a package that it lies in, is trusted: by
`--trust MODULE` of a command, `trust` of a plan, or the environment variable `CURATE_TRUST` (names with commas between
them), which holds all of them and which child processes inherit. A config file cannot add to it.
"""

import importlib
import os
from collections.abc import Callable, Iterable
from typing import Any

from curate.core.errors import UserError

VARIABLE = "CURATE_TRUST"
OPTION = "--trust"


def trust(modules: Iterable[str]) -> None:
    """Allow the import of modules, and of a package's modules, in this process and its children."""
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*_trusted(), *modules]))


def is_trusted(module: str) -> bool:
    """Whether a module or a package around it is trusted."""
    return any(module == name or module.startswith(f"{name}.") for name in _trusted())


def trusted_function(source: str, setting: str) -> Callable[..., Any]:
    """Import what `module:function` names.

    Args:
        source: the name.
        setting: where it stands, for messages.

    Raises:
        UserError: the module is not trusted (nothing is imported then), there is no such function, or it was only
            imported there from a module that is not trusted.
    """
    module, _, name = source.partition(":")
    if not module or not name:
        raise UserError(f"{setting} {source!r} is no module:function")
    _check(module, f"{setting} {source!r} is code")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{setting} {source!r} cannot be loaded ({error}); write module:function") from None
    # A trusted module may have imported `os.system`; what counts is where the function was defined.
    _check(str(getattr(function, "__module__", None)), f"{setting} {source!r} is code of another module")
    return function


def take_option(arguments: list[str]) -> list[str]:
    """Trust the modules of `--trust MODULE[,MODULE]`; returns the other arguments of a command line."""
    others = []
    words = iter(arguments)
    for argument in words:
        option, assigned, value = argument.partition("=")
        if option != OPTION:
            others.append(argument)
            continue
        modules = value if assigned else next(words, "")
        if not modules or modules.startswith("-"):
            raise UserError(f"{OPTION} needs the name of a module")
        trust(modules.split(","))
    return others


def _trusted() -> list[str]:
    # Read anew each time: a variable of the environment is the one state that child processes inherit.
    return [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]


def _check(module: str, what: str) -> None:
    if not is_trusted(module):
        raise UserError(
            f"{what}, and {module} is not trusted; if you trust it, add {OPTION} {module} to the command (in a plan "
            f"`trust: [{module}]`, in Python curate.trust([{module!r}]))"
        )
