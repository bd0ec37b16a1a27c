"""Which samples are left out, and why: real MDS streams with planted copies, leaks and clusters."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.ngrams.hashes import N, ngram_hashes
from curate.shards.choose import ShardsConfig, _ranked, choose, keep_best, length_correlation, with_keys
from curate.shards.plan import make_pool
from curate.shards.scan import held_out, leaks, near_duplicates, scan
from curate.shards.sift import sift

LENGTH = 64
SAMPLES = 60
NONE = pl.DataFrame(schema={"sample_id": pl.Int64, "uses": pl.Int64})


def planted():
    """Domain a: sample 10 and 11 are sample 3 with some tokens changed, 12 repeats it exactly; 20 quotes half of the
    held-out document, 21 a few words of it. The last 20 samples of each domain draw on 30 tokens only."""
    random = np.random.default_rng(0)
    held = random.integers(0, 1000, 80, dtype=np.int32)
    tokens = {name: random.integers(0, 1000, (SAMPLES, LENGTH), dtype=np.int32) for name in "ab"}
    for name in "ab":
        tokens[name][40:] = random.integers(0, 30, (20, LENGTH))
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
    catalogues = {name: stream.catalogue() for name, stream in streams.items()}
    return streams, catalogues, held


def values_of(catalogues, value):
    """One row for each of the first 40 samples of a domain; `value(index)` per token."""
    tables = [
        table.filter(pl.col("index") < 40).with_columns(domain=pl.lit(name)) for name, table in catalogues.items()
    ]
    table = pl.concat(tables).unique(["domain", "sample_id"], keep="first", maintain_order=True)
    per_token = pl.Series([float(value(index)) for index in table["index"]])
    numbers = {name: pl.col("tokens") * per_token for name in ("value", "value_a", "value_b")}
    return table.with_columns(step=0, window=pl.lit("late"), target=pl.lit("t"), **numbers)


def outcome(data, value=lambda index: index, seed=0, **settings):
    streams, catalogues, held = data
    pool = make_pool(catalogues, values_of(catalogues, value), NONE)
    config = ShardsConfig(**{"drop_fraction": 0.0, **settings})
    documents = held_out([("test.jsonl", "question 7", held)])
    found = scan(pool, streams, documents, clusters=config.clusters > 0)
    hits = leaks(found, documents, config.screen.overlap)
    return choose(pool, found, hits.filter("hit"), config, seed), hits


def reasons(pool, reason, domain="a"):
    return sorted(pool.filter(reason=reason, domain=domain)["index"].to_list())


def test_hashes_are_of_every_window_and_only_of_content():
    tokens = np.arange(40, dtype=np.int32)
    assert len(ngram_hashes(tokens)) == 40 - N + 1 == len(set(ngram_hashes(tokens).tolist()))
    assert (ngram_hashes(tokens)[5:10] == ngram_hashes(tokens[5 : 9 + N])).all()
    assert len(ngram_hashes(tokens[: N - 1])) == 0


def test_of_near_duplicates_the_best_stays(data):
    pool, _ = outcome(data)
    assert reasons(pool, "near_duplicate") == [3, 10, 12]  # 11 has the largest value
    kept = pool.filter(domain="a", index=11)["sample_id"].item()
    assert set(pool.filter(reason="near_duplicate")["detail"]) == {f"sample {kept}"}
    pool, _ = outcome(data, value=lambda index: -index)
    assert reasons(pool, "near_duplicate") == [10, 11, 12]
    assert reasons(pool, "near_duplicate", "b") == []


def test_near_duplicates_in_two_parts_of_a_domain_count_once(data):
    streams, catalogues, _ = data
    pool = make_pool(catalogues, values_of(catalogues, lambda index: index), NONE)
    found, config = scan(pool, streams, held_out([])), ShardsConfig(drop_fraction=0.0)
    cut = pool.with_columns(domain=pl.format("{}.{}", "domain", (pl.col("index") > 10).cast(pl.Int8)))
    none = leaks(found, held_out([]), 0.5)
    parents = {f"{name}.{part}": name for name in "ab" for part in (0, 1)}
    whole = choose(cut, found, none, config, 0, parents).filter(reason="near_duplicate")
    assert sorted(whole["index"]) == [3, 10, 12]
    alone = choose(cut, found, none, config, 0).filter(reason="near_duplicate")
    assert sorted(alone["index"]) == [3, 12]


def test_near_duplicates_against_all_pairs(data):
    """A slow oracle over sets of n-grams."""
    streams, catalogues, _ = data
    pool = make_pool(catalogues, values_of(catalogues, lambda index: index), NONE)
    found = scan(pool, streams, held_out([]))
    order = pool.with_row_index("place").select(
        pl.col("place").cast(pl.Int64), "domain", rank=pl.col("place").cast(pl.Int64)
    )
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
        assert near_duplicates(found, order, overlap)["place"].to_list() == expected


def test_leaks_are_named_and_left_out(data):
    pool, hits = outcome(data)
    assert reasons(pool, "leak") == [20]
    assert pool.filter(reason="leak")["detail"].item() == "test.jsonl: question 7"
    top = hits.row(0, named=True)
    assert (top["shared"], top["hit"]) == (40 - N + 1, True)
    assert top["of_sample"] == pytest.approx(28 / 52)
    assert top["of_document"] == pytest.approx(28 / 68)
    assert hits["hit"].to_list() == [True, False]  # 14 tokens in common are two n-grams of 52
    pool, _ = outcome(data, screen={"overlap": 0.01})
    assert reasons(pool, "leak") == [20, 21]


def test_where_nothing_is_compared_no_sample_is_read(data):
    """Reweighted streams without held-out text: no stream is opened, and the report is empty with its columns."""
    _, catalogues, _ = data
    pool = make_pool(catalogues, values_of(catalogues, lambda index: index), NONE)
    kept, report = sift(pool, {}, held_out([]), ShardsConfig(), filtered=False, seed=0)
    assert kept.equals(pool)
    assert report.is_empty()
    assert report.columns[:3] == ["domain", "index", "sample_id"]
    with pytest.raises(KeyError):
        sift(pool, {}, held_out([]), ShardsConfig(), filtered=True, seed=0)


def test_lowest_values_go_exactly_without_temperature_and_mostly_with_it(data):
    cold, _ = outcome(data, drop_fraction=0.25, sample_temperature=0)
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
    cold, _ = outcome(data, value=lambda index: -50 if index in (4, 7) else 0, drop_fraction=None, sample_temperature=0)
    assert reasons(cold, "low_value", "b") == [4, 7]
    equal, _ = outcome(data, value=lambda index: 1, drop_fraction=None)
    assert reasons(equal, "low_value", "b") == []


def test_samples_without_a_value_stay_or_go_as_asked(data):
    kept, _ = outcome(data)
    assert kept.filter(domain="b")["kept"].all()
    dropped, _ = outcome(data, unvalued="drop")
    assert reasons(dropped, "not_valued", "b") == list(range(40, 60))


def test_a_cluster_has_at_most_its_quota(data):
    pool, _ = outcome(data, clusters=4, cluster_quota=1.0)
    crowded = pool.filter(reason="cluster_quota")
    assert 0 < len(crowded) < SAMPLES
    assert (pool.filter("kept").group_by("domain").len()["len"] <= SAMPLES).all()
    assert pool.filter(domain="b").filter("kept").height <= SAMPLES
    assert crowded["detail"].str.contains(r"^cluster \d of [ab]$").all()


@settings(max_examples=5)
@given(st.integers(0, 2**32 - 1))
def test_the_order_of_the_shards_does_not_matter(data, seed):
    """The same samples in another order, as another writer would have put them."""
    streams, catalogues, held = data
    pool = make_pool(catalogues, values_of(catalogues, lambda index: index % 7), NONE)
    order = np.random.default_rng(seed).permutation(len(pool))
    config, documents = ShardsConfig(drop_fraction=0.3, clusters=3), held_out([("t", "q", held)])
    chosen = []
    for table in (pool, pool[order.tolist()]):
        found = scan(table, streams, documents, clusters=True)
        part = choose(table, found, leaks(found, documents, 0.2).filter("hit"), config, 0)
        unique = part.group_by("domain", "sample_id").agg(pl.col("reason").sort())
        chosen.append(unique.sort("domain", "sample_id"))
    assert chosen[0].equals(chosen[1])


def test_each_domain_keeps_its_largest_keys_and_nothing_that_was_left_out_before():
    pool = pl.DataFrame(
        {
            "domain": ["a"] * 4 + ["b"] * 2,
            "index": range(6),
            "value": [0.0] * 6,
            "reason": [None, "consumed", None, None, None, None],
            "kept": [True, False, True, True, True, True],
            "key": [0.0] * 6,
            "cluster": [None] * 6,
        }
    )
    keys = pool.select("domain", "index", key=pl.Series([1.0, 9.0, 3.0, 2.0, 1.0, 2.0]))
    found = keep_best(with_keys(pool, keys), {"a": 2, "b": 5}, 1.0)
    assert set(found.columns) == set(pool.columns)
    assert found["kept"].to_list() == [False, False, True, True, True, True]
    assert found["reason"].to_list() == ["over_quota", "consumed", None, None, None, None]
    assert found["value"].to_list() == keys["key"].to_list()


def test_what_a_stage_takes_of_a_domain_are_its_best(data):
    pool, _ = outcome(data, sample_temperature=0.0)
    taken = keep_best(pool, {"a": 5, "b": 0}, 1.0).filter("kept")
    assert sorted(taken["index"]) == [35, 36, 37, 38, 39]  # of 40 samples with values, larger ones later


def test_no_cluster_gives_more_than_its_quota_while_others_have_samples_left():
    pool = pl.DataFrame(
        {
            "domain": ["a"] * 8,
            "reason": [None] * 7 + ["leak"],
            "kept": [True] * 7 + [False],
            "key": [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 99.0],
            "cluster": [0, 0, 0, 0, 0, 1, 1, 1],
        },
        schema_overrides={"cluster": pl.Int64},
    )

    def taken(count, quota):
        return keep_best(pool, {"a": count}, quota).filter("kept")["key"].to_list()

    assert taken(4, 1.0) == [9.0, 8.0, 4.0, 3.0]
    assert taken(4, 1.5) == [9.0, 8.0, 7.0, 4.0]
    assert taken(4, 2.0) == [9.0, 8.0, 7.0, 6.0]
    assert taken(6, 1.0) == [9.0, 8.0, 7.0, 6.0, 4.0, 3.0]  # the other cluster has two
    assert taken(7, 1.0) == [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]


def test_a_choice_that_goes_with_length_is_told():
    pool = pl.DataFrame(
        {"domain": ["a"] * 4 + ["b"] * 4, "key": [1.0, 2, 3, 4, 9, 8, 7, 6], "length": [1, 2, 3, 4, 40, 30, 20, 10]}
    ).with_columns(kept=True)
    assert length_correlation(pool) == pytest.approx(1)
    assert length_correlation(pool.with_columns(key=-pl.col("key"))) == pytest.approx(-1)
    one = pool.with_columns(kept=pl.col("domain") == "a", length=pl.Series([2, 1, 4, 3] * 2))
    assert length_correlation(one) == pytest.approx(0.6)
    assert length_correlation(pool.with_columns(length=7)) is None


def test_a_quota_holds_for_what_a_stage_takes(data):
    """The last 20 samples of a domain are alike, and here the best."""
    pool, _ = outcome(data, clusters=2, cluster_quota=1.0, sample_temperature=0.0, drop_fraction=0.0)
    best = pool.with_columns(key=pl.col("index").cast(pl.Float64))
    taken = keep_best(best, {"a": 0, "b": 12}, 1.0).filter("kept")
    assert Counter(taken["cluster"]) == {0: 6, 1: 6}


@pytest.mark.parametrize("drop", [0.3, None])
def test_values_that_differ_by_rounding_are_equal(data, drop):
    streams, catalogues, _ = data
    values = values_of(catalogues, lambda index: 0.1).with_columns(tokens=pl.col("index") % 7 + 3)
    values = values.with_columns((pl.col("tokens") * 0.1).alias(name) for name in ("value", "value_a", "value_b"))
    pool = make_pool(catalogues, values, NONE)
    assert pool["value"].n_unique() > 2  # rounding, and what has no value
    config = ShardsConfig(sample_temperature=0.0, drop_fraction=drop)
    ranked = _ranked(pool, config, 0)
    assert set(ranked["z"]) == {0.0}
    found = scan(pool, streams, held_out([]))
    left = choose(pool, found, leaks(found, held_out([]), config.screen.overlap), config, 0)
    assert (left.filter(reason="low_value").height > 0) == (drop is not None)


def with_likeness(data, like, value=lambda index: index, **settings):
    """The pool after the choice, `like` an expression of each sample's index; without randomness."""
    streams, catalogues, _ = data
    tables = [table.with_columns(domain=pl.lit(name)) for name, table in catalogues.items()]
    first = pl.concat(tables).unique(["domain", "sample_id"], keep="first", maintain_order=True)
    likeness = first.select("domain", "sample_id", likeness=like.cast(pl.Float64))
    pool = make_pool(catalogues, values_of(catalogues, value), NONE, likeness=likeness)
    config = ShardsConfig(**{"drop_fraction": 0.0, "sample_temperature": 0.0, **settings})
    found = scan(pool, streams, held_out([]))
    return choose(pool, found, leaks(found, held_out([]), config.screen.overlap), config, 0)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_value_and_likeness_are_weighted_by_their_shares(data, share):
    pool = with_likeness(data, pl.col("index") * 7 % 11, likeness_share=share).filter(domain="a")

    def deviations(name):
        known = np.array([np.nan if each is None else each for each in pool[name]], float)
        return np.nan_to_num((known - np.nanmean(known)) / np.nanstd(known, ddof=1))

    mixed = (1 - share) * deviations("value") + share * deviations("likeness")
    np.testing.assert_allclose(pool["key"] * 1e-9, mixed / np.hypot(1 - share, share), atol=1e-7)  # and a lot for ties


