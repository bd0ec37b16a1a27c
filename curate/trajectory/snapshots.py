"""Snapshots: the state of model and optimizers before a step, as one safetensors file or a dictionary of tensors.

Several optimizers each hold some of the parameters. Keys are `model.<parameter>` and
`optimizer.<parameter>.<buffer>`; nothing is pickled. Writing one holds no second copy of the state beyond what the
device-to-host transfer needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.artifacts import checked, list_files, replacing
from curate.errors import UserError
from curate.optimizers.settings import BUFFERS

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def snapshot_path(run: Path, step: int) -> Path:
    """File of the state before `step`."""
    return run / "snapshots" / f"step-{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Steps that have a complete snapshot, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "snapshots").glob("step-*.safetensors"))


def unwrapped_name(name: str) -> str:
    """Without the prefixes `module.` (DDP) and `_orig_mod.` (torch.compile)."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name, see `unwrapped_name`."""
    return {unwrapped_name(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def state_bytes(model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Size of one snapshot in bytes: parameters, buffers and what the optimizers keep for each of their parameters."""
    own: int = sum(tensor.nbytes for _, tensor in _model_tensors(model))
    kept: int = sum(
        _vectors(optimizer, group) * parameter.nbytes
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return own + kept


def _vectors(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """What an optimizer keeps per parameter, in copies of it."""
    if "momentum_buffer" in BUFFERS.get(type(optimizer).__name__, ()):
        return 1 if group["momentum"] else 0
    return 2


def as_sequence(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    """One or several optimizers as several."""
    return optimizers if isinstance(optimizers, Sequence) else (optimizers,)


def state_tensors(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> dict[str, Tensor]:
    """The state itself, not a copy, under the keys of a snapshot. Tied tensors come once."""
    tensors = dict(_model_tensors(model))
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    for optimizer in as_sequence(optimizers):
        for parameter, buffers in optimizer.state.items():
            for key, value in buffers.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return {key: value.detach() for key, value in tensors.items()}


def save_state(path: Path, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> None:
    """Write the state atomically."""
    from safetensors.torch import save_file

    with replacing(path) as part:
        save_file({key: value.contiguous() for key, value in state_tensors(model, optimizers).items()}, str(part))


def save_snapshot(run: Path, step: int, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> None:
    """Write the state before `step` as a snapshot of a run, and list it there."""
    path = snapshot_path(run, step)
    save_state(path, model, optimizers)
    list_files(run, [path])


def load_state(path: Path, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] = ()) -> None:
    """Load a snapshot into a model and, where given, its optimizers.

    Raises:
        UserError: the file is missing or truncated, or it belongs to another model (names or shapes differ) or to
            other optimizers.
    """
    put_state(_read(path), model, optimizers, f"snapshot {path}")


def put_state(
    tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Optimizer | Sequence[Optimizer] = (), what: str = ""
) -> None:
    """Copy what `state_tensors` gave into a model and, where given, its optimizers.

    Args:
        tensors: by key; left as they are.
        model: the model.
        optimizers: its optimizers.
        what: the tensors, for messages.

    Raises:
        UserError: they belong to another model or to other optimizers.
    """
    import torch

    wanted = dict(_model_tensors(model))
    found = {key: value for key, value in tensors.items() if key.startswith("model.")}
    wrong = [
        key
        for key in sorted({*wanted, *found})
        if key not in wanted or key not in found or wanted[key].shape != found[key].shape
    ]
    if wrong:
        there = tuple(found[wrong[0]].shape) if wrong[0] in found else "missing"
        here = tuple(wanted[wrong[0]].shape) if wrong[0] in wanted else "missing"
        raise UserError(
            f"{what} is of another model: {len(wrong)} tensors differ, first {wrong[0]} ({there} there, "
            f"{here} in the run's model); restore the run's own snapshot or its model config"
        )
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(found[key])
    given = as_sequence(optimizers)
    if given:
        _put_optimizers(tensors, named_parameters(model), given, what)


def _put_optimizers(
    tensors: Mapping[str, Tensor], parameters: dict[str, Tensor], optimizers: Sequence[Optimizer], what: str
) -> None:
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        name, _, buffer = key.removeprefix("optimizer.").rpartition(".")
        if name not in parameters or id(parameters[name]) not in owners:
            raise UserError(f"{what} has optimizer state of {name}, which is no trainable parameter of the run's model")
        device = value.device if value.dim() == 0 else parameters[name].device
        owners[id(parameters[name])].state[parameters[name]][buffer] = value.clone().to(device)
    _refuse_other_buffers(parameters, optimizers, what)


def _refuse_other_buffers(parameters: dict[str, Tensor], optimizers: Sequence[Optimizer], what: str) -> None:
    """An optimizer takes up foreign state silently, or fails at its first step; nothing is done about unknown ones.

    Raises:
        UserError: a supported optimizer was given state that lacks a buffer of its own.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        for parameter, buffers in optimizer.state.items():
            lacking = sorted(BUFFERS.get(kind, frozenset()) - set(buffers))
            if lacking:
                raise UserError(
                    f"{what} has {', '.join(sorted(buffers))} of {names[id(parameter)]}, but {kind} needs "
                    f"{', '.join(lacking)}: it was written with another optimizer; use that one, or start without it"
                )


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under `model.`, each storage once (tied weights under their first name)."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield "model." + unwrapped_name(name), tensor


def _read(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(checked(path)))
    except FileNotFoundError:
        raise UserError(f"snapshot {path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"snapshot {path} is corrupted ({error}); restore it or train the stage again") from None
