"""How often each sample was trained on, over all stages.

The counts come from the recorded steps and go by content id. So they survive re-sharding and renaming, and a resumed
stage counts once. A run names the run that it continued from (`RunSpec.previous`), which gives the chain of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import dataframely as dy
import polars as pl

from curate.core.arrays import read_table
from curate.core.artifacts import file_fingerprint, read_json
from curate.core.errors import UserError
from curate.tables import DomainsSeen, SampleUses, StageUses
from curate.training.run import Run, sample_uses
from curate.training.source import SampleSource


def stages(run: Run, earlier: Sequence[Path] | None = None) -> list[Path]:
    """Folders of all stages, first stage first, this run last.

    Args:
        run: of the last stage.
        earlier: runs of the stages before it; None: the chain of `previous`, as the runs were recorded.

    Raises:
        UserError: an earlier run is not where it was, is not finished, or the chain comes back to itself.
    """
    earlier_stages = _recorded_chain(run) if earlier is None else [Path(folder) for folder in earlier]
    # only a stage's steps are read, so its snapshots and streams may be gone
    for folder in earlier_stages:
        if not (folder / "steps.parquet").exists():
            raise UserError(
                f"{folder}, a stage before run {run.folder}, is not there or not finished: its samples cannot be "
                "counted; name the earlier runs where they lie now in earlier_runs, or [] for none"
            )
    return [*earlier_stages, run.folder]


def _recorded_chain(run: Run) -> list[Path]:
    """The earlier stages as the runs name them, first stage first."""
    chain: list[Path] = []
    folder = run.spec.previous
    while folder is not None:
        # paths of moved or copied runs can form a circle
        if folder in chain or folder == run.folder.resolve():
            raise UserError(f"the stages of run {run.folder} come back to {folder}: name them in earlier_runs")
        chain.insert(0, folder)
        folder = _previous(folder)
    return chain


def _previous(folder: Path) -> Path | None:
    """The run that a run continued from."""
    # a missing run ends the chain here, and `stages` refuses it by name
    if not (folder / "run.json").exists():
        return None
    previous = read_json(folder / "run.json").get("previous")
    return None if previous is None else Path(previous)


def uses(folders: Sequence[Path]) -> dy.DataFrame[StageUses]:
    """How often each stage trained on each sample.

    Args:
        folders: of the stages, see `stages`.

    Raises:
        UserError: a table of steps is unreadable.
    """
    frames = []
    for stage, folder in enumerate(folders):
        # one column: weights and settings are most of the file
        ids = read_table(folder / "steps.parquet", ["sample_ids"])
        frames.append(sample_uses(ids).select(pl.lit(stage).alias("stage"), "sample_id", "uses"))
    # sorted: group_by gives an order of its own each time, and the table goes into files
    return StageUses.validate(pl.concat(frames).sort("stage", "sample_id"))


def seen_uses(stage_uses: dy.DataFrame[StageUses]) -> dy.DataFrame[SampleUses]:
    """How often each sample was trained on, summed over the stages of `uses`."""
    summed = stage_uses.group_by("sample_id").agg(pl.col("uses").sum()).sort("sample_id")
    return SampleUses.validate(summed)


def stages_identity(folders: Sequence[Path]) -> list[str]:
    """Identity of the stages, for a result that counts them."""
    return [file_fingerprint(folder / "steps.parquet") for folder in folders]


def domains_seen(source: SampleSource, stage_uses: dy.DataFrame[StageUses]) -> dy.DataFrame[DomainsSeen]:
    """What all stages trained on of each domain of a source.

    Samples of earlier stages that are in none of the source's streams do not count.

    Args:
        source: of the samples.
        stage_uses: see `uses`.
    """
    samples = source.unique_samples.select("domain", "sample_id", "stored_tokens")
    counted = samples.join(seen_uses(stage_uses), on="sample_id", how="left").with_columns(pl.col("uses").fill_null(0))
    sums = counted.group_by("domain").agg(
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
    # every pair, so that position i of the list is stage i in every domain
    stages_and_domains = stage_uses.select("stage").unique().join(samples.select("domain").unique(), how="cross")
    trained = samples.join(stage_uses, on="sample_id").group_by("stage", "domain")
    tokens = trained.agg(tokens=(pl.col("stored_tokens") * pl.col("uses")).sum())
    pairs = stages_and_domains.join(tokens, on=["stage", "domain"], how="left").sort("domain", "stage")
    return pairs.group_by("domain").agg(seen_tokens_by_stage=pl.col("tokens").fill_null(0))
