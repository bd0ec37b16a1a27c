"""How much of a stream is new text: the share of n-grams that did not occur earlier in it.

Near-identical documents (templates, licences, generated rules) repeat almost all of their n-grams; exact-duplicate
removal does not see them.
"""

import numpy as np
import numpy.typing as npt

from curate.rng import generator

N = 13  # tokens, the length that overlap screens of benchmarks use (Brown et al., arXiv 2005.14165, appendix C)
MEMORY = 2_000_000  # hashes kept of one stream; longer streams keep an even sample of the n-grams instead of all


class NgramMemory:
    """Remembers hashes of the n-grams seen so far.

    Args:
        total_tokens: tokens of the stream; decides which share of the n-grams is remembered.
    """

    def __init__(self, total_tokens: int) -> None:
        self._seen: set[int] = set()
        self._factors = generator(0, "n-grams").integers(0, 1 << 63, size=N, dtype=np.uint64) * 2 + 1
        self._threshold = np.uint64(min(1.0, MEMORY / max(total_tokens, 1)) * (2**64 - 2**11))

    def count(self, tokens: npt.NDArray[np.int32]) -> tuple[int, int]:
        """Count the n-grams of a sequence; they count as seen afterwards.

        Args:
            tokens: (T,) token ids.

        Returns:
            How many of its remembered n-grams were not seen before, and how many there are. The share of new text of a
            stream is the ratio of the two sums.
        """
        if len(tokens) < N:
            return 0, 0
        windows = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64) + 1, N)
        hashes = windows @ self._factors  # modulo 2^64; the high bits are well mixed
        kept = hashes[hashes <= self._threshold].tolist()
        before = len(self._seen)
        self._seen.update(kept)
        return len(self._seen) - before, len(kept)
