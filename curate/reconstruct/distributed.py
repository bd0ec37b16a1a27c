"""Folders of `torch.distributed.checkpoint`, read in one process without running what a file says.

Their index `.metadata` is a pickle, and a pickle may call anything that it can name. So it can name only the records of
an index (`_RECORDS`), torch's dtypes and three helpers, and what it gets for a record is an empty class of this module:
no code of torch or of the file runs. The index is then made anew from the fields, each held against its type.
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
    """One object of the index: what was pickled of it, and no behaviour."""

    state: Any = None

    def __init__(self, *arguments: Any) -> None:
        """Arguments (of a path, of a number of an enumeration) are not needed."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles an index into `_Record`s."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)
        self._kinds: dict[str, type[_Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What a name of the index stands for.

        Raises:
            UnpicklingError: it is no name of an index.
        """
        import torch

        if (module, name) in _RECORDS:
            return self._kinds.setdefault(name, type(name, (_Record,), {}))
        if (module, name) == ("torch", "Size"):
            return tuple
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
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
    except (CheckpointException, pickle.UnpicklingError, ArithmeticError, AttributeError, EOFError, LookupError,
            MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:  # fmt: skip
        raise UserError(
            f"distributed checkpoint {path} cannot be read ({' '.join(str(error).split())[:200]}); write it again, or "
            "correct `checkpoints`"
        ) from None
    return tensors


def _read_index(path: Path) -> Metadata:
    """The index, made of nothing but names, numbers, dtypes and paths below the folder."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

    with (path / ".metadata").open("rb") as file:
        fields = _fields(_IndexUnpickler(file).load(), "Metadata")
    entries = {
        key: BytesStorageMetadata() if type(entry).__name__ == "BytesStorageMetadata" else _tensor_entry(entry)
        for key, entry in fields["state_dict_metadata"].items()
    }
    places = dict(_place(path, *item) for item in fields["storage_data"].items())
    return Metadata(state_dict_metadata=entries, storage_data=places)


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    if not isinstance(record, _Record) or type(record).__name__ != kind or not isinstance(record.state, Mapping):
        raise ValueError(f"its index has no {kind} where there must be one")
    return record.state


def _tensor_entry(record: Any) -> Any:
    import torch
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    fields = _fields(record, "TensorStorageMetadata")
    dtype = fields["properties"].state[0]
    if not isinstance(dtype, torch.dtype):
        raise TypeError("its index has a tensor without a dtype")
    size = torch.Size(fields["size"])
    pieces = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    chunks = [ChunkStorageMetadata(torch.Size(each["offsets"]), torch.Size(each["sizes"])) for each in pieces]
    if sum(chunk.sizes.numel() for chunk in chunks) != size.numel():
        raise ValueError("its index lacks a part of a tensor")  # which would stay uninitialised memory
    return TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=size, chunks=chunks)


def _place(path: Path, index: Any, info: Any) -> tuple[Any, Any]:
    """Where the bytes of an entry lie."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import MetadataIndex

    key, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    file = str(where["relative_path"])
    if not (path / file).resolve().is_relative_to(path.resolve()):
        raise ValueError(f"its index names the file {file}, which is not in it")
    if where.get("transform_descriptors"):
        raise ValueError("its files are compressed by an extension of torch; write it without one")
    place = _StorageInfo(relative_path=file, offset=int(where["offset"]), length=int(where["length"]))
    return MetadataIndex(str(key["fqn"]), key.get("offset"), key.get("index")), place
