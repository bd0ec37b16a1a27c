"""Which samples were consumed how often, over all stages: `python -m curate.training.token_accounting --run RUN`.

Counted from what the recorder wrote, by content id, so it survives re-sharding and renaming, and a resumed stage counts
once. A run names the run that it continued from (`RunSpec.previous`); the chain back to the first stage is the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import dataframely as dy
import polars as pl

from curate.core.arrays import read_table
from curate.core.artifacts import file_fingerprint, read_json
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.progress import start_logging
from curate.tables import DomainsSeen, SampleUses, StageUses
from curate.training.run import Run, open_run, sample_uses
from curate.training.source import SampleSource

_log = logging.getLogger(__name__)


class LedgerConfig(Config):
    """Whose ledger."""

    run: Path = Path("runs")
    """Recorded run of the last stage, or a folder of runs: the newest finished one is taken."""
    earlier_runs: tuple[Path, ...] | None = None
    """Runs of the stages before it; none: the chain that the runs name themselves."""


def stages(run: Run, earlier: Sequence[Path] | None = None) -> list[Path]:
    """Folders of all stages, first stage first, this run last.

    Args:
        run: of the last stage.
        earlier: the stages before it; none: the chain of `previous`, as the runs were recorded.

    Raises:
        UserError: an earlier run is not where it was, is not finished, or the chain comes back to itself.
    """
    if earlier is not None:
        found = [Path(folder) for folder in earlier]
    else:
        found, at = [], run.spec.previous
        while at is not None:
            if at in found or at == run.folder.resolve():
                raise UserError(f"the stages of run {run.folder} come back to {at}: name them in earlier_runs")
            found.insert(0, at)
            before = _previous(at)
            at = None if before is None else Path(before)
    for folder in found:
        if not (folder / "steps.parquet").exists():
            raise UserError(
                f"{folder}, a stage before run {run.folder}, is not there or not finished: its samples cannot be "
                "counted; name the earlier runs where they lie now in earlier_runs, or [] for none"
            )
    return [*found, run.folder]


def _previous(folder: Path) -> str | None:
    if not (folder / "run.json").exists():
        return None  # `stages` says that it is not there
    found = read_json(folder / "run.json").get("previous")
    return None if found is None else str(found)


def uses(folders: Sequence[Path]) -> dy.DataFrame[StageUses]:
    """How often each sample was trained on.

    Args:
        folders: of the stages, see `stages`.

    Raises:
        UserError: a table of steps is unreadable.
    """
    frames = []
    for stage, folder in enumerate(folders):
        ids = read_table(folder / "steps.parquet", ["sample_ids"])
        frames.append(sample_uses(ids).select(pl.lit(stage).alias("stage"), "sample_id", "uses"))
    return StageUses.validate(pl.concat(frames).sort("stage", "sample_id"))


def seen_uses(stage_uses: dy.DataFrame[StageUses]) -> dy.DataFrame[SampleUses]:
    """`uses` summed over the stages."""
    summed = stage_uses.group_by("sample_id").agg(pl.col("uses").sum()).sort("sample_id")
    return SampleUses.validate(summed)


def ledger_identity(folders: Sequence[Path]) -> list[str]:
    """What a result depends on that counts these stages."""
    return [file_fingerprint(folder / "steps.parquet") for folder in folders]


def domains_seen(source: SampleSource, stage_uses: dy.DataFrame[StageUses]) -> dy.DataFrame[DomainsSeen]:
    """Per domain of a source, what all stages trained on of it.

    Samples of earlier stages that are in none of its streams are not in it.

    Args:
        source: of the samples.
        stage_uses: see `uses`.
    """
    samples = source.unique_samples.select("domain", "sample_id", "stored_tokens")
    each = samples.join(seen_uses(stage_uses), on="sample_id", how="left").with_columns(pl.col("uses").fill_null(0))
    sums = each.group_by("domain").agg(
        samples=pl.len().cast(pl.Int64),
        seen=(pl.col("uses") > 0).sum().cast(pl.Int64),
        most_uses=pl.col("uses").max(),
        stored_tokens=pl.col("stored_tokens").sum(),
        seen_tokens=(pl.col("stored_tokens") * pl.col("uses")).sum(),
    )
    by_stage = _tokens_by_stage(samples, stage_uses)
    table = sums.with_columns(epochs=pl.col("seen_tokens") / pl.col("stored_tokens"))
    return DomainsSeen.validate(table.join(by_stage, on="domain").sort("domain"))


def _tokens_by_stage(samples: pl.DataFrame, stage_uses: dy.DataFrame[StageUses]) -> pl.DataFrame:
    """`domain` and `seen_tokens_by_stage`: stored tokens, 0 where a stage trained on none."""
    stages_and_domains = stage_uses.select("stage").unique().join(samples.select("domain").unique(), how="cross")
    trained = samples.join(stage_uses, on="sample_id").group_by("stage", "domain")
    tokens = trained.agg(tokens=(pl.col("stored_tokens") * pl.col("uses")).sum())
    every = stages_and_domains.join(tokens, on=["stage", "domain"], how="left").sort("domain", "stage")
    return every.group_by("domain").agg(seen_tokens_by_stage=pl.col("tokens").fill_null(0))


def main() -> None:
    """Entry point."""
    config = parse_command(
        LedgerConfig,
        "python -m curate.training.token_accounting",
        "What all stages up to a run consumed of each domain.",
    )
    start_logging()
    run = open_run(config.run)
    folders = stages(run, config.earlier_runs)
    for stage, folder in enumerate(folders):
        _log.info("stage %d: %s", stage, folder)
    _log.info("%-20s %10s %10s %14s %14s %7s %5s", "domain", "samples", "seen", "tokens", "consumed", "epochs", "most")
    for row in domains_seen(run.source, uses(folders)).iter_rows(named=True):
        _log.info(
            "%-20s %10s %10s %14s %14s %7.2f %5d",
            row["domain"], f"{row['samples']:,}", f"{row['seen']:,}", f"{row['stored_tokens']:,}",
            f"{row['seen_tokens']:,}", row["epochs"], row["most_uses"],
        )  # fmt: skip
    unknown = run.unknown
    if len(unknown):
        cells = ("(in no stream)", "?", f"{len(unknown):,}", "?", "?", "?", str(unknown["uses"].max()))
        _log.info("%-20s %10s %10s %14s %14s %7s %5s", *cells)


if __name__ == "__main__":
    run_command(main)
