"""N-gram log-likelihood ratios: how much more likely a text is in a target than in the pool (DSIR, per token).

T targets, V buckets of `ngrams.counts`, B samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from curate.ngrams.counts import buckets_of
from curate.ngrams.hashes import hashed_features

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.ngrams.text import Text

    Floats32 = npt.NDArray[np.float32]
    Floats64 = npt.NDArray[np.float64]

_MU = 2000.0  # pseudo-counts of the pool in a target, about what Zhai and Lafferty find best


def ngram_features(samples: Sequence[Text]) -> Floats32:
    """Hashed counts of tokens and token pairs, float32 (B, 4096); see `ngrams.hashes.hashed_features`."""
    return np.stack([hashed_features(sample.tokens) for sample in samples])


def log_ratios(targets: Sequence[Floats64], pool: Floats64) -> Floats64:
    """How much more likely each n-gram is in each target than in the pool: `log p_j - log q_j`, float64 (T, V).

    With n-grams j that occur c_j times among the n of a target and d_j times in the pool,

        q_j = (d_j + 1) / sum_j (d_j + 1)        p_j = (c_j + mu q_j) / (n + mu)        mu 2000

    the Dirichlet smoothing of Zhai and Lafferty (SIGIR 2001): what a small target does not have is as likely as in the
    pool, or a little less.

    Args:
        targets: (V,) counts of each target, see `ngrams.counts.ngram_counts`.
        pool: (V,) counts of the pool.
    """
    q = (pool + 1) / (pool + 1).sum()
    return np.stack([np.log((counts + _MU * q) / (counts.sum() + _MU)) - np.log(q) for counts in targets])


def mean_log_ratios(samples: Sequence[Text], ratios: Floats64) -> Floats32:
    """Mean of `log_ratios` over the n-grams of each sample, float32 (B, T); 0 where a sample predicts nothing."""
    means = np.zeros((len(samples), len(ratios)), np.float32)
    for row, sample in enumerate(samples):
        buckets = buckets_of(sample.tokens, sample.loss_mask)
        if len(buckets):
            means[row] = ratios[:, buckets].mean(axis=1)
    return means
