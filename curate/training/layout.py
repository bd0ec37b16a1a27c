"""All trained parameters as one vector, ordered by optimizer parameter group.

P is the number of trained parameters. Group order makes each group's hyper-parameters scalars on one slice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from curate.optimizers.state import Group
from curate.training.model import all_parameters

if TYPE_CHECKING:
    from torch import Tensor, nn

    from curate.optimizers.settings import GroupSettings


class FlatLayout:
    """Where each named parameter lies in a vector of length P.

    Args:
        model: supplies the shapes; tied parameters count once, under their first name.
        groups: parameter names of each optimizer group.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[str]]) -> None:
        shapes = {name: tuple(parameter.shape) for name, parameter in all_parameters(model).items()}
        self.names = [name for group in groups for name in group]
        self.shapes = {name: shapes[name] for name in self.names}
        self.group_slices: list[slice] = []
        self._group_shapes = [tuple(shapes[name] for name in group) for group in groups]
        self._sizes = [prod(shapes[name]) for name in self.names]
        # the groups lie one after the other, so that each is one slice, whatever the order of the model's parameters
        start = 0
        for group in groups:
            stop = start + sum(prod(shapes[name]) for name in group)
            self.group_slices.append(slice(start, stop))
            start = stop
        self.size = start

    def groups(self, settings: Sequence[GroupSettings]) -> list[Group]:
        """Slices and shapes of the parameter groups, with their settings at one step."""
        return [
            Group(place=place, shapes=shapes, settings=group_settings)
            for place, shapes, group_settings in zip(self.group_slices, self._group_shapes, settings, strict=True)
        ]

    def parts(self, settings: Sequence[GroupSettings], names: Sequence[str]) -> list[tuple[int, Group]]:
        """Give some parameters a group each, whose slices are of vectors of these parameters alone (`columns`).

        Returns:
            For each parameter, in the order of the layout, the index of its group here and its own group.
        """
        parts = []
        # two offsets: in the vector of all parameters, and in the vector of the chosen ones
        start = chosen_start = 0
        for name, size in zip(self.names, self._sizes, strict=True):
            if name in names:
                # the groups are in order, so the first that ends behind the parameter's start holds it
                index = next(i for i, place in enumerate(self.group_slices) if start < place.stop)
                place = slice(chosen_start, chosen_start + size)
                parts.append((index, Group(place=place, shapes=(self.shapes[name],), settings=settings[index])))
                chosen_start += size
            start += size
        return parts

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy named tensors of shape (..., *parameter shape) into one of shape (..., P)."""
        import torch

        ordered = [tensors[name] for name in self.names]
        # dimensions before those of the parameter (rows of cotangents) are the same on every tensor
        lead = ordered[0].shape[: ordered[0].dim() - len(self.shapes[self.names[0]])]
        return torch.cat([tensor.reshape(*lead, -1) for tensor in ordered], dim=-1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views (..., *parameter shape) of a vector (..., P); nothing is copied."""
        pieces = flat.split(self._sizes, dim=-1)
        return {
            name: piece.view(*flat.shape[:-1], *self.shapes[name])
            for name, piece in zip(self.names, pieces, strict=True)
        }

    def columns(self, names: Sequence[str]) -> Tensor:
        """Boolean mask (P,), True in the columns of some parameters."""
        import torch

        chosen = set(names)
        return torch.cat(
            [torch.full((size,), name in chosen) for name, size in zip(self.names, self._sizes, strict=True)]
        )
