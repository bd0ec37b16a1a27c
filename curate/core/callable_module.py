"""Modules that can be called: `curate.select` is the command's module, and `curate.select(config, run)` selects.

Importing the module `curate.select` binds that name in `curate`, whatever was bound before. A function of the same name
would be lost then, so the module itself does what the function does.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def make_callable(module: str, function: Callable[..., Any]) -> None:
    """Let a call of a module run a function.

    Args:
        module: name of the module, which is being imported.
        function: what a call of the module runs.
    """

    class CallableModule(ModuleType):
        __call__ = staticmethod(function)
        __signature__ = inspect.signature(function)  # what notebooks and editors show

    # Python looks `__call__` up in the class, and a module's class may be replaced by one derived from `ModuleType`.
    sys.modules[module].__class__ = CallableModule
