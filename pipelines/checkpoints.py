"""Checkpoints of the pretrainer: model and optimizer as safetensors, the place in the data as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from curate.artifacts import read_json, write_json
from curate.errors import UserError
from curate.trajectory.snapshots import load_state, save_state

if TYPE_CHECKING:
    from streaming import StreamingDataLoader
    from torch import nn
    from torch.optim import Optimizer

    from pipelines.pretrain import PretrainConfig

CHECKPOINT = "checkpoint.safetensors"


def save(
    config: PretrainConfig, step: int, model: nn.Module, optimizer: Optimizer, loader: StreamingDataLoader
) -> None:
    """State first, then the file that makes it current: a crash between the two repeats steps, it loses none."""
    save_state(config.out / f"step-{step:08d}.{CHECKPOINT}", model, optimizer)
    write_json(
        config.out / "trainer.json",
        {"step": step, "data": loader.state_dict(), "config": json.loads(config.model_dump_json())},
    )
    for path in config.out.glob(f"step-*.{CHECKPOINT}"):
        if path.name != f"step-{step:08d}.{CHECKPOINT}":
            path.unlink()
    if step == config.steps:
        (config.out / f"step-{step:08d}.{CHECKPOINT}").replace(config.out / CHECKPOINT)


def resume(config: PretrainConfig, model: nn.Module, optimizer: Optimizer, loader: StreamingDataLoader) -> int:
    """Load the stage's own checkpoint, or the state that it starts from; returns the first step to train."""
    state = config.out / "trainer.json"
    if not state.exists():
        if config.init_from is not None:
            load_state(config.init_from, model, optimizer)
        return 0
    trainer = read_json(state)
    differing = [
        key for key, value in json.loads(config.model_dump_json()).items() if trainer["config"].get(key) != value
    ]
    if differing:
        raise UserError(
            f"{config.out} was trained with other {', '.join(differing)}; restore them or choose another out"
        )
    step = int(trainer["step"])
    path = config.out / f"step-{step:08d}.{CHECKPOINT}"
    load_state(path if path.exists() else config.out / CHECKPOINT, model, optimizer)
    loader.load_state_dict(trainer["data"])
    return step
