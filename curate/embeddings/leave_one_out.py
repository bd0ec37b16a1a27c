"""The exact leave-one-out update: what the step that used a sample would have been without it.

The derivative of Adam's update nearly vanishes where one sample alone drives a coordinate (rows of rare tokens), and
in the first steps, whose updates are close to signs. Removing the sample changes the update there all the same. So the
step that used the sample is taken again without it, and only the later steps are linear:

    value(z) = <lambda_{k+1}, f_k(s_k, ghat_k - c_z g_z) - s_{k+1}>

This is still linear in lambda, so it embeds like the derivative. Where the gradients of samples cancel, the change of
Adam's second moment is not small. It is taken in the coordinate that later updates read
(`optimizers.adam.second_moment_change`); otherwise single values explode and sums over groups mean nothing.

Cost: per-sample gradients at every step of the window, about 2 forward-backward passes whatever the number of anchors,
and more where sequences are short. `embedding` takes only the rows of token embeddings exactly (with the clip factor
held fixed), where the derivative is worst, and keeps the derivative elsewhere.
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
    """Values of the step's samples by the exact leave-one-out update of every parameter.

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
        for samples, gradients in sample_gradients(task, layout, batch, state.parameters, layout.names):
            removed = gradients.mul_(samples.weights[:, None].to(gradients.dtype))
            without = _take_from(state.gradient, removed, _rounding_share(task, removed.dtype))
            # The training would have clipped another gradient: each sample has its own clip factor.
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
    """What to add to linear values so that the update of the named parameters is exact; (B_k, R).

    The clip factor is held fixed: its change is in the linear value already.
    """
    import torch

    columns = layout.columns(names).to(state.gradient.device)
    named_groups = layout.parts(state.record.groups, names)
    groups, updates = [group for _, group in named_groups], [state.updates[index] for index, _ in named_groups]
    # Of the whole gradient: clipping is global, although only some columns are looked at.
    factor = clip_factor(state.gradient.norm(), clip_norm)
    before, after = _columns(before_step(state), columns), _columns(cotangent, columns)
    gradient = state.gradient[columns]
    update = _Update(before, gradient, factor, groups, updates)
    # clip_norm None, because the factor is in the gradient already.
    u, _ = update_vjp(before, factor * gradient, updates, groups, None, after)  # (R, p)
    rows = []
    for batch in state.batches:
        for samples, gradients in sample_gradients(task, layout, batch, state.parameters, names):
            removed = gradients.mul_(samples.weights[:, None].to(gradients.dtype))
            linear = factor * removed @ u.T  # before `_take_from`, which writes over `removed`
            without = _take_from(gradient, removed, _rounding_share(task, removed.dtype))
            # The linear value is -<c_z g_z, u>: adding it back leaves the exact change alone.
            rows.append(_changes(update, without, factor.expand(len(samples)), after) + linear)
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
        groups: columns and settings of each; together they cover all columns.
        updates: updates that each group had before.
    """

    before: TrainingState
    gradient: Tensor
    factor: Tensor
    groups: Sequence[Group]
    updates: Sequence[int]


def _take_from(gradient: Tensor, removed: Tensor, rounding_share: float) -> Tensor:
    """`ghat - c_z g_z` (b, p), exactly 0 where a sample alone drives a weight; written over `c_z g_z`.

    Different kernels make the two. Where they should cancel, their difference is rounding, which Adam would normalise
    to an ordinary step. A difference below `rounding_share` of `c_z g_z` is taken for rounding.
    """
    import torch

    # In pieces of columns that fit a cache: b x P temporaries would double the memory of the gradients.
    width = max(1, piece_numbers(removed.device) // len(removed))
    for whole, sample in zip(gradient.split(width), removed.split(width, dim=1), strict=True):
        rounding = sample.abs().mul_(rounding_share)
        torch.sub(whole, sample, out=sample)
        sample.masked_fill_(sample.abs() <= rounding, 0)
    return removed


def _changes(update: _Update, without: Tensor, factors: Tensor, cotangent: TrainingState) -> Tensor:
    """`<lambda, f(s, factors without) - f(s, factor ghat)>` for each row of `without` (b, p); (b, R).

    It goes piece by piece, so b whole states are never held.
    """
    values = without.new_zeros(len(without), len(cotangent.parameters))
    for rule, group, done in update_pieces(update.groups, update.updates, len(without), without.device):
        columns = group.place
        start, weight = _start(update.before.part(columns), group), cotangent.part(columns)
        # The real update is made again by the same code, not read from s_{k+1}: rounding cancels in the difference.
        real = rule.update(start, update.factor * update.gradient[columns], done, group)
        changed = rule.update(start, factors[:, None] * without[:, columns], done, group)
        # A rule passes a buffer that its optimizer does not keep through as the same object.
        if changed.second_moment is not start.second_moment:
            values.addmm_(second_moment_change(real.second_moment, changed.second_moment), weight.second_moment.T)
        if changed.momentum is not start.momentum:
            values.addmm_(changed.momentum.sub_(real.momentum), weight.momentum.T)
        values.addmm_(changed.parameters.sub_(real.parameters), weight.parameters.T)
    return values


def _rounding_share(task: Task, dtype: torch.dtype) -> float:
    """A hundred times the precision that gradients were computed in; four times that of half precision."""
    import torch

    # Half precision leaves eps near 1e-2 (bfloat16): a hundred times it would call real differences rounding.
    if task.spec.autocast is None:
        return 100 * torch.finfo(dtype).eps
    return 4 * torch.finfo(getattr(torch, task.spec.autocast)).eps


def _start(before: TrainingState, group: Group) -> TrainingState:
    """The state with parameters 0 where the change of an update does not depend on them.

    The parameters enter every update linearly, except that of Adam with (coupled) weight decay. An update is small
    beside the weights: with them in it, the difference of two updates would drown in the rounding of the weights.
    """
    import torch

    # Coupled decay puts the weights into the gradient, and so through the square root of the second moment.
    if group.settings.optimizer == "Adam" and group.settings.weight_decay:
        return before
    return replace(before, parameters=torch.zeros_like(before.parameters))


def _columns(vectors: TrainingState, columns: Tensor) -> TrainingState:
    """Copies of some columns."""
    return TrainingState(
        parameters=vectors.parameters[..., columns],
        momentum=vectors.momentum[..., columns],
        second_moment=vectors.second_moment[..., columns],
    )
