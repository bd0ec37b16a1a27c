"""SGD with coupled weight decay, momentum, dampening and Nesterov's variant, as in `torch.optim.SGD`.

With `g` the clipped gradient, mu the momentum and tau the dampening:

    a = g + wd theta
    b' = a at the group's first update, else mu b + (1 - tau) a
    d = a  (mu = 0; b is kept),   b',   or  a + mu b'  (Nesterov; Sutskever et al., ICML 2013)
    theta' = theta - lr d
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from curate.optimizers.state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.state import Group


class SgdRule:
    """SGD; linear in everything it reads."""

    def pieces(self, group: Group, numbers: int) -> Iterator[Group]:
        """See `Rule.pieces`."""
        return group.cut(numbers)

    def update(self, state: TrainingState, gradient: Tensor, updates: int, group: Group) -> TrainingState:
        """See `Rule.update`."""
        settings = group.settings
        direction = a = gradient + settings.weight_decay * state.parameters
        buffer = state.momentum
        if settings.momentum:
            # torch starts the buffer as a copy of the first gradient, without dampening
            buffer = settings.momentum * buffer + (1 - settings.dampening) * a if updates else a.clone()
            direction = a + settings.momentum * buffer if settings.nesterov else buffer
        return TrainingState(
            parameters=state.parameters - settings.lr * direction, momentum=buffer, second_moment=state.second_moment
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
        """See `Rule.vjp`; nothing depends on the buffer before a first update."""
        settings = group.settings
        before.second_moment[:] = cotangent.second_moment
        if settings.momentum:
            # d d / d b': mu for Nesterov's direction, 1 for the buffer itself
            d_direction = settings.momentum if settings.nesterov else 1.0
            d_buffer = cotangent.momentum - (settings.lr * d_direction) * cotangent.parameters
            u[:] = (1 - settings.dampening) * d_buffer if updates else d_buffer
            if settings.nesterov:
                # the direct term `a` of Nesterov's direction, beside the one through the buffer
                u.add_(cotangent.parameters, alpha=-settings.lr)
            before.momentum[:] = settings.momentum * d_buffer if updates else 0.0
        else:
            u[:] = -settings.lr * cotangent.parameters
            before.momentum[:] = cotangent.momentum
        # u is the cotangent of `a` too, and `a` reads theta through the coupled decay
        before.parameters[:] = cotangent.parameters + settings.weight_decay * u
