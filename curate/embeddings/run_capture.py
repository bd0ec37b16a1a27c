"""Projected per-sample gradients captured while a model trains, for `dvemb` and `dvemb-adam` to read.

    recorder.attach(RunCapture(recorder, CaptureConfig()))

The hooks (`curate.gradients.capture`) are installed for the declared windows only. They read what the training's own
backward pass computes; no number of the training changes. A step costs B T (I k_i + O k_o + k_i k_o) multiplications
per captured layer, twice that with AdamW's coordinates, beside the 3 B T I O of its forward and backward pass.

A failure after training has begun ends the capture, not the training; missing steps are replayed later. The rows of a
window's first step are compared with the gradient that they must add up to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from curate.core.config import Config
from curate.core.errors import UserError
from curate.embeddings.captured import RowWriter, adds_up, capture_folder
from curate.optimizers.settings import GroupSettings
from curate.training.recorder import clip_factor

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from curate.gradients.capture import CapturedFactors, GradientCapture
    from curate.training.recorder import TrajectoryRecorder

_log = logging.getLogger(__name__)


class CaptureConfig(Config):
    """What is captured while a run trains; an estimator of the same width, seed and layers needs no replay."""

    estimator: Literal["dvemb", "dvemb-adam"] = "dvemb"
    """dvemb: gradients. dvemb-adam: also times AdamW's scale; serves both estimators at twice the bytes."""
    width: int = Field(default=16, ge=1)
    """Projected size of each side of a layer, as `dvemb.width`."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Name patterns of Linear and Conv1D modules that are not captured, as `dvemb.exclude`."""
    seed: int = 0
    """Seed of the projections, as `dvemb.seed`."""
    queue_steps: int = Field(default=4, ge=1)
    """Steps that may wait in memory for the disk; the training waits when there are more."""
    patience_seconds: float = Field(default=300.0, gt=0)
    """Longest wait for the disk; after it the capture ends and the training goes on."""


