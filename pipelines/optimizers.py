"""The optimizers of the shipped trainer and their learning rate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from curate.core.config import Config
from curate.core.errors import UserError
from curate.optimizers.schedule import LrSchedule

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """Optimizer with warm-up, cosine decay and clipping."""

    name: Literal["AdamW", "Adam", "SGD", "Muon"] = "AdamW"
    """Class in torch.optim. Muon: for the hidden matrices, with lr scaled to AdamW's step size; AdamW for the rest."""
    lr: float = Field(default=3e-3, ge=0, allow_inf_nan=False)
    """Peak learning rate."""
    min_lr_ratio: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """lr at the end of the cosine, as a share of the peak."""
    warmup_steps: int = Field(default=20, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """Weight decay of matrices, as the optimizer means it; vectors (norms, biases) have none."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the moments of Adam and AdamW."""
    eps: float = Field(default=1e-8, ge=0, allow_inf_nan=False)
    """Added to the root of their second moment."""
    momentum: Decay = 0.95
    """Momentum of SGD and Muon."""
    clip_norm: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest global gradient norm."""


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Lr of one step: linear warm-up, then cosine to `min_lr_ratio` of the peak."""
    schedule = LrSchedule(peak=config.lr, warmup_steps=config.warmup_steps, min_ratio=config.min_lr_ratio)
    return schedule.lr(step, steps)


def build_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """The named optimizer; for Muon, that one over the hidden matrices and AdamW over the rest.

    Raises:
        UserError: this torch has no Muon.
    """
    import torch

    if config.name != "Muon":
        return [_plain(config.name, list(model.parameters()), config)]
    if not hasattr(torch.optim, "Muon"):
        raise UserError(f"torch {torch.__version__} has no torch.optim.Muon; install torch>=2.9, or set another name")
    # Muon is made for matrices between hidden vectors; rows of embeddings and of the head are one per token
    # (K. Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024)
    tables: list[nn.Module] = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    head: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    # by identity: the head may be the embedding itself (tied weights), and tensors compare by element
    outer = {id(parameter) for table in [*tables, *([head] if head else [])] for parameter in table.parameters()}
    hidden = [p for p in model.parameters() if p.dim() == 2 and id(p) not in outer]
    hidden_ids = {id(parameter) for parameter in hidden}
    muon = torch.optim.Muon(
        # match_rms_adamw: updates of the same size as AdamW's, so that one lr serves both
        hidden,
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, _plain("AdamW", [p for p in model.parameters() if id(p) not in hidden_ids], config)]


def _plain(name: Literal["AdamW", "Adam", "SGD"], parameters: list[nn.Parameter], config: OptimizerConfig) -> Optimizer:
    import torch

    # no decay of vectors: it would pull the scales of norms towards 0
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    if name == "SGD":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    optimizer_class = torch.optim.AdamW if name == "AdamW" else torch.optim.Adam
    return optimizer_class(groups, lr=config.lr, betas=config.betas, eps=config.eps)
