"""Names of a model's parameters, and checks that a replay can repeat its forward pass."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

# attributes that torch.compile, activation checkpointing and FSDP keep the wrapped module under
_WRAPPERS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
# dropouts of classification heads: every GPT-2 config has them, and no language model reads them
_OTHER_HEADS = ("summary_", "classifier_")


def unwrapped_name(name: str) -> str:
    """The name of a parameter or module as if nothing were wrapped.

    torch.compile, activation checkpointing and FSDP add an attribute wherever they wrap a module; DDP adds `module` at
    the front.
    """
    attributes = [attribute for attribute in name.split(".") if attribute not in _WRAPPERS]
    # only in front: a model may well have a submodule called `module`
    while attributes and attributes[0] == "module":
        del attributes[0]
    return ".".join(attributes)


def all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter by its unwrapped name; tied ones once, under their first name."""
    # named_parameters leaves doubles out
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters()}


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable ones of `all_parameters`."""
    return {name: parameter for name, parameter in all_parameters(model).items() if parameter.requires_grad}


def train_only(model: nn.Module, names: Collection[str], whose: str) -> None:
    """Make some parameters trainable and freeze all others.

    Args:
        model: the model.
        names: of the parameters to train.
        whose: what names them, for messages.

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
        # by name, so that SyncBatchNorm and those of other libraries count; tracked statistics mix batches as well
        if "BatchNorm" in type(module).__name__ or getattr(module, "track_running_stats", False) is True:
            raise UserError(
                f"{where} is a {type(module).__name__}, which mixes the samples of a batch: they have no values of "
                "their own; use LayerNorm, RMSNorm or GroupNorm"
            )


def _dropouts(where: str, module: nn.Module) -> Iterator[str]:
    """Describe every dropout of one module."""
    # by name: dropouts of other libraries do not derive from torch's
    if "Dropout" in type(module).__name__ and getattr(module, "p", False):
        yield f"{where} is a dropout with p > 0"
    # attention modules keep a rate as a number and pass it to a function; True and integers are switches and sizes
    for key, value in vars(module).items():
        if "drop" in key and isinstance(value, float) and value > 0:
            yield f"{where} has {key} {value:g}"
    config: Any = getattr(module, "config", None)
    if hasattr(config, "to_dict"):
        for key, value in _numbers(config.to_dict()):
            setting = key.rpartition(".")[2]
            if "drop" in setting and value > 0 and not setting.startswith(_OTHER_HEADS):
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
            dtype = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"{name} is {dtype}, and replay computes with float32 weights; keep the weights in float32 and train "
                "under torch.autocast (task.autocast bfloat16)"
            )


def _is_sharded(parameter: Tensor) -> bool:
    from torch import distributed

    # FSDP1 recognises its flat parameters by this attribute; without use_orig_params the class says it too
    if hasattr(parameter, "_is_flat_param") or type(parameter).__name__ == "FlatParameter":
        return True
    # a torch built without distributed has no DTensor to import
    if not distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)
