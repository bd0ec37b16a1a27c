"""Is what a trainer left the stage that the plan asked for?"""

from __future__ import annotations

from pathlib import Path

from curate.errors import UserError
from curate.formats.mds import load_streams
from curate.stages.plan import PlanConfig
from curate.trajectory.run import Run


def check_stage(plan: PlanConfig, index: int, run: Run) -> None:
    """Hold a trained stage against the plan.

    Raises:
        UserError: it has other steps, other data or another model, or left no state for the next stage.
    """
    stage = plan.stages[index]
    if run.spec.steps != stage.steps:
        raise UserError(f"{run.folder} has {run.spec.steps} steps, stage {stage.name} of the plan {stage.steps}")
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
    if index and _parameters(Run(plan.run_folder(index - 1))) != _parameters(run):
        raise UserError(
            f"{run.folder} has other parameters than {plan.run_folder(index - 1)}: does the command of stage "
            f"{stage.name} start from {{checkpoint}}?"
        )


def _parameters(run: Run) -> list[str]:
    return sorted(name for group in run.spec.groups for name in group)


def stream_folders(data: Path) -> set[Path]:
    """MDS folders of a stage's data, and the folder that joins them.

    Raises:
        UserError: there are none.
    """
    folders = {Path(stream["local"]) / (stream.get("split") or "") for stream in load_streams(data)}
    return {folder.resolve() for folder in folders | {data}}
