"""Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) and AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

With `g` the clipped gradient and `t` the number of this update, as in `torch.optim`:

    a = g  (AdamW)  or  g + wd theta  (Adam)
    m' = beta1 m + (1 - beta1) a                  v' = beta2 v + (1 - beta2) a^2
    theta' = d theta - lr / (1 - beta1^t) m' / (sqrt(v' / (1 - beta2^t)) + eps),   d = 1 - lr wd  or  1
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from curate.optimizers.state import TrainingState

if TYPE_CHECKING:
    from torch import Tensor

    from curate.optimizers.settings import GroupSettings
    from curate.optimizers.state import Group


class AdamRule:
    """Adam.

    Args:
        decoupled: AdamW's weight decay instead of Adam's.
    """

    def __init__(self, *, decoupled: bool) -> None:
        self.decoupled = decoupled

    def pieces(self, group: Group, numbers: int) -> Iterator[Group]:
        """See `Rule.pieces`."""
        return group.cut(numbers)

    def update(self, state: TrainingState, gradient: Tensor, updates: int, group: Group) -> TrainingState:
        """See `Rule.update`."""
        import torch

        settings = group.settings
        _, m, v = self._moments(state, gradient, settings)
        step_size, denominator, _ = _step_size_and_denominator(v, updates, settings)
        decay = 1 - settings.lr * settings.weight_decay if self.decoupled else 1.0
        # the order of operations of torch's own kernel, so that rounding agrees as far as it can
        parameters = torch.addcdiv(decay * state.parameters, m, denominator, value=-step_size)
        return TrainingState(parameters=parameters, momentum=m, second_moment=v)

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
        """See `Rule.vjp`; where `v' = 0` the derivative through v is 0."""
        import torch

        settings = group.settings
        a, m, v = self._moments(state, gradient, settings)
        step_size, denominator, root = _step_size_and_denominator(v, updates, settings)
        # d theta' / d m' = - step_size / denominator
        d_m = torch.addcmul(cotangent.momentum, cotangent.parameters, step_size / denominator, value=-1)
        # d theta' / d v' = step_size m' / denominator^2 * d root / d v',   d root / d v' = root / (2 v')
        # v' = 0: no gradient has reached the weight, or v underflowed; 0 / 0 would spread NaN
        slope = torch.where(v > 0, step_size * m / denominator**2 * root / (2 * v), torch.zeros_like(v))
        d_v = torch.addcmul(cotangent.second_moment, cotangent.parameters, slope)
        # both moments read the gradient: u = (1 - beta1) d_m + 2 (1 - beta2) a d_v, in place of (R, p) temporaries
        torch.addcmul((1 - settings.beta1) * d_m, a, d_v, value=2 * (1 - settings.beta2), out=u)
        torch.mul(d_m, settings.beta1, out=before.momentum)
        torch.mul(d_v, settings.beta2, out=before.second_moment)
        if self.decoupled:
            torch.mul(cotangent.parameters, 1 - settings.lr * settings.weight_decay, out=before.parameters)
        else:
            # coupled decay adds wd theta to the gradient, so theta is also reached through u
            torch.add(cotangent.parameters, u, alpha=settings.weight_decay, out=before.parameters)

    def _moments(
        self, state: TrainingState, gradient: Tensor, settings: GroupSettings
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient with coupled decay, and the new moments."""
        import torch

        a = gradient if self.decoupled else gradient + settings.weight_decay * state.parameters
        m = torch.add(settings.beta1 * state.momentum, a, alpha=1 - settings.beta1)
        v = torch.addcmul(settings.beta2 * state.second_moment, a, a, value=1 - settings.beta2)
        return a, m, v


def _step_size_and_denominator(v: Tensor, updates: int, settings: GroupSettings) -> tuple[float, Tensor, Tensor]:
    """Lr / (1 - beta1^t), sqrt(v / (1 - beta2^t)) + eps, and the root alone."""
    step = updates + 1
    # torch divides the root by the root of the correction, which rounds unlike the root of the quotient
    root = v.sqrt() / (1 - settings.beta2**step) ** 0.5
    return settings.lr / (1 - settings.beta1**step), root + settings.eps, root


def second_moment_change(real: Tensor, changed: Tensor) -> Tensor:
    """The change of v that a first-order step should use: `v' - v`, or `2 v (1 - sqrt(v / v'))` where v' > v.

    Later updates divide by `sqrt(v)`. Where the gradients of samples cancel, v is tiny, and without one of them it is
    thousands of times larger. A derivative by v, times so large a change, gives thousands of times the effect that the
    weight can have. A derivative by `v^-1/2` saturates instead. For small changes the two agree.

    Args:
        real: (p,) v.
        changed: (b, p) v'.
    """
    import torch

    # dv of the linearisation in w = v^-1/2: dv = dw * dv/dw = (v'^-1/2 - v^-1/2) * (-2 v^3/2)
    saturated = 2 * real * (1 - torch.sqrt(real / changed))
    return torch.where(changed > real, saturated, changed - real)
