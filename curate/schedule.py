"""`python -m curate.schedule --plan plan.yaml`: train, embed, select, train ... without anyone watching.

What is done is what lies there complete; nothing else is remembered. So the runner can be stopped at any instant and
run again, by hand, by cron or in a batch job: `--once` does one piece of work and says by its exit status whether more
is left.

    0  everything is done            3  a piece was done, more is left (--once)
    2  bad input                     4  the trainer failed          5  another runner works on the plan
"""

from __future__ import annotations

import logging
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from curate.config import Config, parse_command, run_command
from curate.embed import embed, is_embedded, read_target
from curate.errors import UserError
from curate.progress import start_logging
from curate.select import SelectConfig, is_selected, select
from curate.stages.check import check_stage
from curate.stages.lock import BusyError, locked
from curate.stages.plan import PlanConfig, load_plan
from curate.trajectory.run import Run

_log = logging.getLogger(__name__)
MORE, TRAINER_FAILED, BUSY = 3, 4, 5
Kind = Literal["train", "embed", "select"]
_OWN = ("run", "runs_root", "target", "out")  # of a selection's settings, what the plan sets itself


class ScheduleConfig(Config):
    """Which plan, and how much of it."""

    plan: Path
    """YAML file; its settings are described in `curate.stages.plan`."""
    once: bool = False
    """Do the next piece of work only."""
    dry_run: bool = False
    """Print what is done and what is left, and do nothing."""


@dataclass(frozen=True)
class Piece:
    """One piece of work on one stage."""

    kind: Kind
    stage: int


class TrainerError(Exception):
    """The user's command exited with another status than 0."""


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
    run = Run(folder)
    if piece.kind == "train":
        check_stage(plan, piece.stage, run)
        return True
    config = selection_config(plan, piece.stage)
    if piece.kind == "embed":
        return is_embedded(config, run, read_target(config, run))
    return is_selected(config, run)


def selection_config(plan: PlanConfig, index: int) -> SelectConfig:
    """Settings of the selection after a stage.

    Raises:
        UserError: the plan's settings are none of `curate.select`.
    """
    chosen = plan.selection_settings(index)
    own = sorted(set(chosen) & set(_OWN))
    if own:
        raise UserError(f"selection.{own[0]} is set by the plan itself; leave it out")
    earlier = tuple(plan.run_folder(before) for before in range(index))
    places = {"run": plan.run_folder(index), "target": plan.target, "out": plan.selection_folder(index)}
    try:
        return SelectConfig(**{"earlier": earlier, **chosen, **places})
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"selection.{'.'.join(map(str, first['loc']))} of the plan: {first['msg']}") from None


def work(plan: PlanConfig, piece: Piece) -> None:
    """Do one piece, or go on with it.

    Raises:
        TrainerError: the command of a stage failed.
        UserError: it left something else than the plan asks for, or the selection is refused.
    """
    stage = plan.stages[piece.stage]
    _log.info("stage %s: %s", stage.name, piece.kind)
    if piece.kind == "train":
        _train(plan, piece.stage)
        return
    config = selection_config(plan, piece.stage)
    run = Run(plan.run_folder(piece.stage))
    if piece.kind == "embed":
        embed(config, run, read_target(config, run))
    else:
        select(config, run)


def _train(plan: PlanConfig, index: int) -> None:
    arguments, folder = plan.arguments(index), plan.run_folder(index)
    _log.info("%s", shlex.join(arguments))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        status = subprocess.run(arguments, check=False).returncode  # noqa: S603
    except OSError as error:
        raise TrainerError(f"{arguments[0]} cannot be started ({error})") from None
    if status:
        raise TrainerError(
            f"the command of stage {plan.stages[index].name} exited with status {status}; what it wrote stays, and "
            "running the schedule again runs it again"
        )
    if not (folder / "steps.parquet").exists():
        raise UserError(
            f"the command of stage {plan.stages[index].name} exited with status 0 and left no finished run in "
            f"{folder}: it must record with curate's recorder into {{out}} and call recorder.finish()"
        )
    check_stage(plan, index, Run(folder))


def carry_out(plan: PlanConfig, *, once: bool) -> int:
    """Do what is left of a plan; returns the exit status.

    Raises:
        UserError: see `work`.
    """
    for piece in pieces(plan):
        if is_done(plan, piece):
            continue
        work(plan, piece)
        if once:
            return MORE if piece != list(pieces(plan))[-1] else 0
    return 0


def describe(plan: PlanConfig) -> list[str]:
    """One line per piece: what is done and what is left."""
    lines, left = [], False
    for piece in pieces(plan):
        stage = plan.stages[piece.stage]
        done = not left and is_done(plan, piece)
        left = left or not done
        what = f"{stage.steps:,} steps: {shlex.join(plan.arguments(piece.stage))}" if piece.kind == "train" else ""
        lines.append(f"{'done' if done else 'left':5} {piece.kind:7} {stage.name:16} {what}".rstrip())
    return lines


def main() -> None:
    """Entry point."""
    config = parse_command(
        ScheduleConfig, "python -m curate.schedule", "Train, embed, select, train ...: a plan of stages."
    )
    start_logging()
    plan = load_plan(config.plan)
    if config.dry_run:
        for line in describe(plan):
            _log.info("%s", line)
        return
    try:
        with locked(plan.folder / "lock"):
            status = carry_out(plan, once=config.once)
    except BusyError:
        _log.error("another runner works on %s", plan.folder)
        status = BUSY
    except TrainerError as error:
        _log.error("%s", error)
        status = TRAINER_FAILED
    raise SystemExit(status)


if __name__ == "__main__":
    run_command(main)
