"""One training step as a pure function of vectors, and its vector-Jacobian product: clip once, then update each group.

R anchors, P parameters (vectors laid out by `FlatLayout`, one slice per parameter group). `ghat` is the gradient
before `torch.nn.utils.clip_grad_norm_`, `c` the clip factor, and every group's optimizer reads its part of `c ghat`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from curate.optimizers.adam import AdamRule
from curate.optimizers.muon import MuonRule
from curate.optimizers.sgd import SgdRule
from curate.optimizers.state import TrainingState

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from curate.optimizers.state import Group, Rule

_RULES: dict[str, Rule] = {
    "AdamW": AdamRule(decoupled=True),
    "Adam": AdamRule(decoupled=False),
    "SGD": SgdRule(),
    "Muon": MuonRule(),
}


# numbers per thread: a handful of float32 vectors of 256 KB stay in a core's cache, so each is read from memory once
_CPU_PIECE = 1 << 16
# 64 MB of float32: large enough to fill a GPU, small beside the R cotangents of a model
_GPU_PIECE = 1 << 24


def piece_numbers(device: torch.device) -> int:
    """How many numbers an update works on at once: it bounds memory, and on CPUs fits the cache."""
    import torch

    return _CPU_PIECE * torch.get_num_threads() if device.type == "cpu" else _GPU_PIECE


def clip_factor(norm: Tensor, clip_norm: float | None) -> Tensor:
    """min(1, clip_norm / (|ghat| + 1e-6)) for norms of any shape."""
    # 1e-6 and the clamp are those of torch.nn.utils.clip_grad_norm_
    return norm.new_ones(norm.shape) if clip_norm is None else (clip_norm / (norm + 1e-6)).clamp(max=1.0)


def update_pieces(
    groups: Sequence[Group], updates: Sequence[int], rows: int, device: torch.device
) -> Iterator[tuple[Rule, Group, int]]:
    """Cut the groups that were updated into pieces of about `piece_numbers`, where their optimizer allows.

    Args:
        groups: places and settings.
        updates: updates that each group had before this one.
        rows: vectors that are worked on at once.
        device: of the vectors.

    Yields:
        Rule, piece of a group, updates that the group had before.
    """
    # `rows` vectors share the cache; at least one column, however many rows there are
    width = max(1, piece_numbers(device) // rows)
    for group, earlier_updates in zip(groups, updates, strict=True):
        # a skipped optimizer (GradScaler) leaves parameters and buffers as they are; the callers copy them through
        if not group.settings.updated:
            continue
        rule = _RULES[group.settings.optimizer]
        for piece in rule.pieces(group, width):
            yield rule, piece, earlier_updates


def update_state(
    state: TrainingState,
    gradient: Tensor,
    updates: Sequence[int],
    groups: Sequence[Group],
    clip_norm: float | None,
) -> TrainingState:
    """One update of all groups.

    Args:
        state: before the step, (P,) each.
        gradient: (P,) `ghat`, before clipping.
        updates: updates that each group had before this one (t - 1).
        groups: places and settings.
        clip_norm: threshold of the global norm, or None.

    Returns:
        The state after the step; the arguments are not changed.
    """
    new = TrainingState(
        parameters=state.parameters.clone(), momentum=state.momentum.clone(), second_moment=state.second_moment.clone()
    )
    # once, over all groups: the training clips the global norm before any optimizer steps
    factor = clip_factor(gradient.norm(), clip_norm)
    for rule, group, earlier_updates in update_pieces(groups, updates, 1, gradient.device):
        place = group.place
        after = rule.update(state.part(place), factor * gradient[place], earlier_updates, group)
        new.parameters[place] = after.parameters
        new.momentum[place] = after.momentum
        new.second_moment[place] = after.second_moment
    return new


def update_vjp(
    state: TrainingState,
    gradient: Tensor,
    updates: Sequence[int],
    groups: Sequence[Group],
    clip_norm: float | None,
    cotangent: TrainingState,
) -> tuple[Tensor, TrainingState]:
    """Pull a cotangent of the state after a step back to the state before it and to the gradient.

    Where the clip is inactive its derivative is 0; for each optimizer's own conventions see its `vjp`.

    Args:
        state: before the step, (P,) each.
        gradient: (P,) the real `ghat` of the step, before clipping.
        updates: updates that each group had before this one.
        groups: places and settings.
        clip_norm: threshold of the global norm, or None.
        cotangent: (R, P) each, of the state after the step.

    Returns:
        u: (R, P), cotangent of `ghat`.
        The cotangent of the state before the step, for `ghat` held fixed.
    """
    import torch

    factor = clip_factor(gradient.norm(), clip_norm)
    # empty: every column belongs to a group, and each group is written below, by its rule or as skipped
    u = torch.empty_like(cotangent.parameters)
    before = TrainingState(
        parameters=torch.empty_like(u), momentum=torch.empty_like(u), second_moment=torch.empty_like(u)
    )
    for rule, group, earlier_updates in update_pieces(groups, updates, len(u), gradient.device):
        place = group.place
        piece, clipped = state.part(place), factor * gradient[place]
        rule.vjp(piece, clipped, earlier_updates, group, cotangent.part(place), u[:, place], before.part(place))
    for group in groups:
        if not group.settings.updated:
            # its step was skipped: the state went through unchanged, and the gradient was not read
            u[:, group.place] = 0
            for name, passed_through in vars(cotangent.part(group.place)).items():
                getattr(before, name)[:, group.place] = passed_through
    # the rules gave the cotangent of the clipped gradient; clipping came first, so it is pulled back last
    return _unclip(u, gradient, factor), before


def _unclip(u: Tensor, gradient: Tensor, factor: Tensor) -> Tensor:
    """Vjp of `ghat -> c(|ghat|) ghat`: `c u`; where the clip is active, also `<ghat, u> dc/dghat`."""
    # d c / d ghat = - c / (|ghat| + 1e-6) ghat / |ghat| where the clip is active
    if float(factor) >= 1:
        return u
    norm = gradient.norm()
    along = (u @ gradient) * factor / ((norm + 1e-6) * norm)  # (R,)
    # in place: u may be the largest array in memory
    return u.mul_(factor).addr_(along, gradient, alpha=-1)
