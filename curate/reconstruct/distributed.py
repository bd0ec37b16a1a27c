"""Folders of `torch.distributed.checkpoint`, read in one process without running what a file says.

Their index `.metadata` is a pickle, and a pickle may call anything that it can name. Here it can name only the records
of an index (`_RECORDS`), torch's dtypes and a few helpers. For a record it gets an empty class of this module, so no
code of torch or of the file runs. The index is then built again from the fields, and each field's type is checked.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from curate.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.checkpoint.metadata import Metadata

_RECORDS = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}  # fmt: skip


class _Record:
    """One object of the index: its pickled state, and no behaviour."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """Arguments (of a path, of a number of an enumeration) are not needed."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index into `_Record`s."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._classes: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """The class or value that a name of the index stands for.

        Raises:
            UnpicklingError: it is no name of an index.
        """
        import torch

        # A class of our own with the same name, one for each: `_fields` tells records apart by it.
        if (module, name) in _RECORDS:
            return self._classes.setdefault(name, type(name, (_Record,), {}))
        if (module, name) == ("torch", "Size"):
            return tuple
        # Called with the layout's name ("torch.strided"), which is not needed.
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        # Checked by type, not by name: torch has many callables, and none of them is a dtype.
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"its index names {module}.{name}, which is no part of one")


def read_distributed(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder of `torch.distributed.checkpoint`, by key; pickled values are left out.

    Raises:
        UserError: it is damaged, or its index names what is no part of one.
    """
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        # torch's own reader would unpickle the index with everything that it names.
        def read_metadata(self, *arguments: Any, **settings: Any) -> Metadata:
            return metadata

    try:
        metadata = _read_index(path)
        tensors = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # says that it loads in a single process, as we mean it to
            load(dict(tensors), storage_reader=Reader(path), no_dist=True)
    # Whatever a damaged file can raise on its way through pickle and torch; not Exception, which hides our mistakes.
    except (
        CheckpointException,
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise UserError(
            f"distributed checkpoint {path} cannot be read ({' '.join(str(error).split())[:200]}); write it again, or "
            "correct `checkpoints`"
        ) from None
    return tensors


def _read_index(path: Path) -> Metadata:
    """The index, built of nothing but names, numbers, dtypes and paths below the folder."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    with (path / ".metadata").open("rb") as file:
        fields = _fields(_IndexUnpickler(file).load(), "Metadata")
    entries = {
        key: BytesStorageMetadata() if type(entry).__name__ == "BytesStorageMetadata" else _tensor_entry(entry)
        for key, entry in fields["state_dict_metadata"].items()
    }
    storage = dict(_storage_entry(path, *item) for item in fields["storage_data"].items())
    # planner_data and storage_meta are left out: loading whole tensors needs neither.
    return Metadata(state_dict_metadata=entries, storage_data=storage)


def _fields(record: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != name or not isinstance(record.state, Mapping):
        raise ValueError(f"its index has no {name} where there must be one")
    return record.state


def _tensor_entry(record: Any) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    fields = _fields(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]  # TensorProperties pickles itself as a tuple, dtype first
    if not isinstance(dtype, torch.dtype):
        raise TypeError("its index has a tensor without a dtype")
    size = torch.Size(fields["size"])
    chunk_fields = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [ChunkStorageMetadata(torch.Size(chunk["offsets"]), torch.Size(chunk["sizes"])) for chunk in chunk_fields]
    # A part that no chunk covers would stay uninitialised memory: numbers that look like weights.
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError("its index lacks a part of a tensor")
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=chunks)


def _storage_entry(path: Path, index: Any, info: Any) -> tuple[Any, Any]:
    """Where the bytes of an entry lie: its index, and the file, offset and length."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    key, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    file = str(where["relative_path"])
    # `../` or an absolute path would read any file of the machine into a tensor.
    if not (path / file).resolve().is_relative_to(path.resolve()):
        raise ValueError(f"its index names the file {file}, which is not in it")
    if where.get("transform_descriptors"):
        raise ValueError("its files are compressed by an extension of torch; write it without one")
    storage = _StorageInfo(relative_path=file, offset=int(where["offset"]), length=int(where["length"]))
    return MetadataIndex(str(key["fqn"]), key.get("offset"), key.get("index")), storage
