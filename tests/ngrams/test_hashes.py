"""Hashed n-grams: of every window, and shares of new ones against an exact count with sets of tuples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.ngrams import hashes
from curate.ngrams.hashes import N, NgramMemory, ngram_hashes


def test_hashes_are_of_every_window_and_only_of_content():
    tokens = np.arange(40, dtype=np.int32)
    assert len(ngram_hashes(tokens)) == 40 - N + 1 == len(set(ngram_hashes(tokens).tolist()))
    assert (ngram_hashes(tokens)[5:10] == ngram_hashes(tokens[5 : 9 + N])).all()
    assert len(ngram_hashes(tokens[: N - 1])) == 0


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=8))
def test_counts_are_those_of_sets_of_tuples(sequences):
    memory, seen = NgramMemory(1000), set()
    for sequence in sequences:
        grams = [tuple(sequence[i : i + N]) for i in range(len(sequence) - N + 1)]
        new = {gram for gram in grams if gram not in seen}
        seen.update(new)
        assert memory.count(np.array(sequence, np.int32)) == (len(new), len(grams))


@pytest.mark.parametrize("total_tokens", [40_000, 4_000_000])
def test_the_share_of_new_text_does_not_depend_on_how_much_is_remembered(monkeypatch, total_tokens):
    monkeypatch.setattr(hashes, "MEMORY", 20_000)
    random = np.random.default_rng(0)
    half = [random.integers(0, 500, 100).astype(np.int32) for _ in range(200)]
    memory = NgramMemory(total_tokens)
    new, remembered = np.sum([memory.count(tokens) for tokens in half + half], axis=0)
    assert new / remembered == pytest.approx(0.5, abs=1e-6)
    assert remembered < 1.2 * len(half) * 2 * 88 * 20_000 / total_tokens + 50
