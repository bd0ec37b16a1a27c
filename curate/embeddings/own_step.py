"""A removal's own step, exactly: what the update would have been without the sample.

The derivative of Adam's update nearly vanishes where one sample alone drives a coordinate (rows of rare tokens), and
in the first steps, whose updates are close to signs; removing the sample there changes the update all the same. So the
step that a sample was used in is taken without it, and only the steps after it are linear:

    value(z) = <lambda_{k+1}, f_k(s_k, ghat_k - c_z g_z) - s_{k+1}>

still linear in lambda, so it embeds like the derivative. The change of Adam's second moment is not small where samples'
gradients cancel; it is taken in the coordinate that later updates read (`optimizers.adam.second_moment_change`), or
single values explode and sums over groups mean nothing. The own step needs per-sample gradients at every step of the
window: about 2 forward+backward passes, whatever the number of anchors, and more where sequences are short. `embedding`
applies it to the rows of token embeddings alone (with the clip factor held fixed), where the derivative is worst, and
keeps the derivative elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from curate.embeddings.products import sample_gradients
from curate.optimizers.adam import second_moment_change
from curate.optimizers.state import TrainingState
from curate.optimizers.step import clip_factor, piece_numbers, update_pieces, update_vjp

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from curate.optimizers.state import Group
    from curate.training.layout import FlatLayout
    from curate.training.replay import State
    from curate.training.task import Task


def exact_values(
    task: Task, layout: FlatLayout, state: State, clip_norm: float | None, cotangent: TrainingState
) -> Tensor:
    """Values of the step's samples with their own step exact in every parameter.

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        state: what step k read.
        clip_norm: threshold of the global gradient norm, or None.
        cotangent: `lambda_{k+1}`, (R, P) each.

    Returns:
        (B_k, R), nats per token of the anchors.
    """
    import torch

    factor = clip_factor(state.gradient.norm(), clip_norm)
    groups = layout.groups(state.record.groups)
    update = _Update(before_step(state), state.gradient, factor, groups, state.updates)
    rows = []
    for batch in state.batches:
        for part, gradients in sample_gradients(task, layout, batch, state.parameters, layout.names):
            removed = gradients.mul_(part.weights[:, None].to(gradients.dtype))
            without = _take_from(state.gradient, removed, _smallest(task, removed.dtype))
            factors = clip_factor(torch.linalg.vector_norm(without, dim=1), clip_norm)
            rows.append(_changes(update, without, factors, cotangent))
    return torch.cat(rows)


def embedding_corrections(
    task: Task,
    layout: FlatLayout,
    state: State,
    clip_norm: float | None,
    cotangent: TrainingState,
    names: Sequence[str],
) -> Tensor:
    """What to add to linear values so that the named parameters' part of the own step is exact; (B_k, R).

    The clip factor is held fixed: its change is in the linear value already.
    """
    import torch

    kept = layout.columns(names).to(state.gradient.device)
    parts = layout.parts(state.record.groups, names)
    groups, updates = [group for _, group in parts], [state.updates[index] for index, _ in parts]
    factor = clip_factor(state.gradient.norm(), clip_norm)
    before, after, gradient = _columns(before_step(state), kept), _columns(cotangent, kept), state.gradient[kept]
    update = _Update(before, gradient, factor, groups, updates)
    slopes, _ = update_vjp(before, factor * gradient, updates, groups, None, after)  # (R, p)
    rows = []
    for batch in state.batches:
        for part, gradients in sample_gradients(task, layout, batch, state.parameters, names):
            removed = gradients.mul_(part.weights[:, None].to(gradients.dtype))
            linear = factor * removed @ slopes.T
            without = _take_from(gradient, removed, _smallest(task, removed.dtype))
            rows.append(_changes(update, without, factor.expand(len(part)), after) + linear)
    return torch.cat(rows)


def before_step(state: State) -> TrainingState:
    """The vectors that the update of a step read."""
    return TrainingState(parameters=state.parameters, momentum=state.momentum, second_moment=state.second_moment)


@dataclass(frozen=True)
class _Update:
    """One step as it was.

    Attributes:
        before: what it read, (p,) each.
        gradient: (p,) `ghat`.
        factor: clip factor, a scalar.
        groups: places and settings; they cover all columns.
        updates: updates that each group had before.
    """

    before: TrainingState
    gradient: Tensor
    factor: Tensor
    groups: Sequence[Group]
    updates: Sequence[int]


def _take_from(gradient: Tensor, removed: Tensor, smallest: float) -> Tensor:
    """`ghat - c_z g_z` (b, p), exactly 0 where a sample alone drives a weight; written over `c_z g_z`.

    The two come from different kernels: what they leave of each other there is rounding, which Adam would normalise
    to an ordinary step. It is told apart by its size.
    """
    import torch

    width = max(1, piece_numbers(removed.device) // len(removed))
    for at, own in zip(gradient.split(width), removed.split(width, dim=1), strict=True):
        rounding = own.abs().mul_(smallest)
        torch.sub(at, own, out=own)
        own.masked_fill_(own.abs() <= rounding, 0)
    return removed


def _changes(update: _Update, without: Tensor, factors: Tensor, cotangent: TrainingState) -> Tensor:
    """`<lambda, f(s, factors without) - f(s, factor ghat)>` for each row of `without` (b, p); (b, R).

    It goes piece by piece, so b whole states are never held.
    """
    values = without.new_zeros(len(without), len(cotangent.parameters))
    for rule, group, done in update_pieces(update.groups, update.updates, len(without), without.device):
        place = group.place
        start, own = _start(update.before.part(place), group), cotangent.part(place)
        real = rule.update(start, update.factor * update.gradient[place], done, group)
        changed = rule.update(start, factors[:, None] * without[:, place], done, group)
        if changed.second_moment is not start.second_moment:  # or the optimizer has none
            values.addmm_(second_moment_change(real.second_moment, changed.second_moment), own.second_moment.T)
        if changed.momentum is not start.momentum:
            values.addmm_(changed.momentum.sub_(real.momentum), own.momentum.T)
        values.addmm_(changed.parameters.sub_(real.parameters), own.parameters.T)
    return values


def _smallest(task: Task, dtype: torch.dtype) -> float:
    """A hundred times the precision that gradients were computed in; four times that of half precision."""
    import torch

    if task.spec.autocast is None:
        return 100 * torch.finfo(dtype).eps
    return 4 * torch.finfo(getattr(torch, task.spec.autocast)).eps


def _start(before: TrainingState, group: Group) -> TrainingState:
    """The state with parameters 0 where the change of an update does not depend on them.

    Everywhere but in Adam with (coupled) weight decay the parameters enter linearly: without them the difference of
    two updates does not cancel to their rounding error.
    """
    import torch

    if group.settings.optimizer == "Adam" and group.settings.weight_decay:
        return before
    return replace(before, parameters=torch.zeros_like(before.parameters))


def _columns(vectors: TrainingState, kept: Tensor) -> TrainingState:
    """Copies of some columns."""
    return TrainingState(
        parameters=vectors.parameters[..., kept],
        momentum=vectors.momentum[..., kept],
        second_moment=vectors.second_moment[..., kept],
    )
