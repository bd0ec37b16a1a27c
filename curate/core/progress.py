"""Progress bars, and logging for commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from curate.core.escape import terminal

T = TypeVar("T")


def progress(iterable: Iterable[T], *, total: int, what: str, unit: str = "step", done: int = 0) -> Iterator[T]:
    """Iterate with a progress bar on stderr: live in a terminal, a line every 15 seconds elsewhere (batch logs)."""
    live = sys.stderr.isatty()
    bar = tqdm(
        iterable,
        total=total,
        initial=done,
        desc=terminal(what),
        unit=unit,
        leave=not live,
        file=sys.stderr,
        mininterval=0.2 if live else 15.0,
        ascii=not live,
        dynamic_ncols=live,
    )
    yield from bar


def start_logging() -> None:
    """Log to stderr: our own modules from INFO on, other packages from WARNING on."""
    shown = logging.StreamHandler()
    shown.setFormatter(_Line("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[shown])
    for name in ("curate", "pipelines", "__main__"):  # a command run by `python -m` logs as `__main__`
        logging.getLogger(name).setLevel(logging.INFO)


def say(line: str) -> None:
    """Print a line of a command's result."""
    sys.stdout.write(f"{terminal(line)}\n")


class _Line(logging.Formatter):
    """Keeps a message to one line, whatever it holds; a traceback below it keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (the name that logging gives it)
        return terminal(super().formatMessage(record))
