"""Checkpoints of other programs, as tensors under the keys of a snapshot (`curate.training.snapshots`).

Three formats are read: files of `torch.save` (with `weights_only=True`), safetensors (a file, or a folder with
`model.safetensors` or its index, and Hugging Face's `optimizer.pt` beside it), and folders of
`torch.distributed.checkpoint`. Only tensors and containers are unpickled, no other object; the index of a distributed
checkpoint is read as data (`curate.reconstruct.distributed`).

Optimizer state may be that of `optimizer.state_dict()` (numbered parameters, in the order of the groups) or of
`torch.distributed.checkpoint.state_dict` (parameters by name).
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.artifacts import read_json
from curate.core.config import Config
from curate.core.errors import UserError
from curate.optimizers.settings import BUFFERS, GroupSettings
from curate.reconstruct.distributed import read_distributed
from curate.training.model import named_parameters, unwrapped_name

if TYPE_CHECKING:
    from torch import Tensor, nn


_OPTIMIZER = "optimizer.pt"
_BUFFERS = frozenset().union(*BUFFERS.values())
# `optimizer.state.0.exp_avg`, `state.layer.weight.step`: where the state_dict lies, whose state it is, which buffer.
_STATE = re.compile(r"(?:(?P<prefix>.+?)\.)?state\.(?P<parameter>.+)\.(?P<buffer>[^.]+)")


class CheckpointKeys(Config):
    """Dotted keys of what a checkpoint holds (`optimizers.0`: the first of a list); an empty key: at its top."""

    model: str = "model"
    """The model's `state_dict()`."""
    optimizers: tuple[str, ...] = ("optimizer",)
    """Each optimizer's `state_dict()`, in the order of `optimizers`."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """All tensors of a checkpoint by dotted key (`model.embedding.weight`, `optimizer.state.0.exp_avg`).

    Returns:
        Tensors, and numbers and texts of a `torch.save` file (hyper-parameters).

    Raises:
        UserError: there is none, it is damaged, or it holds pickled objects.
    """
    # By what lies there, not by name: trainers name their checkpoints as they like.
    if not path.exists():
        raise UserError(f"checkpoint {path} is not there; correct `checkpoints`")
    if path.is_dir() and (path / ".metadata").exists():
        return dict(read_distributed(path))
    if path.is_dir() or path.suffix == ".safetensors":
        return _read_safetensors(path)
    return dict(_flat(_read_torch(path)))


def _read_torch(path: Path) -> Any:
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0].strip()
        raise UserError(
            f"checkpoint {path} holds more than tensors ({reason}); curate unpickles no objects: load it where you "
            "trust it and save model.state_dict() and optimizer.state_dict() alone with torch.save"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"checkpoint {path} cannot be read ({' '.join(str(error).split())[:200]})") from None


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{prefix}{key}.")
    # Lists of optimizers or parameter groups are walked; `betas` and lists of parameter numbers stay values.
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping) for inner in value):
        for index, inner in enumerate(value):
            yield from _flat(inner, f"{prefix}{index}.")
    else:
        yield prefix[:-1], value


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    files, beside = [path], {}
    if path.is_dir():
        # Under the default key of `CheckpointKeys`, as if it lay in the same file.
        if (path / _OPTIMIZER).exists():
            beside = dict(_flat(_read_torch(path / _OPTIMIZER), "optimizer."))
        index = path / "model.safetensors.index.json"  # of a model in several files
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
        files = [path / name for name in names]
    tensors: dict[str, Any] = beside
    for file in files:
        try:
            tensors |= load_file(str(file))
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {file} cannot be read ({error})") from None
    return tensors


def snapshot_tensors(
    checkpoint: Mapping[str, Any], keys: CheckpointKeys, model: nn.Module, optimizers: Sequence[Sequence[Sequence[str]]]
) -> tuple[dict[str, Tensor], bool]:
    """The tensors of a checkpoint under the keys of a snapshot.

    Args:
        checkpoint: see `read_checkpoint`.
        keys: where its tensors lie.
        model: the model; shows which tensors are tied: one name of them is enough.
        optimizers: per optimizer, per group, the names of its parameters.

    Returns:
        The tensors, and whether optimizer state is among them. A file with the keys of a snapshot is taken as it is.

    Raises:
        UserError: tensors of the model are missing or unknown, or optimizer state does not belong to its parameters.
    """
    # `optimizer.<parameter>.<buffer>`, without `.state.`: a snapshot of our own recorder.
    if any(
        key.startswith("optimizer.") and key.rpartition(".")[2] in _BUFFERS and ".state." not in key
        for key in checkpoint
    ):
        return dict(checkpoint), True
    state = _model_state(checkpoint, keys.model, model)
    shapes = {name: tuple(parameter.shape) for name, parameter in named_parameters(model).items()}
    moments: dict[str, Any] = {}
    # strict=False: `_refuse_unread` below refuses a wrong number of keys, and says where the state lies.
    for prefix, groups in zip(keys.optimizers, optimizers, strict=False):
        # In the order of the groups: a state_dict numbers parameters in it.
        moments |= _optimizer_state(checkpoint, prefix, {name: shapes[name] for group in groups for name in group})
    _refuse_unread(checkpoint, keys, len(optimizers))
    return {**state, **moments}, bool(moments)


def _state_prefix(key: str) -> str | None:
    """The key of the optimizer's state_dict that an entry belongs to; None where it is no optimizer state."""
    match = _STATE.fullmatch(key)
    return (match["prefix"] or "") if match and match["buffer"] in _BUFFERS else None


