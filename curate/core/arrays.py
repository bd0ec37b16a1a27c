"""Arrays and tables on disk, held against their list before they are read; damage is told in one sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from curate.core.artifacts import checked, remedy_of
from curate.core.errors import UserError
from curate.core.reading import first_line
from curate.core.writing import atomic_write

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

UNREADABLE = (  # what NumPy raises for damaged npy and npz files, by where they are damaged
    ValueError, EOFError, BadZipFile, KeyError, AttributeError, RuntimeError, OverflowError, MemoryError, SyntaxError,
    struct.error,
)  # fmt: skip


def write_arrays(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Replace `path` atomically with an npz of named arrays."""
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez(file, **dict(arrays))


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """What `write_arrays` wrote; nothing is unpickled.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _told(path), np.load(checked(path)) as stored:
        return {name: stored[name] for name in stored.files}


def read_array(path: Path) -> npt.NDArray[Any]:
    """The array in an npy file, memory-mapped; nothing is unpickled.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _told(path):
        found: npt.NDArray[Any] = np.load(checked(path), mmap_mode="r")
        return found


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of a file that cannot be read which it is, and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy_of(path.parent)}") from None
    except UserError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path} is corrupted ({first_line(error)}): {remedy_of(path.parent)}") from None


def read_table(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """The table in a Parquet file.

    Args:
        path: the file.
        columns: those that are read; none: all.

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """
    import polars as pl

    try:
        return pl.read_parquet(checked(path), glob=False, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy_of(path.parent)}") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # polars panics on some damage
        raise UserError(f"{path} is corrupted ({first_line(error)}): {remedy_of(path.parent)}") from None


def create_memmap(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A new file of float32 zeros in memory, with its place on the disk: writing to it cannot find the disk full.

    Raises:
        OSError: there is no space for it.
    """
    with atomic_write(path) as part:
        np.lib.format.open_memmap(part, "w+", np.float32, shape)
        with part.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    created: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "r+")
    return created
