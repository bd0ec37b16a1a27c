"""`python -m curate.verify`: how far the values of a run can be trusted, by running its training again."""

from __future__ import annotations

import logging
from pathlib import Path

from curate.core.artifacts import read_json
from curate.core.callable_module import make_callable
from curate.core.config import parse_command, run_command
from curate.core.progress import start_logging
from curate.evaluation.verify import VerifyConfig, verify
from curate.training.run import open_run

__all__ = ["VerifyConfig", "verify"]

_log = logging.getLogger(__name__)
make_callable(__name__, verify)


def main() -> None:
    """Entry point."""
    config = parse_command(
        VerifyConfig, "python -m curate.verify", "Hold the values of a run against training that is run again."
    )
    start_logging()
    _summarise(verify(config, open_run(config.run, config.streams, config.tokenizer)))


def _summarise(out: Path) -> None:
    """Log the agreement per window and horizon, and name the files."""
    rows = read_json(out / "verify.json")["rows"]
    _log.info("%-8s %-11s %-20s %5s  %s", "window", "horizon", "target", "pairs", "Spearman with reruns [95 %], cap")
    for row in rows:
        numbers = ", ".join("-" if row[key] is None else f"{row[key]:.2f}" for key in ("low", "high"))
        value = "-" if row["spearman"] is None else f"{row['spearman']:.2f}"
        cap = "-" if row["noise_cap"] is None else f"{row['noise_cap']:.2f}"
        _log.info(
            "%-8s %-11s %-20s %5d  %s [%s], %s",
            row["window"],
            row["horizon"],
            row["target"],
            row["n"],
            value,
            numbers,
            cap,
        )
    for name in ("verify.json", "verify.html"):
        _log.info("wrote %s", out / name)


if __name__ == "__main__":
    run_command(main)
