"""Rows of the value index on disk: one of 256 bytes for each sample, of the run's own data or never trained on.

A file holds the rows of at most 4,096 samples of one MDS shard. Its name says which samples and what bytes, so that
finished files are kept after an interruption, those of new shards stand beside the old ones, and a shard whose samples
changed is another one. A sample is known by its content: copies, other shard layouts and other sources share its row.
Files are memory-mapped: what is in memory is 16 bytes a sample, and what a caller asks for.

N samples, D numbers of a row, T vectors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.artifacts import hash_of
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.progress import progress
from curate.core.writing import atomic_write
from curate.influence.current import read_together
from curate.influence.space import captured_rows, row_capture, row_passes
from curate.training.fit import check_fit

if TYPE_CHECKING:
    import dataframely as dy
    import numpy.typing as npt

    from curate.influence.space import RowSpace
    from curate.tables import Samples
    from curate.training.replay import Replay
    from curate.training.run import Run
    from curate.training.source import SampleSource

    Codes = npt.NDArray[np.int8]
    Floats = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]

_log = logging.getLogger(__name__)
_BLOCK = 4096  # samples of a file: what an interruption can cost
_CHUNK = 1 << 16  # rows in memory at once, 64 MiB of float32
_LARGEST = 127  # int8


def quantized(rows: Floats) -> tuple[Codes, Floats]:
    """Rows (N, D) as int8 codes and a scale for each, the largest entry at 127; a row of zeros has scale 0."""
    scales = (np.abs(rows).max(axis=1) / _LARGEST).astype(np.float32)
    codes = np.rint(np.divide(rows, scales[:, None], out=np.zeros_like(rows), where=scales[:, None] > 0))
    # clip: the scale of the smallest numbers is rounded so much that codes would wrap around
    return codes.clip(-_LARGEST, _LARGEST).astype(np.int8), scales


@dataclass(frozen=True, kw_only=True)
class _File:
    """The rows of a file, memory-mapped: ids (N,), scales (N,) and codes (N, D), one array after the other."""

    ids: Ids
    scales: Floats
    codes: Codes

    def rows(self, positions: npt.NDArray[Any]) -> Floats:
        """(n, D) of some rows."""
        found: Floats = self.codes[positions].astype(np.float32) * self.scales[positions][:, None]
        return found


class RowStore:
    """The rows in a folder; their ids are read when they are first asked for.

    Args:
        folder: of the files.
        numbers: D.
    """

    def __init__(self, folder: Path, numbers: int) -> None:
        self.folder, self.numbers = folder, numbers

    @cached_property
    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("*.npy"))

    @cached_property
    def _places(self) -> tuple[Ids, npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Ids in order, and the file and the row of each; of a sample that two files have, the first by name."""
        # copies: a map that is referred to keeps a file open
        parts = [np.array(_mapped(path, self.numbers, check=True).ids) for path in self._paths]
        ids = np.concatenate([np.zeros(0, np.int64), *parts])
        lengths = [len(part) for part in parts]
        files = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        rows = np.concatenate([np.zeros(0, np.int32), *(np.arange(length, dtype=np.int32) for length in lengths)])
        unique, first = np.unique(ids, return_index=True)
        return unique, files[first], rows[first]

    @property
    def sample_ids(self) -> Ids:
        """(N,) content ids of the samples that have a row, in their order."""
        return self._places[0]

    def missing(self, samples: dy.DataFrame[Samples]) -> pl.DataFrame:
        """The samples without a row, by domain, shard and place."""
        have = pl.DataFrame({"sample_id": self.sample_ids})
        return samples.join(have, on="sample_id", how="anti").sort("domain", "shard", "index")

    def take(self, sample_ids: Ids) -> Floats:
        """(n, D) rows of samples, in their order.

        Raises:
            UserError: a sample has none.
        """
        ids, files, rows = self._places
        at = np.searchsorted(ids, sample_ids)
        lacking = np.ones(len(sample_ids), bool) if len(ids) == 0 else ids[at.clip(max=len(ids) - 1)] != sample_ids
        if lacking.any():
            raise UserError(
                f"{self.folder} has no row of {lacking.sum():,} samples that were indexed, the first one "
                f"{sample_ids[lacking][0]}: files were deleted; make them again with python -m curate.embed"
            )
        taken = np.empty((len(sample_ids), self.numbers), np.float32)
        of_file = files[at]
        # file by file, so that each is open once, and read from front to back where the samples are in its order
        for number in np.unique(of_file):
            here = np.flatnonzero(of_file == number)
            taken[here] = _mapped(self._paths[number], self.numbers).rows(rows[at[here]])
        return taken

    def products(self, sample_ids: Ids, vectors: Floats) -> Floats:
        """(n, T) float32 inner products of samples' rows with vectors (T, D)."""
        starts = range(0, len(sample_ids), _CHUNK)
        parts = [self.take(sample_ids[start : start + _CHUNK]) @ vectors.T for start in starts]
        return np.concatenate([np.zeros((0, len(vectors)), np.float32), *parts])

    def write(self, sample_ids: Ids, rows: Floats) -> None:
        """Write the rows of one block."""
        codes, scales = quantized(rows)
        ids = sample_ids.astype("<i8").tobytes()
        content = ids + scales.astype("<f4").tobytes() + codes.tobytes()
        path = self.folder / f"{hash_of(ids)[:16]}-{hash_of(content)}.npy"
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.frombuffer(content, np.uint8))
        for name in ("_paths", "_places"):
            self.__dict__.pop(name, None)


