"""Which samples are left out, and why: real MDS streams with planted copies, leaks and clusters."""

from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.formats.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.formats.ngrams import N, ngram_hashes
from curate.shards.choose import ShardsConfig, choose
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
