"""`adjoint`: exact first-order values through the optimizer [MAGIC, arXiv 2504.16430].

The anchors' gradients at the horizon are pushed backward through training. At step k, with the cotangent `lambda` of
the state after it,

    u        = vjp of the update with respect to ghat_k                  (`update_vjp`)
    E[z]     = - c_z <g_z(theta_k), u>                                   for all z in B_k, one number per anchor
    lambda  <- vjp of the update with respect to the state, plus H_k u on the parameters

`H_k u` and every `<g_z, u>` come out of one pass: forward-mode differentiation of the gradient in direction u, with the
per-sample losses as auxiliary output. Every parameter counts, tied ones included; no hooks, no projection.

R anchors, P parameters, S steps between the window's start and the horizon. Memory: 4 S P numbers for the states, 6 R
P for cotangents, and R times the activations of one micro-batch. Cost: S forward+backward passes for the states, and
about 1 + 2 R passes per step for the products.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from curate.errors import UserError
from curate.optimizers.state import TrainingState
from curate.optimizers.step import update_vjp

if TYPE_CHECKING:
    from torch import Tensor

    from curate.task import Batch, Task
    from curate.trajectory.flat import FlatLayout
    from curate.trajectory.replay import State


# What PyTorch says where an operation, or a custom autograd.Function, cannot be differentiated forward.
_NO_FORWARD_MODE = ("forward AD", "forward mode AD", "jvp", "setup_context")


def adjoint_step(
    task: Task, layout: FlatLayout, state: State, clip_norm: float | None, cotangent: TrainingState
) -> tuple[Tensor, TrainingState]:
    """One step of the backward recursion.

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        state: what step k read.
        clip_norm: threshold of the global gradient norm, or None.
        cotangent: `lambda_{k+1}`, (R, P) each.

    Returns:
        (B_k, R) embeddings of the step's samples in record order.
        `lambda_k`.

    Raises:
        UserError: a number is not finite (names the step).
    """
    import torch

    before = TrainingState(parameters=state.parameters, momentum=state.momentum, second_moment=state.second_moment)
    groups = layout.groups(state.record.groups)
    u, pulled = update_vjp(before, state.gradient, state.updates, groups, clip_norm, cotangent)
    parameters = layout.views(state.parameters)
    embeddings = []
    for batch in state.batches:
        products, curvature = directional_products(task, layout, batch, parameters, u)
        embeddings.append(-(products * batch.weights).T)
        pulled.parameters += curvature
    rows = torch.cat(embeddings)
    if not (torch.isfinite(rows).all() and torch.isfinite(pulled.parameters).all()):
        raise UserError(
            f"the adjoint is not finite at step {state.record.step}: training is unstable there (look at its loss and "
            "gradient norm); use a shorter window that starts after it"
        )
    return rows, pulled


def directional_products(
    task: Task, layout: FlatLayout, batch: Batch, parameters: dict[str, Tensor], directions: Tensor
) -> tuple[Tensor, Tensor]:
    """`<g_z, u_r>` for every sample and `H u_r`, H the Hessian of `sum_z c_z l_z`, in one forward-over-reverse pass.

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        batch: B samples with weights `c_z`.
        parameters: where to differentiate, by name.
        directions: (R, P) u.

    Returns:
        (R, B) and (R, P).
    """
    from torch.func import grad, jvp, vmap
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def batch_loss(values: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        losses = task.sample_losses(batch, values)
        return (losses * batch.weights).sum(), losses

    def tangents(direction: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        tangent: tuple[dict[str, Tensor], Tensor] = jvp(grad(batch_loss, has_aux=True), (parameters,), (direction,))[1]
        return tangent

    # Fused attention kernels have no forward-mode derivative; the math kernel has.
    with sdpa_kernel(SDPBackend.MATH):
        curvature, products = vmap(tangents)(layout.views(directions))
    return products, layout.flatten(curvature)


def check_forward_mode(task: Task, layout: FlatLayout, batch: Batch) -> None:
    """Try one product on one sample: a model that cannot be differentiated forward is refused before long work.

    Raises:
        UserError: an operation has no forward-mode derivative; names the module.
    """
    from torch.nn.modules.module import register_module_forward_pre_hook

    names = {id(module): name for name, module in task.model.named_modules()}
    entered: list[str] = []
    handle = register_module_forward_pre_hook(lambda module, _: entered.append(names.get(id(module), "")))
    first = batch.split(1)[0]
    flat = layout.flatten(dict(task.model.named_parameters())).detach()
    try:
        with (
            warnings.catch_warnings()
        ):  # torch scripts its own forward-mode formulas on the first product, and warns of it
            warnings.simplefilter("ignore", FutureWarning)
            directional_products(task, layout, first, layout.views(flat), flat[None])
    except (RuntimeError, NotImplementedError) as error:
        if not any(phrase in str(error) for phrase in _NO_FORWARD_MODE):
            raise
        place = next((name for name in reversed(entered) if name), "the model")
        raise UserError(
            f"module {place} has no forward-mode derivative, which adjoint needs ({str(error).splitlines()[0]}); "
            "switch it to PyTorch's scaled_dot_product_attention or to eager attention (Hugging Face: attn_"
            "implementation 'sdpa' or 'eager'), or use --estimator dvemb"
        ) from None
    finally:
        handle.remove()
