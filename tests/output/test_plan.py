import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from curate.core.errors import UserError
from curate.filter.choose import FilterConfig, choose
from curate.filter.overlap import contamination, held_out, scan
from curate.mixture.constraints import Supply
from curate.output.plan import make_plan, make_pool, supply_of
from curate.tables import SamplePool, SampleUses
from tests.frames import fill

NONE = SampleUses.create_empty()


def chosen_pool(streams, catalogue, values, used=NONE, *, unseen_only=False, **settings):
    """The pool after the choice, without randomness."""
    pool = make_pool(catalogue, values, used, unseen_only=unseen_only)
    config, documents = FilterConfig(**settings), held_out([])
    found = scan(pool, streams, documents)
    hits = contamination(found, documents, 0.2)
    return choose(pool, found, hits.filter("hit"), config, 0, ngram_share=0.0, noise=0.0)


def test_pool_drops_the_lowest_valued(streams, catalogue, values):
    pool = chosen_pool(streams, catalogue, values)
    assert pool.height == 75
    lost = pool.filter(~pl.col("kept")).select("domain", "index").rows()
    assert lost == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1), ("b", 2), ("b", 3), ("c", 0), ("c", 1)]
    assert pool["value_per_token"].null_count() == 75 - 50
    assert pool.filter(domain="a", index=7)["value_per_token"].item() == pytest.approx(0.07)
    assert pool.filter(domain="a", index=3)["value_per_token"].item() == pytest.approx(
        0.03
    )  # seen twice: still per token


def test_no_drop_keeps_all(streams, catalogue, values):
    assert chosen_pool(streams, catalogue, values, drop_fraction=0.0)["kept"].all()


def test_supply_of_the_kept(streams, catalogue, values):
    ids = {domain: catalogue.filter(domain=domain)["sample_id"].to_list() for domain in ("a", "c")}
    used = pl.DataFrame({"sample_id": [ids["a"][0], *ids["a"][4:9], ids["c"][9]], "uses": [7, 1, 1, 1, 1, 4, 2]})
    supply = supply_of(chosen_pool(streams, catalogue, values, used))
    assert supply["a"] == Supply(samples=36, tokens=288, seen_tokens=8 * 8)  # sample 0 is of low value
    assert supply["c"] == Supply(samples=8, tokens=64, seen_tokens=16)


def test_what_was_seen_is_left_out_where_asked(streams, catalogue, values):
    used = catalogue.filter(domain="a").head(30).select("sample_id", uses=pl.lit(1, pl.Int64))
    pool = chosen_pool(streams, catalogue, values, used, unseen_only=True)
    assert pool.filter(pl.col("kept") & (pl.col("domain") == "a"))["index"].to_list() == list(range(30, 40))
    plan = make_plan(pool, {"a": 12, "b": 3, "c": 0}, 0)
    reasons = plan.dropped.group_by("domain", "reason").len().sort("domain", "reason").rows()
    assert ("a", "seen", 30) in reasons
    assert ("b", "low_value", 4) in reasons


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 10))
def test_exact_counts_and_even_use(a, b, seed):
    rows = [("a", 5), ("b", 3)]
    table = pl.DataFrame(
        {"domain": domain, "index": i, "sample_id": hash((domain, i)) % 997, "stored_tokens": 8,
         "reason": None if i > 0 else "low_value", "kept": i > 0}
        for domain, size in rows
        for i in range(size)
    )  # fmt: skip
    pool = fill(SamplePool, table)
    plan = make_plan(pool, {"a": a, "b": b}, seed)
    for domain, wanted in (("a", a), ("b", b)):
        uses = plan.uses.filter(domain=domain)["uses"]
        assert uses.sum() == wanted
        kept = dict(rows)[domain] - 1
        assert ((uses == wanted // kept) | (uses == wanted // kept + 1)).all()
        assert plan.tokens().get(domain, 0) == 8 * wanted
    assert plan.uses.height + plan.dropped.height == pool.height


def test_dropped_have_a_reason(streams, catalogue, values):
    pool = chosen_pool(streams, catalogue, values)
    plan = make_plan(pool, {"a": 10, "b": 42, "c": 0}, 0)
    groups = plan.dropped.group_by("domain", "reason").len()
    reasons = {(domain, reason): count for domain, reason, count in groups.iter_rows()}
    assert reasons == {
        ("a", "low_value"): 4,
        ("a", "not_sampled"): 26,
        ("b", "low_value"): 4,
        ("c", "low_value"): 2,
        ("c", "not_sampled"): 8,
    }
    assert plan.dropped.columns == ["domain", "index", "sample_id", "reason", "detail", "value_per_token"]


def test_the_draw_does_not_depend_on_the_shard_layout(streams, catalogue, values):
    pool = chosen_pool(streams, catalogue, values)
    backwards = pool.with_columns(index=1000 - pl.col("index")).sort("domain", "index")
    samples = {"a": 10, "b": 30, "c": 3}
    dropped = [
        make_plan(table, samples, 3).dropped.select("domain", "sample_id", "reason") for table in (pool, backwards)
    ]
    assert_frame_equal(*(table.sort("domain", "sample_id") for table in dropped))


def test_seed_changes_the_draw(streams, catalogue, values):
    pool = chosen_pool(streams, catalogue, values, drop_fraction=0.0)
    chosen = [make_plan(pool, {"a": 10, "b": 10, "c": 5}, seed).uses for seed in (0, 0, 1)]
    assert chosen[0].equals(chosen[1])
    assert not chosen[0].equals(chosen[2])


def test_a_rewritten_stream_is_refused(catalogue, values):
    other = catalogue.with_columns(pl.col("sample_id") + (pl.col("domain") == "b").cast(pl.Int64))
    with pytest.raises(UserError, match=r"\b0 of b\b.*\b20\b"):
        make_pool(other, values, NONE)
    with pytest.raises(UserError, match="of c "):
        make_pool(catalogue.filter(pl.col("domain") != "c"), values, NONE)


def test_values_of_two_sources_are_refused(catalogue, values):
    both = pl.concat([values, values.with_columns(source=pl.lit("early"))])
    with pytest.raises(ValueError, match="source"):
        make_pool(catalogue, both, NONE)
