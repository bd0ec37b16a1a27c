"""Search a saved index. It is memory-mapped: opening reads nothing, searching reads what it visits.

Shape legend: N rows, D embedding dim, Q queries, K results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from curate.core import artifacts
from curate.core.errors import UserError
from curate.index.build import INDEX_FILE, find_lists
from curate.index.exact import Floats, Rows, recall
from curate.index.library import load_faiss, on_gpu


@dataclass(frozen=True, kw_only=True)
class Index:
    """An opened index.

    Args:
        recall: share of the exact top 100 that it found when it was built.
    """

    recall: float
    _faiss_index: Any

    def __len__(self) -> int:
        """N, the number of rows."""
        return int(self._faiss_index.ntotal)

    @property
    def lists(self) -> int:
        """Lists of a compressed index; 0 where search is exact."""
        lists = find_lists(load_faiss(), self._faiss_index)
        return lists.nlist if lists else 0

    @property
    def lists_visited(self) -> int:
        """Lists that a search visits; 0 where it is exact."""
        lists = find_lists(load_faiss(), self._faiss_index)
        return lists.nprobe if lists else 0

    def visit(self, count: int) -> None:
        """Let searches visit as many lists."""
        lists = find_lists(load_faiss(), self._faiss_index)
        lists.nprobe = min(count, lists.nlist)

    def widen(self, queries: Floats, exact: Rows, target: float) -> float:
        """Double the number of lists visited until enough of the exact results [Q, K] are found; return the share."""
        found = recall(self.search(queries, exact.shape[1])[1], exact)
        while found < target and self.lists_visited < self.lists:
            self.visit(2 * self.lists_visited)
            found = recall(self.search(queries, exact.shape[1])[1], exact)
        return found

    def search(self, queries: Floats, k: int) -> tuple[Floats, Rows]:
        """Find the rows with the largest inner products, best first. For the smallest products search for `-queries`.

        Args:
            queries: float32 [Q, D].
            k: results wanted; `min(k, N)` come back.

        Returns:
            products float32 [Q, K] and row ids int64 [Q, K]. A compressed index that visits too few lists to find K
            rows fills up with product -inf and row -1.

        Raises:
            ValueError: the queries have another dimension, or k is not positive.
        """
        if queries.ndim != 2 or queries.shape[1] != self._faiss_index.d or k < 1:
            raise ValueError(f"queries {queries.shape}, k {k}: need [Q, {self._faiss_index.d}] and k >= 1")
        products, rows = self._faiss_index.search(np.ascontiguousarray(queries, dtype=np.float32), min(k, len(self)))
        # FAISS fills up with the least float32; -inf cannot be taken for a product.
        return np.where(rows < 0, np.float32(-np.inf), products), rows


def extremes(folder: Path, query: Floats, k: int) -> dict[str, list[int]]:
    """Find the rows of largest ("most") and smallest ("least") inner product with a query (D,), farthest first.

    Raises:
        UserError: see `open_index`.
    """
    index, rows_by_end = open_index(folder), {}
    for end, sign in (("most", 1), ("least", -1)):
        _, rows = index.search((sign * query)[None].astype(np.float32), k)
        # -1 fills up where too few rows were found.
        rows_by_end[end] = rows[0][rows[0] >= 0].tolist()
    return rows_by_end


def open_index(folder: Path) -> Index:
    """Open an index that `build` wrote: memory-mapped, or copied to the GPU where there is one.

    Raises:
        UserError: FAISS is missing or doubled, or the folder holds no complete index.
    """
    faiss = load_faiss()
    manifest = artifacts.read_json(folder / artifacts.MANIFEST)
    # Two ways of mapping: the lists of a k-means, or one flat array of codes.
    flag = faiss.IO_FLAG_MMAP if manifest["lists"] else faiss.IO_FLAG_MMAP_IFC
    try:
        index = faiss.read_index(str(artifacts.checked(folder / INDEX_FILE)), flag)
    except RuntimeError as error:
        raise UserError(
            f"{folder / INDEX_FILE} cannot be read ({str(error).splitlines()[0]}); delete {folder}"
        ) from None
    return Index(recall=manifest["recall_at_100"], _faiss_index=on_gpu(faiss, index))
