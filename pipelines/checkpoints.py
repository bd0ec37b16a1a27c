"""Checkpoints of the pretrainer: model and optimizers as safetensors, the position in the data as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.artifacts import checked, list_files, read_hashed, sum_of, write_hashed
from curate.core.errors import UserError
from curate.training.recorder import remove_parts
from curate.training.snapshots import load_state, save_state

if TYPE_CHECKING:
    from streaming import StreamingDataLoader
    from torch import nn
    from torch.optim import Optimizer

FINAL = "checkpoint.safetensors"
_TRAINER = "trainer.json"


def save(
    out: Path,
    step: int,
    settings: dict[str, Any],
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    loader: StreamingDataLoader,
) -> None:
    """Write the state after `step` steps, then the file that makes it current.

    A crash between them loses nothing: the older state is still there and still current.
    """
    save_state(_path(out, step), model, optimizers)
    state = list(sum_of(_path(out, step)))
    write_hashed(out / _TRAINER, {"step": step, "state": state, "data": loader.state_dict(), "settings": settings})
    # the old state goes last: until the line above it was the one to resume from
    _remove_older(out, step)


def finish(out: Path, step: int) -> None:
    """Give the last checkpoint its final name, and leave no other."""
    if _path(out, step).exists():
        # the list of hashes first, for the final name: renaming changes no content, and a crash here is repaired by
        # calling again
        list_files(out, [], sums={FINAL: sum_of(_path(out, step))})
        _path(out, step).replace(out / FINAL)
    _remove_older(out, step)


def _remove_older(out: Path, step: int) -> None:
    for path in out.glob(f"step-*.{FINAL}"):
        if path != _path(out, step):
            path.unlink()


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether the stage is complete.

    Raises:
        UserError: the folder holds a stage made with other settings (names them), or a damaged one.
    """
    if not (out / _TRAINER).exists():
        return False
    earlier_settings = read_hashed(out / _TRAINER)["settings"]
    differing = [key for key, value in settings.items() if earlier_settings.get(key) != value]
    if differing:
        raise UserError(f"{out} was trained with other {', '.join(differing)}; restore them or choose another out")
    # trainer.json is there from the first checkpoint on: the final files say that the stage is complete
    files = [out / FINAL, *([] if settings["recorder"] is None else [out / "run.json", out / "steps.parquet"])]
    if not all(path.exists() for path in files):
        return False
    for path in files:
        checked(path, by=out)
    # the recorder leaves its parts where the process was killed after its last step
    remove_parts(out)
    return True


def resume(out: Path, model: nn.Module, optimizers: Sequence[Optimizer], loader: StreamingDataLoader) -> int:
    """Load the last checkpoint, if there is one.

    Returns:
        The first step to train; 0 without a checkpoint.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if not (out / _TRAINER).exists():
        return 0
    trainer = read_hashed(out / _TRAINER)
    step = int(trainer["step"])
    # a crash in `finish` may have renamed the state already
    state = _path(out, step) if _path(out, step).exists() else out / FINAL
    # trainer.json and the state belong together: a position in the data without its weights would skip samples
    if state.exists() and list(sum_of(state)) != trainer["state"]:
        raise UserError(f"{state} is corrupted: restore it, or delete {out} and train the stage again")
    load_state(state, model, optimizers)
    loader.load_state_dict(trainer["data"])
    return step


def _path(out: Path, step: int) -> Path:
    return out / f"step-{step:08d}.{FINAL}"
