"""The runner of a plan: its pieces of work, which of them are done, and how the next one is done.

Nothing is remembered but the artifacts: a piece is done when its artifact lies there complete. So the runner can be
killed at any instant and run again.
"""

from __future__ import annotations

import logging
import shlex
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from curate.core.artifacts import folder_bytes
from curate.core.errors import UserError
from curate.core.lock import Lock, locked
from curate.embeddings.embed import embed, embedding_passes, is_embedded
from curate.embeddings.store import read_timings
from curate.mixture.record import read_mixture
from curate.plans.check import (
    check_data,
    check_inputs,
    check_stage,
    check_states,
    check_supply,
    next_tokens,
    open_stage,
)
from curate.plans.plan import PlanConfig
from curate.plans.trainer import TrainerError, run_trainer
from curate.selection.config import SelectConfig
from curate.selection.pipeline import is_selected, load_plan_targets, select
from curate.selection.resolve import resolve
from curate.training.declared import default_windows, window_steps
from curate.training.recorder import remove_parts
from curate.training.run import Run
from curate.training.samples import trained_tokens

_log = logging.getLogger(__name__)
MORE, TRAINER_FAILED, BUSY = 3, 4, 5
"""Exit statuses: a piece was done and more is left, the trainer failed, another runner works on the plan."""
Kind = Literal["train", "embed", "select"]
_SET_BY_PLAN = ("run", "target", "out")  # of a selection's settings


@dataclass(frozen=True)
class Piece:
    """One piece of work on one stage."""

    kind: Kind
    stage: int


def pieces(plan: PlanConfig) -> Iterator[Piece]:
    """All of a plan, in order; nothing is selected after the last stage."""
    for index in range(len(plan.stages)):
        yield Piece("train", index)
        if index + 1 < len(plan.stages):
            yield Piece("embed", index)
            yield Piece("select", index)


def is_done(plan: PlanConfig, piece: Piece) -> bool:
    """Whether the artifacts of a piece are there, complete, and those of this plan.

    Raises:
        UserError: they are complete but another plan made them; the message says what differs.
    """
    folder = plan.run_folder(piece.stage)
    if not (folder / "steps.parquet").exists():
        return False
    run = open_stage(plan, piece.stage)
    if piece.kind == "train":
        check_stage(plan, piece.stage, run)
        return True
    config = selection_config(plan, piece.stage, run)
    if piece.kind == "embed":
        # a selection by the current state alone has nothing to embed
        selection = resolve(config, run)
        return not selection.windows or is_embedded(selection.embedding, run, load_plan_targets(selection))
    return is_selected(config, run)


def selection_config(plan: PlanConfig, index: int, run: Run | None = None) -> SelectConfig:
    """Settings of the selection after a stage.

    Args:
        plan: the plan.
        index: the stage.
        run: of the stage; with it the budget is what the next stage trains on, where the plan names no other.

    Raises:
        UserError: the plan's settings are none of `curate.select`, or contradict the next stage.
    """
    chosen = plan.selection_settings(index)
    refused = sorted(set(chosen) & set(_SET_BY_PLAN))
    if refused:
        raise UserError(f"selection.{refused[0]} is set by the plan itself; leave it out")
    earlier = tuple(plan.run_folder(before) for before in range(index))
    paths: dict[str, Any] = {
        "run": plan.run_folder(index),
        "target": plan.target_of(index),
        "out": plan.selection_folder(index),
    }
    # before a run is there a stage that names steps alone has no budget yet
    after = plan.stages[index + 1]
    budget = next_tokens(plan, index, run) if run else after.tokens
    if budget is not None:
        chosen = {"budget_tokens": budget, **chosen}
    try:
        config = SelectConfig(**_with_earlier(chosen, earlier), **paths)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"selection.{'.'.join(map(str, first['loc']))} of the plan: {first['msg']}") from None
    if after.tokens is not None and config.budget_tokens != after.tokens:
        raise UserError(
            f"stage {after.name} trains on {int(after.tokens):,} tokens, selection.budget_tokens before it is "
            f"{int(config.budget_tokens or 0):,}: leave it out, or set both to the same"
        )
    return config


