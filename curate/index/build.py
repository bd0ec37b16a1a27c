"""Build a FAISS inner-product index over a window's embeddings, measure its recall, and save both.

Up to 200,000 rows the search is exact. Above, rows are rounded to two bytes per number inside the lists of a k-means
(`IVF<lists>,SQbf16`); the number of lists visited per query is doubled until the recall measured against exact search
reaches its target. Time: k-means on a sample, then one pass over the memory map. Memory: the index (N (2 D + 8) bytes
where it is compressed) and one chunk of rows, never a copy of the embeddings.

Shape legend: N rows, D embedding dim, Q queries.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from curate.core import artifacts
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.rng import generator
from curate.core.writing import atomic_write
from curate.index.exact import Floats, Matrix, Rows, chunks, exact_search, recall
from curate.index.library import load_faiss, on_cpu, on_gpu

log = logging.getLogger(__name__)

INDEX_FILE = "index.faiss"
EXACT_UP_TO = 200_000  # rows
RECALL_AT = 100
# Queries beside the targets: where recall varies by .1 from row to row, the mean over so many is known to .006.
_RECALL_ROWS = 256
# FAISS asks for 39 at least and uses 256 at most.
_TRAINING_ROWS_PER_LIST = 64
_TRAINING_ROWS = 65_536  # of an index without lists


class IndexConfig(Config):
    """How a window's embeddings are indexed."""

    factory: str = "auto"
    """FAISS factory string, e.g. "Flat" or "IVF1024,SQ8"; "auto" is exact up to 200,000 rows and compressed above."""
    recall_target: float = Field(default=0.95, gt=0, le=1)
    """Share of the exact top 100 that a compressed index must find; more lists are visited until it does."""


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """Queries float32 [Q, D], real targets first, and their exact results int64 [Q, K]."""

    queries: Floats
    rows: Rows
    # How many of the queries are real targets.
    targets: int

    def recall_of(self, index: Any) -> float:
        """Measure the lower one of the targets' recall and the sampled rows' recall."""
        found = index.search(self.queries, self.rows.shape[1])[1]
        # Apart: the few targets are what is searched for, and would vanish among 256 sampled rows.
        groups = [group for group in (slice(self.targets), slice(self.targets, None)) if len(found[group])]
        return min(recall(found[group], self.rows[group]) for group in groups)


def build(
    embeddings: Matrix,
    folder: Path,
    config: IndexConfig,
    *,
    queries: Floats,
    seed: int,
    parents: Mapping[str, str] | None = None,
) -> None:
    """Write `folder/index.faiss` and its manifest, which holds `recall_at_100`; does nothing where they are complete.

    Args:
        embeddings: float32 [N, D], usually a memory map; read in parts.
        folder: replaced as a whole, atomically.
        config: factory and recall target.
        queries: float32 [Q, D], real target vectors (Q may be 0); recall is measured with them and with sampled rows,
            and the lower one counts.
        seed: seed of the training sample and of the sampled queries.
        parents: fingerprints of the artifacts the embeddings and the queries came from.

    Raises:
        UserError: FAISS is missing or doubled, the factory string is unknown, there are no rows, a number is not
            finite, or `folder` holds an index made with other settings.
    """
    # The embeddings themselves are known by the fingerprints of `parents`.
    settings = {**config.model_dump(), "rows": embeddings.shape, "seed": seed, "parents": dict(parents or {})}
    if artifacts.is_complete(folder, settings):
        return
    faiss = load_faiss()
    _check(embeddings, queries)
    factory = auto_factory(len(embeddings)) if config.factory == "auto" else config.factory
    index = _filled(faiss, factory, embeddings, seed)
    truth = _truth(embeddings, queries, seed)
    measured = _tune(faiss, index, truth, config.recall_target)
    # A warning, not an error: the manifest has the recall, and a search that misses some rows is still of use.
    if measured < config.recall_target:
        log.warning(
            "%s finds %.3f of the exact top %d, wanted %.3f", factory, measured, RECALL_AT, config.recall_target
        )
    lists = find_lists(faiss, on_cpu(faiss, index))
    with atomic_write(folder) as temporary:
        temporary.mkdir()
        faiss.write_index(on_cpu(faiss, index), str(temporary / INDEX_FILE))
        artifacts.finalize(
            temporary,
            "index",
            settings,
            factory=factory,
            recall_at_100=measured,
            recall_queries=len(truth.queries),
            lists=lists.nlist if lists else 0,
            lists_visited=lists.nprobe if lists else 0,
            bytes=(temporary / INDEX_FILE).stat().st_size,
        )


