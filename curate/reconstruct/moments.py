"""Optimizer state that no checkpoint kept, estimated from the samples that made it.

Moments before step c are running means of the gradients of the steps before c. Their samples are known, their weights
are not: gradients are taken at the checkpoint's own weights instead, over the last n steps, with the training's own
optimizer at lr 0. What is neglected is how weights moved within n steps, and gradients older than n: a share `beta^n`
of a moment, which is made up for by scaling (`beta2` 0.95: nothing is left after 100 steps; 0.999: a third after 1000).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.artifacts import list_files
from curate.core.progress import progress
from curate.training.replay import records
from curate.training.snapshots import save_state

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.optim import Optimizer

    from curate.optimizers.settings import GroupSettings
    from curate.training.replay import Replay


def estimate_moments(replay: Replay, step: int, state: Path, steps: int) -> None:
    """Add optimizer state to the file of a state that has none.

    Args:
        replay: of the reconstructed run.
        step: the state's step.
        state: its file.
        steps: gradients of as many steps before it are used.
    """
    optimizers = replay.restore(step, state)
    first = max(step - steps, 0)
    groups: list[GroupSettings] = []
    for record in progress(records(replay.run, first, step), total=step - first, what=f"moments of step {step}"):
        replay.backward(replay.batches(record), optimizers)
        frozen = replace(record, groups=[replace(settings, lr=0.0) for settings in record.groups])
        replay.update(frozen, optimizers)
        groups = record.groups
    _scale(optimizers, groups, step - first, step)
    save_state(state, replay.model, optimizers, estimated=True)
    list_files(replay.run.folder, [state])


def _scale(optimizers: Sequence[Optimizer], groups: Sequence[GroupSettings], made: int, updates: int) -> None:
    """Turn Adam's moments of so many updates into those of all updates, were gradients like these before."""
    every = [group for optimizer in optimizers for group in optimizer.param_groups]
    states = {parameter: kept for optimizer in optimizers for parameter, kept in optimizer.state.items()}
    for group, settings in zip(every, groups, strict=True):
        for parameter in group["params"]:
            kept = states.get(parameter, {})
            if "exp_avg" in kept:
                kept["exp_avg"].mul_((1 - settings.beta1**updates) / (1 - settings.beta1**made))
                kept["exp_avg_sq"].mul_((1 - settings.beta2**updates) / (1 - settings.beta2**made))
                kept["step"].fill_(updates)
