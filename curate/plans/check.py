"""Checks of a plan: is a trained stage what the plan asked for, and can the next one start from it?"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from curate.core.artifacts import checked, read_json
from curate.core.errors import UserError
from curate.data.mds import MdsStream
from curate.data.streams import load_streams
from curate.plans.plan import PlanConfig
from curate.plans.state import difference, readable
from curate.training.declared import window_steps
from curate.training.run import Run
from curate.training.samples import trained_tokens
from curate.training.token_accounting import domains_seen, uses

if TYPE_CHECKING:
    from curate.mixture.constraints import MixtureConfig

_log = logging.getLogger(__name__)
_LEAST_PEAK, _MOST_PEAK = 0.9, 1.001  # of the planned lr: a decay may begin before the warm-up ends


def open_stage(plan: PlanConfig, index: int) -> Run:
    """The run of a stage, its streams where the plan's data lies now.

    Raises:
        UserError: see `Run`.
    """
    folder = plan.run_folder(index)
    given = plan.selection_settings(index).get("source", {}).get("tokenizer")
    tokenizer = None if given is None else Path(given)
    streams = read_json(checked(folder / "run.json", by=folder))["streams"]
    recorded = {domain: Path(place) for domain, place in streams.items()}
    # data that a selection wrote moves with the plan's folder: found again by the names of its folders
    lost = {domain: place for domain, place in recorded.items() if not place.exists()}
    if not lost:
        return Run(folder, tokenizer=tokenizer)
    now = {place.name: place for place in stream_folders(plan.data_of(index))}
    return Run(folder, {domain: now[place.name] for domain, place in lost.items() if place.name in now}, tokenizer)


def check_inputs(plan: PlanConfig) -> None:
    """What must be there before the first stage.

    Raises:
        UserError: data or a target is missing.
    """
    stream_folders(plan.data)
    for index, stage in enumerate(plan.stages[:-1]):
        if not plan.target_of(index).is_file():
            raise UserError(
                f"{plan.target_of(index)}, the target after stage {stage.name}, is not there; set target of the plan"
            )


def check_data(plan: PlanConfig, index: int) -> None:
    """What must be there before a stage is trained.

    Raises:
        UserError: a stream of its data is gone, or the checkpoint is no longer the state that the stage before left.
    """
    data = plan.data_of(index)
    for stream in load_streams(data):
        folder = Path(stream["local"]) / (stream.get("split") or "")
        if not (folder / "index.json").exists() and not stream.get("remote"):
            again = f", or delete {plan.selection_folder(index - 1)} to select again" if index else ""
            raise UserError(f"{data} names {folder}, which is not there: put it back{again}")
    if index:
        check_checkpoint(plan, index - 1)


def check_stage(plan: PlanConfig, index: int, run: Run) -> None:
    """Hold a trained stage against the plan, by what costs nothing to read.

    Raises:
        UserError: it has other steps, windows, learning rate or data or another model, or left no state for the next
            stage.
    """
    stage = plan.stages[index]
    if stage.steps is not None and run.spec.steps != stage.steps:
        raise UserError(f"{run.folder} has {run.spec.steps} steps, stage {stage.name} of the plan {stage.steps}")
    _check_settings(plan, index, run)
    data = plan.data_of(index)
    other = sorted({path.resolve() for path in run.spec.streams.values()} - stream_folders(data))
    if other:
        raise UserError(
            f"{run.folder} trained on {other[0]}, which is not in {data}: does the command of stage {stage.name} use "
            "{data}?"
        )
    if index + 1 < len(plan.stages) and not (run.folder / plan.checkpoint).exists():
        raise UserError(
            f"{run.folder} has no {plan.checkpoint} for the next stage to start from; set `checkpoint` of the plan to "
            "what the trainer leaves in {out}"
        )
    # names only: shapes and values are compared where states are read, see `check_states`
    if index and _parameters(Run(plan.run_folder(index - 1))) != _parameters(run):
        raise UserError(
            f"{run.folder} has other parameters than {plan.run_folder(index - 1)}: does the command of stage "
            f"{stage.name} start from {{checkpoint}}?"
        )


def _check_settings(plan: PlanConfig, index: int, run: Run) -> None:
    stage = plan.stages[index]
    if stage.windows is not None:
        windows = window_steps(stage.windows, run.spec.steps)
        if windows != run.spec.windows:
            raise UserError(
                f"{run.folder} recorded the windows {run.spec.windows}, stage {stage.name} of the plan has {windows}: "
                "does its command hand {windows} to the recorder?"
            )
    if stage.lr_schedule is not None:
        peaks = run.steps.select(pl.col("groups").list.eval(pl.element().struct.field("lr")).list.max()).to_series()
        peak, wanted = float(peaks.max() or 0.0), stage.lr_schedule.lr  # type: ignore[arg-type]
        if not _LEAST_PEAK * wanted <= peak <= _MOST_PEAK * wanted:
            raise UserError(
                f"{run.folder} reached a learning rate of {peak:g}, stage {stage.name} of the plan has {wanted:g}: "
                "does its command use {lr}, and does the warm-up end within the stage?"
            )


def _parameters(run: Run) -> list[str]:
    return sorted(name for group in run.spec.groups for name in group)


def check_states(plan: PlanConfig, index: int, run: Run) -> None:
    """Hold the states and the amount of data of a trained stage against the plan; reads them.

    Raises:
        UserError: it did not start where the stage before ended, did not leave the state it ended with, or trained on
            another amount of data.
    """
    stage = plan.stages[index]
    if index and 0 in run.snapshots:
        before = Run(plan.run_folder(index - 1))
        differs = difference(before.snapshot(before.spec.steps), run.snapshot(0))
        if differs:
            raise UserError(
                f"{run.folder} did not start from where {before.folder} ended ({differs}): does the command of stage "
                f"{stage.name} load {{checkpoint}}?"
            )
    if index + 1 < len(plan.stages):
        check_checkpoint(plan, index)
    _check_amount(plan, index, run)


def check_checkpoint(plan: PlanConfig, index: int) -> None:
    """Hold the checkpoint that a stage left against the last state that its recorder saw.

    Raises:
        UserError: it is another state.
    """
    run = Run(plan.run_folder(index))
    checkpoint, last = run.folder / plan.checkpoint, run.snapshot(run.spec.steps)
    differs = difference(last, checkpoint)
    if differs:
        raise UserError(
            f"{checkpoint} is not the state that {run.folder} ended with ({differs}): it is of another model, stage or "
            f"step; the command of stage {plan.stages[index].name} must leave its last state there"
        )
    # a folder has no single hash
    if checkpoint.is_file():
        checked(checkpoint)  # what no snapshot can tell, where the trainer listed it
    if not readable(last, checkpoint):
        _log.warning("%s is in no form that can be held against the recorded state; it is taken as it is", checkpoint)


def _check_amount(plan: PlanConfig, index: int, run: Run) -> None:
    stage = plan.stages[index]
    seen = int(run.steps["sample_ids"].list.len().sum())
    step = -(-seen // run.spec.steps)  # samples of a step
    tokens = sum(trained_tokens(run).values())
    if stage.tokens is not None and abs(tokens - int(stage.tokens)) > tokens / run.spec.steps:
        raise UserError(
            f"{run.folder} trained on {tokens:,} tokens, stage {stage.name} of the plan has {int(stage.tokens):,}: "
            "does its command use {tokens}?"
        )
    if index == 0:
        return
    # a stream without "choose" is served whole
    there = sum(
        int(stream["choose"]) if "choose" in stream else len(MdsStream(Path(stream["local"])))
        for stream in load_streams(plan.data_of(index))
    )
    if seen > there:
        raise UserError(
            f"{run.folder} trained on {seen:,} samples, what was selected for stage {stage.name} is {there:,}: it "
            "went round again, against the epoch caps; set tokens of the stage, or selection.budget_tokens before it"
        )
    if there - seen >= step:
        _log.warning(
            "stage %s trained on %s of the %s samples that were selected for it",
            stage.name,
            f"{seen:,}",
            f"{there:,}",
        )


def next_tokens(plan: PlanConfig, index: int, run: Run) -> int | None:
    """Stored tokens of the stage after one: its own, else in proportion to its steps; None where it cannot be known."""
    after = plan.stages[index + 1]
    if after.tokens is not None:
        return int(after.tokens)
    return None if after.steps is None else sum(trained_tokens(run).values()) * after.steps // run.spec.steps


def check_supply(plan: PlanConfig, index: int, run: Run, config: MixtureConfig) -> None:
    """Ask before anything is valued whether the epoch caps leave enough for the stages to come.

    Raises:
        UserError: they do not; names the first stage that cannot be filled.
    """
    by_domain = domains_seen(run.source, uses([*map(plan.run_folder, range(index)), run.folder]))
    left = sum(
        max(0.0, config.max_epochs * tokens - seen)
        for tokens, seen in by_domain.select("stored_tokens", "seen_tokens").iter_rows()
    )
    step_tokens = sum(trained_tokens(run).values()) / run.spec.steps
    wanted = 0.0
    for stage in plan.stages[index + 1 :]:
        wanted += int(stage.tokens) if stage.tokens is not None else step_tokens * (stage.steps or 0)
        # all domains together, which is necessary and not sufficient: the solver says which one is short
        if wanted > left * (1 + 1e-9):
            raise UserError(
                f"the stages up to {stage.name} need {int(wanted):,} more tokens, the data has {int(left):,} left at "
                f"mixture.max_epochs {config.max_epochs:g}: raise it, add data, or shorten the stages"
            )


def stream_folders(data: Path) -> set[Path]:
    """MDS folders of a stage's data, and the folder that joins them.

    Raises:
        UserError: there are none.
    """
    folders = {Path(stream["local"]) / (stream.get("split") or "") for stream in load_streams(data)}
    return {folder.resolve() for folder in folders | {data}}