def _with_earlier(chosen: Mapping[str, Any], earlier: Sequence[Path]) -> dict[str, Any]:
    """Settings with the stages before the run, where they name no others."""
    return {**chosen, "source": {"earlier_runs": tuple(earlier), **chosen.get("source", {})}}


def work(plan: PlanConfig, piece: Piece, lock: Lock) -> None:
    """Do one piece, or go on with it.

    Args:
        plan: the plan.
        piece: of it.
        lock: of the plan; a trainer holds it too.

    Raises:
        TrainerError: the command of a stage failed.
        UserError: it left something else than the plan asks for, or the selection is refused.
    """
    stage = plan.stages[piece.stage]
    _log.info("stage %s: %s", stage.name, piece.kind)
    if piece.kind == "train":
        check_data(plan, piece.stage)
        _train(plan, piece.stage, lock)
        return
    run = open_stage(plan, piece.stage)
    config = selection_config(plan, piece.stage, run)
    if piece.kind == "embed":
        # again, though training was checked: the user may have put another run there, and states cost little to read
        check_states(plan, piece.stage, run)
        if config.mode != "samples":
            check_supply(plan, piece.stage, run, config.mixture)
        selection = resolve(config, run)
        if selection.windows:
            embed(selection.embedding, run, load_plan_targets(selection))
    else:
        select(config, run)


def _train(plan: PlanConfig, index: int, lock: Lock) -> None:
    arguments, folder, name = plan.arguments(index), plan.run_folder(index), plan.stages[index].name
    _log.info("%s", shlex.join(arguments))
    folder.parent.mkdir(parents=True, exist_ok=True)
    status = run_trainer(arguments, name, lock)
    if status:
        how = f"exited with status {status}" if status > 0 else f"was ended by {signal.Signals(-status).name}"
        raise TrainerError(
            f"the command of stage {name} {how}; what it wrote stays, and running the schedule again runs it again"
        )
    if not (folder / "steps.parquet").exists():
        raise UserError(
            f"the command of stage {plan.stages[index].name} exited with status 0 and left no finished run in "
            f"{folder}: it must record with curate's recorder into {{out}} and call recorder.finish()"
        )
    run = open_stage(plan, index)
    check_stage(plan, index, run)
    check_states(plan, index, run)


def check_plan(plan: PlanConfig) -> None:
    """What can be known before anything is trained.

    Raises:
        UserError: data or a target is missing, or the settings of a selection are wrong.
    """
    check_inputs(plan)
    for index in range(len(plan.stages) - 1):
        selection_config(plan, index)


def carry_out(plan: PlanConfig, *, once: bool) -> int:
    """Do what is left of a plan; returns the exit status.

    Raises:
        BusyError: another runner works on it, or the trainer that one left behind as it was killed.
        TrainerError, UserError: see `work`.
    """
    check_plan(plan)
    with locked(plan.folder) as lock:
        for piece in pieces(plan):
            if is_done(plan, piece):
                # a trainer killed between its last two writes left parts that nobody else would remove
                if piece.kind == "train":
                    remove_parts(plan.run_folder(piece.stage))
                continue
            work(plan, piece, lock)
            if once:
                return MORE if piece != list(pieces(plan))[-1] else 0
    return 0


def describe(plan: PlanConfig) -> list[str]:
    """One line per piece: what is done and what is left, with tokens, bytes and cost.

    What is left is estimated from the last finished stage; without one its cost is not known.

    Raises:
        UserError: see `check_plan` and `is_done`.
    """
    check_plan(plan)
    # what follows a piece that is left is left too, and cannot be asked: its run is not there
    lines, left, like = [], False, None
    for piece in pieces(plan):
        done = not left and is_done(plan, piece)
        left = left or not done
        if done:
            like = piece.stage
        what = measured(plan, piece) if done else expected(plan, piece, like)
        if piece.kind == "train":
            what = f"{what}: {shlex.join(plan.arguments(piece.stage))}"
        lines.append(f"{'done' if done else 'left':5} {piece.kind:7} {plan.stages[piece.stage].name:16} {what}")
    return lines


