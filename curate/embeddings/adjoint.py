"""`adjoint`: exact first-order values through the training's own optimizers [MAGIC, arXiv 2504.16430].

The anchors' gradients at the horizon are pushed backward through training. At step k, with the cotangent `lambda` of
the state after it,

    u        = vjp of the update with respect to ghat_k                  (`update_vjp`)
    E[z]     = - c_z <g_z(theta_k), u>                                   for all z in B_k, one number per anchor
    lambda  <- vjp of the update with respect to the state, plus H_k u on the parameters

`H_k u` and every `<g_z, u>` come out of one pass (`products.py`); a sample's own step can be taken exactly instead
(`own_step.py`). Every parameter counts, tied ones included; no hooks, no projection.

R anchors, P parameters. Memory: 6 R P numbers for cotangents, the activations of one micro-batch (`gauss-newton`: once
for each anchor that goes at once), and the states (`states.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING, Literal

from curate.embeddings.own_step import before_step, embedding_corrections, exact_values
from curate.embeddings.products import Hessian, difference_products, directional_products, exact_slopes
from curate.errors import UserError
from curate.model import all_parameters
from curate.optimizers.step import update_vjp
from curate.rng import generator

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.state import TrainingState
    from curate.task import Batch, Task
    from curate.trajectory.flat import FlatLayout
    from curate.trajectory.replay import State

OwnStep = Literal["exact", "embedding", "linear"]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How one step is differentiated; the defaults of a plain derivative.

    Attributes:
        own_step: see `own_step.py`.
        hessian: see `products.py`.
        hessian_share: share of the step's samples that the Hessian product is taken over (scaled up); drawn by step.
        rows: whether the step's samples are valued; a step behind the window only passes the cotangent on.
        curvature: factor of the Hessian product; 0 leaves it out.
        at_once: anchors in one pass of `gauss-newton`; none: all.
    """

    own_step: OwnStep = "linear"
    hessian: Hessian = "exact"
    hessian_share: float = 1.0
    rows: bool = True
    curvature: float = 1.0
    at_once: int | None = None


def adjoint_step(
    task: Task,
    layout: FlatLayout,
    state: State,
    clip_norm: float | None,
    cotangent: TrainingState,
    options: StepOptions,
) -> tuple[Tensor | None, TrainingState]:
    """One step of the backward recursion.

    Args:
        task: the model's loss.
        layout: of the parameter vectors.
        state: what step k read.
        clip_norm: threshold of the global gradient norm, or None.
        cotangent: `lambda_{k+1}`, (R, P) each.
        options: how.

    Returns:
        (B_k, R) embeddings of the step's samples in record order, or None where they are not valued; 0 of a step whose
        update was skipped.
        `lambda_k`.

    Raises:
        UserError: a number is not finite (names the step and the sample).
    """
    import torch

    if not state.record.updated:  # its gradient may even be NaN
        rows = cotangent.parameters.new_zeros(sum(map(len, state.batches)), len(cotangent.parameters))
        return (rows if options.rows else None), cotangent
    groups = layout.groups(state.record.groups)
    u, pulled = update_vjp(before_step(state), state.gradient, state.updates, groups, clip_norm, cotangent)
    linear = options.rows and options.own_step != "exact"
    slopes = None
    if options.curvature:
        slopes, curvature = _products(task, layout, state, u, options)
        pulled.parameters.add_(curvature, alpha=options.curvature)
    values = None
    if linear:
        if slopes is None or options.hessian_share < 1:
            parts = [
                sample_slopes(task, layout, batch, state.parameters, u, options.hessian) for batch in state.batches
            ]
            slopes = torch.cat(parts, dim=1)
        weights = torch.cat([batch.weights for batch in state.batches])
        values = -(slopes * weights).T
    if values is not None and options.own_step == "embedding":
        names = embedding_names(task, layout)
        values += embedding_corrections(task, layout, state, clip_norm, cotangent, names)
    elif options.rows and options.own_step == "exact":
        values = exact_values(task, layout, state, clip_norm, cotangent)
    _check_finite(state, values, pulled)
    return values, pulled


