"""Snapshots: the state of model and optimizer before a step, as one safetensors file.

Keys are `model.<parameter>` and `optimizer.<parameter>.<buffer>`; nothing is pickled. Writing one holds no second copy
of the state beyond what the device-to-host transfer needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.artifacts import replacing
from curate.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def snapshot_path(run: Path, step: int) -> Path:
    """File of the state before `step`."""
    return run / "snapshots" / f"step-{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Steps that have a complete snapshot, ascending."""
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "snapshots").glob("step-*.safetensors"))


def named_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Trainable parameters by name; `module.` (DDP) and `_orig_mod.` (torch.compile) prefixes are dropped."""
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def state_bytes(model: nn.Module, optimizer_copies: int = 2) -> int:
    """Size of one snapshot in bytes: parameters, buffers and `optimizer_copies` moments of the trainable parameters."""
    own: int = sum(tensor.nbytes for _, tensor in _model_tensors(model))
    return own + optimizer_copies * sum(parameter.nbytes for parameter in named_parameters(model).values())


def save_state(path: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Write the state atomically. Tied tensors are stored once."""
    from safetensors.torch import save_file

    tensors = dict(_model_tensors(model))
    names = {id(parameter): name for name, parameter in named_parameters(model).items()}
    for parameter, buffers in optimizer.state.items():
        for key, value in buffers.items():
            tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    with replacing(path) as part:
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, str(part))


def load_state(path: Path, model: nn.Module, optimizer: Optimizer | None = None) -> None:
    """Load a snapshot into a model and, where given, its optimizer.

    Raises:
        UserError: the file is missing or truncated, or it belongs to another model (names or shapes differ).
    """
    import torch

    tensors = _read(path)
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
            f"snapshot {path} is of another model: {len(wrong)} tensors differ, first {wrong[0]} ({there} there, "
            f"{here} in the run's model); restore the run's own snapshot or its model config"
        )
    with torch.no_grad():
        for key, target in wanted.items():
            target.copy_(found[key])
    if optimizer is not None:
        _load_optimizer(path, tensors, named_parameters(model), optimizer)


def _load_optimizer(
    path: Path, tensors: dict[str, Tensor], parameters: dict[str, Tensor], optimizer: Optimizer
) -> None:
    optimizer.state.clear()
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        name, _, buffer = key.removeprefix("optimizer.").rpartition(".")
        if name not in parameters:
            raise UserError(
                f"snapshot {path} has optimizer state of {name}, which is no trainable parameter of the run's model"
            )
        device = value.device if value.dim() == 0 else parameters[name].device
        optimizer.state[parameters[name]][buffer] = value.clone().to(device)


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under `model.`, each storage once (tied weights under their first name)."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield "model." + name.removeprefix("module.").removeprefix("_orig_mod."), tensor


def _read(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise UserError(f"snapshot {path} is missing") from None
    except SafetensorError as error:
        raise UserError(f"snapshot {path} is corrupted ({error}); restore it or train the stage again") from None
