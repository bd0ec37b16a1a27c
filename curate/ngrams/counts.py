"""How often hashed unigrams and bigrams occur in texts: the counts that n-gram ratios are made from.

The n-grams are those of the run's own tokens, counted where their last token is predicted, so that padding, prompts and
the overlap of a document's pieces do not count.

F features of a sequence of T tokens, V buckets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.core.rng import generator

Floats = npt.NDArray[np.float64]
Sequence = tuple[npt.NDArray[np.integer[Any]], npt.NDArray[np.bool_]]  # tokens and loss mask, (T,) each

# Odd, so that a product modulo 2^64 loses nothing; fixed, so that counts of two processes can be compared.
_FACTORS = generator(0, "hashed n-grams").integers(0, 1 << 63, size=2, dtype=np.uint64) * 2 + 1
BUCKETS = 10_000  # as DSIR has (arXiv 2302.03169, section 3.2)


def buckets_of(tokens: npt.NDArray[np.integer[Any]], loss_mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Buckets of the unigrams and bigrams whose last token is predicted.

    Args:
        tokens: (T,) token ids.
        loss_mask: (T,), True where a token is predicted; the first token never is.

    Returns:
        (F,) int64 from 0 to V - 1, F twice the predicted tokens.
    """
    # + 1: token 0 would hash to 0 whatever its factor
    shifted = tokens.astype(np.uint64) + 1
    last, before = shifted[1:][loss_mask[1:]], shifted[:-1][loss_mask[1:]]
    hashes = np.concatenate([last * _FACTORS[0], last * _FACTORS[0] + before * _FACTORS[1]])  # modulo 2^64
    # the low bits of a product are badly mixed: the highest 31 choose the bucket
    buckets: npt.NDArray[np.int64] = ((hashes >> np.uint64(33)) % np.uint64(BUCKETS)).astype(np.int64)
    return buckets


def ngram_counts(sequences: Iterable[Sequence]) -> Floats:
    """How often each bucket occurs in some sequences, float64 (V,)."""
    counts = np.zeros(BUCKETS)
    for tokens, loss_mask in sequences:
        np.add.at(counts, buckets_of(tokens, loss_mask), 1)
    return counts
