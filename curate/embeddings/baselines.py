"""The cheap values that `adjoint` is compared with: dot products of per-sample gradients with a target's gradient.

    grad-dot    <g_z, g_q>                                 both at the evaluation checkpoint (`horizon`)
    less        cos(u_z, g_q), u_z Adam's update for z     both there [LESS, arXiv 2402.04333, section 3]
    shapley     lr_k clip_k c_z <g_z(theta_k), g_q(theta_k)>   at the step that used the sample [In-Run Data Shapley,
                arXiv 2406.11011, section 4.1, first order; for Adam too the plain dot product]

All gradients are whole, none is projected. None of the values sees what comes after a step (curvature, momentum,
weight decay).

N samples of the window, B of a step, b of a part of it, R losses, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.progress import progress
from curate.embeddings.estimator import HALVES, Encoded, job_target
from curate.embeddings.products import sample_gradients
from curate.optimizers.state import TrainingState
from curate.optimizers.step import update_pieces
from curate.training.model import named_parameters
from curate.training.replay import records
from curate.training.target import loss_gradients

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor
    from torch.optim import Optimizer

    from curate.core.artifacts import Json
    from curate.embeddings.estimator import WindowJob
    from curate.training.replay import Replay, StepRecord
    from curate.training.target import Target
    from curate.training.task import Batch

    Floats = npt.NDArray[np.float64]

BaselineName = Literal["grad-dot", "less", "shapley"]
_CHECKED_STEPS = 3  # steps replayed to compare the run with its records, and to time one forward-backward pass


class BaselineConfig(Config):
    """Settings of `grad-dot`, `less` and `shapley`."""

    target_every: int = Field(default=1, ge=1)
    """shapley: take the target's gradient at every n-th step of the window; the steps between use the last one."""


def grad_dot(replay: Replay, targets: Tensor, window: tuple[int, int]) -> Floats:
    """`<g_z, g_r>` (N, R) of every sample of a window, at the parameters that the model has now.

    Args:
        replay: of the run; its model is at the checkpoint.
        targets: (R, P) gradients of the losses there.
        window: first step, step after the last.
    """
    return _at_checkpoint(replay, targets, window, lambda gradients, _: gradients)


def less(replay: Replay, targets: Tensor, window: tuple[int, int], optimizers: Sequence[Optimizer]) -> Floats:
    """`<u_z, g_r> / |u_z|` (N, R) at the parameters that the model has now.

    `u_z` is what Adam would take off the parameters for z alone, at lr 1 and without weight decay, from the moments of
    the checkpoint; divided by `|g_r|` it is the cosine.

    Args:
        replay: of the run; its model is at the checkpoint.
        targets: (R, P) gradients of the losses there.
        window: first step, step after the last.
        optimizers: in their state at the checkpoint.

    Raises:
        UserError: a part of the model was not trained with Adam or AdamW.
    """
    others = sorted(set(replay.run.spec.optimizers) - {"Adam", "AdamW"})
    if others:
        raise UserError(
            f"less needs the moments of Adam or AdamW, run {replay.run.folder} was trained with {others[0]} too; "
            "choose another method, grad-dot for example"
        )
    first, second, updates = replay.moments(optimizers)
    # Parameters 0: what an update leaves there is then minus the direction itself, without the weights' rounding.
    moments = TrainingState(parameters=first.new_zeros(first.shape), momentum=first, second_moment=second)

    def direction(gradients: Tensor, record: StepRecord) -> Tensor:
        # updated: a skipped step's samples have a direction too; the checkpoint's optimizer would take it.
        settings = [replace(group, lr=1.0, weight_decay=0.0, updated=True) for group in record.groups]
        directions = gradients.new_empty(gradients.shape)
        groups = replay.layout.groups(settings)
        for rule, group, done in update_pieces(groups, updates, len(gradients), gradients.device):
            state = moments.part(group.place)
            directions[:, group.place] = -rule.update(state, gradients[:, group.place], done, group).parameters
        normalised: Tensor = directions / directions.norm(dim=1, keepdim=True)
        return normalised

    return _at_checkpoint(replay, targets, window, direction)


def _at_checkpoint(
    replay: Replay,
    targets: Tensor,
    window: tuple[int, int],
    direction: Callable[[Tensor, StepRecord], Tensor],
) -> Floats:
    """Inner products of the targets with a direction made of each sample's gradient, (N, R)."""
    import torch

    theta = replay.layout.flatten(named_parameters(replay.model)).detach().clone()
    rows = []
    for record in progress(records(replay.run, *window), total=window[1] - window[0], what="gradients"):
        for batch in replay.batches(record):
            for _, gradients in sample_gradients(replay.task, replay.layout, batch, theta, replay.layout.names):
                rows.append(direction(gradients, record) @ targets.T)
    values: Floats = torch.cat(rows).double().cpu().numpy()
    return values


