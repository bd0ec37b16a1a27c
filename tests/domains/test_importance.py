"""Hashed n-gram importance resampling on cases small enough to work out, and as the draw that it is."""

from collections import Counter
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.domains.importance import drawn_shares, gumbel_keys, log_importance, log_ratio
from curate.ngrams.counts import BUCKETS, buckets_of, ngram_counts

ALL = np.ones(64, bool)


def stream(folder, rows):
    mask = [np.ones(len(row), np.uint8) for row in rows]
    write_stream(
        folder,
        COLUMNS,
        [
            {"tokens": np.asarray(row, np.int32), "loss_mask": m, "sample_id": content_id(np.asarray(row, np.int32), m),
             "domain": folder.name, "documents": []}
            for row, m in zip(rows, mask, strict=True)
        ],
        shard_bytes=10_000,
    )  # fmt: skip
    return MdsStream(folder)


def pool_of(lengths, domains):
    n = len(lengths)
    return pl.DataFrame(
        {"domain": domains, "index": np.arange(n), "sample_id": np.arange(n) * 7 + 1, "stored_tokens": lengths}
    )


@given(st.lists(st.integers(0, 50_000), min_size=2, max_size=40), st.randoms())
def test_features_are_the_uni_and_bigrams_of_predicted_tokens(tokens, random):
    mask = np.array([random.random() < 0.7 for _ in tokens])
    found = buckets_of(np.asarray(tokens, np.int32), mask)
    wanted = [token for token, on in zip(tokens[1:], mask[1:], strict=True) if on]
    pairs = [pair for pair, on in zip(pairwise(tokens), mask[1:], strict=True) if on]
    assert len(found) == 2 * len(wanted)
    assert found.min(initial=0) >= 0
    assert found.max(initial=0) < BUCKETS
    for values, keys in ((found[: len(wanted)], wanted), (found[len(wanted) :], pairs)):
        bucket = {}
        for value, key in zip(values, keys, strict=True):
            assert bucket.setdefault(key, value) == value


def test_bigrams_have_an_order_and_few_collisions():
    forward, back = (buckets_of(np.array(pair, np.int32), ALL[:2])[1] for pair in ((3, 4), (4, 3)))
    assert forward != back
    unigrams = buckets_of(np.arange(501, dtype=np.int32), ALL.repeat(8)[:501])[:500]
    assert len(set(unigrams)) > 450  # of 500 in 10,000 buckets about 12 are expected to collide


def test_log_importance_is_the_sum_of_log_ratios_counted_by_hand(tmp_path):
    rows = {"a": [[1, 2, 3], [1, 1, 1]], "b": [[4, 5, 6], [5, 3, 2]]}
    streams = {name: stream(tmp_path / name, found) for name, found in rows.items()}
    target = [(np.array([1, 2, 3, 2], np.int64), ALL[:4])]

    def counts(sequences):
        found = Counter()
        for row in sequences:
            found.update(buckets_of(np.asarray(row, np.int32), ALL[: len(row)]).tolist())
        return found

    p, q = counts([[1, 2, 3, 2]]), counts([*rows["a"], *rows["b"]])
    found = log_importance(streams, target)
    for name, own in rows.items():
        for index, row in enumerate(own):
            wanted = sum(
                np.log(p[j] / p.total() + 1e-8) - np.log(q[j] / q.total() + 1e-8)
                for j in buckets_of(np.asarray(row, np.int32), ALL[: len(row)]).tolist()
            )
            assert found[name][index] == pytest.approx(wanted, rel=1e-9)
    assert found["a"][0] > found["b"][1] > found["b"][0]


def test_a_pool_like_the_target_has_no_importance():
    same = ngram_counts([(np.arange(30), ALL[:30])])
    assert same.sum() == 2 * 29
    np.testing.assert_allclose(log_ratio(same, same), 0)


def test_the_largest_keys_are_a_draw_in_proportion_to_the_weights():
    weights = np.array([1.0, 2.0, 5.0])
    pool = pool_of([1, 1, 1], ["a", "a", "a"])
    first = Counter(gumbel_keys(pool, {"a": np.log(weights)}, seed)["index"][0] for seed in range(600))
    for index, weight in enumerate(weights):
        share = weight / weights.sum()
        assert first[index] / 600 == pytest.approx(share, abs=4 * (share * (1 - share) / 600) ** 0.5)


def test_the_draw_belongs_to_contents_not_to_places():
    pool = pool_of([4] * 30, ["a"] * 10 + ["b"] * 20)
    again = pool.sample(fraction=1.0, shuffle=True, seed=1).with_columns(index=pl.int_range(30))
    found, moved = (gumbel_keys(table, None, 3) for table in (pool, again))
    assert found["sample_id"].to_list() == moved["sample_id"].to_list()
    assert gumbel_keys(pool, None, 4)["sample_id"].to_list() != found["sample_id"].to_list()


def test_shares_are_those_of_the_draw_that_fills_the_budget():
    keys = pool_of([2, 4, 6, 8], ["a", "b", "a", "c"]).with_columns(key=pl.Series([4.0, 3.0, 2.0, 1.0]))
    # 2 + 4 + 6 tokens reach 11; nothing of c is drawn, it counts as half a sample
    assert drawn_shares(keys, 11) == pytest.approx({"a": 8 / 16, "b": 4 / 16, "c": 4 / 16})
    assert drawn_shares(keys, 10**9) == pytest.approx({"a": 8 / 20, "b": 4 / 20, "c": 8 / 20})


def test_random_draws_are_null_on_average():
    pool = pool_of([3] * 400, ["a"] * 100 + ["b"] * 300)
    shares = [drawn_shares(gumbel_keys(pool, None, seed), 300)["a"] for seed in range(200)]
    assert np.mean(shares) == pytest.approx(0.25, abs=4 * np.std(shares) / 200**0.5)
