"""Probes: what one more use of a sample would do to the target's loss, from the state that training is in now.

The run is continued for n steps on its last batches (`Run.continued`), and the target's gradient pushed backward
through them to the cotangent `lambda` of the state after the first (`embeddings.adjoint`). A sample z that was never
trained on is added to that first step, at the current state s, with the weight c_z that it would have in a batch:

    value(z) = l_q(theta_n without z) - l_q(theta_n with z)
             = - <lambda, f(s, ghat + c_z g_z(theta)) - f(s, ghat)>          own step exact
             ~ - c_z <g_z(theta), u>,   u = vjp of f with respect to ghat    own step linear

the sign and the unit of every value here. A single step of Adam realises only 1 - beta1 of a gradient and momentum
carries the rest, but one step ahead ranks the samples of a domain .97 to .99 like ten (two runs of the branch bench),
and needs no second derivative. f is the optimizers' own update (clipping, weight decay) at the settings of the
step of median lr (at a stage's end lr may have fallen to 0), and at a small share of that lr, by which values are
divided again: they are to be about the current state, and at a full lr the path that these very batches take from it
decides. On the demo's run two draws of batches ranked the same samples of a domain .23 to .63 alike at the median lr,
.89 to .97 at a tenth of it.

Every other sample has the linear value at the cost of forward passes: the slope of its loss along u by a difference,

    <g_z(theta), u> ~ (l_z(theta + h u) - l_z(theta)) / h,      h |u| = `products.STEP` |theta|

in float32 whatever the run trained in, and without weights that no gradient has moved (rows of tokens never trained on:
Adam's scale is huge there, and the rest of u would drown in rounding).

R losses (halves of targets), T targets, V directions (targets, or several together), N samples, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.arrays import read_arrays, write_arrays
from curate.embeddings.adjoint import StepOptions, adjoint_step
from curate.embeddings.adjoint_estimator import load_cotangent, save_cotangent
from curate.embeddings.own_step import before_step
from curate.embeddings.products import STEP, check_curvature
from curate.embeddings.states import limits, plan_states, states_backward
from curate.errors import UserError
from curate.optimizers.state import Group, TrainingState
from curate.optimizers.step import update_vjp
from curate.progress import progress
from curate.target import loss_gradients
from curate.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.embeddings.adjoint_estimator import AdjointConfig
    from curate.formats.mds import Sample
    from curate.task import Batch, Task
    from curate.trajectory.replay import Replay, State

    Floats = npt.NDArray[np.float64]

_SAVED = 32  # batches of probes between saves


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The current state, and what it leads to.

    Attributes:
        state: what the next step reads.
        cotangent: of the state after it, (R, P) each.
    """

    state: State
    cotangent: TrainingState


def look_ahead(
    replay: Replay, start: int, losses: Sequence[Batch], config: AdjointConfig, *, batch_size: int, scratch: Path
) -> Outlook:
    """Walk from the end of a continued run back to the current state.

    Args:
        replay: of `Run.continued`.
        start: the first step that it is continued by, which reads the current state.
        losses: R losses, read at the end.
        config: curvature, memory and disk.
        batch_size: samples per pass over the losses.
        scratch: folder for what an interrupted call continues from.

    Raises:
        UserError: memory or disk limits are too small, or the model cannot be differentiated twice.
    """
    run, path = replay.run, scratch / "cotangent.safetensors"
    saved = load_cotangent(path, replay.device)
    if saved is not None:
        return Outlook(state=next(replay.states(start, start + 1)), cotangent=saved[1])
    allowed = limits(replay, config.memory_bytes, config.disk_bytes)
    plan = plan_states(replay.layout.size, start, run.spec.steps, *allowed)
    replay.horizon_model(run.spec.steps)
    if config.hessian != "difference" and run.spec.steps > start + 1:
        check_curvature(replay.task, replay.layout, losses[0].to(replay.device))
    cotangent = TrainingState.zeros(loss_gradients(replay.task, replay.layout, losses, batch_size))
    options = StepOptions(hessian=config.hessian, rows=False)
    states = states_backward(replay, plan, scratch / "states")
    for state in progress(states, total=run.spec.steps - start, what="look ahead"):
        if state.record.step > start:
            _, cotangent = adjoint_step(replay.task, replay.layout, state, run.spec.clip_norm, cotangent, options)
    save_cotangent(path, start + 1, cotangent)
    return Outlook(state=state, cotangent=cotangent)


