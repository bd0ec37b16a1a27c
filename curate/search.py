"""`python -m curate.search`: which samples are worth most and least for a target, by the value index of a run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from curate.core.arrays import write_table
from curate.core.artifacts import file_fingerprint, fingerprint
from curate.core.callable_module import make_callable
from curate.core.config import Config, parse_command, run_command
from curate.core.escape import terminal
from curate.core.progress import start_logging
from curate.influence.ask import Found, SourceName, ask
from curate.influence.current import NextStepOptions
from curate.selection.candidates import candidate_streams, open_candidates, streams_fingerprint
from curate.training.replay import Replay
from curate.training.run import open_run
from curate.training.source import CANDIDATES, CURRENT
from curate.training.target import load_target

if TYPE_CHECKING:
    from curate.training.run import Run

__all__ = ["Found", "SearchConfig", "search"]

_log = logging.getLogger(__name__)
_EXCERPT = 100  # characters of a text in the terminal; the table has all of it
_SHOWN = 10  # samples of each end in the terminal; the table has all


class SearchConfig(Config):
    """What to search for."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken. It must have a value index, see
    `python -m curate.embed`."""
    target: Path
    """Target documents (JSONL)."""
    candidates: Path | None = None
    """Search data that was never trained on (MDS folders of domains, or a streams.yaml) instead of the run's own."""
    top: int = Field(default=50, ge=1)
    """Samples of most value, and as many of least."""
    measured_per_domain: int = Field(default=30, ge=1)
    """Samples of each domain that are measured exactly, to tell how far the index can be trusted there."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of the target."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    device: str = "cpu"
    """Device of the model, for example cuda."""
    out: Path | None = None
    """Folder of the tables; none: a folder inside the run."""


def search(config: SearchConfig, run: Run) -> Found:
    """Search a run's value index for a target; see `influence.ask`.

    Raises:
        UserError: bad target or candidates, or samples that are not in the index (names the command).
    """
    target = load_target(config.target, run.spec, config.min_target_tokens)
    source = run.source if config.candidates is None else open_candidates(config.candidates, run)
    options = NextStepOptions(per_domain=config.measured_per_domain, device=config.device)
    name: SourceName = CURRENT if config.candidates is None else CANDIDATES
    return ask(run, source, name, target, config.top, options, Replay(run, config.device), run.spec.tokenizer)


make_callable(__name__, search)


def main() -> None:
    """Entry point."""
    config = parse_command(
        SearchConfig, "python -m curate.search", "The samples of most and least value for a target, by the value index."
    )
    start_logging()
    run = open_run(config.run, config.streams, config.tokenizer)
    found = search(config, run)
    # what decides the tables: another search never replaces them
    identity = [run.fingerprint, file_fingerprint(config.target), config.top, config.measured_per_domain]
    if config.candidates is not None:
        identity.append(streams_fingerprint(candidate_streams(config.candidates)))
    out = config.out or run.folder / "searches" / f"{found.trust['target'][0]}-{fingerprint(identity)[:8]}"
    for name, table in (("samples", found.samples), ("domains", found.domains), ("trust", found.trust)):
        write_table(out / f"{name}.parquet", table)
    _show(found)
    if found.recall < 1:
        _log.info("the search found %.2f of the samples that an exact one would", found.recall)
    _log.info("whole texts, domains and trust -> %s", out / "{samples,domains,trust}.parquet")


def _show(found: Found) -> None:
    """Log the tables for a reader."""
    for end in ("most", "least"):
        name = terminal(found.trust["target"][0])
        _log.info("%s value for %s, per predicted token of a sample (nats per token of the target)", end, name)
        for row in found.samples.filter(end=end).head(_SHOWN).iter_rows(named=True):
            text = terminal(" ".join(row["text"].split()))[:_EXCERPT]
            by = {"measured": "=", "row": " ", "domain mean": "?"}[row["by"]]
            _log.info("%4d %+.3e%s %-20s %s", row["rank"], row["value_per_token"], by, terminal(row["domain"]), text)
    _log.info("= measured exactly, ? the mean of its domain, else by its row")
    about = "95 % interval; rank correlation of rows with exact values [95 %] over n samples"
    _log.info("%-20s %8s  %10s  %s", "domain", "samples", "mean", about)
    both = found.domains.join(found.trust, on="domain", maintain_order="left")
    for row in both.iter_rows(named=True):
        interval = "-" if row["low"] is None else f"[{row['low']:+.2e}, {row['high']:+.2e}]"
        numbers = ["-" if row[key] is None else f"{row[key]:.2f}" for key in ("spearman", "low_right", "high_right")]
        r = f"{numbers[0]} [{numbers[1]}, {numbers[2]}] over {row['measured']}"
        cells = terminal(row["domain"]), f"{row['samples']:,}", row["value_per_token"], interval, r
        _log.info("%-20s %8s  %+.3e  %s, %s", *cells)
    weak = found.trust.filter(~found.trust["used"])
    for row in weak.iter_rows(named=True):
        held = "" if row["share_held"] is None else f", rows hold {max(row['share_held'], 0):.0%} of the values there"
        _log.warning(
            "%s: rows are not trusted for this target: rank correlation with exact values %s over %d samples%s; "
            "its values are the mean of the measured samples. More of them (--measured_per_domain) may tell better",
            terminal(row["domain"]),
            "not known" if row["spearman"] is None else f"{row['spearman']:.2f}",
            row["measured"],
            held,
        )


if __name__ == "__main__":
    run_command(main)
