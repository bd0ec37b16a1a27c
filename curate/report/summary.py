"""What a selection says in the terminal when it is done."""

from __future__ import annotations

import logging
from pathlib import Path

from curate.mixture.record import read_mixture
from curate.output.layout import SelectionFolder

_log = logging.getLogger(__name__)


def say_mixture(out: Path) -> None:
    """Print the mixture and name the files."""
    folder = SelectionFolder(out)
    mixture = read_mixture(folder.mixture)
    names = ("domain", "prior", "next", "tokens", "samples", "epochs")
    _log.info("%-20s %7s -> %6s %14s %8s %7s  score [95 %% interval]", *names)
    for name, domain in sorted(mixture.domains.items(), key=lambda item: -item[1].delivered_weight):
        has_interval = domain.score_low is not None and domain.score_high is not None
        interval = f"[{domain.score_low:+.2f}, {domain.score_high:+.2f}]" if has_interval else ""
        _log.info(
            "%-20s %6.1f%% -> %5.1f%% %14s %8s %7.2f  %+.2f %s %s",
            name,
            100 * domain.prior,
            100 * domain.delivered_weight,
            f"{domain.stored_tokens:,}",
            f"{domain.samples:,}",
            domain.epochs,
            domain.score,
            interval,
            # a score without an interval comes from a method that measures nothing: there it is not worth saying
            "not measured" if has_interval and not domain.measured_samples else domain.binding or "",
        )
    # which forms exist depends on the mode and the schedule: what lies there is named, nothing is guessed
    data = [
        form(scheduled=scheduled) for form in (folder.weights_for, folder.samples_for) for scheduled in (False, True)
    ]
    for path in (folder.mixture, *data, folder.scores, folder.table("contamination"), folder.report):
        if path.exists():
            _log.info("wrote %s", path)
