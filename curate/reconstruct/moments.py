"""Optimizer state that no checkpoint kept, estimated from the samples that it came from.

Moments before step c are running means of the gradients of the steps before c. The samples of those steps are known,
the weights at those steps are not. So gradients are taken at the weights of the checkpoint, over the last n steps, with
the training's own optimizer at lr 0. This neglects how the weights moved within n steps, and gradients older than n:
they are a share `beta^n` of a moment, which scaling makes up for (`beta2` 0.95: nothing is left after 100 steps; 0.999:
a third after 1000).
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
        # lr 0 moves no weight (decoupled decay is lr wd too), and the moments update as in training.
        frozen = replace(record, groups=[replace(settings, lr=0.0) for settings in record.groups])
        replay.update(frozen, optimizers)
        groups = record.groups
    _scale(optimizers, groups, step - first, step)
    # Marked as estimated: replay must not hold a state that it reaches against this one.
    save_state(state, replay.model, optimizers, estimated=True)
    list_files(replay.run.folder, [state])


def _scale(optimizers: Sequence[Optimizer], groups: Sequence[GroupSettings], repeated: int, updates: int) -> None:
    """Scale Adam's moments of the repeated updates to those of all updates, as if earlier gradients had been alike.

    Momentum of SGD and Muon is left as it is: it counts no updates and has no bias correction.
    """
    parameter_groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    buffers_of = {parameter: buffers for optimizer in optimizers for parameter, buffers in optimizer.state.items()}
    for group, settings in zip(parameter_groups, groups, strict=True):
        for parameter in group["params"]:
            buffers = buffers_of.get(parameter, {})
            # m after n equal gradients g is (1 - beta^n) g [Adam, arXiv 1412.6980, section 3]: the ratio of two n.
            if "exp_avg" in buffers:
                buffers["exp_avg"].mul_((1 - settings.beta1**updates) / (1 - settings.beta1**repeated))
                buffers["exp_avg_sq"].mul_((1 - settings.beta2**updates) / (1 - settings.beta2**repeated))
                buffers["step"].fill_(updates)