def _refuse_unread(checkpoint: Mapping[str, Any], keys: CheckpointKeys, optimizers: int) -> None:
    """Name optimizer state that the keys of the description do not reach, instead of estimating it.

    Raises:
        UserError: says where it lies.
    """
    import torch

    tensors = [key for key, value in checkpoint.items() if isinstance(value, torch.Tensor)]
    prefixes = {prefix for prefix in map(_state_prefix, tensors) if prefix is not None}
    named = keys.optimizers[:optimizers]
    unread = sorted(prefixes - set(named))
    # More state than optimizers is no error where every key was read: a checkpoint may hold other models' too.
    if len(keys.optimizers) > optimizers or (unread and not (set(named) <= prefixes and len(named) == optimizers)):
        where = f"optimizer state lies at {', '.join(map(repr, unread)) or 'no other key'} of the checkpoint"
        raise UserError(
            f"checkpoint_keys.optimizers is {list(keys.optimizers)} and the description has {optimizers} optimizers, "
            f"but {where}: set one key for each optimizer, in their order"
        )


def _below(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Entries below a dotted key, without it."""
    start = f"{prefix.removeprefix('.')}." if prefix else ""
    return {key[len(start) :]: value for key, value in checkpoint.items() if key.startswith(start)}


def _model_state(checkpoint: Mapping[str, Any], prefix: str, model: nn.Module) -> dict[str, Tensor]:
    import torch

    # keep_vars: tied names give one object, so that identity shows the tie.
    model_tensors = {unwrapped_name(name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    tensors = {key: value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}
    nested = {unwrapped_name(key): value for key, value in _below(tensors, prefix).items()}
    top = {unwrapped_name(key): value for key, value in tensors.items()}
    stored = nested if set(model_tensors) & set(nested) else top  # a model's names may begin like the prefix ("model.")
    aliases: dict[int, list[str]] = {}
    for name, tensor in model_tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    missing = [names[0] for names in aliases.values() if not any(name in stored for name in names)]
    if missing:
        raise UserError(
            f"the checkpoint lacks {len(missing)} of the model's {len(aliases)} tensors, first {missing[0]} (it has "
            f"{', '.join(sorted(checkpoint)[:4])}, ...); set checkpoint_keys.model to the key of model.state_dict()"
        )
    unknown = sorted(key for key in set(stored) - set(model_tensors) if _state_prefix(key) is None)
    # Only below the model's key: at the top other things (a scheduler, a scaler) may lie beside the model.
    if unknown and stored is nested:
        raise UserError(f"the checkpoint is of another model: it has {unknown[0]}, which the description's has not")
    chosen = {names[0]: next(stored[name] for name in names if name in stored) for names in aliases.values()}
    for name, tensor in chosen.items():
        if tensor.shape != model_tensors[name].shape:
            raise UserError(
                f"the checkpoint is of another model: {name} is {tuple(tensor.shape)} there, "
                f"{tuple(model_tensors[name].shape)} in the description's"
            )
    return {f"model.{name}": tensor for name, tensor in chosen.items()}


def _optimizer_state(
    checkpoint: Mapping[str, Any], prefix: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """State by snapshot key, of parameters with these shapes in the groups' order; empty where there is none."""
    import torch

    state: dict[str, Tensor] = {}
    numbered = {str(index): name for index, name in enumerate(shapes)}
    for key, value in _below(checkpoint, f"{prefix}.state").items():
        owner, _, buffer = key.rpartition(".")
        # A number (optimizer.state_dict) or a name, perhaps with prefixes of DDP or torch.compile.
        name = numbered.get(owner, unwrapped_name(owner))
        if name not in shapes:
            raise UserError(
                f"{prefix}.state of the checkpoint has {key}, but the description gives that optimizer "
                f"{len(shapes)} parameters, none of that name or number: correct optimizers.groups"
            )
        # Other buffers (max_exp_avg_sq of amsgrad) belong to optimizers that replay refuses; None: SGD's empty buffer.
        if buffer not in _BUFFERS or value is None:
            continue
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        if buffer != "step" and tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{prefix}.state.{key} of the checkpoint is {tuple(tensor.shape)}, {name} of the model {shapes[name]}: "
                "its parameters were in another order, or some were frozen; correct optimizers.groups or frozen"
            )
        state[f"optimizer.{name}.{buffer}"] = tensor
    return state


def check_settings(checkpoint: Mapping[str, Any], prefix: str, groups: Sequence[GroupSettings]) -> None:
    """Compare hyper-parameters of a `torch.save` checkpoint with the description's, except lr.

    Raises:
        UserError: one differs.
    """
    stored = _below(checkpoint, f"{prefix}.param_groups")
    count = len({key.partition(".")[0] for key in stored})
    if not count:
        return
    if count != len(groups):
        raise UserError(f"{prefix} of the checkpoint has {count} parameter groups, the description {len(groups)}")
    for index, settings in enumerate(groups):
        stored_group = _below(stored, str(index))
        for key, value in settings.as_group().items():
            # A key that the checkpoint lacks is no contradiction: older versions of torch have fewer.
            stored_value = stored_group.get(key, value)
            same = tuple(stored_value) == tuple(value) if isinstance(value, tuple | list) else stored_value == value
            # lr changes with each step, and the log checks it; no adjust_lr_fn is torch's name for "original".
            if key not in ("lr", "adjust_lr_fn") and stored_value is not None and not same:
                raise UserError(
                    f"group {index} of {prefix} has {key} {stored_value} in the checkpoint, {value} in the description"
                )
