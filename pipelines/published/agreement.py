"""Rank agreement with its uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from curate.core.rng import generator
from curate.stats.bootstrap import INTERVAL

if TYPE_CHECKING:
    import numpy.typing as npt


def bootstrap_ranks(
    effects: Sequence[float], values: Mapping[str, Sequence[float]], resamples: int, seed: int
) -> dict[str, npt.NDArray[np.float64]]:
    """Spearman of each method's values with the effects, on the sample and on resamples of its images.

    All methods see the same resamples.

    Returns:
        Method -> (1 + resamples,), the sample's own first.
    """
    drawn = generator(seed, "bootstrap").integers(len(effects), size=(resamples, len(effects)))
    # row 0 is the sample itself
    drawn = np.concatenate([np.arange(len(effects))[None], drawn])
    # Spearman is the product of centred ranks of unit length: thousands of resamples in one pass
    truth = _ranks(np.asarray(effects)[drawn])
    return {name: (truth * _ranks(np.asarray(method)[drawn])).sum(1) for name, method in values.items()}


def interval(replicates: npt.NDArray[np.float64]) -> dict[str, float]:
    """95 % percentile interval of the resamples."""
    low, high = np.quantile(replicates[1:], INTERVAL)
    return {"low": float(low), "high": float(high)}


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Ranks of each row, centred and of unit length; rows without an order become 0."""
    from scipy.stats import rankdata

    ranks = rankdata(values, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    length = np.linalg.norm(ranks, axis=1, keepdims=True)
    result: npt.NDArray[np.float64] = np.divide(ranks, length, out=np.zeros_like(ranks), where=length > 0)
    return result
