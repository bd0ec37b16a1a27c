"""Exact maximum-inner-product search, the truth that an index is measured against.

Shape legend: N rows, D embedding dim, Q queries, K results.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int64]


class Matrix(Protocol):
    """Rows float32 [N, D] that are read in parts: an array, a memory map, or what looks like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, D)."""

    def __len__(self) -> int:
        """N."""

    def __getitem__(self, rows: Any, /) -> Floats:
        """Some rows, by a slice or their numbers."""


CHUNK_NUMBERS = 1 << 24  # 64 MiB of float32


def chunks(embeddings: Matrix, products: int = 0) -> Iterator[tuple[int, Floats]]:
    """Yield (first row, rows) of at most 64 MiB each, read from the memory map one after another.

    `products` is how many numbers will be computed for each row; they count towards the size.
    """
    # At least one row, where one alone is larger than a chunk.
    size = max(1, CHUNK_NUMBERS // (embeddings.shape[1] + products))
    for start in range(0, len(embeddings), size):
        yield start, np.ascontiguousarray(embeddings[start : start + size], dtype=np.float32)


def exact_search(embeddings: Matrix, queries: Floats, k: int) -> tuple[Floats, Rows]:
    """Find the `min(k, N)` rows with the largest inner products, best first.

    Time O(N D Q), memory one chunk and its products (64 MiB); the embeddings may be a memory map.

    Args:
        embeddings: float32 [N, D].
        queries: float32 [Q, D].
        k: results wanted.

    Returns:
        products float32 [Q, min(k, N)], row ids int64 of the same shape.
    """
    products = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    # About 8 numbers per product: it and its row (int64), their copies in `hstack`, and the partition's indices.
    for start, chunk in chunks(embeddings, 8 * len(queries)):
        ids = np.arange(start, start + len(chunk))
        products = np.hstack([products, queries @ chunk.T])
        rows = np.hstack([rows, np.broadcast_to(ids, (len(queries), len(chunk)))])
        # Keep the best k so far, unsorted: a partition is linear in the chunk, a sort is not.
        if products.shape[1] > k:
            kept = np.argpartition(-products, k - 1, axis=1)[:, :k]
            products, rows = np.take_along_axis(products, kept, 1), np.take_along_axis(rows, kept, 1)
    order = np.lexsort((rows, -products), axis=1)  # equal products in the order of rows
    return np.take_along_axis(products, order, 1), np.take_along_axis(rows, order, 1)


def recall(found: Rows, exact: Rows) -> float:
    """Compute the share of the exact results [Q, K] that are among the results found [Q, K]; 0 to 1."""
    # As sets: the order within the results does not count.
    hits = sum(np.isin(wanted, got).sum() for wanted, got in zip(exact, found, strict=True))
    return float(hits / exact.size)