def test_without_likeness_its_share_says_nothing(data):
    some, none = (outcome(data, likeness_share=share)[0] for share in (0.7, 0.0))
    assert some["key"].to_list() == none["key"].to_list()


def test_samples_without_a_value_are_left_out_by_their_likeness(data):
    pool = with_likeness(data, pl.col("index"), value=lambda index: 0, drop_fraction=0.5).filter(domain="b")
    assert reasons(pool, "low_value", "b") == list(range(SAMPLES // 2))
    assert pool["value"].null_count() == SAMPLES - 40


@pytest.mark.parametrize("temperature", [0.0, 0.1])
def test_without_any_value_what_a_domain_gives_is_drawn_by_content(data, temperature):
    _, catalogues, _ = data
    moved = {
        name: table.with_columns(index=pl.lit(SAMPLES - 1) - pl.col("index")) for name, table in catalogues.items()
    }
    none, config = values_of(catalogues, lambda index: index).clear(), ShardsConfig(sample_temperature=temperature)
    taken = []
    for tables in (catalogues, moved):
        ranked = _ranked(make_pool(tables, none, NONE), config, 0)
        kept = keep_best(ranked.with_columns(cluster=pl.lit(None, pl.Int64)), {"a": 0, "b": 10}, 1.0).filter("kept")
        assert kept["domain"].to_list() == ["b"] * 10
        assert sorted(kept["index"]) != list(range(10))
        taken.append(set(kept["sample_id"]))
    assert taken[0] == taken[1]
