"""N-grams of token ids as 64-bit hashes: novel text, near-duplicates and overlap with held-out documents.

Near-identical documents (templates, licences, generated rules) repeat almost all of their n-grams; exact-duplicate
removal does not see them.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curate.core.rng import generator

N = 13  # tokens, the length that overlap screens of benchmarks use (Brown et al., arXiv 2005.14165, appendix C)
MEMORY = 2_000_000  # hashes kept of one stream; longer streams keep an even sample of the n-grams instead of all

Hashes = npt.NDArray[np.uint64]

# Odd and fixed, see `ngrams.counts`: hashes of the same text are the same everywhere.
_FACTORS = generator(0, "n-grams").integers(0, 1 << 63, size=N, dtype=np.uint64) * 2 + 1
_BUCKETS = 1 << 12


def ngram_hashes(tokens: npt.NDArray[np.int32]) -> Hashes:
    """Hashes of all n-grams of a sequence of T tokens, in order: uint64 [max(0, T - N + 1)]."""
    if len(tokens) < N:
        return np.zeros(0, np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + 1, N)
    hashes: Hashes = windows @ _FACTORS  # modulo 2^64; the high bits are well mixed
    return hashes


def sampled(hashes: Hashes, total: int, memory: int) -> Hashes:
    """Those hashes that are remembered where at most about `memory` of `total` can be: the same ones everywhere."""
    # the smallest hashes are an even sample; 2^64 - 2^11 is the largest float64 that still fits into uint64
    return hashes[hashes <= np.uint64(min(1.0, memory / max(total, 1)) * (2**64 - 2**11))]


def hashed_features(tokens: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
    """Square roots of the counts of tokens and token pairs, hashed into 4096 buckets, of norm 1: float32 [4096]."""
    ids = tokens.astype(np.uint64) + 1
    keys = np.concatenate([ids * _FACTORS[0], ids[:-1] * _FACTORS[1] + ids[1:] * _FACTORS[2]]) >> np.uint64(52)
    counts = np.sqrt(np.bincount(keys.astype(np.int64), minlength=_BUCKETS)).astype(np.float32)
    return np.asarray(counts / max(float(np.linalg.norm(counts)), 1e-9), np.float32)


class NgramMemory:
    """Remembers hashes of the n-grams seen so far.

    Args:
        total_tokens: tokens of the stream; decides which share of the n-grams is remembered.
    """

    def __init__(self, total_tokens: int) -> None:
        self._seen: set[int] = set()
        self._total = total_tokens

    def count(self, tokens: npt.NDArray[np.int32]) -> tuple[int, int]:
        """Count the n-grams of a sequence; they count as seen afterwards.

        Args:
            tokens: (T,) token ids.

        Returns:
            How many of its remembered n-grams were not seen before, and how many there are. A stream's share of novel
            text is the ratio of the two sums.
        """
        kept = sampled(ngram_hashes(tokens), self._total, MEMORY).tolist()
        before = len(self._seen)
        self._seen.update(kept)
        return len(self._seen) - before, len(kept)