class RunCapture:
    """Captures the declared windows of a run while it trains; give it to `TrajectoryRecorder.attach`.

    Args:
        recorder: of the run.
        config: what to capture.

    Raises:
        UserError: before any step, where this model or optimizer cannot be captured.
    """

    def __init__(self, recorder: TrajectoryRecorder, config: CaptureConfig) -> None:
        from curate.gradients.capture import GradientCapture

        model = recorder.model
        _refuse_compiled(model)
        self._adam = config.estimator == "dvemb-adam"
        self._capture: GradientCapture = GradientCapture(
            model, config.width, config.seed, config.exclude, keep=self._adam, on_error=self._stop
        )
        self._group_of = {
            id(parameter): (optimizer, group)
            for optimizer in recorder.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        if self._adam:
            _check_adam(self._capture, self._group_of)
        self._averaging = _averaging_ranks(model)
        self._recorder = recorder
        self._writer = RowWriter(
            capture_folder(recorder.folder, self._capture.identity),
            self._capture.identity,
            rank=recorder.rank,
            first_step=recorder.first_step,
            queue_steps=config.queue_steps,
            patience_seconds=config.patience_seconds,
        )
        self._step = -1
        self._inside = self._opens = False  # whether hooks are installed; whether this is the window's first step
        self._total: Tensor | None = None
        # Of each micro-batch: sample ids, weights, rows or (AdamW) the factors that rows are made of.
        self._micro_batches: list[tuple[list[int], Tensor, Tensor | CapturedFactors]] = []

    def begin_step(self, step: int) -> None:
        """Install the hooks where a window begins, remove them where it has ended."""
        self._step, self._micro_batches = step, []
        wanted = self._writer.failure is None and any(
            start <= step < stop for start, stop in self._recorder.windows.values()
        )
        self._opens = wanted and not self._inside
        # By hand: the context is entered in one call of the training loop and left in another.
        if self._opens:
            self._capture.__enter__()
            self._total = None
            # The gradient is whole, averaged and clipped only when the optimizer is about to read it.
            self._before_update = self._recorder.optimizers[0].register_step_pre_hook(self._sum)
        elif self._inside and not wanted:
            self._capture.__exit__(None, None, None)
        self._inside = wanted

    def micro_batch(
        self, sample_ids: Iterable[int], weights: Tensor | Sequence[float], backward_scale: Tensor | float | None
    ) -> None:
        """Take the rows of a micro-batch right after its backward pass; see `TrajectoryRecorder.micro_batch`."""
        self._guarded(lambda: self._take(list(sample_ids), weights, backward_scale))

    def end_step(self, grad_norm: Tensor | float | None) -> None:
        """Queue the step's rows; the optimizer has stepped."""
        self._guarded(lambda: self._put(grad_norm))

    def flush(self) -> None:
        """Wait until all rows are on disk."""
        if self._writer.failure is None:
            self._writer.flush()

    def finish(self) -> None:
        """Remove the hooks and end the writer."""
        if self._inside:
            self._capture.__exit__(None, None, None)
            self._inside = False
        self._writer.close()

    def _guarded(self, work: Callable[[], None]) -> None:
        if not self._inside or self._writer.failure is not None:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - `_stop` says it; the training goes on
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        # The hooks stay until the next `begin_step`: this may be called from one of them, inside the backward pass.
        self._micro_batches = []
        self._writer.stop(f"step {self._step}: {type(error).__name__}: {error}")

    def _take(
        self, sample_ids: list[int], weights: Tensor | Sequence[float], backward_scale: Tensor | float | None
    ) -> None:
        import torch

        device = self._capture.weight(self._capture.layers[0]).device
        c = torch.as_tensor(weights, dtype=torch.float32, device=device).detach()
        # DistributedDataParallel takes the mean over ranks: a rank's own loss is that many times its sum of c_z l_z.
        scale = float(self._averaging) if backward_scale is None else backward_scale
        rows: Tensor | CapturedFactors = (
            self._capture.take_factors(c * scale) if self._adam else self._capture.take(c * scale)
        )
        self._micro_batches.append((sample_ids, c, rows))

    def _sum(self, optimizer: Optimizer, *_: Any) -> None:
        """Keep the gradient that an optimizer is about to read; the rows of the step must add up to it."""
        self._before_update.remove()  # once per window: it projects the whole gradient
        try:
            # A fused optimizer undoes a GradScaler's scale itself, later: here it is still in the gradient.
            scale = getattr(optimizer, "grad_scale", None)
            self._total = self._capture.sum_rows() / (1.0 if scale is None else scale)
        except Exception as error:  # noqa: BLE001 - `_stop` says it; the training goes on
            self._stop(error)

    def _put(self, grad_norm: Tensor | float | None) -> None:
        import torch

        if not self._micro_batches:
            raise UserError("no micro-batch was recorded in this step; call recorder.micro_batch after each backward()")
        arrays: dict[str, Any] = {
            "sample_ids": np.concatenate([np.asarray(ids, np.int64) for ids, _, _ in self._micro_batches]),
            "weights": torch.cat([weights for _, weights, _ in self._micro_batches]),
        }
        taken: list[Any] = [rows for _, _, rows in self._micro_batches]
        if self._adam:
            # Only now: D_k is the one after the update, and the optimizer has just stepped.
            scales = {layer: self._scale(layer) for layer in self._capture.layers}
            per_batch = [self._capture.scaled_rows(factors, scales) for factors in taken]
            arrays["gradients"], arrays["preconditioned"] = (torch.cat(rows) for rows in zip(*per_batch, strict=True))
        else:
            arrays["gradients"] = torch.cat(taken)
        if self._opens and self._total is not None:
            # The optimizer read the clipped gradient; the rows add up to the one before clipping.
            factor = clip_factor(None if grad_norm is None else float(grad_norm), self._recorder.clip_norm)
            if factor is not None:  # else what was clipped away is not known
                arrays["gradient"] = self._total / factor
                # With more ranks only all rows together add up: `CapturedRows.read` checks them then.
                if self._recorder.world == 1:
                    _check_sum(arrays)
        self._micro_batches = []
        self._writer.put(self._step, arrays)

    def _scale(self, layer: str) -> tuple[Tensor, Tensor]:
        # Here, not at the top: a training that captures for `dvemb` need not import the estimators.
        from curate.embeddings.dvemb_adam_estimator import layer_scale

        weight = self._capture.weight(layer)
        optimizer, group = self._group_of[id(weight)]
        settings = GroupSettings.read(type(optimizer).__name__, group)
        return layer_scale(self._capture, layer, optimizer.state.get(weight, {}), settings)


def _check_sum(arrays: dict[str, Any]) -> None:
    """Compare the rows of a step with its gradient.

    Raises:
        UserError: they do not add up to it.
    """
    rows, weights, total = (arrays[key].cpu().numpy() for key in ("gradients", "weights", "gradient"))
    if not adds_up(rows, weights, total):
        raise UserError(
            "the captured rows, times the samples' weights, do not add up to the step's gradient: call "
            "recorder.micro_batch after each backward(), with the weights c_z of the loss (one sample per row of the "
            "batch), and with backward_scale where the loss was multiplied before backward() (GradScaler.get_scale())"
        )


def _averaging_ranks(model: nn.Module) -> int:
    """Ranks that DistributedDataParallel takes the mean of gradients over; 1 without it."""
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    return distributed.get_world_size(model.process_group) if isinstance(model, DistributedDataParallel) else 1


def _refuse_compiled(model: nn.Module) -> None:
    """Hooks inside a compiled graph are not called.

    Raises:
        UserError: the model, or a module of it, is compiled.
    """
    from torch._dynamo import OptimizedModule

    # `torch.compile(model)` wraps it; `model.compile()` leaves only this attribute.
    for name, module in model.named_modules():
        if isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None:
            raise UserError(
                f"{name or 'the model'} is compiled (torch.compile): hooks inside it are not called, so its gradients "
                "cannot be captured in the run; train the windows uncompiled, or capture nothing and let curate.embed "
                "replay them"
            )


def _check_adam(capture: GradientCapture, group_of: dict[int, tuple[Optimizer, dict[str, Any]]]) -> None:
    """Refuse what `dvemb-adam` does not describe.

    Raises:
        UserError: a captured weight is not AdamW's.
    """
    for layer in capture.layers:
        optimizer, group = group_of.get(id(capture.weight(layer)), (None, {}))
        optimizer_name = type(optimizer).__name__
        # Adam adds its weight decay to the gradient; the recursion has it decoupled.
        if optimizer_name not in ("AdamW", "Adam") or (optimizer_name == "Adam" and group["weight_decay"]):
            raise UserError(
                f"capture.estimator dvemb-adam follows AdamW, {layer} is trained with "
                f"{optimizer_name if optimizer else 'no optimizer'}; use dvemb, or exclude the layer"
            )
