"""Snapshots: the state of model and optimizers before a step, as one safetensors file or a dictionary of tensors.

Several optimizers each hold some of the parameters. Keys are `model.<parameter>` and
`optimizer.<parameter>.<buffer>`; nothing is pickled. Writing one holds no second copy of the state beyond what the
device-to-host transfer needs.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.artifacts import checked, list_files
from curate.core.errors import UserError
from curate.core.machine import free_disk
from curate.core.writing import atomic_write
from curate.optimizers.settings import BUFFERS
from curate.training.model import all_parameters, named_parameters, unwrapped_name

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)
# safetensors metadata of a snapshot whose optimizer state was estimated
_ESTIMATED = {"optimizer": "estimated"}


def snapshot_path(run: Path, step: int) -> Path:
    """File of the state before `step`."""
    return run / "snapshots" / f"step-{step:08d}.safetensors"


def snapshot_steps(run: Path) -> list[int]:
    """Steps that have a complete snapshot, ascending."""
    # incomplete ones have a hidden name until they are renamed
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / "snapshots").glob("step-*.safetensors"))


def state_bytes(model: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Size of one snapshot in bytes: parameters, buffers and what the optimizers keep for each of their parameters."""
    model_bytes: int = sum(tensor.nbytes for _, tensor in _model_tensors(model))
    # computed, because before the first step the optimizers hold nothing yet that could be measured
    optimizer_bytes: int = sum(
        _state_vectors(optimizer, group) * parameter.nbytes
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    )
    return model_bytes + optimizer_bytes


def _state_vectors(optimizer: Optimizer, group: dict[str, Any]) -> int:
    """How many tensors of a parameter's size an optimizer keeps for it."""
    if "momentum_buffer" in BUFFERS.get(type(optimizer).__name__, ()):
        return 1 if group["momentum"] else 0
    return 2


def snapshot_schedule(
    windows: dict[str, tuple[int, int]], steps: int, cadence: int, snapshot_bytes: int, budget_bytes: int
) -> set[int]:
    """Steps whose state is stored: all window borders and the stage's end, then an even cadence within the byte budget.

    Args:
        windows: step ranges.
        steps: steps of the stage.
        cadence: snapshots wanted beside those at the borders.
        snapshot_bytes: size of one snapshot.
        budget_bytes: size of all of them.

    Raises:
        UserError: the borders alone exceed the budget.
    """
    borders = {step for window in windows.values() for step in window} | {steps}
    needed = len(borders) * snapshot_bytes
    if needed > budget_bytes:
        raise UserError(
            f"{len(borders)} snapshots of {snapshot_bytes:,} bytes at the window borders need {needed:,} bytes, "
            f"{budget_bytes:,} are there (recorder.snapshot_bytes, or free on the disk); allow that many, or declare "
            "fewer recorder.windows"
        )
    spare = min(cadence, (budget_bytes - needed) // snapshot_bytes)
    if spare < cadence:
        _log.warning(
            "%d of %d snapshots between the windows fit into %s bytes; each takes %s",
            spare,
            cadence,
            f"{budget_bytes:,}",
            f"{snapshot_bytes:,}",
        )
    # rounded up, so that there are never more than `spare`
    return borders | (set(range(0, steps, ceil(steps / spare))) if spare else set())


def snapshot_budget(run: Path, snapshot_bytes: int | None) -> int:
    """Bytes for snapshots: as set, or what is free on the run's disk plus what its snapshots take already."""
    if snapshot_bytes is not None:
        return snapshot_bytes
    # a resumed stage must come to the same schedule as when it began
    stored = sum(path.stat().st_size for path in (run / "snapshots").glob("*.safetensors"))
    return free_disk(run) + stored


def as_sequence(optimizers: Optimizer | Sequence[Optimizer]) -> Sequence[Optimizer]:
    """One optimizer as a sequence of one; several as they are."""
    return optimizers if isinstance(optimizers, Sequence) else (optimizers,)


def state_tensors(model: nn.Module, optimizers: Optimizer | Sequence[Optimizer]) -> dict[str, Tensor]:
    """The state itself, not a copy, under the keys of a snapshot. Tied tensors come once."""
    tensors = dict(_model_tensors(model))
    names = {id(parameter): name for name, parameter in all_parameters(model).items()}
    for optimizer in as_sequence(optimizers):
        for parameter, buffers in optimizer.state.items():
            for key, value in buffers.items():
                tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
    return {key: value.detach() for key, value in tensors.items()}


def save_state(
    path: Path, model: nn.Module, optimizers: Optimizer | Sequence[Optimizer], *, estimated: bool = False
) -> None:
    """Write the state atomically.

    Args:
        path: file.
        model: the model.
        optimizers: its optimizers.
        estimated: the optimizers' state is not that of the training, see `is_estimated`.
    """
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in state_tensors(model, optimizers).items()}
    with atomic_write(path) as part:
        save_file(tensors, str(part), _ESTIMATED if estimated else None)


