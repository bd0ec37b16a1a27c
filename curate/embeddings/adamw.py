"""The AdamW update as a pure function of vectors, and its vector-Jacobian product.

R anchors, P parameters (vectors laid out by `FlatLayout`, one slice per parameter group).
With `c` the clip factor, `g = c ghat` and `t` the number of this update:

    m' = beta1 m + (1 - beta1) g                  v' = beta2 v + (1 - beta2) g^2
    theta' = (1 - lr wd) theta - lr / (1 - beta1^t) m' / (sqrt(v' / (1 - beta2^t)) + eps)

This is `torch.optim.AdamW` (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) after
`torch.nn.utils.clip_grad_norm_`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from curate.trajectory.replay import GroupSettings


@dataclass(kw_only=True)
class TrainingState:
    """Parameters and moments, each (P,), or cotangents of them, each (R, P)."""

    parameters: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


def clip_factor(gradient: Tensor, clip_norm: float | None) -> Tensor:
    """min(1, clip_norm / (|ghat| + 1e-6)), a scalar tensor."""
    norm: Tensor = gradient.norm()
    return norm.new_ones(()) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def adamw_update(
    state: TrainingState,
    gradient: Tensor,
    updates: int,
    groups: Sequence[tuple[slice, GroupSettings]],
    clip_norm: float | None,
) -> TrainingState:
    """One update of all groups.

    Args:
        state: before the step.
        gradient: (P,) `ghat`, before clipping.
        updates: updates done before this one (t - 1).
        groups: slice and settings of each parameter group.
        clip_norm: threshold of the global norm, or None.

    Returns:
        The state after the step; the arguments are not changed.
    """
    new = TrainingState(
        parameters=state.parameters.clone(), exp_avg=state.exp_avg.clone(), exp_avg_sq=state.exp_avg_sq.clone()
    )
    clipped = gradient * clip_factor(gradient, clip_norm)
    for place, group in groups:
        g = clipped[place]
        new.exp_avg[place] = group.beta1 * state.exp_avg[place] + (1 - group.beta1) * g
        new.exp_avg_sq[place] = group.beta2 * state.exp_avg_sq[place] + (1 - group.beta2) * g**2
        step_size, denominator, _ = _step_size_and_denominator(new.exp_avg_sq[place], updates, group)
        decayed = (1 - group.lr * group.weight_decay) * state.parameters[place]
        new.parameters[place] = decayed - step_size * new.exp_avg[place] / denominator
    return new


def adamw_vjp(
    state: TrainingState,
    gradient: Tensor,
    updates: int,
    groups: Sequence[tuple[slice, GroupSettings]],
    clip_norm: float | None,
    cotangent: TrainingState,
) -> tuple[Tensor, TrainingState]:
    """Pull a cotangent of the state after a step back to the state before it and to the gradient.

    Where `v' = 0` the derivative through v is 0, and where the clip is inactive its derivative is 0.

    Args:
        state: before the step.
        gradient: (P,) the real `ghat` of the step, before clipping.
        updates: updates done before this one.
        groups: slice and settings of each parameter group.
        clip_norm: threshold of the global norm, or None.
        cotangent: (R, P) each, of the state after the step.

    Returns:
        u: (R, P), cotangent of `ghat`.
        The cotangent of the state before the step, for `ghat` held fixed.
    """
    import torch

    factor = clip_factor(gradient, clip_norm)
    u = torch.empty_like(cotangent.parameters)
    before = TrainingState(parameters=torch.empty_like(u), exp_avg=torch.empty_like(u), exp_avg_sq=torch.empty_like(u))
    for place, group in groups:
        g = factor * gradient[place]
        m = group.beta1 * state.exp_avg[place] + (1 - group.beta1) * g
        v = group.beta2 * state.exp_avg_sq[place] + (1 - group.beta2) * g**2
        step_size, denominator, root = _step_size_and_denominator(v, updates, group)
        # d theta' / d m' = - step_size / denominator
        d_m = torch.addcmul(
            cotangent.exp_avg[:, place], cotangent.parameters[:, place], step_size / denominator, value=-1
        )
        # d theta' / d v' = step_size m' / denominator^2 * d root / d v',   d root / d v' = root / (2 v')
        slope = torch.where(v > 0, step_size * m / denominator**2 * root / (2 * v), torch.zeros_like(v))
        d_v = torch.addcmul(cotangent.exp_avg_sq[:, place], cotangent.parameters[:, place], slope)
        u[:, place] = (1 - group.beta1) * d_m + 2 * (1 - group.beta2) * g * d_v
        before.parameters[:, place] = (1 - group.lr * group.weight_decay) * cotangent.parameters[:, place]
        before.exp_avg[:, place] = group.beta1 * d_m
        before.exp_avg_sq[:, place] = group.beta2 * d_v
    return _unclip(u, gradient, factor), before


def _unclip(u: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    """Vjp of `ghat -> c(|ghat|) ghat`: `c u`; where the clip is active, also `<ghat, u> dc/dghat`."""
    # d c / d ghat = - c / (|ghat| + 1e-6) ghat / |ghat| where the clip is active
    if float(factor) >= 1:
        return u
    norm = gradient.norm()
    along = (u @ gradient) * factor / ((norm + 1e-6) * norm)  # (R,)
    return u.mul_(factor).addr_(along, gradient, alpha=-1)


def _step_size_and_denominator(v: Tensor, updates: int, group: GroupSettings) -> tuple[float, Tensor, Tensor]:
    """Lr / (1 - beta1^t), sqrt(v / (1 - beta2^t)) + eps, and the root alone."""
    step = updates + 1
    root = v.sqrt() / (1 - group.beta2**step) ** 0.5
    return group.lr / (1 - group.beta1**step), root + group.eps, root
