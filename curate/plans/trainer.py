"""The trainer of a stage as a process: it holds the plan's lock too, and ends when the runner is told to."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
from collections.abc import Sequence

from curate.core.lock import Lock

_log = logging.getLogger(__name__)
_SAME_SIGNAL_SECONDS = 5.0  # a terminal's Ctrl-C reaches the trainer by itself
_GRACE_SECONDS = 30.0  # what batch systems give a process between SIGTERM and SIGKILL


class TrainerError(Exception):
    """The user's command cannot be started, or exited with another status than 0."""


def run_trainer(arguments: Sequence[str], stage: str, lock: Lock) -> int:
    """Run the command of a stage to its end; returns its status, or minus the signal that ended it.

    Where the runner alone is killed, the command runs on and holds the plan's lock as long as it does: no second one
    is started beside it.

    Args:
        arguments: of the command.
        stage: its name.
        lock: of the plan.

    Raises:
        TrainerError: it cannot be started.
        KeyboardInterrupt: the runner was told to end, and has ended the command.
    """
    try:
        # the lock's descriptor is inherited: the lock is free when both have closed it
        process = subprocess.Popen(arguments, pass_fds=(lock.descriptor,))  # noqa: S603
    except OSError as error:
        raise TrainerError(f"{arguments[0]} cannot be started ({error.strerror})") from None
    runner = f"process {os.getpid()}"
    # what a second runner tells its user: whom it waits for, or whom to end
    lock.say(f"process {process.pid} (the trainer of stage {stage}, started by {runner})")
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        # a terminal sends Ctrl-C to both; SIGTERM reached the runner alone
        _end(process, from_terminal=interrupt.args[:1] != (signal.SIGTERM,))
        raise
    finally:
        lock.say(runner)


def _end(process: subprocess.Popen[bytes], *, from_terminal: bool) -> None:
    """Let the trainer put things in order, then end it; a second signal to the runner ends it at once."""
    try:
        if not (from_terminal and _has_ended(process, _SAME_SIGNAL_SECONDS)):
            _log.info("asking the trainer, process %d, to end", process.pid)
            process.terminate()
            if not _has_ended(process, _GRACE_SECONDS):
                _log.warning("the trainer has not ended within %.0f seconds and is killed", _GRACE_SECONDS)
    finally:
        # no child outlives the runner's exit, even where a second signal cut the wait short
        process.kill()
        process.wait()


def _has_ended(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True
