"""Clusters of rows by FAISS k-means on the sphere."""

import numpy as np
import numpy.typing as npt

from curate.index.exact import Floats
from curate.index.library import load_faiss


def clusters(rows: Floats, count: int, seed: int) -> npt.NDArray[np.int64]:
    """Divide rows into clusters of similar direction.

    Args:
        rows: float32 [N, D].
        count: clusters wanted; at most one for every 8 rows are made.
        seed: of the first centres.

    Returns:
        int64 [N], the cluster of each row.
    """
    wanted = max(1, min(count, len(rows) // 8))
    if wanted == 1:
        return np.zeros(len(rows), np.int64)
    faiss = load_faiss()
    norms = np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    units = np.ascontiguousarray(rows / norms, dtype=np.float32)
    means = faiss.Kmeans(
        units.shape[1], wanted, niter=20, seed=seed, spherical=True, min_points_per_centroid=1, verbose=False
    )
    means.train(units)
    return np.asarray(means.index.search(units, 1)[1][:, 0], np.int64)
