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

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from curate.optimizers.state import TrainingState
from curate.optimizers.step import clip_factor, update_state, update_vjp
from curate.task import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.state import Group
    from curate.task import Task
    from curate.trajectory.flat import FlatLayout
    from curate.trajectory.replay import State

# What PyTorch says where a model cannot run under its function transforms.
_NO_TRANSFORM = ("vmap", "functorch", "setup_context")
_GRADIENT_NUMBERS = 1 << 28  # per-sample gradients held at once: 1 GiB in float32


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
            without = state.gradient - part.weights[:, None].to(gradients.dtype) * gradients
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
            exact = _changes(state, clipped - removed, groups, None, cotangent, base=clipped)
            rows.append(exact + removed @ slopes.T)
    return torch.cat(rows)


def before_step(state: State) -> TrainingState:
    """The vectors that the update of a step read."""
    return TrainingState(parameters=state.parameters, momentum=state.momentum, second_moment=state.second_moment)


def sample_gradients(
    task: Task, layout: FlatLayout, batch: Batch, parameters: Tensor, names: Sequence[str]
) -> Iterator[tuple[Batch, Tensor]]:
    """Per-sample gradients of some parameters, a few samples at a time.

    A model that cannot run under vmap (custom kernels, branches that depend on data) goes sample by sample.

    Yields:
        Consecutive parts of the batch, and (b, p) `g_z` of the named parameters in the layout's order.
    """
    import torch

    point = layout.views(parameters)
    chosen = [name for name in layout.names if name in set(names)]
    size = sum(point[name].numel() for name in chosen)

    way = _together
    for part in batch.split(max(1, _GRADIENT_NUMBERS // size)):
        try:
            gradients = way(task, part, point, chosen)
        except (RuntimeError, NotImplementedError) as error:
            if way is _one_by_one or not any(phrase in str(error) for phrase in _NO_TRANSFORM):
                raise
            way = _one_by_one
            gradients = way(task, part, point, chosen)
        yield part, torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def _together(task: Task, batch: Batch, point: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    from torch.func import grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sample_loss(values: dict[str, Tensor], tokens: Tensor, loss_mask: Tensor) -> Tensor:
        one = Batch(tokens=tokens[None], loss_mask=loss_mask[None], weights=batch.weights[:1])
        return task.sample_losses(one, {**point, **values})[0]

    values = {name: point[name] for name in names}
    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0))(values, batch.tokens, batch.loss_mask)
    return [gradients[name] for name in names]


def _one_by_one(task: Task, batch: Batch, point: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    import torch

    values = {name: point[name].detach().clone().requires_grad_() for name in names}
    rows = []
    for one in batch.split(1):
        loss = task.sample_losses(one, {**point, **values})[0]
        rows.append(torch.autograd.grad(loss, list(values.values()), materialize_grads=True))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


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
