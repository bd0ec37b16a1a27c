"""Muon for matrices, as in `torch.optim.Muon` (Jordan et al. 2024, kellerjordan.github.io/posts/muon).

With `G` the clipped gradient of one matrix, mu the momentum and s the scale of its shape:

    B' = mu B + (1 - mu) G
    D = B'   or   (1 - mu) G + mu B'  (Nesterov)
    theta' = (1 - lr wd) theta - lr s NS(D)

NS is the Newton-Schulz iteration: X_0 = D / max(|D|, eps) (Frobenius norm), X_{i+1} = a X_i + (b A + c A^2) X_i with
A = X_i X_i^T. torch runs it in bfloat16; `update` and `vjp` run the same polynomial in the precision of the state, so
`vjp` is the derivative of the unrounded iteration (rounding itself has no useful derivative), and `update` differs from
torch's by bfloat16 rounding. Replay uses torch's own optimizer, so states are those of the training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod, sqrt
from typing import TYPE_CHECKING

from curate.optimizers.state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.settings import GroupSettings
    from curate.optimizers.state import Group


class MuonRule:
    """Muon."""

    def pieces(self, group: Group, numbers: int) -> Iterator[Group]:
        """See `Rule.pieces`: matrix by matrix, whatever their size."""
        # NS reads the whole matrix, so a piece is one; a group without parameters has no piece
        start = group.place.start
        for shape in group.shapes:
            yield replace(group, place=slice(start, start + prod(shape)), shapes=(shape,))
            start += prod(shape)

    def update(self, state: TrainingState, gradient: Tensor, updates: int, group: Group) -> TrainingState:
        """See `Rule.update`."""
        import torch

        settings = group.settings
        buffer, direction = _buffer_and_direction(state, gradient, settings)
        # the last two dimensions: a gradient of (b, p), one update for each row, gives (b, m, n)
        steps = [
            (settings.lr * _scale(settings, matrix.shape[-2:]) * newton_schulz(matrix, settings)).flatten(-2)
            for matrix in _matrices(direction, group.shapes)
        ]
        decayed = (1 - settings.lr * settings.weight_decay) * state.parameters
        return TrainingState(
            parameters=decayed - torch.cat(steps, dim=-1),
            momentum=buffer,
            second_moment=state.second_moment,
        )

    def vjp(
        self,
        state: TrainingState,
        gradient: Tensor,
        updates: int,
        group: Group,
        cotangent: TrainingState,
        u: Tensor,
        before: TrainingState,
    ) -> None:
        """See `Rule.vjp`; where |D| <= eps the derivative through NS is 0 (its slope there is 1 / eps times a^k)."""
        import torch

        settings, mu = group.settings, group.settings.momentum
        _, direction = _buffer_and_direction(state, gradient, settings)
        # theta' = ... - lr s NS(D), D = B' or (Nesterov) (1 - mu) G + mu B', B' = mu B + (1 - mu) G, last to first
        pulled = [
            _pull(matrix, d_step, settings)
            for matrix, d_step in zip(
                _matrices(direction, group.shapes), _matrices(cotangent.parameters, group.shapes), strict=True
            )
        ]
        d_direction = torch.cat(pulled, dim=1)
        d_buffer = cotangent.momentum + (mu * d_direction if settings.nesterov else d_direction)
        # Nesterov's direction reads G twice: once itself, once through the buffer
        u[:] = (1 - mu) * (d_buffer + d_direction if settings.nesterov else d_buffer)
        before.momentum[:] = mu * d_buffer
        before.second_moment[:] = cotangent.second_moment
        before.parameters[:] = (1 - settings.lr * settings.weight_decay) * cotangent.parameters


def newton_schulz(matrix: Tensor, settings: GroupSettings) -> Tensor:
    """NS of a (m, n) matrix, or of each of (b, m, n), in its own precision."""
    import torch

    if matrix.dim() > 2:
        # vmap, because the norm below is of one matrix
        batch: Tensor = torch.func.vmap(lambda single: newton_schulz(single, settings))(matrix)
        return batch
    # A = X X^T is the smaller of the two Gram matrices where X is wide; torch transposes alike
    wide = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    # the Frobenius norm bounds the spectral norm, so that the iteration starts inside its region of convergence
    x = wide / wide.norm().clamp(min=settings.eps)
    for _ in range(settings.ns_steps):
        gram = x @ x.mT
        x = torch.addmm(
            x, torch.addmm(gram, gram, gram, beta=settings.ns_b, alpha=settings.ns_c), x, beta=settings.ns_a
        )
    orthogonal: Tensor = x.mT if matrix.shape[0] > matrix.shape[1] else x
    return orthogonal


def _pull(matrix: Tensor, d_step: Tensor, settings: GroupSettings) -> Tensor:
    """Pull cotangents (R, m, n) of theta' back to D, through `- lr s NS(D)`; (R, m n)."""
    import torch

    if float(matrix.norm()) <= settings.eps:
        return torch.zeros_like(d_step).flatten(1)
    pull = torch.func.vjp(lambda value: newton_schulz(value, settings), matrix)[1]
    # the forward pass ran once; vmap repeats the backward pass for the R cotangents only
    scaled = -settings.lr * _scale(settings, matrix.shape) * d_step
    pulled: Tensor = torch.func.vmap(pull)(scaled)[0]
    return pulled.flatten(1)


def _buffer_and_direction(state: TrainingState, gradient: Tensor, settings: GroupSettings) -> tuple[Tensor, Tensor]:
    """B' and D of the module docstring."""
    mu = settings.momentum
    buffer = mu * state.momentum + (1 - mu) * gradient
    return buffer, (1 - mu) * gradient + mu * buffer if settings.nesterov else buffer


def _matrices(flat: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """(..., p) as views (..., m, n)."""
    columns = flat.split([prod(shape) for shape in shapes], dim=-1)
    return [matrix.unflatten(-1, shape) for matrix, shape in zip(columns, shapes, strict=True)]


def _scale(settings: GroupSettings, shape: Sequence[int]) -> float:
    """Torch's `adjust_lr_fn` of a (m, n) matrix."""
    rows, columns = shape
    if settings.adjust_lr_fn == "match_rms_adamw":
        # .2 is the usual RMS of an AdamW update (Liu et al., arXiv 2502.16982, section 2.2)
        return 0.2 * sqrt(max(rows, columns))
    ratio = rows / columns
    return sqrt(ratio if settings.adjust_lr_fn == "spectral_unclamped" else max(1.0, ratio))
