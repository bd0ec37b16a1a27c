"""Directional derivatives of unmeasured samples, predicted from those of the tokens of measured ones.

A sample's derivative (`influence.direction`) is the mean of its tokens', and much of what training on a token does to
the target is told by the token and the two before it. The derivatives of all tokens cost no more than that of their
sample, so a hundred samples of a thousand tokens are a hundred thousand observations, from which a ridge regression
learns what each n-gram does:

    y_t ~ m + sum_f w_f        f: the token, the one before it, both, the token and the last but one, all three
    sum_t (y_t - m - sum_f w_f)^2 + lambda sum_f w_f^2        lambda 1: seen once, an n-gram goes half of the way

by conjugate gradients, scaled by the diagonal; m is the mean of the y_t. Prediction costs no pass through the model. On
the two pools of the branch bench (seed 0, 100 samples of each domain; two targets, general text) the rank correlation
with the derivatives of all others was .47 to .65 inside domains, where a fit to whole samples (`stats.rank_ridge`) had
.27 to .45 and n-gram ratios .17 to .28; it differs by less than .03 from lambda .3 to 3, and falls beyond.

N samples, n tokens, T targets, C = 5 n-grams of a token, F distinct ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.rng import generator

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.ngrams.text import Text

    Floats = npt.NDArray[np.float64]
    Keys = npt.NDArray[np.uint64]
    Counts = npt.NDArray[np.int64]

FOLDS = 5
# Part of a selection's identity: another wording here makes every finished selection one "of other settings".
PREDICTOR = ("n-grams of three tokens", "ridge on the slopes of tokens, penalty 1")
"""What predictions are made from and how, part of their identity."""
_PENALTY = 1.0
_MOST = 4_000_000  # tokens that are fitted to, about 400 bytes each
_ITERATIONS, _TOLERANCE = 200, 1e-3  # of conjugate gradients; weights are far noisier than this
_CHUNK = 1 << 18  # tokens predicted at once
# A purpose of a generator is part of its numbers: renaming it changes every hash.
_FACTORS = generator(0, "n-gram slopes").integers(0, 1 << 63, size=(5, 3), dtype=np.uint64) * 2 + 1
_USED = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1]], np.uint64)  # token, before, before that


@dataclass(frozen=True, kw_only=True)
class NgramRegression:
    """A fit.

    Attributes:
        table: (F,) uint64, the n-grams, ascending.
        weights: (F, T) of each.
        mean: (T,) m.
    """

    table: Keys
    weights: Floats
    mean: Floats

    def tokens(self, keys: Keys) -> Floats:
        """(n, T) predictions of tokens with n-grams (n, C)."""
        predicted = np.repeat(self.mean[None], len(keys), axis=0)
        for start in range(0, len(keys) if len(self.table) else 0, _CHUNK):
            chunk = keys[start : start + _CHUNK]
            # searchsorted points behind the last one for a larger hash; an n-gram never seen adds nothing
            at = np.minimum(np.searchsorted(self.table, chunk), len(self.table) - 1)
            known = self.table[at] == chunk
            predicted[start : start + _CHUNK] += (self.weights[at] * known[..., None]).sum(axis=1)
        return predicted

    def samples(self, samples: Sequence[Text]) -> Floats:
        """(B, T) predictions of samples, which predict a token each."""
        keys = [ngrams_of(sample) for sample in samples]
        return means(self.tokens(np.concatenate(keys)), np.array([len(sample_keys) for sample_keys in keys]))


def ngrams_of(sample: Text) -> Keys:
    """Hashes (n, C) of the n-grams that end at each predicted token of a sample."""
    # a 0 before the first token, ids from 1: the second token of a text has one before it and nothing before that
    padded = np.concatenate([np.zeros(1, np.uint64), sample.tokens.astype(np.uint64) + 1])
    at = np.flatnonzero(sample.loss_mask[1:]) + 1  # of the token in the sample
    context = np.stack([padded[at + 1], padded[at], padded[at - 1]], axis=1)
    mixed = context @ (_FACTORS * _USED).T + np.arange(len(_USED), dtype=np.uint64)  # modulo 2^64
    # mixed as splitmix64 does: the products alone are as regular as token ids are
    mixed ^= mixed >> np.uint64(31)
    mixed *= _FACTORS[0, 0]
    keys: Keys = mixed ^ (mixed >> np.uint64(29))
    return keys


def means(values: Floats, counts: Counts) -> Floats:
    """(N, ...) means of consecutive values (n, ...), as many of each sample as `counts` (N,) says; none is 0."""
    if not len(counts):
        return np.zeros((0, *values.shape[1:]))
    sums = np.add.reduceat(values, np.cumsum(counts) - counts, axis=0)
    averages: Floats = sums / counts.reshape(-1, *[1] * (values.ndim - 1))
    return averages


def fit(keys: Keys, values: Floats, counts: Counts, seed: int) -> tuple[NgramRegression, Floats]:
    """Fit to the tokens of some samples.

    Args:
        keys: (n, C), see `ngrams_of`, one sample after the other.
        values: (n, T) directional derivatives of the tokens, in the unit of values.
        counts: (N,) tokens of each sample.
        seed: of folds, and of the tokens that are fitted to where there are very many.

    Returns:
        The fit, and for each sample (N, T) what one without its fold predicts; NaN where all samples are of one fold.
    """
    import scipy.sparse

    random = generator(seed, "n-gram slopes")
    # whole samples are held out: tokens of one sample share n-grams, and would give each other away
    folds = np.repeat(random.permutation(len(counts)) % FOLDS, counts)
    # an even part of all tokens where memory would not hold them; held-out predictions are still of every token
    read = np.flatnonzero(random.random(len(keys)) < _MOST / max(len(keys), 1))
    table, columns = np.unique(keys[read], return_inverse=True)
    starts = np.arange(len(read) + 1) * keys.shape[1]
    counted = scipy.sparse.csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(len(read), len(table)))

    def fitted(rows: npt.NDArray[np.bool_]) -> NgramRegression:
        weights, mean = _ridge(counted[rows], values[read][rows])
        return NgramRegression(table=table, weights=weights, mean=mean)

    held_out = np.full(values.shape, np.nan)
    for fold in np.unique(folds):
        out = folds == fold
        if not out.all():
            held_out[out] = fitted(~out[read]).tokens(keys[out])
    return fitted(np.ones(len(read), bool)), means(held_out, counts)


def _ridge(counted: Any, values: Floats) -> tuple[Floats, Floats]:
    """Weights (F, T) of n-grams counted in tokens, sparse (n, F), and the mean (T,) of the tokens' values (n, T)."""
    from scipy.sparse.linalg import LinearOperator, cg

    # stored by column too: a product with the transpose of a CSR matrix is many times slower
    turned, size = counted.T.tocsr(), counted.shape[1]
    mean = values.mean(axis=0) if len(values) else np.zeros(values.shape[1])
    # diagonal of the normal equations: frequent and rare n-grams differ by orders of magnitude
    scale = 1 / (np.asarray(counted.multiply(counted).sum(axis=0)).ravel() + _PENALTY)
    normal = LinearOperator((size, size), matvec=lambda w: turned @ (counted @ w) + _PENALTY * w, dtype=np.float64)
    scaled = LinearOperator((size, size), matvec=lambda w: scale * w, dtype=np.float64)
    weights = [
        cg(normal, turned @ column, rtol=_TOLERANCE, maxiter=_ITERATIONS, M=scaled)[0] for column in (values - mean).T
    ]
    return np.stack(weights, axis=1), mean