def _mapped(path: Path, numbers: int, *, check: bool = False) -> _File:
    """The arrays of a file, whose name ends in their hash.

    Raises:
        UserError: it is damaged; its hash is compared where `check` is set.
    """
    try:
        content = np.load(path, mmap_mode="r")
    except (ValueError, EOFError):  # not OSError: a limit of open files is no damage
        content = np.zeros(0, np.uint8)
    if not len(content) or (check and hash_of(content.data) != path.stem.rpartition("-")[2]):
        raise UserError(f"{path} is corrupted: delete it, and its rows are made again")
    size = len(content) // (12 + numbers)
    return _File(
        ids=content[: 8 * size].view("<i8"),
        scales=content[8 * size : 12 * size].view("<f4"),
        codes=content[12 * size :].view(np.int8).reshape(size, numbers),
    )


def embed_samples(
    run: Run, source: SampleSource, samples: dy.DataFrame[Samples], space: RowSpace, replay: Replay
) -> RowStore:
    """Make the rows of samples that have none, a block after the other; what an interruption left is kept.

    The cost is logged before.

    Args:
        run: a finished run, whose last state is the current one.
        source: of the samples.
        samples: N samples of the source.
        space: of the run.
        replay: of the run.

    Raises:
        UserError: the model cannot read the samples, or a sample's gradient is not finite (names it).
    """
    store = open_rows(space)
    missing = store.missing(samples)
    if missing.is_empty():
        return store
    check_fit(source.catalogue, source.folders, replay.model, replay.task.vocabulary)
    _log.info(
        "rows of %s samples will cost about %.0f forward+backward passes, %.1f %% of the stage's %d (%s have theirs)",
        f"{len(missing):,}",
        row_passes(run, len(missing)),
        100 * row_passes(run, len(missing)) / run.spec.steps,
        run.spec.steps,
        f"{len(samples) - len(missing):,}",
    )
    with locked(store.folder, wait=True):
        # asked again: whoever held the lock may have made them meanwhile
        store = open_rows(space)
        replay.model_at(run.spec.steps)
        compression = space.compression.to(replay.device)
        blocks = list(blocks_of(store.missing(samples)))
        with row_capture(space, replay) as capture:
            for block in progress(blocks, total=len(blocks), what="embed samples", unit="block"):
                batches = read_together(run, source, block)
                parts = [captured_rows(replay, capture, batch, compression).cpu().numpy() for batch in batches]
                store.write(block["sample_id"].to_numpy(), np.concatenate(parts))
    return store


def open_rows(space: RowSpace) -> RowStore:
    """The rows of a space; it may hold none yet."""
    return RowStore(space.folder / "rows", space.numbers)


def blocks_of(samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The samples of each shard, in parts of at most 4,096: other shards beside it change no byte of a part."""
    for shard in samples.partition_by("domain", "shard", maintain_order=True):
        yield from shard.iter_slices(_BLOCK)