def probe_values(
    replay: Replay,
    outlook: Outlook,
    batches: Sequence[Sequence[Sample]],
    config: AdjointConfig,
    *,
    step_tokens: float,
    scratch: Path,
) -> Floats:
    """Values of samples for each loss of an outlook.

    Args:
        replay: of the run.
        outlook: see `look_ahead`.
        batches: N samples, as they go through the model together; how they are cut changes rounding and memory only.
        config: how the step that a sample is used in is taken.
        step_tokens: predicted tokens of a training step: `c_z` is a sample's share of them.
        scratch: folder for what an interrupted call continues from.

    Returns:
        float64 (N, R), nats per token of the losses; positive = training on the sample lowers the loss.

    Raises:
        UserError: a number is not finite (names the sample).
    """
    options = StepOptions(own_step=config.own_step, hessian=config.hessian, curvature=0.0)
    blocks = [batches[start : start + _SAVED] for start in range(0, len(batches), _SAVED)]
    found = []
    for number, block in enumerate(progress(blocks, total=len(blocks), what="probes", unit="block")):
        path = scratch / f"probes-{number:06d}.npz"
        if not path.exists():
            values = [_added(replay, outlook, samples, options, step_tokens) for samples in block]
            write_arrays(path, {"values": np.concatenate(values)})
        found.append(read_arrays(path)["values"])
    return np.concatenate(found)


def target_directions(replay: Replay, outlook: Outlook, weights: Sequence[Sequence[float]]) -> Tensor:
    """`u` of each of T targets, (T, P), 0 where no gradient has moved a weight.

    Args:
        replay: of the run.
        outlook: see `look_ahead`.
        weights: (T, R), each target's share of every loss.
    """
    import torch

    state = outlook.state
    groups = replay.layout.groups(state.record.groups)
    u, _ = update_vjp(
        before_step(state), state.gradient, state.updates, groups, replay.run.spec.clip_norm, outlook.cotangent
    )
    u = u.where(moved(state, groups), 0.0)
    return torch.as_tensor(weights, dtype=u.dtype, device=u.device) @ u


def moves_along(directions: Tensor, parameters: Tensor) -> tuple[Tensor, list[float]]:
    """`h u` of each of V directions `u`, (V, P), and V times h."""
    import torch

    whole = float(parameters.norm()) * STEP
    steps = [whole / length if (length := float(direction.norm())) else 1.0 for direction in directions]
    return torch.stack([h * direction for h, direction in zip(steps, directions, strict=True)]), steps


def moved(state: State, groups: Sequence[Group]) -> Tensor:
    """(P,) whether a gradient has moved each weight; all of a group whose optimizer keeps nothing."""
    found = (state.momentum != 0) | (state.second_moment != 0)
    for group in groups:
        if not found[group.place].any():
            found[group.place] = True
    return found


def forward_slopes(
    replay: Replay, parameters: Tensor, moves: tuple[Tensor, list[float]], samples: Sequence[Sample]
) -> Floats:
    """`<g_z(theta), u>` of B samples along V directions (`moves_along`), 1 + V forward passes; float64 (B, V)."""
    return _slopes(replay, parameters, moves, samples, lambda task, logits, batch: task.losses_of(logits, batch))


def token_slopes(
    replay: Replay, parameters: Tensor, moves: tuple[Tensor, list[float]], samples: Sequence[Sample]
) -> Floats:
    """The same of their n predicted tokens, one sample after the other: float64 (n, V); their mean is the sample's."""
    return _slopes(
        replay, parameters, moves, samples,
        lambda task, logits, batch: task.token_losses_of(logits, batch)[batch.loss_mask[:, 1:]],
    )  # fmt: skip


def _slopes(
    replay: Replay,
    parameters: Tensor,
    moves: tuple[Tensor, list[float]],
    samples: Sequence[Sample],
    losses_of: Callable[[Task, Tensor, Batch], Tensor],
) -> Floats:
    """Slopes (K, V) of K losses of a batch along V directions.

    Raises:
        UserError: one is not finite.
    """
    import torch

    task, layout = copy(replay.task), replay.layout
    task.spec = task.spec.model_copy(update={"autocast": None})
    batch = collate(samples, np.ones(len(samples), np.float32)).to(replay.device)

    def losses(at: Tensor) -> Tensor:
        return losses_of(task, task.logits(batch, layout.views(at)), batch)

    with torch.no_grad():
        base = losses(parameters)
        slopes = [(losses(parameters + move) - base).double() / h for move, h in zip(*moves, strict=True)]
    found: Floats = torch.stack(slopes, dim=1).cpu().numpy()
    if not np.isfinite(found).all():
        raise UserError(
            f"a loss among samples {[sample.sample_id for sample in samples]} is not finite at the run's last state; "
            "leave the bad one out of the streams"
        )
    return found


def _added(
    replay: Replay, outlook: Outlook, samples: Sequence[Sample], options: StepOptions, step_tokens: float
) -> Floats:
    """Values (B, R) of samples that are added to the step: taken away with a negative weight, and turned round."""
    state, weights = outlook.state, [-sample.predicted_tokens / step_tokens for sample in samples]
    record = replace(state.record, micro_batches=[([sample.sample_id for sample in samples], weights)])
    batch = collate(samples, np.asarray(weights, np.float32)).to(replay.device)
    rows, _ = adjoint_step(
        replay.task, replay.layout, replace(state, record=record, batches=[batch]), replay.run.spec.clip_norm,
        outlook.cotangent, options,
    )  # fmt: skip
    assert rows is not None
    values: Floats = -rows.double().cpu().numpy()
    return values
