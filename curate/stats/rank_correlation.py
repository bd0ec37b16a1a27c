"""Spearman's rank correlation, and its interval by resampling steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curate.core.rng import generator

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

_RESAMPLES = 1000
LENGTH_BIAS = 0.3
"""Rank correlation with length from which a choice of samples is said to be one by length too."""


def spearman(a: Floats, b: Floats) -> float | None:
    """Spearman's rank correlation; None where a side does not vary."""
    if len(a) <= 2:
        return None
    r = float(spearman_rows(a[None], b[None])[0])
    return None if np.isnan(r) else r


def spearman_rows(a: Floats, b: Floats) -> Floats:
    """The same of each row of (K, n); NaN where a side does not vary."""
    from scipy.stats import rankdata

    left, right = rankdata(a, axis=1), rankdata(b, axis=1)
    left, right = left - left.mean(1, keepdims=True), right - right.mean(1, keepdims=True)
    scale = np.sqrt((left**2).sum(1) * (right**2).sum(1))
    r: Floats = np.divide((left * right).sum(1), scale, out=np.full(len(a), np.nan), where=scale > 0)
    return r


def spearman_interval(
    a: Floats, b: Floats, steps: npt.NDArray[np.int64], seed: int
) -> tuple[float | None, float | None]:
    """95 % interval by resampling steps: samples of one step share its state."""
    random = generator(seed, "fidelity bootstrap")  # the purpose is part of the draw: renaming it moves intervals
    rows_of_step = [np.flatnonzero(steps == step) for step in np.unique(steps)]
    drawn = [
        np.concatenate([rows_of_step[i] for i in random.integers(len(rows_of_step), size=len(rows_of_step))])
        for _ in range(_RESAMPLES)
    ]
    # resamples of one length are ranked in one call, which is much faster than one call for each
    estimates = []
    for length in {len(chosen) for chosen in drawn} - {1, 2}:
        rows = np.stack([chosen for chosen in drawn if len(chosen) == length])
        estimates += [value for value in spearman_rows(a[rows], b[rows]).tolist() if not np.isnan(value)]
    if not estimates:
        return None, None
    low, high = np.quantile(estimates, [0.025, 0.975]).tolist()
    return low, high