def along_trajectory(
    replay: Replay, losses: Sequence[Batch], window: tuple[int, int], batch_size: int, every: int = 1
) -> Floats:
    """`lr_k clip_k c_z <g_z(theta_k), g_r(theta_k)>` (N, R), each group with its own lr; positive = helped.

    Args:
        replay: of the run.
        losses: R losses.
        window: first step, step after the last.
        batch_size: samples per pass over the losses.
        every: take `g_r` at every n-th step, from the window's first on (1: in-run Shapley; more: TracIn).
    """
    import torch

    layout, task = replay.layout, replay.task
    rows, targets = [], torch.empty(0)  # the first step sets the targets: (step - start) % every is 0
    for replayed in progress(replay.steps(*window), total=window[1] - window[0], what="trajectory"):
        record = replayed.record
        if (record.step - window[0]) % every == 0:
            targets = loss_gradients(task, layout, losses, batch_size)
        # A skipped step helped nobody, and its gradients may not be finite.
        if not record.updated:
            rows.append(targets.new_zeros(record.size, len(targets)))
            continue
        # (P,): lr differs between parameter groups, so it goes inside the inner product; 0 where a group was skipped.
        group_lrs = [
            targets.new_full((group.place.stop - group.place.start,), group.settings.lr * group.settings.updated)
            for group in layout.groups(record.groups)
        ]
        scaled_targets = torch.cat(group_lrs) * targets
        # A copy: the replay updates the parameters in place when the next step is asked for.
        theta = layout.flatten(named_parameters(replay.model)).detach().clone()
        for batch in replayed.batches:
            for samples, gradients in sample_gradients(task, layout, batch, theta, layout.names):
                weights = record.clipped * samples.weights.to(gradients.dtype)
                rows.append(weights[:, None] * (gradients @ scaled_targets.T))
    values: Floats = torch.cat(rows).double().cpu().numpy()
    return values


class BaselineEstimator:
    """A baseline as an estimator: D = 2, one number per half of the target.

    Args:
        name: which.
        config: its settings.
    """

    def __init__(self, name: BaselineName, config: BaselineConfig) -> None:
        self.name, self.config = name, config

    def settings(self, job: WindowJob) -> Json:
        """The target; for shapley, how often its gradient is taken."""
        chosen = self.config.model_dump() if self.name == "shapley" else {}
        return {"target": job_target(job, self.name).fingerprint, **chosen}

    def dimension(self, job: WindowJob) -> int:
        """One number per half."""
        return HALVES

    def passes(self, job: WindowJob) -> float:
        """Per-sample gradients of the window (measured: about 2 for each step), replay, gradients of the target."""
        window = job.stop - job.start
        batch_size = max(next(records(job.replay.run, job.start, job.stop)).size, 1)
        target = sum(len(half) for half in job_target(job, self.name).halves) / batch_size
        replayed = window if self.name == "shapley" else _CHECKED_STEPS
        target_gradients = -(-window // self.config.target_every) if self.name == "shapley" else 1
        return 2.0 * window + replayed + target_gradients * target

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Values for the halves of the target; see the module.

        Raises:
            UserError: the replay differs from the records, or `less` without Adam's moments.
        """
        target, window = job_target(job, self.name), (job.start, job.stop)
        if self.name == "shapley":
            out[:] = along_trajectory(job.replay, target.halves, window, job.batch_size, self.config.target_every)
            return {}
        # These values need no replay of the window: a few steps still show that this is the run that was recorded.
        for _ in job.replay.steps(job.start, min(job.start + _CHECKED_STEPS, job.stop)):
            pass
        optimizers = job.replay.optimizers_at(job.horizon)
        gradients = loss_gradients(job.replay.task, job.replay.layout, target.halves, job.batch_size)
        if self.name == "grad-dot":
            out[:] = grad_dot(job.replay, gradients, window)
        else:
            # The norm of the whole target for both halves: their weighted sum is then the cosine with the target.
            norm = _target_gradient(gradients, target).norm()
            out[:] = less(job.replay, gradients / norm, window, optimizers)
        return {}

    def encode(self, job: WindowJob) -> Encoded:
        """Unit vectors: the rows are the values for the halves."""
        return Encoded(vectors=np.eye(HALVES, dtype=np.float32))


def _target_gradient(halves: Tensor, target: Target) -> Tensor:
    """The target's gradient (P,) from those of its halves (2, P)."""
    import torch

    return torch.tensor(target.half_weights, dtype=halves.dtype, device=halves.device) @ halves