def auto_factory(rows: int) -> str:
    """Choose the factory string for "auto": exact for few rows, compressed for many."""
    return "Flat" if rows <= EXACT_UP_TO else compressed_factory(rows)


def compressed_factory(rows: int) -> str:
    """Choose about sqrt(N) lists, a power of two, of rows in bfloat16."""
    return f"IVF{2 ** round(np.log2(rows) / 2)},SQbf16"


def _check(embeddings: Matrix, queries: Floats) -> None:
    if len(embeddings) == 0:
        raise UserError("there are no embeddings to index; embed a window with at least one sample")
    if queries.ndim != 2 or queries.shape[1] != embeddings.shape[1]:
        raise ValueError(f"queries have shape {queries.shape}, embeddings {embeddings.shape}")
    # FAISS adds such rows and returns them as results; its k-means refuses them, but names no row.
    for start, chunk in chunks(embeddings):
        finite = np.isfinite(chunk).all(axis=1)
        if not finite.all():
            raise UserError(
                f"embedding row {start + int(np.argmin(finite))} is not finite: training diverged in this window"
            )


def _filled(faiss: Any, factory: str, embeddings: Matrix, seed: int) -> Any:
    """Make an index and add every row in order, chunk by chunk."""
    try:
        index = faiss.index_factory(embeddings.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"index.factory {factory!r} is not a FAISS factory string ({reason}); try auto or Flat"
        ) from None
    if lists := find_lists(faiss, index):
        # For inner products FAISS gives its lists centres of norm 1: distance to one means nothing, least of all
        # where rows have norm 1e-7, so rows themselves are encoded.
        lists.by_residual = False
    # To the GPU before training, as k-means is most of the time.
    index = on_gpu(faiss, index)
    if not index.is_trained:
        index.train(_training_rows(faiss, index, embeddings, seed))
    for _, chunk in chunks(embeddings):
        index.add(chunk)
    return index


def _training_rows(faiss: Any, index: Any, embeddings: Matrix, seed: int) -> Floats:
    """Sample rows, in their order: float32 [at most N, D]."""
    lists = find_lists(faiss, on_cpu(faiss, index))
    wanted = max(_TRAINING_ROWS, _TRAINING_ROWS_PER_LIST * lists.nlist if lists else 0)
    rows = np.arange(len(embeddings))
    if len(rows) > wanted:
        # Sorted, so that the memory map is read from front to back.
        rows = np.sort(generator(seed, "index-training").choice(rows, wanted, replace=False))
    return np.ascontiguousarray(embeddings[rows], dtype=np.float32)


def _truth(embeddings: Matrix, queries: Floats, seed: int) -> _Truth:
    """Search exactly for the queries and for sampled rows."""
    count = min(_RECALL_ROWS, len(embeddings))
    sampled = np.sort(generator(seed, "index-recall").choice(len(embeddings), count, replace=False))
    stacked = np.ascontiguousarray(np.vstack([queries, embeddings[sampled]]), dtype=np.float32)
    return _Truth(queries=stacked, rows=exact_search(embeddings, stacked, RECALL_AT)[1], targets=len(queries))


def _tune(faiss: Any, index: Any, truth: _Truth, target: float) -> float:
    """Double the number of lists visited until the recall reaches its target; return the recall."""
    lists = find_lists(faiss, index)
    measured = truth.recall_of(index)
    while lists and measured < target and lists.nprobe < lists.nlist:
        lists.nprobe = min(lists.nlist, 2 * lists.nprobe)
        measured = truth.recall_of(index)
    return measured


def find_lists(faiss: Any, index: Any) -> Any:
    """Find the inverted lists of an index (with `nlist` and `nprobe`); None where it has none."""
    # IVF indexes have `nprobe` themselves, on the GPU too; others may wrap one ("PCA64,IVF1024,Flat").
    return index if hasattr(index, "nprobe") else faiss.try_extract_index_ivf(index)
