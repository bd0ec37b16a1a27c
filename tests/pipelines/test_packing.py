"""Packing loses nothing, doubles nothing and says where everything is."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.mds import Sample
from pipelines.packing import Encoded, pack

EOT = 99


@st.composite
def encoded(draw: st.DrawFn) -> list[Encoded]:
    lengths = draw(st.lists(st.integers(0, 20), max_size=12))
    documents = []
    for number, length in enumerate(lengths):
        tokens = draw(st.lists(st.integers(0, 98), min_size=length, max_size=length))
        mask = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        documents.append((f"d{number}", np.array(tokens, np.int32), np.array(mask, np.bool_)))
    return documents


def parts(samples: Sequence[Sample]) -> Iterator[Encoded]:
    for sample in samples:
        for name, start, stop in sample.documents:
            yield name, sample.tokens[start:stop], sample.loss_mask[start:stop]


@given(documents=encoded(), seq_len=st.integers(2, 17))
def test_every_document_is_there_once_and_whole(documents: list[Encoded], seq_len: int) -> None:
    samples = list(pack(documents, seq_len, EOT))
    for name, tokens, mask in documents:
        found = [(ids, counts) for other, ids, counts in parts(samples) if other == name]
        assert np.concatenate([ids for ids, _ in found]).tolist() == [*tokens, EOT]
        assert np.concatenate([counts for _, counts in found]).tolist() == [*mask, bool(mask.any())]


@given(documents=encoded(), seq_len=st.integers(2, 17))
def test_samples_are_full_in_order_and_padded_only_at_the_end(documents: list[Encoded], seq_len: int) -> None:
    samples = list(pack(documents, seq_len, EOT))
    stored = sum(len(tokens) + 1 for _, tokens, _ in documents)
    assert len(samples) == -(-stored // seq_len)
    assert [name for name, ids, _ in parts(samples) if ids[-1] == EOT] == [name for name, _, _ in documents]
    for number, sample in enumerate(samples):
        assert sample.tokens.shape == sample.loss_mask.shape == (seq_len,)
        assert sample.tokens.dtype == np.int32
        ends = [0, *(stop for _, _, stop in sample.documents)]
        assert [start for _, start, _ in sample.documents] == ends[:-1]
        padding = slice(ends[-1], seq_len)
        assert number == len(samples) - 1 or ends[-1] == seq_len
        assert (sample.tokens[padding] == EOT).all()
        assert not sample.loss_mask[padding].any()


def test_samples_do_not_share_memory() -> None:
    samples = list(pack([("a", np.arange(10, dtype=np.int32), np.ones(10, np.bool_))], 4, EOT))
    assert [sample.tokens.tolist() for sample in samples] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, EOT, EOT]]
    assert [sample.predicted_tokens for sample in samples] == [3, 3, 2]


@pytest.mark.parametrize("seq_len", [2, 3])
def test_no_documents_no_samples(seq_len: int) -> None:
    assert list(pack([], seq_len, EOT)) == []
