"""What a user says about a finished run that had no recorder: everything that its numbers depend on."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from curate.core.config import Config
from curate.core.errors import UserError
from curate.data.mds import Columns
from curate.data.order import LoaderConfig
from curate.data.streams import DomainName, stream_arguments
from curate.optimizers.schedule import LrSchedule
from curate.optimizers.settings import BUFFERS, GroupSettings, refuse_unsupported
from curate.reconstruct.checkpoints import CheckpointKeys
from curate.training.declared import Border
from curate.training.model import all_parameters, named_parameters
from curate.training.task import TaskSpec

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class GroupConfig(Config):
    """A parameter group: the parameters that match, and that no group before it took."""

    names: str = ".*"
    """Regular expression that the whole name must match."""
    min_dim: int = Field(default=0, ge=0)
    """Fewest dimensions of its parameters; 2: matrices and embeddings."""
    arguments: dict[str, Any] = {}
    """Arguments of this group, over the optimizer's, e.g. {weight_decay: 0.0}."""
    lr_scale: float = Field(default=1.0, gt=0)
    """Its lr, as a multiple of the lr of each step."""


class OptimizerConfig(Config):
    """One optimizer of the training."""

    name: str = "AdamW"
    """Class in torch.optim."""
    arguments: dict[str, Any] = {}
    """Its arguments, except lr, e.g. {betas: [0.9, 0.95], weight_decay: 0.1}."""
    groups: tuple[GroupConfig, ...] = Field(default=(GroupConfig(),), min_length=1)
    """Its parameter groups, in order."""


class LossConfig(Config):
    """How the loss of a step follows from the losses of its samples."""

    mean: Literal["token", "sample"] = "token"
    """Mean over predicted tokens, or over samples of each sample's token mean."""
    over: Literal["step", "rank", "micro_batch"] = "step"
    """Over all of a step's samples at once; or of each rank's, and the mean over ranks (DistributedDataParallel); or of
    each micro-batch's, and the mean over micro-batches and ranks (loss divided by the accumulation steps)."""


class LogConfig(Config):
    """A table of what was logged: CSV, JSON lines or Parquet, one row per logged step."""

    file: Path
    """The table."""
    step: str = "step"
    """Column of the step."""
    first_step: int = 0
    """What the log calls the first step; 1 where step k is logged after it as k + 1."""
    loss: str = "loss"
    """Column of the step's training loss over all ranks, nats per token; needed of some steps."""
    lr: str = "lr"
    """Column of the first group's lr, if there is one; needed of every step, or set `lr`."""
    grad_norm: str = "grad_norm"
    """Column of the gradient norm before clipping, if there is one."""


