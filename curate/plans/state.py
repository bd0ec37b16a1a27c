"""Do two stored states hold the same parameters? Compared by name, one at a time, without loading a whole state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

_TORCH = (".pt", ".pth", ".bin", ".ckpt")
_MODEL = "model."  # of a snapshot's keys

Tensors = Mapping[str, Callable[[], "Tensor"]]


def difference(snapshot: Path, other: Path) -> str | None:
    """Where the parameters of a checkpoint, or of another snapshot, are not those of a snapshot.

    A parameter of the snapshot is looked for under its own name or behind any prefix ("module.", "model."); what is
    stored in bfloat16 or float16 is compared in it. Parameters that only one of the two names (tied ones) do not count.

    Args:
        snapshot: as the recorder wrote it.
        other: safetensors file, folder of them, or a file that torch loads with `weights_only=True`.

    Returns:
        One sentence about the first difference; None where there is none or nothing can be compared (`readable`).

    Raises:
        UserError: a file is corrupted.
    """
    mine, theirs = _open(snapshot), _by_ending(_open(other))
    for name in sorted(key.removeprefix(_MODEL) for key in mine if key.startswith(_MODEL)):
        readers = theirs.get(name)
        if not readers:
            continue
        # several: a name may end in the same way in two parts of a model (one of them has to be the same)
        wanted, candidates = mine[_MODEL + name](), [read() for read in readers]
        if all(candidate.shape != wanted.shape for candidate in candidates):
            return f"{name} has shape {tuple(candidates[0].shape)} instead of {tuple(wanted.shape)}"
        if not any(_same(wanted, candidate) for candidate in candidates):
            far = (candidates[0].float() - wanted.float()).abs().mean() / wanted.float().abs().mean().clamp(min=1e-30)
            return f"{name} differs, by {float(far):.2g} of its mean size"
    return None


def readable(snapshot: Path, other: Path) -> bool:
    """Whether `difference` finds at least one parameter of the snapshot in the other state."""
    theirs = _by_ending(_open(other))
    return any(key.removeprefix(_MODEL) in theirs for key in _open(snapshot) if key.startswith(_MODEL))


def _same(wanted: Tensor, other: Tensor) -> bool:
    import torch

    if wanted.shape != other.shape:
        return False
    other = other.to(wanted.device)
    # in the smaller of the two types: a checkpoint in bfloat16 of a float32 state is the same state, rounded
    types = {wanted.dtype, other.dtype} & {torch.bfloat16, torch.float16} or {wanted.dtype}
    return any(torch.equal(wanted.to(dtype), other.to(dtype)) for dtype in types)


def _by_ending(tensors: Tensors) -> dict[str, list[Callable[[], Tensor]]]:
    """Every tensor under its name and under all that is left of it behind a dot."""
    by_ending: dict[str, list[Callable[[], Tensor]]] = {}
    for name, read in tensors.items():
        parts = name.split(".")
        for start in range(len(parts)):
            by_ending.setdefault(".".join(parts[start:]), []).append(read)
    return by_ending


def _open(path: Path) -> dict[str, Callable[[], Tensor]]:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if all(file.suffix == ".safetensors" for file in files):
        return {name: read for file in files for name, read in _safetensors(file)}
    return dict(_torch(path)) if path.suffix in _TORCH else {}


def _safetensors(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    from safetensors import SafetensorError, safe_open

    try:
        file: Any = safe_open(str(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupted ({error}); restore it or train the stage again") from None
    for name in file.keys():  # noqa: SIM118  # no mapping: it can only be iterated by its keys
        yield name, partial(file.get_tensor, name)


def _torch(path: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    import pickle

    import torch

    try:
        stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return  # needs more than tensors and plain values: nothing pickled is loaded
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is corrupted ({error}); restore it or train the stage again") from None
    yield from _flattened(stored, "")


def _flattened(value: Any, prefix: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    import torch

    if isinstance(value, torch.Tensor):
        yield prefix, lambda: value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flattened(inner, f"{prefix}.{key}" if prefix else str(key))
