"""Replay: run recorded steps again from a snapshot, with the training's own optimizers and kernels; verify each one.

P is the number of trainable parameters. Memory: model, gradients and optimizer state, as in training. A run has one
or several `torch.optim` optimizers (Muon and AdamW, say); replay holds them as a list, in the order of the groups.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.errors import UserError
from curate.core.machine import usable_device
from curate.optimizers.settings import BUFFERS, GroupSettings
from curate.training.drift import check_drift
from curate.training.layout import FlatLayout
from curate.training.model import named_parameters, train_only
from curate.training.samples import SampleReader
from curate.training.snapshots import load_state, put_state, state_tensors
from curate.training.task import Batch, Task, collate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from curate.training.run import Run


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One recorded step.

    Attributes:
        step: its number.
        micro_batches: sample ids and weights `c_z` of each micro-batch, over all ranks.
        loss: recorded `L_k`, nats per token, or None.
        grad_norm: recorded norm before clipping, or None.
        clip_factor: what clipping multiplied the gradient by; None where that is not known.
        groups: settings per parameter group.
    """

    step: int
    micro_batches: list[tuple[list[int], list[float]]]
    loss: float | None
    grad_norm: float | None
    clip_factor: float | None
    groups: list[GroupSettings]

    @property
    def clipped(self) -> float:
        """The clip factor, where it must be known.

        Raises:
            UserError: it is not known.
        """
        if self.clip_factor is None:
            raise UserError(
                f"the gradient norm of step {self.step} was not recorded, so what clipping did there is not known: "
                "pass it to end_step (or log it), or use the adjoint estimator, which measures it"
            )
        return self.clip_factor

    @property
    def updated(self) -> bool:
        """Whether any optimizer took the step."""
        return any(group.updated for group in self.groups)

    @property
    def size(self) -> int:
        """Samples of the step."""
        return sum(len(ids) for ids, _ in self.micro_batches)


@dataclass(frozen=True, kw_only=True)
class ReplayedStep:
    """A step after its backward pass and before its update: the model holds `theta_k`, `.grad` holds `ghat_k`.

    Attributes:
        record: the step.
        batches: its micro-batches.
        captured: what `after_backward` returned for each micro-batch.
        optimizers: in their state before the step, but for hyper-parameters, which `record` has.
    """

    record: StepRecord
    batches: list[Batch]
    captured: list[Any]
    optimizers: Sequence[torch.optim.Optimizer]


@dataclass(frozen=True, kw_only=True)
class State:
    """Everything the update of one step read, as vectors of length P (see `FlatLayout`).

    Attributes:
        record: the step.
        batches: its micro-batches.
        parameters: `theta_k`.
        momentum: moment `m_k` (Adam, AdamW) or buffer (SGD, Muon) before the step; 0 where there is none.
        second_moment: `v_k` (Adam, AdamW) before the step; 0 where there is none.
        gradient: `ghat_k` before clipping.
        updates: per parameter group, updates that it had before this step; SGD and Muon do not count theirs: 0 before
            the first one, 1 after it.
    """

    record: StepRecord
    batches: list[Batch]
    parameters: Tensor
    momentum: Tensor
    second_moment: Tensor
    gradient: Tensor
    updates: list[int]


