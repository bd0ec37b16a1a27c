"""Hyper-parameters of one parameter group, and which optimizers can be recorded, replayed and differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError

if TYPE_CHECKING:
    from torch.optim import Optimizer

_ADAM = frozenset({"step", "exp_avg", "exp_avg_sq"})
BUFFERS = {"AdamW": _ADAM, "Adam": _ADAM, "SGD": frozenset({"momentum_buffer"}), "Muon": frozenset({"momentum_buffer"})}
"""Supported class of `torch.optim` -> buffers that it keeps per parameter (SGD only with momentum)."""
# flags of torch.optim that change the update and that no rule here knows
_UNSUPPORTED_FLAGS = ("amsgrad", "maximize")


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """Hyper-parameters of one parameter group at one step, named as in torch; 0 where the optimizer has no such one.

    Attributes:
        optimizer: class name in `torch.optim`, a key of `BUFFERS`.
        lr: learning rate.
        weight_decay: coupled (added to the gradient) for SGD and Adam, decoupled for AdamW and Muon.
        beta1: decay of Adam's first moment.
        beta2: decay of Adam's second moment.
        eps: Adam's, or the smallest norm that Muon divides by.
        momentum: of SGD and Muon.
        dampening: of SGD.
        nesterov: of SGD and Muon.
        ns_steps: Newton-Schulz iterations of Muon.
        ns_a: first coefficient of their polynomial.
        ns_b: second.
        ns_c: third.
        adjust_lr_fn: how Muon scales lr by a matrix's shape.
        updated: whether the optimizer took the step; a GradScaler or a loop may skip it.
    """

    optimizer: str
    lr: float
    weight_decay: float = 0.0
    beta1: float = 0.0
    beta2: float = 0.0
    eps: float = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    ns_steps: int = 0
    ns_a: float = 0.0
    ns_b: float = 0.0
    ns_c: float = 0.0
    adjust_lr_fn: str = ""
    updated: bool = True

    @classmethod
    def read(cls, optimizer: str, group: Mapping[str, Any]) -> GroupSettings:
        """Read an entry of a torch optimizer's `param_groups`."""
        beta1, beta2 = group.get("betas", (0.0, 0.0))
        ns_a, ns_b, ns_c = group.get("ns_coefficients", (0.0, 0.0, 0.0))
        # float(): a scheduler, or capturable=True, may leave tensors and NumPy numbers in a group
        return cls(
            optimizer=optimizer,
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0.0)),
            momentum=float(group.get("momentum", 0.0)),
            dampening=float(group.get("dampening", 0.0)),
            nesterov=bool(group.get("nesterov", False)),
            ns_steps=int(group.get("ns_steps", 0)),
            ns_a=float(ns_a),
            ns_b=float(ns_b),
            ns_c=float(ns_c),
            # torch's None means "original"; one word for both, so that equal settings compare equal
            adjust_lr_fn=(group.get("adjust_lr_fn") or "original") if optimizer == "Muon" else "",
        )

    def as_group(self) -> dict[str, Any]:
        """The inverse of `read`: keys and values for an entry of `param_groups` of the same optimizer."""
        # only the keys that the class has: torch would keep a foreign one in every checkpoint
        common = {"lr": self.lr, "weight_decay": self.weight_decay}
        if self.optimizer in ("AdamW", "Adam"):
            return {**common, "betas": (self.beta1, self.beta2), "eps": self.eps}
        common = {**common, "momentum": self.momentum, "nesterov": self.nesterov}
        if self.optimizer == "SGD":
            return {**common, "dampening": self.dampening}
        return {
            **common,
            "eps": self.eps,
            "ns_steps": self.ns_steps,
            "adjust_lr_fn": self.adjust_lr_fn,
            "ns_coefficients": (self.ns_a, self.ns_b, self.ns_c),
        }


def refuse_unsupported(optimizers: Sequence[Optimizer]) -> None:
    """Refuse before training what replay could not rebuild after it.

    Raises:
        UserError: a class or a variant that is not supported, or a parameter in two groups.
    """
    seen: set[int] = set()
    for optimizer in optimizers:
        name = supported_class(type(optimizer))
        for group in optimizer.param_groups:
            refuse_variant(name, group)
            # by identity: tensors compare elementwise. torch itself refuses doubles within one optimizer only
            parameters = {id(parameter) for parameter in group["params"]}
            if parameters & seen:
                raise UserError(f"{name} holds a parameter that another optimizer holds too; give each to one of them")
            seen |= parameters


def supported_class(optimizer: type) -> str:
    """The name of an optimizer's class in `torch.optim`.

    Raises:
        UserError: it is not a supported class of torch's own.
    """
    import torch

    name: str = optimizer.__name__
    # the very class: a subclass, or a library's class of the same name, may update in another way
    if name not in BUFFERS or optimizer is not getattr(torch.optim, name, None):
        raise UserError(
            f"the optimizer is {optimizer.__module__}.{optimizer.__qualname__}; values are computed for torch.optim's "
            f"{', '.join(BUFFERS)} (one, or several over different parameters): train with these"
        )
    return name


def refuse_variant(name: str, group: Mapping[str, Any]) -> None:
    """Refuse a form of an optimizer that replay does not know.

    Raises:
        UserError: names the flag.
    """
    for flag in _UNSUPPORTED_FLAGS:
        if group.get(flag):
            raise UserError(f"{name} with {flag} cannot be replayed; set {flag}=False")
    # newer torch derives AdamW from Adam and keeps the difference in this flag, which a user may flip
    if name in ("AdamW", "Adam") and bool(group.get("decoupled_weight_decay", name == "AdamW")) != (name == "AdamW"):
        raise UserError(
            f"{name} with decoupled_weight_decay={group['decoupled_weight_decay']} cannot be replayed; use "
            f"torch.optim.{'Adam' if name == 'AdamW' else 'AdamW'}, which is the same"
        )
