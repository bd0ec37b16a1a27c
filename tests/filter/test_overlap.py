"""The pass over a pool: what near-duplicates are found by where not every n-gram is held."""

import re
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from curate.core.rng import generator
from curate.filter import overlap as module
from curate.filter.choose import FilterConfig
from curate.filter.overlap import held_out, near_duplicates, scan, sight
from curate.filter.pipeline import filter_pool
from curate.tables import SamplePool
from tests.frames import fill

LENGTH, PAIRS = 212, 400


@pytest.fixture(scope="module")
def pool():
    """Samples of 200 n-grams, each with a copy that shares the first 180 of them."""
    random = generator(0, "planted copies")
    originals = random.integers(0, 30_000, (PAIRS, LENGTH), dtype=np.int32)
    copies = originals.copy()
    copies[:, 192:] = random.integers(0, 30_000, (PAIRS, LENGTH - 192), dtype=np.int32)
    samples = [SimpleNamespace(tokens=tokens) for tokens in (*originals, *copies)]
    table = pl.DataFrame({"domain": "a", "index": range(len(samples)), "stored_tokens": LENGTH})
    return fill(SamplePool, table), {"a": samples}


@pytest.mark.parametrize("memory", [1e6, 20_000, 8_000, 3_000, 400])
def test_the_stated_recall_is_that_of_planted_copies(pool, memory, monkeypatch):
    monkeypatch.setattr(module, "MEMORY", memory)
    table, streams = pool
    found = scan(table, streams, held_out([]))
    order = pl.DataFrame({"row": range(len(table)), "domain": "a", "rank": range(len(table))})
    doubles = near_duplicates(found, order, 0.8)
    assert (doubles["row"] >= PAIRS).all()
    seen = sight(table, 0.8)
    if memory == 1e6:
        assert seen is None
        assert len(doubles) == PAIRS
        return
    assert (seen.ngrams, seen.alike) == (200, 0.9)
    assert seen.held == pytest.approx(len(found.grams) / len(table), rel=0.1)
    assert len(doubles) / PAIRS == pytest.approx(seen.recall, abs=0.06)


def test_what_is_missed_is_said(pool, monkeypatch, caplog):
    table, _ = pool
    monkeypatch.setattr(module, "MEMORY", 16_000)
    unread = scan(table.clear(), {}, held_out([]))
    how = {"ngram_share": 0.5, "seed": 0}
    filter_pool(table, unread, held_out([]), FilterConfig(), leave_out=False, **how)
    assert not caplog.records  # nothing is left out for being a near-duplicate
    filter_pool(table, unread, held_out([]), FilterConfig(), leave_out=True, **how)
    assert re.search(r"\b9\.4 %.*\b18\.9 of 200\b.*\b90 %", caplog.text)


def test_what_reads_along_is_given_every_sample_once_in_order(pool):
    table, streams = pool
    seen = []
    alone, shared = scan(table, streams, held_out([])), scan(table, streams, held_out([]), [seen.extend])
    assert [id(sample) for sample in seen] == [id(sample) for sample in streams["a"]]
    assert shared.grams.equals(alone.grams)