def bridge_curvature(step: int, start: int, stop: int, every: int) -> float:
    """Factor of the Hessian product of a step that is only bridged, where every n-th one stands for n.

    Args:
        step: of the stretch that is bridged.
        start: its first step, which is one of those that are taken.
        stop: step after its last; the last one that is taken stands for what remains.
        every: n; 1 is exact.
    """
    return 0.0 if (step - start) % every else float(min(every, stop - step))


def _products(task: Task, layout: FlatLayout, state: State, u: Tensor, options: StepOptions) -> tuple[Tensor, Tensor]:
    """Slopes (R, B) of the samples that curvature is taken over, and `H_k u` (R, P)."""
    import torch

    batches = [
        _subsample(batch, options.hessian_share, state.record.step, index) for index, batch in enumerate(state.batches)
    ]
    if options.hessian == "difference":
        known = state.gradient if options.hessian_share == 1 else None
        return difference_products(task, layout, batches, state.parameters, u, known)
    parts = [
        directional_products(task, layout, batch, state.parameters, u, options.hessian, options.at_once)
        for batch in batches
    ]
    return torch.cat([slopes for slopes, _ in parts], dim=1), torch.stack([own for _, own in parts]).sum(0)


def sample_slopes(
    task: Task,
    layout: FlatLayout,
    batch: Batch,
    parameters: Tensor,
    directions: Tensor,
    hessian: Hessian = "exact",
) -> Tensor:
    """`<g_z, u_r>` (R, B) for steps whose Hessian product does not deliver it."""
    if hessian == "difference":
        return difference_products(task, layout, [batch], parameters, directions)[0]
    return exact_slopes(task, layout, batch, parameters, directions)


def embedding_names(task: Task, layout: FlatLayout) -> list[str]:
    """Trained weights of the model's token embeddings, by their names in the layout.

    Raises:
        UserError: there are none.
    """
    from torch import nn

    held = {id(module.weight) for module in task.model.modules() if isinstance(module, nn.Embedding)}
    named = all_parameters(task.model)
    names = [name for name in layout.names if id(named[name]) in held]
    if not names:
        raise UserError("the model trains no nn.Embedding; set adjoint.own_step to exact or linear")
    return names


def _subsample(batch: Batch, share: float, step: int, index: int) -> Batch:
    """A random share of a micro-batch, its weights scaled to stand for all of it."""
    import torch

    count = max(1, ceil(share * len(batch)))
    if count == len(batch):
        return batch
    chosen = sorted(generator(0, "hessian share", step, index).permutation(len(batch))[:count].tolist())
    kept = torch.as_tensor(chosen, device=batch.tokens.device)
    return replace(
        batch,
        tokens=batch.tokens[kept],
        loss_mask=batch.loss_mask[kept],
        weights=batch.weights[kept] * (len(batch) / count),
    )


def _check_finite(state: State, values: Tensor | None, pulled: TrainingState) -> None:
    import torch

    if not bool((state.gradient.sum() + pulled.parameters.sum()).isfinite()):  # sums need no vector of their own
        raise UserError(
            f"the adjoint is not finite at step {state.record.step}: training is unstable there (look at its loss and "
            "gradient norm); use a shorter window that starts after it"
        )
    if values is not None and not torch.isfinite(values).all():
        position = int((~torch.isfinite(values).all(1)).nonzero()[0])
        sample = [sample for ids, _ in state.record.micro_batches for sample in ids][position : position + 1]
        raise UserError(
            f"the value of sample {sample[0] if sample else position} at step {state.record.step} is not finite: its "
            "loss or gradient overflows there; use a shorter window that starts after the step, or leave the sample out"
        )