class ReconstructConfig(Config):
    """A finished run on StreamingDataset, without a recorder."""

    out: Path
    """Folder of the reconstructed run."""
    streams: dict[DomainName, dict[str, Any]] = Field(min_length=1)
    """Domain -> arguments of its `Stream`, in the order of the training."""
    dataset: dict[str, Any]
    """Other arguments of `StreamingDataset`: shuffle, shuffle_algo, shuffle_seed, shuffle_block_size,
    num_canonical_nodes, epoch_size ... as they were given; what is left out has streaming's default."""
    loader: LoaderConfig
    """Processes and loaders."""
    streaming_version: str | None = None
    """Version of mosaicml-streaming that the training used, if it is known."""
    steps: int = Field(ge=1)
    """Optimizer steps of the stage."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Samples of a forward pass, where a DataLoader batch was split further."""
    task: TaskSpec
    """Model and precision."""
    loss: LossConfig = LossConfig()
    """From samples to the step's loss."""
    optimizers: tuple[OptimizerConfig, ...] = Field(min_length=1)
    """One optimizer, or several over different parameters."""
    frozen: tuple[str, ...] = ()
    """Parameters that were not trained: regular expressions that their whole names must match."""
    clip_norm: float | None = Field(default=None, gt=0, allow_inf_nan=True)
    """Threshold given to `clip_grad_norm_`; none: no clipping."""
    lr: LrSchedule | None = None
    """Learning rate by formula; none: the log's."""
    log: LogConfig
    """Logged losses."""
    checkpoints: dict[int, Path] = Field(min_length=1)
    """Step -> state before it (after as many steps): a file of torch.save, safetensors, or a folder of
    torch.distributed.checkpoint."""
    checkpoint_keys: CheckpointKeys = CheckpointKeys()
    """Where a checkpoint holds what."""
    estimate_moments: int | None = Field(default=None, ge=1)
    """Where checkpoints have no optimizer state: estimate it from the gradients of as many steps before each, at the
    checkpoint's own weights. None: such checkpoints serve one step each, unless the optimizer keeps nothing."""
    windows: dict[str, tuple[Border, Border]] | None = None
    """Windows to value, as the recorder's; none: the recorder's, the early one from the first checkpoint on."""
    columns: Columns = Columns()
    """Columns of the streams."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the tokens; needed for targets given as text."""
    previous: Path | None = None
    """Run of the stage that this one continued from."""
    check_steps: int = Field(default=3, ge=1)
    """Steps to replay from each checkpoint and compare with the log."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest relative difference between logged and replayed numbers."""
    device: str = "cpu"
    """Device of the replay."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for domain, stream in self.streams.items():
            # `local` may be missing here (a remote stream); what is checked are the names of the arguments.
            stream_arguments({"local": "", **stream}, f"streams.{domain}")
        outside = [step for step in self.checkpoints if not 0 <= step <= self.steps]
        if outside:
            raise ValueError(f"checkpoint {outside[0]} is not of a stage of {self.steps} steps")
        return self


def build_optimizers(model: nn.Module, config: ReconstructConfig) -> list[Optimizer]:
    """The optimizers of a description, in their initial state; each step sets the lr.

    Raises:
        UserError: unknown ones or arguments, a parameter without a group, or a group or a pattern of `frozen` without
            parameters.
    """
    import torch

    # First: `named_parameters` has trained parameters only, and each of those must be in a group.
    _freeze(model, config.frozen)
    left = named_parameters(model)
    optimizers: list[Optimizer] = []
    for number, chosen in enumerate(config.optimizers):
        where = f"optimizers.{number}"
        if chosen.name not in BUFFERS or not hasattr(torch.optim, chosen.name):
            raise UserError(f"{where}.name is {chosen.name}; known are {', '.join(BUFFERS)} of torch.optim")
        groups = []
        for index, group in enumerate(chosen.groups):
            # Of what is left: the first matching group takes a parameter, and pop below removes it for the others.
            taken = [n for n, p in left.items() if p.dim() >= group.min_dim and re.fullmatch(group.names, n)]
            if not taken:
                raise UserError(
                    f"{where}.groups.{index} matches no parameter that is left ({', '.join(left) or 'none'})"
                )
            if "lr" in group.arguments or "lr" in chosen.arguments:
                raise UserError(f"{where} sets lr; give it by `lr` or the log, and a group's own by lr_scale")
            groups.append({"params": [left.pop(name) for name in taken], **group.arguments})
        try:
            optimizers.append(getattr(torch.optim, chosen.name)(groups, lr=0.0, **chosen.arguments))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: torch.optim.{chosen.name} refuses its arguments: {error}") from None
    if left:
        raise UserError(
            f"{len(left)} parameters are in no group of `optimizers`, first {next(iter(left))}; give them one, or name "
            "them in `frozen`"
        )
    refuse_unsupported(optimizers)
    return optimizers


def _freeze(model: nn.Module, patterns: tuple[str, ...]) -> None:
    parameters = all_parameters(model)
    for pattern in patterns:
        matched = [name for name in parameters if re.fullmatch(pattern, name)]
        if not matched:
            raise UserError(f"frozen has {pattern!r}, which matches no parameter; there is {', '.join(parameters)}")
        for name in matched:
            parameters[name].requires_grad_(False)


def group_settings(config: ReconstructConfig, optimizers: list[Optimizer]) -> list[tuple[GroupSettings, float]]:
    """Settings of every parameter group, and its multiple of the lr."""
    return [
        (GroupSettings.read(chosen.name, group), scaled.lr_scale)
        for chosen, optimizer in zip(config.optimizers, optimizers, strict=True)
        for scaled, group in zip(chosen.groups, optimizer.param_groups, strict=True)
    ]
