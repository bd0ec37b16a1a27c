"""Modules that can be called: `curate.select` is the command's module, and `curate.select(config, run)` selects.

Importing the module `curate.select` binds that name in `curate`, whatever was bound there before. So a function of the
same name cannot stay there, but the module can do what the function does.
"""

import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def calls_module(function: FunctionT) -> FunctionT:
    """Decorate the function that a call of its module runs."""

    class CallableModule(ModuleType):
        __call__ = staticmethod(function)
        __signature__ = inspect.signature(function)  # what notebooks and editors show

    sys.modules[function.__module__].__class__ = CallableModule
    return function
