"""Shares of new n-grams against an exact count with sets of tuples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.formats import ngrams
from curate.formats.ngrams import N, NgramMemory


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=8))
def test_shares_are_those_of_sets_of_tuples(sequences):
    memory, seen = NgramMemory(1000), set()
    for sequence in sequences:
        grams = [tuple(sequence[i : i + N]) for i in range(len(sequence) - N + 1)]
        new = {gram for gram in grams if gram not in seen}
        seen.update(new)
        wanted = len(new) / len(grams) if grams else 1.0
        assert memory.fresh_share(np.array(sequence, np.int32)) == pytest.approx(wanted)


def test_a_long_stream_is_sampled_and_still_right_on_average(monkeypatch):
    monkeypatch.setattr(ngrams, "MEMORY", 2000)
    random = np.random.default_rng(0)
    half = [random.integers(0, 500, 100).astype(np.int32) for _ in range(200)]
    memory = NgramMemory(40_000)
    first = [memory.fresh_share(tokens) for tokens in half]
    again = [memory.fresh_share(tokens) for tokens in half]
    assert np.mean(first) == pytest.approx(1, abs=0.01)
    assert np.mean(again) < 0.02 + np.mean([share == 1 for share in again])
    assert len(memory._seen) < 3000
