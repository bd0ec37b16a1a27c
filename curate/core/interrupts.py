"""Signals that end a command: it prints one sentence and exits with 128 + signal, from its first import to its end."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal asks the command to end; it rises where the command is working, so that `finally` blocks run.

    Attributes:
        status: exit status, 128 + signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(number)
        self.status = 128 + number

    def __str__(self) -> str:
        name = "interrupted" if self.status == 128 + signal.SIGINT else f"ended by {signal.Signals(self.args[0]).name}"
        return f"{name}: nothing is lost; run the same command again to continue"


def raise_on_signals() -> None:
    """Raise `Interrupted` at the signals that end a process; an ignored one (nohup) stays ignored."""
    # Forks inherit the handlers, and must not run the parent's cleaning up.
    process = os.getpid()

    def handle(number: int, _frame: FrameType | None) -> None:
        if os.getpid() == process:
            raise Interrupted(number)
        # A forked worker dies of the signal itself: whoever ends it waits for that exit status.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    _install(handle)


def guard_imports(package: str) -> None:
    """Leave at once on a signal while `python -m` imports a command of the package, until `raise_on_signals`.

    Call it first in the package: the interpreter imports the package before the command.
    """
    # While the package is imported `sys.argv` is `["-m", ...]`; only `orig_argv` has the module's name.
    module = sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] if "-m" in sys.orig_argv else []
    if sys.argv[:1] == ["-m"] and module and f"{module[0]}.".startswith(f"{package}."):
        leave_on_signals()


def leave_on_signals() -> None:
    """On a signal print the sentence and leave at once, until `raise_on_signals`: no work has begun yet."""
    _install(_leave)


def _install(handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _ENDING:
        if signal.getsignal(number) != signal.SIG_IGN:  # set by nohup, and by shells for background jobs
            signal.signal(number, handler)


def _leave(number: int, _frame: FrameType | None) -> None:
    sys.stderr.write(f"{Interrupted(number)}\n")
    sys.stderr.flush()
    # No exception: it could rise inside of an import, whose library might catch it.
    os._exit(128 + number)
