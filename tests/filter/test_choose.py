"""Which samples are left out, and why: real MDS streams with planted copies, contamination and clusters."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.filter.choose import NOISE, FilterConfig, choose, length_correlation, top_k, with_keys
from curate.filter.overlap import contamination, held_out, near_duplicates, scan
from curate.filter.pipeline import filter_pool
from curate.ngrams.hashes import N, ngram_hashes
from curate.output.plan import make_pool
from curate.tables import VALUES_TOTAL, Catalogue, DrawKeys, RankedPool, SampleUses, SampleValues
from tests.frames import fill

LENGTH = 64
SAMPLES = 60
NONE = SampleUses.create_empty()


def planted():
    """Domain a: sample 10 and 11 are sample 3 with some tokens changed, 12 repeats it exactly; 20 quotes half of the
    held-out document, 21 a few words of it."""
    random = np.random.default_rng(0)
    held = random.integers(0, 1000, 80, dtype=np.int32)
    tokens = {name: random.integers(0, 1000, (SAMPLES, LENGTH), dtype=np.int32) for name in "ab"}
    a = tokens["a"]
    a[10:13] = a[3]
    a[10, 0] += 1
    a[11, [0, 63]] += 1
    a[20, 10:50] = held[5:45]
    a[21, :14] = held[:14]
    return tokens, held


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    base, (tokens, held) = tmp_path_factory.mktemp("planted"), planted()
    for name, samples in tokens.items():
        mask = np.ones(LENGTH, np.uint8)
        rows = [
            {"tokens": row, "loss_mask": mask, "sample_id": content_id(row, mask), "domain": name, "documents": []}
            for row in samples
        ]
        write_stream(base / name, COLUMNS, rows, shard_bytes=4000)
    streams = {name: MdsStream(base / name) for name in tokens}
    tables = [stream.catalogue().with_columns(domain=pl.lit(name)) for name, stream in streams.items()]
    return streams, Catalogue.validate(pl.concat(tables)), held


def values_of(catalogue, value):
    """One row for each of the first 40 samples of a domain; `value(index)` per token."""
    first = catalogue.filter(pl.col("index") < 40)
    table = first.unique(["domain", "sample_id"], keep="first", maintain_order=True)
    per_token = pl.Series([float(value(index)) for index in table["index"]], dtype=pl.Float64)
    return fill(
        SampleValues, table.with_columns((pl.col("predicted_tokens") * per_token).alias(n) for n in VALUES_TOTAL)
    )


def outcome(data, value=lambda index: index, seed=0, noise=NOISE, **settings):
    streams, catalogue, held = data
    pool = make_pool(catalogue, values_of(catalogue, value), NONE)
    config = FilterConfig(**{"drop_fraction": 0.0, **settings})
    documents = held_out([("test.jsonl", "question 7", held)])
    found = scan(pool, streams, documents)
    hits = contamination(found, documents, config.contamination_overlap)
    return choose(pool, found, hits.filter("hit"), config, seed, ngram_share=0.0, noise=noise), hits


def reasons(pool, reason, domain="a"):
    return sorted(pool.filter(reason=reason, domain=domain)["index"].to_list())


def test_of_near_duplicates_the_best_stays(data):
    pool, _ = outcome(data)
    assert reasons(pool, "near_duplicate") == [3, 10, 12]  # 11 has the largest value
    kept = pool.filter(domain="a", index=11)["sample_id"].item()
    assert set(pool.filter(reason="near_duplicate")["detail"]) == {f"sample {kept}"}
    pool, _ = outcome(data, value=lambda index: -index)
    assert reasons(pool, "near_duplicate") == [10, 11, 12]
    assert reasons(pool, "near_duplicate", "b") == []


def test_near_duplicates_against_all_pairs(data):
    """A slow oracle over sets of n-grams."""
    streams, catalogue, _ = data
    pool = make_pool(catalogue, values_of(catalogue, lambda index: index), NONE)
    found = scan(pool, streams, held_out([]))
    order = pool.with_row_index("row").select(pl.col("row").cast(pl.Int64), "domain", rank=pl.col("row").cast(pl.Int64))
    sets = [
        set(ngram_hashes(streams[domain][index].tokens).tolist())
        for domain, index in pool.select("domain", "index").iter_rows()
    ]
    for overlap in (0.3, 0.8, 1.0):
        expected = []
        owner = {}
        for place, (domain, grams) in enumerate(zip(pool["domain"], sets, strict=True)):
            counts = Counter(owner[domain, gram] for gram in grams if (domain, gram) in owner)
            if counts and max(counts.values()) >= overlap * len(grams):
                expected.append(place)
            for gram in grams:
                owner.setdefault((domain, gram), place)
        assert near_duplicates(found, order, overlap)["row"].to_list() == expected


def test_leaks_are_named_and_left_out(data):
    pool, hits = outcome(data)
    assert reasons(pool, "contamination") == [20]
    assert pool.filter(reason="contamination")["detail"].item() == "test.jsonl: question 7"
    top = hits.row(0, named=True)
    assert (top["shared"], top["hit"]) == (40 - N + 1, True)
    assert top["of_sample"] == pytest.approx(28 / 52)
    assert top["of_document"] == pytest.approx(28 / 68)
    assert hits["hit"].to_list() == [True, False]  # 14 tokens in common are two n-grams of 52
    pool, _ = outcome(data, contamination_overlap=0.01)
    assert reasons(pool, "contamination") == [20, 21]


def test_where_nothing_is_compared_no_text_is_needed(data):
    """Weighted streams without held-out text: the report is empty with its columns."""
    _, catalogue, _ = data
    pool = make_pool(catalogue, values_of(catalogue, lambda index: index), NONE)
    unread = scan(pool.clear(), {}, held_out([]))
    kept, report = filter_pool(pool, unread, held_out([]), FilterConfig(), leave_out=False, ngram_share=0.5, seed=0)
    assert kept.equals(pool)
    assert report.is_empty()
    assert report.columns[:3] == ["domain", "index", "sample_id"]


def test_lowest_values_go_exactly_without_noise_and_mostly_with_it(data):
    cold, _ = outcome(data, drop_fraction=0.25, noise=0)
    assert reasons(cold, "low_value", "b") == list(range(10))
    draws = [reasons(outcome(data, drop_fraction=0.25, seed=seed)[0], "low_value", "b") for seed in range(8)]
    assert {len(draw) for draw in draws} == {10}
    assert len({tuple(draw) for draw in draws}) > 1
    assert 2 < np.mean(draws) < 12  # the mean of all is 19.5
    assert outcome(data, drop_fraction=0.25, seed=3)[0].equals(outcome(data, drop_fraction=0.25, seed=3)[0])


def test_the_draw_has_the_probabilities_of_gumbel_top_k(data):
    """With one sample of 40 to leave out: far in front of the others the best is never the one."""
    pools = [outcome(data, value=lambda index: index == 5, drop_fraction=0.03, seed=seed)[0] for seed in range(20)]
    dropped = [index for pool in pools for index in reasons(pool, "low_value", "b")]
    assert len(dropped) == 20
    assert 5 not in dropped
    assert len(set(dropped)) > 8


def test_the_keep_rate_is_found_where_both_halves_agree(data):
    pool, _ = outcome(data, value=lambda index: -50 if index in (4, 7) else index / 100, drop_fraction=None)
    assert len(reasons(pool, "low_value", "b")) == 2
    cold, _ = outcome(data, value=lambda index: -50 if index in (4, 7) else 0, drop_fraction=None, noise=0)
    assert reasons(cold, "low_value", "b") == [4, 7]
    equal, _ = outcome(data, value=lambda index: 1, drop_fraction=None)
    assert reasons(equal, "low_value", "b") == []


def test_samples_without_a_value_stay(data):
    kept, _ = outcome(data)
    assert kept.filter(domain="b")["kept"].all()


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_the_shards_does_not_matter(data, seed):
    """The same samples in another order, as another writer would have put them."""
    streams, catalogue, held = data
    pool = make_pool(catalogue, values_of(catalogue, lambda index: index % 7), NONE)
    order = np.random.default_rng(seed).permutation(len(pool))
    config, documents = FilterConfig(drop_fraction=0.3), held_out([("t", "q", held)])
    chosen = []
    for table in (pool, pool[order.tolist()]):
        found = scan(table, streams, documents)
        hits = contamination(found, documents, 0.2).filter("hit")
        part = choose(table, found, hits, config, 0, ngram_share=0.5)
        unique = part.group_by("domain", "sample_id").agg(pl.col("reason").sort())
        chosen.append(unique.sort("domain", "sample_id"))
    assert chosen[0].equals(chosen[1])


def test_each_domain_keeps_its_largest_keys_and_nothing_that_was_left_out_before():
    table = pl.DataFrame(
        {
            "domain": ["a"] * 4 + ["b"] * 2,
            "index": range(6),
            "reason": [None, "seen", None, None, None, None],
            "kept": [True, False, True, True, True, True],
        }
    )
    pool = fill(RankedPool, table)
    keys = fill(DrawKeys, table.select("domain", "index", key=pl.Series([1.0, 9.0, 3.0, 2.0, 1.0, 2.0])))
    found = top_k(with_keys(pool, keys), {"a": 2, "b": 5})
    assert set(found.columns) == set(pool.columns)
    assert found["kept"].to_list() == [False, False, True, True, True, True]
    assert found["reason"].to_list() == ["not_sampled", "seen", None, None, None, None]
    assert found["value_per_token"].to_list() == keys["key"].to_list()


def test_what_a_stage_takes_of_a_domain_are_its_best(data):
    pool, _ = outcome(data, noise=0.0)
    taken = top_k(pool, {"a": 5, "b": 0}).filter("kept")
    assert sorted(taken["index"]) == [35, 36, 37, 38, 39]  # of 40 samples with values, larger ones later


def test_a_choice_that_goes_with_length_is_told():
    pool = pl.DataFrame(
        {
            "domain": ["a"] * 4 + ["b"] * 4,
            "key": [1.0, 2, 3, 4, 9, 8, 7, 6],
            "stored_tokens": [1, 2, 3, 4, 40, 30, 20, 10],
        }
    ).with_columns(kept=True)
    assert length_correlation(pool) == pytest.approx(1)
    assert length_correlation(pool.with_columns(key=-pl.col("key"))) == pytest.approx(-1)
    one = pool.with_columns(kept=pl.col("domain") == "a", stored_tokens=pl.Series([2, 1, 4, 3] * 2))
    assert length_correlation(one) == pytest.approx(0.6)
    assert length_correlation(pool.with_columns(stored_tokens=7)) is None


@pytest.mark.parametrize("drop", [0.3, None])
def test_values_that_differ_by_rounding_are_equal(data, drop):
    streams, catalogue, _ = data
    values = values_of(catalogue, lambda index: 0.1).with_columns(predicted_tokens=pl.col("index") % 7 + 3)
    values = values.with_columns((pl.col("predicted_tokens") * 0.1).alias(name) for name in VALUES_TOTAL)
    pool = make_pool(catalogue, values, NONE)
    assert pool["value_per_token"].n_unique() > 2  # rounding, and what has no value
    found = scan(pool, streams, held_out([]))
    config, none = FilterConfig(drop_fraction=drop), contamination(found, held_out([]), 0.2)
    left = choose(pool, found, none, config, 0, ngram_share=0.0, noise=0.0)
    assert left["key"].abs().max() < 20  # lots alone: a deviation would count 1e9
    assert (left.filter(reason="low_value").height > 0) == (drop is not None)


def with_ratios(data, ratio, value=lambda index: index, ngram_share=0.5, **settings):
    """The pool after the choice, `ratio` an expression of each sample's index; without randomness."""
    streams, catalogue, _ = data
    first = catalogue.unique(["domain", "sample_id"], keep="first", maintain_order=True)
    ratios = first.select("domain", "sample_id", ngram_ratio=ratio.cast(pl.Float64))
    pool = make_pool(catalogue, values_of(catalogue, value), NONE, ngram_ratios=ratios)
    config = FilterConfig(**{"drop_fraction": 0.0, **settings})
    found = scan(pool, streams, held_out([]))
    none = contamination(found, held_out([]), 0.2)
    return choose(pool, found, none, config, 0, ngram_share=ngram_share, noise=0.0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_values_and_n_gram_ratios_are_weighted_by_their_shares(data, share):
    pool = with_ratios(data, pl.col("index") * 7 % 11, ngram_share=share).filter(domain="a")

    def deviations(name):
        known = np.array([np.nan if each is None else each for each in pool[name]], float)
        return np.nan_to_num((known - np.nanmean(known)) / np.nanstd(known, ddof=1))

    mixed = (1 - share) * deviations("value_per_token") + share * deviations("ngram_ratio")
    np.testing.assert_allclose(pool["key"] * 1e-9, mixed / np.hypot(1 - share, share), atol=1e-7)  # and a lot for ties


def test_without_n_gram_ratios_their_share_says_nothing(data):
    streams, catalogue, _ = data
    pool = make_pool(catalogue, values_of(catalogue, lambda index: index), NONE)
    found = scan(pool, streams, held_out([]))
    none = contamination(found, held_out([]), 0.2)
    some, values = (choose(pool, found, none, FilterConfig(), 0, ngram_share=share) for share in (0.7, 0.0))
    assert some["key"].to_list() == values["key"].to_list()


def test_samples_without_a_value_are_left_out_by_their_n_gram_ratio(data):
    pool = with_ratios(data, pl.col("index"), value=lambda index: 0, drop_fraction=0.5).filter(domain="b")
    assert reasons(pool, "low_value", "b") == list(range(SAMPLES // 2))
    assert pool["value_per_token"].null_count() == SAMPLES - 40


def test_a_sample_that_predicts_no_token_is_the_last_to_be_taken(data):
    """It has no n-gram ratio, and nobody can learn from it."""
    silent = pl.when(pl.col("index") != 39).then(pl.lit(0))
    pool = with_ratios(data, silent, ngram_share=0.3)
    taken = top_k(pool, {"a": 0, "b": SAMPLES - 1})
    assert taken.filter(pl.col("domain") == "b").filter(~pl.col("kept"))["index"].to_list() == [39]


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_without_any_value_what_a_domain_gives_is_drawn_by_content(data, noise):
    streams, catalogue, _ = data
    moved = catalogue.with_columns(index=pl.lit(SAMPLES - 1) - pl.col("index"))
    none, config = values_of(catalogue, lambda index: index).clear(), FilterConfig(duplicate_overlap=1)
    taken = []
    for table in (catalogue, moved):
        pool = make_pool(table, none, NONE)
        found = scan(pool.clear(), streams, held_out([]))
        hits = contamination(found, held_out([]), 0.2)
        kept = top_k(choose(pool, found, hits, config, 0, ngram_share=0.5, noise=noise), {"a": 0, "b": 10})
        kept = kept.filter("kept")
        assert kept["domain"].to_list() == ["b"] * 10
        assert sorted(kept["index"]) != list(range(10))
        taken.append(set(kept["sample_id"]))
    assert taken[0] == taken[1]
