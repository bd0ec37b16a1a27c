"""Products with the Hessian of a batch's loss, and each sample's directional derivative along the same directions.

For directions u (R, P) at parameters theta, with `L = sum_z c_z l_z`:

    directional derivatives   <g_z, u_r>   (R, B)        curvature   H u_r   (R, P)

Two methods:

- `exact` differentiates `<grad L, u>` once more (Pearlmutter 1994). With respect to theta the derivative is H u, with
  respect to the weights c_z it is <g_z, u>.
- `difference` takes `(grad L(theta + h u) - grad L(theta)) / h` with the training's own kernels, so it also serves
  models that cannot be differentiated twice. h makes the step `STEP` long relative to |theta|. Where u is concentrated
  on weights that hardly any sample moves (Adam's 1 / sqrt(v) is huge there), the rest drowns in float32 rounding. Only
  weights whose gradient is exactly 0, such as the rows of absent tokens, are left out. Compare it with `exact` on a
  model of the kind (`curate.verify`) before you trust it.

Cost in forward-backward passes of the batch, for R directions: `exact` about 1 + 2 R, `difference` R (the gradient at
theta is known).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from curate.core.errors import UserError
from curate.training.model import all_parameters
from curate.training.task import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from curate.training.layout import FlatLayout
    from curate.training.task import Task

Hessian = Literal["exact", "difference"]
# Length of the difference's step relative to |theta|: float32 loses about 1e-7 / STEP of the difference to rounding,
# and the third derivative adds an error that grows with STEP.
STEP = 1e-3
# PyTorch has no exception class of its own for these cases: its message is all that tells them from a real fault.
# What it says where a model cannot run under its function transforms.
_NO_TRANSFORM = ("vmap", "functorch", "setup_context", "expected scalar type")
# What it says where an operation, or a custom autograd.Function, has no second derivative.
_NO_DERIVATIVE = ("twice", "is not implemented")
_GRADIENT_NUMBERS = 1 << 28  # per-sample gradients held at once: 1 GiB in float32


def exact_products(
    task: Task, layout: FlatLayout, batch: Batch, parameters: Tensor, directions: Tensor
) -> tuple[Tensor, Tensor]:
    """`exact`: `<g_z, u_r>` for every sample, and `H u_r`: derivatives of <grad L, u> by c_z and by theta.

    The graph of the gradient is made once and walked for one direction after another: all at once (under vmap) is
    slower, and needs R times the activations.

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        batch: B samples with weights `c_z`.
        parameters: (P,) where to differentiate.
        directions: (R, P) u.

    Returns:
        (R, B) and (R, P).
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaf = parameters.detach().clone().requires_grad_()
    weights = batch.weights.to(parameters.dtype, copy=True).requires_grad_()
    # Fused attention kernels cannot be differentiated twice; the math kernel can.
    with sdpa_kernel(SDPBackend.MATH):
        loss = (task.sample_losses(batch, layout.views(leaf)) * weights).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        # One graph, one direction after another: all at once under vmap is slower and needs R times the activations.
        per_direction = [
            torch.autograd.grad(gradient, (weights, leaf), direction, retain_graph=True) for direction in directions
        ]
    derivatives, curvature = zip(*per_direction, strict=True)
    return torch.stack(derivatives), torch.stack(curvature)


