"""`dvemb-adam` as an estimator: gradients and preconditioned gradients captured by replay, then `dvemb_adam.py`.

`D_k` is the one after update k, so it is known only when the backward pass of the whole step is done. The sides of each
layer are kept until then and projected a second time; it stays one backward pass. D is factored (`separable_inverse`),
because only a scale of rows and one of columns can go into the two sides.

With `shortcut` the D of the evaluation checkpoint serves the whole window. In coordinates scaled by `D^{-1/2}` the
recursion then has `D^{1/2} g` on both sides, and in the target: one array, and no sides to keep.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.errors import UserError
from curate.embeddings.dvemb_adam import recursion, separable_inverse
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator, layer_settings, row_scales, row_steps
from curate.training.replay import optimizer_state, records

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor
    from torch.optim import Optimizer

    from curate.core.artifacts import Json
    from curate.embeddings.captured import CapturedRows
    from curate.embeddings.estimator import WindowJob
    from curate.gradients.capture import GradientCapture
    from curate.optimizers.settings import GroupSettings
    from curate.training.replay import ReplayedStep, StepRecord


class DvembAdamConfig(DvembConfig):
    """Settings of `dvemb-adam`."""

    shortcut: bool = False
    """The optimizer's scale frozen at the horizon: half the disk and less memory, and less faithful."""


class DvembAdamEstimator(DvembEstimator):
    """The recursion for AdamW without momentum over projected gradients; serves any target.

    Memory beside that of `dvemb`: without `shortcut`, B T (I + O) numbers per captured layer for a whole step.
    """

    name = "dvemb-adam"
    shared_settings = ("lr", "weight_decay")
    config: DvembAdamConfig

    def __init__(self, config: DvembAdamConfig) -> None:
        super().__init__(config)

    def settings(self, job: WindowJob) -> Json:
        """Projection, operator and form.

        Raises:
            UserError: the run's optimizer is not AdamW.
        """
        check_adam(job)
        return super().settings(job)

    def _capture(self, job: WindowJob, *, frozen: bool = False) -> GradientCapture:
        # keep: the sides wait for D_k. A target (frozen) has no update, so it needs no D but the shortcut's.
        capture = self._plain_capture(job, keep=not (self.config.shortcut or frozen), frozen=frozen)
        if self.config.shortcut:
            last = next(records(job.replay.run, job.horizon - 1, job.horizon))
            optimizers = job.replay.optimizers_at(job.horizon)
            scales = preconditioners(job, capture, last, optimizers, updated=True)
            # Roots: half of D goes into the rows, half into the target.
            capture.scale({layer: (outputs.sqrt(), inputs.sqrt()) for layer, (outputs, inputs) in scales.items()})
        return capture

    def _taker(self, capture: GradientCapture) -> Callable[[Tensor], Any]:
        return capture.take if self.config.shortcut else capture.take_factors

    def _in_run(self, job: WindowJob, capture: GradientCapture) -> CapturedRows | None:
        # While it trains, a run cannot know the D of its horizon.
        return None if self.config.shortcut else super()._in_run(job, capture)

    def _stored(self) -> tuple[str, ...]:
        return ("gradients",) if self.config.shortcut else ("gradients", "preconditioned")

    def _rows(self, job: WindowJob, capture: GradientCapture, replayed: ReplayedStep) -> list[Tensor]:
        import torch

        if self.config.shortcut:
            return super()._rows(job, capture, replayed)
        scales = preconditioners(job, capture, replayed.record, replayed.optimizers, updated=False)
        per_batch = [capture.scaled_rows(captured, scales) for captured in replayed.captured]
        return [torch.cat(rows) for rows in zip(*per_batch, strict=True)]

    def _recursion(
        self,
        stored: Mapping[str, npt.NDArray[np.float32]],
        step_records: Sequence[StepRecord],
        settings: Sequence[Sequence[GroupSettings]],
        out: npt.NDArray[np.float32],
        **options: Any,
    ) -> list[Tensor]:
        # Weight decay is decoupled: it acts with the lr alone, not with the clip factor.
        per_step = [[group.lr * group.weight_decay * group.updated for group in groups] for groups in settings]
        return recursion(
            stored["gradients"],
            stored[self._stored()[-1]],  # with the shortcut the same array again
            row_scales(step_records, settings),
            np.repeat(per_step, [record.size for record in step_records], axis=0),
            row_steps(step_records),
            out,
            **options,
        )


def check_adam(job: WindowJob) -> None:
    """Refuse what the recursion does not describe.

    Raises:
        UserError: the optimizer is not AdamW, or it is Adam with a weight decay that goes through its moments.
    """
    spec = job.replay.run.spec
    if not set(spec.optimizers) <= {"AdamW", "Adam"}:
        raise UserError(
            f"dvemb-adam follows AdamW, run {job.replay.run.folder} was trained with {', '.join(spec.optimizers)}; "
            "use --estimator dvemb"
        )
    # A weight decay does not change its kind during a run: the first step stands for all.
    first = next(records(job.replay.run, job.start, job.horizon))
    if any(group.optimizer == "Adam" and group.weight_decay for group in first.groups):
        raise UserError("dvemb-adam follows decoupled weight decay; this run's Adam adds it to the gradient")


def preconditioners(
    job: WindowJob, capture: GradientCapture, record: StepRecord, optimizers: Sequence[Optimizer], *, updated: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Factored `D_k` of each layer after the update of step k: (O,) and (I,), see `separable_inverse`.

    Args:
        job: the window.
        capture: names the layers.
        record: step k.
        optimizers: in their state after the update, or before it with `ghat_k` in `.grad`.
        updated: which of the two.
    """
    scales, buffers = {}, optimizer_state(optimizers)
    for layer, settings in layer_settings(job, capture, record).items():
        weight = capture.weight(layer)
        clipped = None if updated or weight.grad is None else weight.grad * record.clipped
        scales[layer] = layer_scale(capture, layer, buffers.get(weight, {}), settings, clipped)
    return scales


def layer_scale(
    capture: GradientCapture,
    layer: str,
    state: Mapping[str, Any],
    settings: GroupSettings,
    clipped: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Factored `D_k` of one layer: (O,) and (I,).

    Args:
        capture: of the layer.
        layer: its name.
        state: what the optimizer keeps of its weight; empty where that never had a gradient.
        settings: of its parameter group.
        clipped: gradient of an update that the state does not have yet.
    """
    import torch

    moment, updates = state.get("exp_avg_sq"), int(state.get("step", 0))
    if moment is None:
        moment = torch.zeros_like(capture.weight(layer))
    # The update that the optimizer is about to take, without taking it: the caller's step must stay undone.
    if clipped is not None:
        moment, updates = torch.lerp(clipped.square(), moment, settings.beta2), updates + 1
    return separable_inverse(capture.oriented(layer, moment), max(updates, 1), settings)
