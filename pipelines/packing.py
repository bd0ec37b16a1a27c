"""Pack documents into sequences: every token of every document is stored exactly once, in order.

The documents, each followed by end-of-text, form one long row of tokens. It is cut every `seq_len` tokens; the last
sequence is filled with end-of-text that is not predicted. A document that does not fit continues in the next sequence.
Memory is one document plus one sequence.

Shapes: T = seq_len stored tokens of a sequence, n = tokens of a document.
"""

from collections.abc import Iterable, Iterator

import numpy as np

from curate.data.documents import Mask, Tokens
from curate.data.mds import Sample

# Document id, token ids (n,), whether each token's loss counts (n,).
Encoded = tuple[str, Tokens, Mask]


def pack(documents: Iterable[Encoded], seq_len: int, eot: int) -> Iterator[Sample]:
    """Cut documents into samples of exactly T = `seq_len` tokens.

    The end-of-text after a document belongs to the document and is predicted, unless nothing of the document is.
    Padding belongs to no document. The first token of a sample keeps its document's mask, although training never
    predicts it.

    Args:
        documents: in the order in which they are stored.
        seq_len: T, at least 2.
        eot: id of the end-of-text token.

    Yields:
        Samples of T tokens; `documents` holds (id, first token, token after the last) of every part of a document.
    """
    tokens = np.full(seq_len, eot, np.int32)
    mask = np.zeros(seq_len, np.bool_)
    spans: list[tuple[str, int, int]] = []
    filled = 0
    # filled: tokens of the sample so far; taken: tokens of the document that are stored
    for name, ids, counts in documents:
        # a document without a predicted token (a masked prompt, say) does not teach the model to end it either
        ended = np.append(ids, np.int32(eot)), np.append(counts, counts.any())
        taken = 0
        while taken < len(ended[0]):
            fits = slice(taken, taken + seq_len - filled)
            length = len(ended[0][fits])
            tokens[filled : filled + length], mask[filled : filled + length] = ended[0][fits], ended[1][fits]
            spans.append((name, filled, filled + length))
            taken, filled = taken + length, filled + length
            if filled == seq_len:
                yield Sample(tokens=tokens, loss_mask=mask, documents=spans)
                # new arrays: the sample that was yielded keeps the old ones
                tokens, mask = np.full(seq_len, eot, np.int32), np.zeros(seq_len, np.bool_)
                spans, filled = [], 0
    if filled:
        yield Sample(tokens=tokens, loss_mask=mask, documents=spans)
