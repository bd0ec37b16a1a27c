"""Arrays and tables on disk, compared with their list before they are read; damage is an error of one sentence."""

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

# What NumPy raises for damaged npy and npz files, by where they are damaged.
UNREADABLE = (
    ValueError,
    EOFError,
    BadZipFile,
    KeyError,
    AttributeError,
    RuntimeError,
    OverflowError,
    MemoryError,
    SyntaxError,
    struct.error,
)


def write_arrays(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Replace `path` atomically with an npz of named arrays."""
    # Into an open file: given a name, NumPy would add `.npz` to it.
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **dict(arrays))


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read what `write_arrays` wrote; it unpickles nothing.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _damage_named(path), np.load(checked(path)) as stored:
        return {name: stored[name] for name in stored.files}


def read_array(path: Path) -> npt.NDArray[Any]:
    """Map the array of an npy file into memory; it unpickles nothing.

    Raises:
        UserError: the file is missing or damaged.
    """
    with _damage_named(path):
        array: npt.NDArray[Any] = np.load(checked(path), mmap_mode="r")
        return array


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn what reading raises into an error that names the file and what to do."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy_of(path.parent)}") from None
    except UserError:  # a ValueError, as NumPy's own are
        raise
    except UNREADABLE as error:
        raise UserError(f"{path} is corrupted ({first_line(error)}): {remedy_of(path.parent)}") from None


def read_table(path: Path, columns: Sequence[str] | None = None) -> pl.DataFrame:
    """Read the table of a Parquet file.

    Args:
        path: the file.
        columns: those that are read; None: all.

    Raises:
        UserError: the file is missing or damaged, or lacks a column.
    """
    import polars as pl

    try:
        # glob=False: a `*` or `[` in a folder's name is no pattern.
        return pl.read_parquet(checked(path), glob=False, columns=None if columns is None else list(columns))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: {remedy_of(path.parent)}") from None
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:  # polars panics on some damage
        raise UserError(f"{path} is corrupted ({first_line(error)}): {remedy_of(path.parent)}") from None


def write_table(path: Path, table: pl.DataFrame) -> None:
    """Replace `path` atomically with a Parquet file of a table."""
    with atomic_write(path) as temporary:
        table.write_parquet(temporary)


def create_memmap(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """Create a memory-mapped file of float32 zeros whose disk space is allocated: later writes cannot fill the disk.

    Raises:
        OSError: there is no space for it.
    """
    with atomic_write(path) as temporary:
        np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        with temporary.open("rb+") as file:
            # The file is sparse until here; without this a full disk kills the process (SIGBUS) at a later write.
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    created: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "r+")
    return created
