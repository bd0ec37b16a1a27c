"""What a selection says in the terminal when it is done."""

from __future__ import annotations

import logging
from pathlib import Path

from curate.mixture.record import read_mixture

_log = logging.getLogger(__name__)
_FILES = (
    "mixture.yaml",
    "data/streams.yaml",
    "data/schedule.yaml",
    "data/mds",
    "scores.parquet",
    "contamination.parquet",
)


def say_mixture(out: Path) -> None:
    """Print the mixture and name the files."""
    mixture = read_mixture(out / "mixture.yaml")
    names = ("domain", "prior", "next", "tokens", "samples", "epochs")
    _log.info("%-20s %7s -> %6s %14s %8s %7s  score [95 %% interval]", *names)
    for name, part in sorted(mixture.domains.items(), key=lambda item: -item[1].delivered_weight):
        known = part.score_low is not None and part.score_high is not None
        interval = f"[{part.score_low:+.2f}, {part.score_high:+.2f}]" if known else ""
        _log.info(
            "%-20s %6.1f%% -> %5.1f%% %14s %8s %7.2f  %+.2f %s %s",
            name, 100 * part.prior, 100 * part.delivered_weight, f"{part.stored_tokens:,}", f"{part.samples:,}",
            part.epochs,
            part.score, interval, "not measured" if known and not part.measured_samples else part.binding or "",
        )  # fmt: skip
    for name in (*_FILES, "report.html"):
        if (out / name).exists():
            _log.info("wrote %s", out / name)
