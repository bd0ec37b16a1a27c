"""The direction that a target asks of the next step, and what one more use of a sample does along it.

The run is continued by one step on its last batch (`ContinuedRun`), and the target's gradient at the state after it
pulled back through the optimizers' own update f (clipping, weight decay). A sample z that is added to that step, at the
current parameters theta, with the weight c_z that it would have in a batch, changes the target's loss l_q by

    value(z) = l_q(theta_1 without z) - l_q(theta_1 with z) ~ - c_z <g_z(theta), u>,   u = vjp of f wrt its gradient

which is the sign and the unit of every value here (first order in c_z).

One step is enough: a single step of Adam realises only 1 - beta1 of a gradient and momentum carries the rest, but one
step ahead ranks the samples of a domain .97 to .99 like ten (two runs of the branch bench), and needs no second
derivative. The added step has the settings of the step of median lr, because at a stage's end lr may have fallen to 0.
Its lr is a small share of that, by which values are divided again: values are to be about the current state, and at the
full lr the path that this very batch takes from it decides. On the demo's run two draws of batches ranked the same
samples of a domain .23 to .63 alike at the median lr, .89 to .97 at a tenth of it.

The directional derivative of a sample's loss along u costs forward passes only, by a difference,

    <g_z(theta), u> ~ (l_z(theta + h u) - l_z(theta)) / h,      h |u| = `products.STEP` |theta|

in float32 whatever the run trained in, and without weights that no gradient has moved (rows of tokens never trained on:
Adam's scale is huge there, and the rest of u would drown in rounding).

R losses (halves of targets), T targets, V directions (targets, or several together), N samples, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING

import numpy as np

from curate.core.errors import UserError
from curate.embeddings.leave_one_out import before_step
from curate.embeddings.products import STEP
from curate.optimizers.state import Group, TrainingState
from curate.optimizers.step import update_vjp
from curate.training.target import loss_gradients
from curate.training.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.data.mds import Sample
    from curate.training.replay import Replay, State
    from curate.training.task import Batch, Task

    Floats = npt.NDArray[np.float64]


def target_directions(
    replay: Replay, losses: Sequence[Batch], weights: Sequence[Sequence[float]], batch_size: int
) -> tuple[State, Tensor]:
    """The current state, and `u` of each of T targets, (T, P), 0 where no gradient has moved a weight.

    Args:
        replay: of the `ContinuedRun`.
        losses: R losses.
        weights: (T, R), each target's share of every loss.
        batch_size: sequences per pass over the losses.
    """
    import torch

    last = replay.run.spec.steps - 1
    replay.model_at(last + 1)  # the state that the losses are read at; `loss_gradients` reads the model in place
    cotangent = TrainingState.zeros(loss_gradients(replay.task, replay.layout, losses, batch_size))
    # then back to the state before the added step, which the update is a function of
    state = next(replay.states(last, last + 1))
    groups = replay.layout.groups(state.record.groups)
    u, _ = update_vjp(before_step(state), state.gradient, state.updates, groups, replay.run.spec.clip_norm, cotangent)
    u = u.where(moved(state, groups), 0.0)  # Adam's scale is huge where no gradient came, see the module
    return state, torch.as_tensor(weights, dtype=u.dtype, device=u.device) @ u


def moves_along(directions: Tensor, parameters: Tensor) -> tuple[Tensor, list[float]]:
    """`h u` of each of V directions `u`, (V, P), and V times h."""
    import torch

    whole = float(parameters.norm()) * STEP  # length of every move, whatever the direction's own length
    steps = [whole / length if (length := float(direction.norm())) else 1.0 for direction in directions]
    return torch.stack([h * direction for h, direction in zip(steps, directions, strict=True)]), steps


def moved(state: State, groups: Sequence[Group]) -> Tensor:
    """(P,) whether a gradient has moved each weight; all of a group whose optimizer keeps nothing."""
    has_moved = (state.momentum != 0) | (state.second_moment != 0)
    for group in groups:
        # plain SGD keeps neither momentum nor second moment: nothing can be told, so all of the group counts
        if not has_moved[group.place].any():
            has_moved[group.place] = True
    return has_moved


def sample_derivatives(
    replay: Replay, parameters: Tensor, moves: tuple[Tensor, list[float]], samples: Sequence[Sample]
) -> Floats:
    """`<g_z(theta), u>` of B samples along V directions (`moves_along`), 1 + V forward passes; float64 (B, V)."""
    return _derivatives(replay, parameters, moves, samples, lambda task, logits, batch: task.losses_of(logits, batch))


def token_derivatives(
    replay: Replay, parameters: Tensor, moves: tuple[Tensor, list[float]], samples: Sequence[Sample]
) -> Floats:
    """The same of their n predicted tokens, one sample after the other: float64 (n, V); their mean is the sample's."""
    return _derivatives(
        replay,
        parameters,
        moves,
        samples,
        lambda task, logits, batch: task.token_losses_of(logits, batch)[batch.loss_mask[:, 1:]],
    )


def _derivatives(
    replay: Replay,
    parameters: Tensor,
    moves: tuple[Tensor, list[float]],
    samples: Sequence[Sample],
    losses_of: Callable[[Task, Tensor, Batch], Tensor],
) -> Floats:
    """Directional derivatives (K, V) of K losses of a batch along V directions.

    Raises:
        UserError: one is not finite.
    """
    import torch

    # float32: in bfloat16 the difference of two losses so near each other would be rounding
    task, layout = copy(replay.task), replay.layout
    task.spec = task.spec.model_copy(update={"autocast": None})
    # weights are not used: losses come one by one
    batch = collate(samples, np.ones(len(samples), np.float32)).to(replay.device)

    def losses(at: Tensor) -> Tensor:
        return losses_of(task, task.logits(batch, layout.views(at)), batch)

    with torch.no_grad():
        # two float32 losses this near each other subtract exactly; only the quotient needs float64
        base = losses(parameters)
        derivatives = [(losses(parameters + move) - base).double() / h for move, h in zip(*moves, strict=True)]
    values: Floats = torch.stack(derivatives, dim=1).cpu().numpy()
    if not np.isfinite(values).all():
        raise UserError(
            f"a loss among samples {[sample.sample_id for sample in samples]} is not finite at the run's last state; "
            "leave the bad one out of the streams"
        )
    return values