def measured(plan: PlanConfig, piece: Piece) -> str:
    """What a piece that is done has: steps, tokens, bytes, forward+backward passes, time."""
    run = open_stage(plan, piece.stage)
    if piece.kind == "train":
        tokens = sum(trained_tokens(run).values())
        states = folder_bytes(run.folder / "snapshots")
        return f"{run.spec.steps:,} steps, {tokens:,} tokens, {states / 1e6:,.1f} MB of states"
    if piece.kind == "embed":
        size = folder_bytes(run.folder / "embeddings")
        times = [read_timings(path.parent) for path in sorted((run.folder / "embeddings").glob("*/timings.json"))]
        seconds = sum(timings["seconds"] for timings in times)
        passes = sum(timings["cost_units"] or 0.0 for timings in times)
        share = 100 * passes / run.spec.steps
        return (
            f"{passes:,.0f} forward+backward passes, {share:.0f} % of the stage, {seconds:,.0f} s, {size / 1e6:,.1f} MB"
        )
    mixture = read_mixture(plan.selection_folder(piece.stage) / "mixture.yaml")
    size = folder_bytes(plan.selection_folder(piece.stage))
    return f"{mixture.stored_tokens:,} tokens in {len(mixture.phases)} phases, {size / 1e6:,.1f} MB"


def expected(plan: PlanConfig, piece: Piece, like: int | None) -> str:
    """The same for a piece that is left, from a finished stage that it resembles."""
    stage = plan.stages[piece.stage]
    amounts = [f"{stage.steps:,} steps"] if stage.steps is not None else []
    amounts += [f"{int(stage.tokens):,} tokens"] if stage.tokens is not None else []
    if like is None:
        if piece.kind != "train":
            return "cost and bytes are known when the first stage is trained"
        return ", ".join([*amounts, "bytes are known when the first stage is trained"])
    run = open_stage(plan, like)
    tokens = sum(trained_tokens(run).values()) / run.spec.steps
    steps = stage.steps if stage.steps is not None else round(int(stage.tokens or 0) / tokens)
    if piece.kind == "train":
        amounts += [] if stage.tokens is not None else [f"about {round(steps * tokens):,} tokens"]
        return f"{', '.join(amounts)}, about {folder_bytes(run.folder / 'snapshots') / 1e6:,.1f} MB of states"
    if piece.kind == "select":
        after = plan.stages[piece.stage + 1]
        budget = selection_config(plan, piece.stage).budget_tokens
        wanted = round((after.steps or 0) * tokens) if budget is None else int(budget)
        copied = selection_config(plan, piece.stage).takes_samples
        size = (
            f"about {wanted * run.source.stored_bytes_per_token / 1e6:,.1f} MB of data"
            if copied
            else "no data is copied"
        )
        return f"about {wanted:,} tokens, {size}"
    return _expected_embedding(plan, piece.stage, run, steps)


def _expected_embedding(plan: PlanConfig, index: int, run: Run, steps: int) -> str:
    config = selection_config(plan, index)
    selection = resolve(config, run)
    if not selection.windows:
        return "no window is valued"
    passes = embedding_passes(selection.embedding, run, load_plan_targets(selection))
    declared = plan.stages[index].windows
    windows = window_steps(declared, steps) if declared else default_windows(steps)
    # a window that was declared longer for this stage costs in proportion
    total = sum(
        passes[name] * (windows[name][1] - windows[name][0]) / (run.window(name)[1] - run.window(name)[0])
        for name in passes
    )
    timed = [read_timings(path.parent)["unit_seconds"] for path in sorted(run.folder.glob("embeddings/*/timings.json"))]
    seconds = [measured for measured in timed if measured]
    time = f", about {total * sum(seconds) / len(seconds):,.0f} s" if seconds else ""
    return f"about {total:,.0f} forward+backward passes, {100 * total / steps:.0f} % of the stage{time}"
