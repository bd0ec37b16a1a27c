"""Products with the Hessian of a batch's loss, and every sample's slope along the same directions.

For directions u (R, P) at parameters theta, with `L = sum_z c_z l_z`:

    products   <g_z, u_r>   (R, B)        curvature   H u_r   (R, P)

Two ways. `exact` differentiates `<grad L, u>` once more (Pearlmutter 1994): with respect to theta it is H u, with
respect to the weights c_z it is <g_z, u>. `difference` takes `(grad L(theta + h u) - grad L(theta)) / h` with the
training's own kernels, so it also serves models that cannot be differentiated twice; h makes the step `STEP` long
relative to |theta|. Where u is concentrated on weights that hardly any sample moves (Adam's 1 / sqrt(v) is huge there),
the rest drowns in float32 rounding; only weights whose gradient is exactly 0, such as the rows of absent tokens, are
left out. Hold it against `exact` on a model of the kind (`curate.verify`) before trusting it.

Cost in forward+backward passes of the batch, for R directions: about 1 + 2 R, and R (the gradient at theta is known).
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
STEP = 1e-3
# What PyTorch says where a model cannot run under its function transforms.
_NO_TRANSFORM = ("vmap", "functorch", "setup_context", "expected scalar type")
_GRADIENT_NUMBERS = 1 << 28  # per-sample gradients held at once: 1 GiB in float32
# What PyTorch says where an operation, or a custom autograd.Function, has no second derivative.
_NO_DERIVATIVE = ("twice", "is not implemented")


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
        found = [torch.autograd.grad(gradient, (weights, leaf), one, retain_graph=True) for one in directions]
    slopes, curvature = zip(*found, strict=True)
    return torch.stack(slopes), torch.stack(curvature)


def difference_products(
    task: Task,
    layout: FlatLayout,
    batches: Sequence[Batch],
    parameters: Tensor,
    directions: Tensor,
    gradient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`difference` for all micro-batches of a step: slopes (R, B) and (R, P).

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
    slopes, curvature = [], []
    for direction in directions.where(base != 0, 0):
        length = float(direction.norm())
        h = scale / length if length else 1.0
        moved_losses, moved = _losses_and_gradient(task, layout, batches, parameters + h * direction)
        slopes.append((moved_losses - losses) / h)
        curvature.append((moved - base) / h)
    return torch.stack(slopes), torch.stack(curvature)


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


def _losses_and_gradient(
    task: Task, layout: FlatLayout, batches: Sequence[Batch], parameters: Tensor
) -> tuple[Tensor, Tensor]:
    import torch

    leaf = parameters.detach().clone().requires_grad_()
    point = layout.views(leaf)
    losses = []
    for batch in batches:
        own = task.sample_losses(batch, point)
        (own * batch.weights).sum().backward(inputs=[leaf])
        losses.append(own.detach())
    assert leaf.grad is not None
    return torch.cat(losses), leaf.grad


def check_curvature(task: Task, layout: FlatLayout, batch: Batch) -> None:
    """Try one exact product on one sample: a model that has none is refused before long work.

    Raises:
        UserError: an operation has no second derivative; names the module.
    """
    flat = layout.flatten(all_parameters(task.model)).detach()
    one = batch.split(1)[0]
    try:
        exact_products(task, layout, one, flat, flat[None])
        _differentiate_twice(task, layout, one, flat)
    except (RuntimeError, NotImplementedError) as error:
        if not any(phrase in str(error) for phrase in _NO_DERIVATIVE):
            raise
        raise UserError(
            f"module {_opaque_module(task, one)} cannot be differentiated as adjoint.hessian exact needs it "
            f"({str(error).splitlines()[0]}); switch it to PyTorch's scaled_dot_product_attention or to eager "
            "attention (Hugging Face: attn_implementation 'sdpa' or 'eager'), or set adjoint.hessian difference"
        ) from None


def _differentiate_twice(task: Task, layout: FlatLayout, batch: Batch, parameters: Tensor) -> None:
    """Walk the whole graph of a gradient: asked for some leaves only, autograd skips a node that would raise."""
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
    passed: list[tuple[str, Tensor, Tensor]] = []

    def keep(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [one for one in (*inputs[:1], output) if isinstance(one, torch.Tensor) and one.requires_grad]
        if len(tensors) == 2:
            passed.append((names.get(id(module), ""), *tensors))

    handles = [module.register_forward_hook(keep) for module in task.model.modules()]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            task.sample_losses(batch)
            for name, given, made in passed:
                try:
                    (slope,) = torch.autograd.grad(made.square().sum(), given, create_graph=True)
                    slope.square().sum().backward(retain_graph=True)
                except RuntimeError:
                    return name or "the model"
    finally:
        for handle in handles:
            handle.remove()
        task.model.zero_grad(set_to_none=True)
    return "the model"
