"""Progress bars, and logging for commands."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(iterable: Iterable[T], *, total: int, what: str, unit: str = "step", done: int = 0) -> Iterator[T]:
    """Iterate under a bar on stderr: live in a terminal, a line every 15 seconds elsewhere (batch logs)."""
    live = sys.stderr.isatty()
    bar = tqdm(
        iterable, total=total, initial=done, desc=what, unit=unit, leave=not live, file=sys.stderr,
        mininterval=0.2 if live else 15.0, ascii=not live, dynamic_ncols=live,
    )  # fmt: skip
    yield from bar


def start_logging() -> None:
    """Show what our own modules say on stderr; other packages only warn."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in ("curate", "pipelines", "__main__"):
        logging.getLogger(name).setLevel(logging.INFO)
