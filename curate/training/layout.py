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
        start = 0
        for group in groups:
            stop = start + sum(prod(shapes[name]) for name in group)
            self.group_slices.append(slice(start, stop))
            start = stop
        self.size = start

    def groups(self, settings: Sequence[GroupSettings]) -> list[Group]:
        """Places and shapes of the parameter groups, with their settings at one step."""
        return [
            Group(place=place, shapes=shapes, settings=own)
            for place, shapes, own in zip(self.group_slices, self._group_shapes, settings, strict=True)
        ]

    def parts(self, settings: Sequence[GroupSettings], names: Sequence[str]) -> list[tuple[int, Group]]:
        """Some parameters as groups of their own, placed in vectors of these parameters alone (`columns`).

        Returns:
            Index of the parameter's group, and the part.
        """
        found, start, at = [], 0, 0
        for name, size in zip(self.names, self._sizes, strict=True):
            if name in names:
                index = next(i for i, place in enumerate(self.group_slices) if start < place.stop)
                part = Group(place=slice(at, at + size), shapes=(self.shapes[name],), settings=settings[index])
                found.append((index, part))
                at += size
            start += size
        return found

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Copy named tensors of shape (..., *parameter shape) into one of shape (..., P)."""
        import torch

        parts = [tensors[name] for name in self.names]
        lead = parts[0].shape[: parts[0].dim() - len(self.shapes[self.names[0]])]
        return torch.cat([part.reshape(*lead, -1) for part in parts], dim=-1)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Named views (..., *parameter shape) of a vector (..., P); nothing is copied."""
        parts = flat.split(self._sizes, dim=-1)
        return {
            name: part.view(*flat.shape[:-1], *self.shapes[name]) for name, part in zip(self.names, parts, strict=True)
        }

    def columns(self, names: Sequence[str]) -> Tensor:
        """Mask (P,) of the places of some parameters."""
        import torch

        chosen = set(names)
        return torch.cat(
            [torch.full((size,), name in chosen) for name, size in zip(self.names, self._sizes, strict=True)]
        )
