"""What is asked of a model: the names of its parameters, and a forward pass that a replay can repeat."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_OTHER_HEADS = ("summary_", "classifier_")  # settings of a Hugging Face config that no language model reads


def unwrapped_name(name: str) -> str:
    """The name of a parameter or module as if nothing were wrapped.

    torch.compile, activation checkpointing and FSDP add a part wherever the wrapped module stands in the model; DDP
    adds `module` at the front.
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while parts and parts[0] == "module":
        del parts[0]
    return ".".join(parts)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its unwrapped name; tied ones once, under their first name."""
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable ones of `all_parameters`."""
    return {name: parameter for name, parameter in all_parameters(model).items() if parameter.requires_grad}


def train_only(model: nn.Module, names: Collection[str], whose: str) -> None:
    """Let some parameters be trained, and all others be frozen.

    Args:
        model: the model.
        names: of those that are trained.
        whose: who says so, for messages.

    Raises:
        UserError: the model lacks one.
    """
    parameters = all_parameters(model)
    missing = sorted(set(names) - set(parameters))
    if missing:
        raise UserError(
            f"{whose} trains {missing[0]} and {len(missing) - 1} more parameters that its model does not have; restore "
            "the model's config, or the code of its model.factory"
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)


def refuse_random(model: nn.Module) -> None:
    """Refuse a model whose forward pass a replay could not repeat sample by sample.

    Raises:
        UserError: it has dropout (a module, or a number that a module or its Hugging Face config holds), or a
            normalisation over the batch.
    """
    for name, module in model.named_modules():
        where = unwrapped_name(name) or "the model"
        dropout = next(_dropouts(where, module), None)
        if dropout is not None:
            raise UserError(f"{dropout}: replay could not repeat it; train with dropout 0")
        if "BatchNorm" in type(module).__name__ or getattr(module, "track_running_stats", False) is True:
            raise UserError(
                f"{where} is a {type(module).__name__}, which mixes the samples of a batch: they have no values of "
                "their own; use LayerNorm, RMSNorm or GroupNorm"
            )


def _dropouts(where: str, module: nn.Module) -> Iterator[str]:
    """Every dropout of one module, in words."""
    if "Dropout" in type(module).__name__ and getattr(module, "p", False):
        yield f"{where} is a dropout with p > 0"
    for key, value in vars(module).items():
        if "drop" in key and isinstance(value, float) and value > 0:
            yield f"{where} has {key} {value:g}"
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        for key, value in _numbers(config.to_dict()):
            own = key.rpartition(".")[2]
            if "drop" in own and value > 0 and not own.startswith(_OTHER_HEADS):
                yield f"the model's config has {key} {value:g}"


def _numbers(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every float of a nested config, by dotted key."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def refuse_unwhole(model: nn.Module) -> None:
    """Refuse weights that replay could not hold as the training does: whole, in float32.

    Raises:
        UserError: a parameter is sharded, or of another type.
    """
    import torch

    for name, parameter in all_parameters(model).items():
        if _is_sharded(parameter):
            raise UserError(
                f"{name} is sharded (FSDP or tensor parallelism), which cannot be recorded; train with "
                "DistributedDataParallel, or on one device"
            )
        if parameter.dtype != torch.float32:
            kind = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} is {kind}, and replay computes with float32 weights; keep the weights in float32 and train "
                "under torch.autocast (task.autocast bfloat16)"
            )


def _is_sharded(parameter: Tensor) -> bool:
    from torch import distributed

    if hasattr(parameter, "_is_flat_param") or type(parameter).__name__ == "FlatParameter":
        return True
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)
