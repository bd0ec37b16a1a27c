"""A removal's own step, exactly: what the update would have been without the sample.

The derivative of Adam's update nearly vanishes where one sample alone drives a coordinate (rows of rare tokens), and
in the first steps, whose updates are close to signs; removing the sample there changes the update all the same. So the
step that a sample was used in is taken without it, and only the steps after it are linear:

    value(z) = <lambda_{k+1}, f_k(s_k, ghat_k - c_z g_z) - s_{k+1}>

still linear in lambda, so it embeds like the derivative. It needs per-sample gradients at every step of the window:
about 1.5 forward+backward passes, whatever the number of anchors. `embedding` applies it to the rows of token
embeddings alone (with the clip factor held fixed), where the derivative is worst, and keeps the derivative elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.embeddings.products import sample_gradients
from curate.optimizers.state import TrainingState
from curate.optimizers.step import clip_factor, update_state, update_vjp

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.state import Group
    from curate.task import Task
    from curate.trajectory.flat import FlatLayout
    from curate.trajectory.replay import State


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

    groups = layout.groups(state.record.groups)
    rows = []
    for batch in state.batches:
        for part, gradients in sample_gradients(task, layout, batch, state.parameters, layout.names):
            own = part.weights[:, None].to(gradients.dtype) * gradients
            without = _subtract(state.gradient, own, task)
            rows.append(_changes(state, without, groups, clip_norm, cotangent))
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

    groups = layout.groups(state.record.groups)
    clipped = state.gradient * clip_factor(state.gradient, clip_norm)
    factor = float(clip_factor(state.gradient, clip_norm))
    slopes, _ = update_vjp(before_step(state), clipped, state.updates, groups, None, cotangent)  # (R, P)
    kept = layout.columns(names).to(clipped.device)
    rows = []
    for batch in state.batches:
        for part, gradients in sample_gradients(task, layout, batch, state.parameters, names):
            removed = torch.zeros(len(part), layout.size, dtype=clipped.dtype, device=clipped.device)
            removed[:, kept] = factor * part.weights[:, None].to(gradients.dtype) * gradients
            without = _subtract(clipped, removed, task)
            exact = _changes(state, without, groups, None, cotangent, base=clipped)
            rows.append(exact + removed @ slopes.T)
    return torch.cat(rows)


def before_step(state: State) -> TrainingState:
    """The vectors that the update of a step read."""
    return TrainingState(parameters=state.parameters, momentum=state.momentum, second_moment=state.second_moment)


def _subtract(gradient: Tensor, own: Tensor, task: Task) -> Tensor:
    """`ghat - c_z g_z` (b, P), exactly 0 where a sample alone drives a weight.

    The two come from different kernels: what they leave of each other there is rounding, which Adam would normalise
    to an ordinary step. It is told apart by its size, a hundred times the precision that gradients were computed in.
    """
    import torch

    precision = torch.finfo(getattr(torch, task.spec.autocast or "float32"))
    smallest = 100 * min(precision.eps, torch.finfo(own.dtype).eps) if task.spec.autocast is None else 4 * precision.eps
    without = gradient - own
    return without.where(without.abs() > smallest * own.abs(), 0)


def _changes(
    state: State,
    gradients: Tensor,
    groups: Sequence[Group],
    clip_norm: float | None,
    cotangent: TrainingState,
    base: Tensor | None = None,
) -> Tensor:
    """`<lambda, f(s, g') - f(s, ghat)>` for each row g' of (b, P); (b, R)."""
    import torch

    start = _without_parameters(state, groups)
    real = update_state(start, state.gradient if base is None else base, state.updates, groups, clip_norm)
    rows = []
    for gradient in gradients:
        changed = update_state(start, gradient, state.updates, groups, clip_norm)
        rows.append(
            cotangent.parameters @ (changed.parameters - real.parameters)
            + cotangent.momentum @ (changed.momentum - real.momentum)
            + cotangent.second_moment @ (changed.second_moment - real.second_moment)
        )
    return torch.stack(rows)


def _without_parameters(state: State, groups: Sequence[Group]) -> TrainingState:
    """The state with parameters 0 where the change of an update does not depend on them.

    Everywhere but in Adam with (coupled) weight decay the parameters enter linearly: without them the difference of
    two updates does not cancel to their rounding error.
    """
    parameters = state.parameters.clone()
    for group in groups:
        if group.settings.optimizer != "Adam" or group.settings.weight_decay == 0:
            parameters[group.place] = 0
    return TrainingState(parameters=parameters, momentum=state.momentum, second_moment=state.second_moment)