def difference_products(
    task: Task,
    layout: FlatLayout,
    batches: Sequence[Batch],
    parameters: Tensor,
    directions: Tensor,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`difference` for all micro-batches of a step: `<g_z, u_r>` (R, B) and `H u_r` (R, P).

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        batches: micro-batches; B samples altogether.
        parameters: (P,) where to differentiate.
        directions: (R, P) u.
        gradient: (P,) of the batches' loss at the parameters, where it is known: saves a backward pass.
    """
    import torch

    with torch.no_grad():
        losses = torch.cat([task.sample_losses(batch, layout.views(parameters)) for batch in batches])
    base = _losses_and_gradient(task, layout, batches, parameters)[1] if gradient is None else gradient
    scale = float(parameters.norm()) * STEP
    derivatives, curvature = [], []
    # Rows of absent tokens have gradient 0 and a huge u: they would take up the whole length of the step.
    for direction in directions.where(base != 0, 0):
        length = float(direction.norm())
        h = scale / length if length else 1.0  # a direction of 0: any h gives 0
        moved_losses, moved = _losses_and_gradient(task, layout, batches, parameters + h * direction)
        derivatives.append((moved_losses - losses) / h)
        curvature.append((moved - base) / h)
    return torch.stack(derivatives), torch.stack(curvature)


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

    gradients_of = _vmapped_gradients
    for samples in batch.split(max(1, _GRADIENT_NUMBERS // size)):
        try:
            gradients = gradients_of(task, samples, point, chosen)
        except (RuntimeError, NotImplementedError) as error:
            if gradients_of is _looped_gradients or not any(phrase in str(error) for phrase in _NO_TRANSFORM):
                raise
            # For the rest of the batch too: vmap would fail again, after a forward pass for nothing.
            gradients_of = _looped_gradients
            gradients = gradients_of(task, samples, point, chosen)
        yield samples, torch.cat([gradient.flatten(1) for gradient in gradients], dim=1)


def _vmapped_gradients(task: Task, batch: Batch, point: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    from torch.func import grad, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def sample_loss(values: dict[str, Tensor], tokens: Tensor, loss_mask: Tensor) -> Tensor:
        # `sample_losses` does not read the weights; any one will do.
        sample = Batch(tokens=tokens[None], loss_mask=loss_mask[None], weights=batch.weights[:1])
        return task.sample_losses(sample, {**point, **values})[0]

    values = {name: point[name] for name in names}
    # Of the attention kernels only the math one runs under grad and vmap on every device.
    with sdpa_kernel(SDPBackend.MATH):
        gradients = vmap(grad(sample_loss), in_dims=(None, 0, 0))(values, batch.tokens, batch.loss_mask)
    return [gradients[name] for name in names]


def _looped_gradients(task: Task, batch: Batch, point: dict[str, Tensor], names: Sequence[str]) -> list[Tensor]:
    import torch

    values = {name: point[name].detach().clone().requires_grad_() for name in names}
    per_sample = []
    for sample in batch.split(1):
        loss = task.sample_losses(sample, {**point, **values})[0]
        # materialize_grads: a parameter that this sample does not reach gets zeros, as under vmap, not None.
        per_sample.append(torch.autograd.grad(loss, list(values.values()), materialize_grads=True))
    return [torch.stack(gradients) for gradients in zip(*per_sample, strict=True)]


def _losses_and_gradient(
    task: Task, layout: FlatLayout, batches: Sequence[Batch], parameters: Tensor
) -> tuple[Tensor, Tensor]:
    import torch

    leaf = parameters.detach().clone().requires_grad_()
    point = layout.views(leaf)
    losses = []
    for batch in batches:
        batch_losses = task.sample_losses(batch, point)
        # inputs: the model's own `.grad` must stay as the replay left it.
        (batch_losses * batch.weights).sum().backward(inputs=[leaf])
        losses.append(batch_losses.detach())
    assert leaf.grad is not None
    return torch.cat(losses), leaf.grad


def check_curvature(task: Task, layout: FlatLayout, batch: Batch) -> None:
    """Try one exact product on one sample: a model that has none is refused before long work.

    Raises:
        UserError: an operation has no second derivative; names the module.
    """
    flat = layout.flatten(all_parameters(task.model)).detach()
    sample = batch.split(1)[0]
    try:
        # Any direction serves; the parameters themselves are one of the right shape.
        exact_products(task, layout, sample, flat, flat[None])
        _differentiate_twice(task, layout, sample, flat)
    except (RuntimeError, NotImplementedError) as error:
        if not any(phrase in str(error) for phrase in _NO_DERIVATIVE):
            raise
        raise UserError(
            f"module {_opaque_module(task, sample)} cannot be differentiated as adjoint.hessian exact needs it "
            f"({str(error).splitlines()[0]}); switch it to PyTorch's scaled_dot_product_attention or to eager "
            "attention (Hugging Face: attn_implementation 'sdpa' or 'eager'), or set adjoint.hessian difference"
        ) from None


def _differentiate_twice(task: Task, layout: FlatLayout, batch: Batch, parameters: Tensor) -> None:
    """Walk the whole graph of a gradient, to every leaf: for a few leaves autograd skips a node that would raise."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    leaf = parameters.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        loss = task.sample_losses(batch, layout.views(leaf)).sum()
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.square().sum().backward()


def _opaque_module(task: Task, batch: Batch) -> str:
    """The first innermost module whose output has no second derivative with respect to its input."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    names = {id(module): name for name, module in task.model.named_modules()}
    calls: list[tuple[str, Tensor, Tensor]] = []

    def keep(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ends = [value for value in (*inputs[:1], output) if isinstance(value, torch.Tensor) and value.requires_grad]
        if len(ends) == 2:
            calls.append((names.get(id(module), ""), *ends))

    handles = [module.register_forward_hook(keep) for module in task.model.modules()]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            task.sample_losses(batch)
            # A forward hook runs when its module returns: inner modules stand before the ones that call them.
            for name, given, returned in calls:
                try:
                    (gradient,) = torch.autograd.grad(returned.square().sum(), given, create_graph=True)
                    gradient.square().sum().backward(retain_graph=True)
                except RuntimeError:
                    return name or "the model"
    finally:
        for handle in handles:
            handle.remove()
        # `backward` filled the model's own `.grad`, which nobody may take for a training gradient.
        task.model.zero_grad(set_to_none=True)
    return "the model"
