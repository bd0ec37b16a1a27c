"""The vectors that an update reads and writes, and what every optimizer offers.

P parameters, p of them in one group; R anchors (rows of cotangents).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.settings import GroupSettings


@dataclass(kw_only=True)
class TrainingState:
    """Parameters and the optimizer's two vectors, each (P,), or cotangents of them, each (R, P).

    Attributes:
        parameters: theta.
        momentum: `exp_avg` of Adam and AdamW, `momentum_buffer` of SGD and Muon.
        second_moment: `exp_avg_sq` of Adam and AdamW; SGD and Muon pass it through.
    """

    parameters: Tensor
    momentum: Tensor
    second_moment: Tensor

    def part(self, place: slice) -> TrainingState:
        """Views of some columns; what is written to them is written to this state."""
        # `...`: the same slice serves vectors (P,) and cotangents (R, P)
        return TrainingState(
            parameters=self.parameters[..., place],
            momentum=self.momentum[..., place],
            second_moment=self.second_moment[..., place],
        )

    @classmethod
    def zeros(cls, parameters: Tensor) -> TrainingState:
        """A state of these parameters whose two other vectors are 0."""
        import torch

        return cls(
            parameters=parameters, momentum=torch.zeros_like(parameters), second_moment=torch.zeros_like(parameters)
        )


@dataclass(frozen=True, kw_only=True)
class Group:
    """One parameter group at one step.

    Attributes:
        place: slice of its columns in a vector (P,).
        shapes: of its parameters, in the order of the columns.
        settings: hyper-parameters.
    """

    place: slice
    shapes: tuple[tuple[int, ...], ...]
    settings: GroupSettings

    def cut(self, numbers: int) -> Iterator[Group]:
        """Consecutive pieces of at most `numbers` columns, for elementwise rules."""
        # a cut may run through a parameter, so the pieces have no shapes
        for start in range(self.place.start, self.place.stop, numbers):
            yield replace(self, place=slice(start, min(start + numbers, self.place.stop)), shapes=())


class Rule(Protocol):
    """One optimizer's update of one group, without clipping."""

    def pieces(self, group: Group, numbers: int) -> Iterator[Group]:
        """Consecutive pieces of a group that can be updated apart, of about `numbers` columns each."""

    def update(self, state: TrainingState, gradient: Tensor, updates: int, group: Group) -> TrainingState:
        """The state after the step; the arguments are not changed.

        Args:
            state: before the step, (p,) each.
            gradient: (p,), clipped; or (b, p), one update for each row.
            updates: updates that the group had before this one.
            group: place, shapes and settings.
        """

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
        """Pull a cotangent of the state after the step back.

        Args:
            state: before the step, (p,) each.
            gradient: (p,), clipped.
            updates: updates that the group had before this one.
            group: place, shapes and settings.
            cotangent: (R, p) each, of the state after the step.
            u: (R, p), written: cotangent of the clipped gradient.
            before: (R, p) each, written: cotangent of the state before the step.
        """
