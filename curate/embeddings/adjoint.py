"""`adjoint`: exact first-order values through the training's own optimizers [MAGIC, arXiv 2504.16430].

The gradients of the anchors at the evaluation checkpoint are pushed backward through training. At step k, with the
cotangent `lambda` of the state after it,

    u        = vjp of the update with respect to ghat_k                  (`update_vjp`)
    E[z]     = - c_z <g_z(theta_k), u>                                   for all z in B_k, one number per anchor
    lambda  <- vjp of the update with respect to the state, plus H_k u on the parameters

One pass gives `H_k u` and every `<g_z, u>` (`products.py`). The step that used a sample can be taken exactly instead
(`leave_one_out.py`). Every parameter counts, tied ones included; no hooks, no projection.

R anchors, P parameters. Memory: 6 R P numbers for cotangents, the activations of one micro-batch, and the states
(`states.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from curate.core.errors import UserError
from curate.embeddings.leave_one_out import before_step, embedding_corrections, exact_values
from curate.embeddings.products import Hessian, difference_products, exact_products
from curate.optimizers.step import update_vjp
from curate.training.model import all_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.state import TrainingState
    from curate.training.layout import FlatLayout
    from curate.training.replay import State
    from curate.training.task import Task

OwnStep = Literal["exact", "embedding", "linear"]


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How one step is differentiated; by default a plain derivative.

    Attributes:
        own_step: exact, embedding: the exact leave-one-out update, see `leave_one_out.py`; linear: the derivative.
        hessian: see `products.py`.
        rows: whether the step's samples are valued; a step after the window only passes the cotangent on.
    """

    own_step: OwnStep = "linear"
    hessian: Hessian = "exact"
    rows: bool = True


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

    # A skipped step moved nothing, and its gradient may be NaN (a loss scale that overflowed): do not touch it.
    if not state.record.updated:
        rows = cotangent.parameters.new_zeros(sum(map(len, state.batches)), len(cotangent.parameters))
        return (rows if options.rows else None), cotangent
    groups = layout.groups(state.record.groups)
    u, pulled = update_vjp(before_step(state), state.gradient, state.updates, groups, clip_norm, cotangent)
    derivatives, curvature = _products(task, layout, state, u, options)
    # `update_vjp` holds ghat_k fixed; theta_k also moves ghat_k, by H_k. In place: (R, P) is the largest tensor here.
    pulled.parameters.add_(curvature)
    values = None
    if options.rows and options.own_step == "exact":
        # From the cotangent after the step: the update itself is not linearised.
        values = exact_values(task, layout, state, clip_norm, cotangent)
    elif options.rows:
        weights = torch.cat([batch.weights for batch in state.batches])
        values = -(derivatives * weights).T
        if options.own_step == "embedding":
            names = embedding_names(task, layout)
            values += embedding_corrections(task, layout, state, clip_norm, cotangent, names)
    _check_finite(state, values, pulled)
    return values, pulled


def _products(task: Task, layout: FlatLayout, state: State, u: Tensor, options: StepOptions) -> tuple[Tensor, Tensor]:
    """`<g_z, u>` (R, B) of the step's samples, and `H_k u` (R, P)."""
    import torch

    if options.hessian == "difference":
        return difference_products(task, layout, state.batches, state.parameters, u, state.gradient)
    # Micro-batch by micro-batch, as in training: the graph of a second derivative holds all activations.
    per_batch = [exact_products(task, layout, batch, state.parameters, u) for batch in state.batches]
    derivatives, curvature = zip(*per_batch, strict=True)
    return torch.cat(derivatives, dim=1), torch.stack(curvature).sum(0)


def embedding_names(task: Task, layout: FlatLayout) -> list[str]:
    """Trained weights of the model's token embeddings, by their names in the layout.

    Raises:
        UserError: there are none.
    """
    from torch import nn

    # By identity, not by name: a tied head and embedding are one parameter under either module's name.
    embedding_weights = {id(module.weight) for module in task.model.modules() if isinstance(module, nn.Embedding)}
    named = all_parameters(task.model)
    names = [name for name in layout.names if id(named[name]) in embedding_weights]
    if not names:
        raise UserError("the model trains no nn.Embedding; set adjoint.own_step to exact or linear")
    return names


def _check_finite(state: State, values: Tensor | None, pulled: TrainingState) -> None:
    import torch

    # A sum is finite only where every number is, and needs no mask of R x P booleans.
    if not bool((state.gradient.sum() + pulled.parameters.sum()).isfinite()):
        raise UserError(
            f"the adjoint is not finite at step {state.record.step}: training is unstable there (look at its loss and "
            "gradient norm); use a shorter window that starts after it"
        )
    if values is not None and not torch.isfinite(values).all():
        row = int((~torch.isfinite(values).all(1)).nonzero()[0])
        # A slice, because a record made by hand may name no samples: then the row is named.
        sample = [sample for ids, _ in state.record.micro_batches for sample in ids][row : row + 1]
        raise UserError(
            f"the value of sample {sample[0] if sample else row} at step {state.record.step} is not finite: its "
            "loss or gradient overflows there; use a shorter window that starts after the step, or leave the sample out"
        )