class Replay:
    """Repeats steps of a run.

    Args:
        run: the recorded run.
        device: where to run; the training's own kind of device repeats its numbers best.
        tolerance: largest relative difference between recorded and replayed loss and gradient norm.

    Raises:
        UserError: the run used an optimizer that cannot be rebuilt with this torch.
    """

    def __init__(self, run: Run, device: torch.device | str = "cpu", tolerance: float = 1e-3) -> None:
        import torch

        self.run, self.device, self.tolerance = run, usable_device(device), tolerance
        # Muon came to torch.optim late, so a run may have been recorded with a newer torch
        for name in run.spec.optimizers:
            if name not in BUFFERS or not hasattr(torch.optim, name):
                raise UserError(
                    f"run {run.folder} was trained with {name}; replay rebuilds {', '.join(BUFFERS)} as far as this "
                    f"torch {torch.__version__} has them"
                )
        self.reader = SampleReader(run.source)
        self.task = Task(run.spec.task, self.device)
        # what the training froze must not get gradients here: they would count in the norm
        trained = {name for group in run.spec.groups for name in group}
        train_only(self.task.model, trained, f"run {run.folder}")
        self.layout = FlatLayout(self.task.model, run.spec.groups)
        self._pass_seconds: list[float] = []

    @property
    def pass_seconds(self) -> float | None:
        """Median seconds of a forward-backward pass of a step's batch in this process: the unit of all costs."""
        # median: the first pass compiles and allocates
        return median(self._pass_seconds) if self._pass_seconds else None

    @property
    def model(self) -> nn.Module:
        """The model; its parameters are those of the step being replayed."""
        return self.task.model

    def load(self, step: int) -> None:
        """Put the model into its state before `step`, which must have a snapshot."""
        self._refuse_diverged(step)
        load_state(self.run.snapshot(step), self.model)

    def model_at(self, step: int) -> nn.Module:
        """The model in its state before `step`: loaded, or replayed from the last snapshot before it."""
        start = self.run.snapshot_before(step)
        if start == step:
            self.load(step)
        else:
            for _ in self.steps(start, step):
                pass
        return self.model

    def optimizers_at(self, step: int) -> Sequence[torch.optim.Optimizer]:
        """The optimizers, and the model too, in their state before `step`; see `model_at`."""
        start = self.run.snapshot_before(step)
        if start == step:
            return self.restore(step)
        # keep the last step but exhaust the generator: that step's update comes after its yield
        return deque(self.steps(start, step), maxlen=1)[0].optimizers

    def batches(self, record: StepRecord) -> list[Batch]:
        """The micro-batches of a step, on the device."""
        return [
            collate(self.reader.samples(ids), np.asarray(weights, np.float32)).to(self.device)
            for ids, weights in record.micro_batches
        ]

    def steps(
        self,
        start: int,
        stop: int,
        after_backward: Callable[[Tensor], Any] | None = None,
        checkpoint: Path | None = None,
    ) -> Iterator[ReplayedStep]:
        """Repeat steps `start` to `stop - 1`, from the last snapshot at or before `start`.

        Each step is yielded after its backward pass and before its update; after the last one the model is at `stop`.
        At each snapshot on the way, and at the end where there is one, the replayed state is compared with it. Then the
        snapshot is loaded, so that rounding differences (other hardware, other thread counts) do not grow.
        A caller must not change gradients: the next snapshot would refuse it. To train differently, use `restore`,
        `backward` and `update`.

        Args:
            start: first step.
            stop: step after the last.
            after_backward: called with the weights (B,) after each micro-batch's backward pass.
            checkpoint: state before `start` as `save_state` wrote it, to start from instead of a snapshot.

        Raises:
            UserError: loss, gradient norm or state differ from the recorded ones, or the training had diverged; the
                message names the step and the numbers.
        """
        self._refuse_diverged(stop)
        first = self.run.snapshot_before(start) if checkpoint is None else start
        optimizers = self.restore(first, checkpoint)
        # the one at `first` was just loaded
        snapshots = {step for step in self.run.snapshots if step > first}
        for record in records(self.run, first, stop):
            # a snapshot is of the state before its step, so it is compared before that step's batch is run
            if record.step in snapshots:
                check_drift(self.run, record.step, self.model, self.tolerance)
                load_state(self.run.snapshot(record.step), self.model, optimizers)
            batches = self.batches(record)
            begin = perf_counter()
            loss, captured = self.backward(batches, optimizers, after_backward)
            self._pass_seconds.append(perf_counter() - begin)
            self.check(record, loss)
            # the steps from the snapshot to `start` only lead there
            if record.step >= start:
                yield ReplayedStep(record=record, batches=batches, captured=captured, optimizers=optimizers)
            self.update(record, optimizers)
        if stop in snapshots:
            check_drift(self.run, stop, self.model, self.tolerance)

    def states(self, start: int, stop: int, checkpoint: Path | None = None) -> Iterator[State]:
        """Like `steps`, with copies of everything the update reads: 4 P numbers per step."""
        parameters = named_parameters(self.model)
        for replayed in self.steps(start, stop, checkpoint=checkpoint):
            momentum, second_moment, updates = self.moments(replayed.optimizers)
            # no gradient (an expert that was not used) counts as 0, as in the clip norm
            gradient = {n: p.detach().new_zeros(p.shape) if p.grad is None else p.grad for n, p in parameters.items()}
            yield State(
                record=replayed.record,
                batches=replayed.batches,
                parameters=self.layout.flatten(parameters).detach(),
                momentum=momentum,
                second_moment=second_moment,
                gradient=self.layout.flatten(gradient),
                updates=updates,
            )

    def moments(self, optimizers: Sequence[torch.optim.Optimizer]) -> tuple[Tensor, Tensor, list[int]]:
        """Copy what the optimizers keep: momentum (P,), second moment (P,), updates done in each group.

        See `curate.optimizers.state.TrainingState`; zeros where an optimizer, or a parameter without a gradient so
        far, has none.
        """
        parameters, state = named_parameters(self.model), optimizer_state(optimizers)
        zeros = {name: parameter.detach().new_zeros(parameter.shape) for name, parameter in parameters.items()}
        buffers = {name: state.get(parameter, {}) for name, parameter in parameters.items()}
        momentum = {n: kept.get("exp_avg", kept.get("momentum_buffer", zeros[n])) for n, kept in buffers.items()}
        second_moment = {n: kept.get("exp_avg_sq", zeros[n]) for n, kept in buffers.items()}
        # SGD and Muon keep no counter: a buffer means that there was an update. max: a parameter that got its first
        # gradient late counts fewer
        updates = [
            max((int(buffers[name].get("step", 1)) for name in group if buffers[name]), default=0)
            for group in self.run.spec.groups
        ]
        return self.layout.flatten(momentum), self.layout.flatten(second_moment), updates

    def restore(self, step: int, checkpoint: Path | None = None) -> list[torch.optim.Optimizer]:
        """Put the model into its state before `step` (a snapshot, or a checkpoint); return optimizers in theirs.

        `update` sets their hyper-parameters. Two neighbouring optimizers of one class become one with all their groups.
        """
        import torch

        self._refuse_diverged(step)
        parameters, spec = named_parameters(self.model), self.run.spec
        groups_by_class = groupby(zip(spec.optimizers, spec.groups, strict=True), key=itemgetter(0))
        # lr 0: a step before `update` has set the recorded one would change nothing
        optimizers: list[torch.optim.Optimizer] = [
            getattr(torch.optim, class_name)(
                [{"params": [parameters[name] for name in names]} for _, names in class_groups], lr=0.0
            )
            for class_name, class_groups in groups_by_class
        ]
        load_state(checkpoint or self.run.snapshot(step), self.model, optimizers)
        return optimizers

    def checkpoint(self, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
        """Copy the state of model and optimizers in memory, for `rewind`; as large as a snapshot."""
        return {key: tensor.clone() for key, tensor in state_tensors(self.model, optimizers).items()}

    def rewind(self, checkpoint: dict[str, Tensor], optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Put model and optimizers back to a checkpoint, which stays usable."""
        put_state(checkpoint, self.model, optimizers, "checkpoint")

    def backward(
        self,
        batches: Sequence[Batch],
        optimizers: Sequence[torch.optim.Optimizer],
        after_backward: Callable[[Tensor], Any] | None = None,
    ) -> tuple[float, list[Any]]:
        """Leave `ghat`, the gradient of some micro-batches, in `.grad`.

        Returns:
            Their loss `sum c_z l_z`, nats per token, and what `after_backward` returned for each of them.
        """
        # to None and not to 0: an optimizer skips a parameter without gradient, but decays one with gradient 0
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss, captured = 0.0, []
        for batch in batches:
            micro_loss = (self.task.sample_losses(batch) * batch.weights).sum()
            micro_loss.backward()
            loss += micro_loss.item()
            if after_backward is not None:
                captured.append(after_backward(batch.weights))
        return loss, captured

    def update(self, record: StepRecord, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Clip and step as the training did, with the recorded hyper-parameters; do nothing where it took no step."""
        from torch.nn.utils import clip_grad_norm_

        if not record.updated:
            return
        # over all parameters at once, before any optimizer steps; torch's own function rounds as the training did
        if self.run.spec.clip_norm is not None:
            clip_grad_norm_(named_parameters(self.model).values(), self.run.spec.clip_norm)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        for group, settings in zip(groups, record.groups, strict=True):
            group.update(settings.as_group())
            # this optimizer alone skipped the step, and torch skips a parameter without gradient
            for parameter in group["params"] if not settings.updated else ():
                parameter.grad = None
        for optimizer in optimizers:
            optimizer.step()

    def gradient_norm(self) -> float:
        """Global norm of what is in `.grad`."""
        from torch.nn.utils import get_total_norm

        parameters = named_parameters(self.model).values()
        return float(get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def check(self, record: StepRecord, loss: float) -> None:
        """Compare a step's loss, and the norm of what is in `.grad`, with the record.

        In a skipped step, recorded numbers that are not finite are not compared: they may be why it was skipped.

        Raises:
            UserError: one differs by more than the tolerance; a NaN differs from everything.
        """
        norm = self.gradient_norm()
        for what, replayed, recorded in (("loss", loss, record.loss), ("gradient norm", norm, record.grad_norm)):
            if recorded is None or (not record.updated and not math.isfinite(recorded)):
                continue
            # isclose is False for NaN
            if not math.isclose(replayed, recorded, rel_tol=self.tolerance):
                raise UserError(
                    f"replay of step {record.step} gives {what} {replayed:.6g}, recorded was {recorded:.6g}: likely "
                    "causes are dropout or other randomness, another autocast type, streams or snapshots changed "
                    "since, sample weights that are not those of the loss, or an update before it that was not "
                    "optimizer.step() on the clipped gradient; on other hardware raise --tolerance"
                )

    def _refuse_diverged(self, stop: int) -> None:
        """Refuse steps after the training diverged.

        Raises:
            UserError: names the step from which on the training was not finite, and a window before it.
        """
        first = self.run.diverged
        if first is not None and first < stop:
            finite = [name for name, (_, end) in self.run.spec.windows.items() if end <= first]
            raise UserError(
                f"the training of {self.run.folder} diverged at step {first} (loss or gradient norm is not finite), so "
                f"steps up to {stop} have no values; "
                + (f"use a window before it (--window {finite[-1]})" if finite else "no declared window lies before it")
            )


def optimizer_state(optimizers: Sequence[torch.optim.Optimizer]) -> dict[Tensor, dict[str, Any]]:
    """The buffers that some optimizers keep of each parameter; none where it never had a gradient."""
    return {parameter: buffers for optimizer in optimizers for parameter, buffers in optimizer.state.items()}


def records(run: Run, start: int, stop: int) -> Iterator[StepRecord]:
    """The recorded steps `start` to `stop - 1`."""
    frame = run.steps.filter(pl.col("step").is_between(start, stop, closed="left"))
    # in order of rank and micro-batch: sums of gradients round by their order
    for _, rows in frame.group_by("step", maintain_order=True):
        # all but samples and weights is the same in every row of a step
        common = rows.row(0, named=True)
        yield StepRecord(
            step=common["step"],
            micro_batches=list(zip(rows["sample_ids"].to_list(), rows["weights"].to_list(), strict=True)),
            loss=common["loss"],
            grad_norm=common["grad_norm"],
            clip_factor=common["clip_factor"],
            groups=[GroupSettings(**group) for group in common["groups"]],
        )
