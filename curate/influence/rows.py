"""Rows of the value index on disk: one of 256 bytes for each sample, of the run's own data or never trained on.

A file holds the rows of at most 4,096 samples of one MDS shard. Its name says which samples and what bytes, so that
finished files are kept after an interruption, those of new shards stand beside the old ones, and a shard whose samples
changed is another one. A sample is known by its content: copies, other shard layouts and other sources share its row.

N samples, D numbers of a row.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
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
from curate.influence.space import captured_rows, row_capture
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
_LARGEST = 127  # int8


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Some rows.

    Attributes:
        sample_ids: (N,) content ids.
        codes: (N, D) int8.
        scales: (N,) float32: a row is its codes times its scale.
    """

    sample_ids: Ids
    codes: Codes
    scales: Floats

    def products(self, vectors: Floats) -> Floats:
        """(N, T) float32 inner products with vectors (T, D)."""
        products: Floats = (self.codes.astype(np.float32) @ vectors.T) * self.scales[:, None]
        return products

    def take(self, positions: npt.NDArray[Any]) -> Floats:
        """(n, D) float32 of some of the rows."""
        rows: Floats = self.codes[positions].astype(np.float32) * self.scales[positions][..., None]
        return rows


def quantized(rows: Floats) -> tuple[Codes, Floats]:
    """Rows (N, D) as int8 codes and a scale for each, the largest entry at 127; a row of zeros has scale 0."""
    scales = (np.abs(rows).max(axis=1) / _LARGEST).astype(np.float32)
    codes = np.rint(np.divide(rows, scales[:, None], out=np.zeros_like(rows), where=scales[:, None] > 0))
    return codes.astype(np.int8), scales


class RowStore:
    """The rows in a folder; they are read when they are first asked for.

    Args:
        folder: of the files.
        numbers: D.
    """

    def __init__(self, folder: Path, numbers: int) -> None:
        self.folder, self._numbers = folder, numbers

    @cached_property
    def rows(self) -> Rows:
        """All rows; of a sample that two files have, the first by name.

        Raises:
            UserError: a file is damaged.
        """
        files = [_read(path) for path in sorted(self.folder.glob("*.npz"))]
        empty = (np.zeros(0, np.int64), np.zeros((0, self._numbers), np.int8), np.zeros(0, np.float32))
        ids, codes, scales = (np.concatenate(parts) for parts in zip(empty, *files, strict=True))
        _, first = np.unique(ids, return_index=True)
        return Rows(sample_ids=ids[first], codes=codes[first], scales=scales[first])

    def missing(self, samples: dy.DataFrame[Samples]) -> pl.DataFrame:
        """The samples without a row, by domain, shard and place."""
        have = pl.DataFrame({"sample_id": self.rows.sample_ids})
        return samples.join(have, on="sample_id", how="anti").sort("domain", "shard", "index")

    def of(self, sample_ids: Ids) -> Rows:
        """The rows of some samples that have one, in their order."""
        at = np.searchsorted(self.rows.sample_ids, sample_ids)
        return Rows(sample_ids=self.rows.sample_ids[at], codes=self.rows.codes[at], scales=self.rows.scales[at])

    def write(self, sample_ids: Ids, rows: Floats) -> None:
        """Write the rows of one block."""
        codes, scales = quantized(rows)
        buffer = BytesIO()
        np.savez(buffer, sample_ids=sample_ids, codes=codes, scales=scales)
        content = buffer.getvalue()
        name = f"{hash_of(sample_ids.astype('<i8').tobytes())[:16]}-{hash_of(content)}.npz"
        with atomic_write(self.folder / name) as temporary:
            temporary.write_bytes(content)
        self.__dict__.pop("rows", None)


def embed_samples(
    run: Run, source: SampleSource, samples: dy.DataFrame[Samples], space: RowSpace, replay: Replay
) -> RowStore:
    """Make the rows of samples that have none, a block after the other; what an interruption left is kept.

    Args:
        run: a finished run, whose last state is the current one.
        source: of the samples.
        samples: N samples of the source.
        space: of the run.
        replay: of the run.

    Raises:
        UserError: the model cannot read the samples, or a sample's gradient is not finite (names it).
    """
    store = RowStore(space.folder / "rows", space.numbers)
    if store.missing(samples).is_empty():
        return store
    with locked(store.folder, wait=True):
        # asked again: whoever held the lock may have made them meanwhile
        store = RowStore(store.folder, space.numbers)
        missing = store.missing(samples)
        check_fit(source.catalogue, source.folders, replay.model)
        replay.model_at(run.spec.steps)
        compression = space.compression.to(replay.device)
        blocks = list(blocks_of(missing))
        with row_capture(space, replay) as capture:
            for block in progress(blocks, total=len(blocks), what="embed samples", unit="block"):
                parts = [
                    (captured_rows(replay, capture, batch) @ compression).cpu().numpy()
                    for batch in read_together(run, source, block)
                ]
                store.write(block["sample_id"].to_numpy(), np.concatenate(parts))
    return RowStore(store.folder, space.numbers)


def blocks_of(samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The samples of each shard, in parts of at most 4,096: other shards beside it change no byte of a part."""
    for shard in samples.partition_by("domain", "shard", maintain_order=True):
        yield from shard.iter_slices(_BLOCK)


def _read(path: Path) -> tuple[Ids, Codes, Floats]:
    """The arrays of a file, whose name ends in its hash.

    Raises:
        UserError: it is damaged.
    """
    content = path.read_bytes()
    if hash_of(content) != path.stem.rpartition("-")[2]:
        raise UserError(f"{path} is corrupted: delete it, and its rows are made again")
    with np.load(BytesIO(content)) as stored:
        return stored["sample_ids"], stored["codes"], stored["scales"]
