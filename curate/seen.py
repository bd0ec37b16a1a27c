"""`python -m curate.seen --run RUN`: tokens, epochs and samples of each domain that all stages trained on."""

from __future__ import annotations

import logging
from pathlib import Path

from curate.core.config import Config, parse_command, run_command
from curate.core.progress import start_logging
from curate.training.run import open_run
from curate.training.token_accounting import domains_seen, stages, uses

_log = logging.getLogger(__name__)


class SeenConfig(Config):
    """The stages to count."""

    run: Path = Path("runs")
    """Recorded run of the last stage, or a folder of runs: the newest finished one is taken."""
    earlier_runs: tuple[Path, ...] | None = None
    """Runs of the stages before it; none: the chain that the runs name themselves."""


def main() -> None:
    """Entry point."""
    config = parse_command(
        SeenConfig,
        "python -m curate.seen",
        "What all stages up to a run trained on of each domain.",
    )
    start_logging()
    run = open_run(config.run)
    folders = stages(run, config.earlier_runs)
    for stage, folder in enumerate(folders):
        _log.info("stage %d: %s", stage, folder)
    header = ("domain", "samples", "seen", "tokens", "seen tokens", "epochs", "most uses")
    _log.info("%-20s %10s %10s %14s %14s %7s %9s", *header)
    for row in domains_seen(run.source, uses(folders)).iter_rows(named=True):
        _log.info(
            "%-20s %10s %10s %14s %14s %7.2f %9d",
            row["domain"],
            f"{row['samples']:,}",
            f"{row['seen']:,}",
            f"{row['stored_tokens']:,}",
            f"{row['seen_tokens']:,}",
            row["epochs"],
            row["most_uses"],
        )
    unknown = run.unknown
    if len(unknown):
        # their lengths are in the streams only
        cells = ("(in no stream)", "?", f"{len(unknown):,}", "?", "?", "?", str(unknown["uses"].max()))
        _log.info("%-20s %10s %10s %14s %14s %7s %9s", *cells)


if __name__ == "__main__":
    run_command(main)