def is_estimated(path: Path) -> bool:
    """Whether the optimizer state of a snapshot was estimated, so that a replay from it is only near the training."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return bool(file.metadata() == _ESTIMATED)


def read_tensors(path: Path, prefix: str, names: Sequence[str]) -> Iterator[Tensor]:
    """Some tensors of a snapshot, each read when the caller asks for it.

    Raises:
        UserError: the file is damaged, or lacks one.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            for name in names:
                yield file.get_tensor(prefix + name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"snapshot {path} is corrupted ({error}); restore it or train the stage again") from None


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
        tensors: by key; not changed.
        model: the model.
        optimizers: its optimizers.
        what: name of the tensors' source, for messages.

    Raises:
        UserError: they belong to another model or to other optimizers.
    """
    import torch

    model_tensors = dict(_model_tensors(model))
    stored = {key: value for key, value in tensors.items() if key.startswith("model.")}
    differing = [
        key
        for key in sorted({*model_tensors, *stored})
        if key not in model_tensors or key not in stored or model_tensors[key].shape != stored[key].shape
    ]
    # all are compared before any is copied: a refused snapshot leaves the model as it was
    if differing:
        first = differing[0]
        there = tuple(stored[first].shape) if first in stored else "missing"
        here = tuple(model_tensors[first].shape) if first in model_tensors else "missing"
        raise UserError(
            f"{what} is of another model: {len(differing)} tensors differ, first {first} ({there} there, "
            f"{here} in the run's model); restore the run's own snapshot or its model config"
        )
    with torch.no_grad():
        # in place: optimizers, hooks and compiled graphs hold these very tensors
        for key, tensor in model_tensors.items():
            tensor.copy_(stored[key])
    given_optimizers = as_sequence(optimizers)
    if given_optimizers:
        _put_optimizers(tensors, named_parameters(model), given_optimizers, what)


def _put_optimizers(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], what: str
) -> None:
    """Replace the state of some optimizers by what a snapshot holds, see `put_state`."""
    owners = {id(p): optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    # a parameter that the snapshot has no state of never had a gradient; stale state would be taken for its own
    for optimizer in optimizers:
        optimizer.state.clear()
    for key, value in tensors.items():
        if not key.startswith("optimizer."):
            continue
        # from the right: names of parameters have dots, names of buffers have none
        name, _, buffer = key.removeprefix("optimizer.").rpartition(".")
        if name not in parameters or id(parameters[name]) not in owners:
            raise UserError(f"{what} has optimizer state of {name}, which is no trainable parameter of the run's model")
        if value.dim() and value.shape != parameters[name].shape:
            raise UserError(
                f"{what} has optimizer state of shape {tuple(value.shape)} for {name}, which is "
                f"{tuple(parameters[name].shape)}: it is of other parameters (are some frozen, or the groups others?)"
            )
        # Adam's step counter stays on the CPU, where torch keeps it unless it is fused or capturable
        device = value.device if value.dim() == 0 else parameters[name].device
        # a copy: the optimizer updates its buffers in place, and the caller's tensors may be used again
        owners[id(parameters[name])].state[parameters[name]][buffer] = value.clone().to(device)
    _refuse_other_buffers(parameters, optimizers, what)


def _refuse_other_buffers(parameters: Mapping[str, Tensor], optimizers: Sequence[Optimizer], what: str) -> None:
    """Refuse state of another optimizer, which torch would take silently, or fail on at the first step.

    Raises:
        UserError: a supported optimizer was given state that lacks a buffer of its own.
    """
    names = {id(parameter): name for name, parameter in parameters.items()}
    for optimizer in optimizers:
        class_name = type(optimizer).__name__
        for parameter, buffers in optimizer.state.items():
            # a class that is not in BUFFERS, in a training that is not recorded, is not judged
            lacking = sorted(BUFFERS.get(class_name, frozenset()) - set(buffers))
            if lacking:
                raise UserError(
                    f"{what} has {', '.join(sorted(buffers))} of {names[id(parameter)]}, but {class_name} needs "
                    f"{', '.join(lacking)}: it was written with another optimizer; use that one, or start without it"
                )


def _model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under `model.`, each storage once (tied weights under their first name)."""
    seen: set[int] = set()
    # keep_vars: the tensors themselves and not detached views, whose ids would not tell which ones are tied
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
