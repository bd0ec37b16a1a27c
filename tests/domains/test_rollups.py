"""Documents, shards and split halves."""

from functools import partial

import numpy as np
import polars as pl
import pytest
from scipy import stats

from curate.domains.documents import document_values
from curate.domains.reliability import halves_reliability, length_bias, spearman_brown
from curate.domains.shards import between_shards, shard_scores
from curate.stats.sums import row_mean, row_sum


def test_document_values_add_up(values):
    frame = document_values(values)
    assert frame["value_total_nats"].sum() == pytest.approx(values["value_total_nats"].sum())
    assert frame["predicted_tokens"].sum() == values["predicted_tokens"].sum()


def test_a_document_in_two_samples_gets_both_shares():
    values = pl.DataFrame(
        {
            "source": ["late"] * 3,
            "target": ["t"] * 3,
            "domain": ["a"] * 3,
            "value_total_nats": [8.0, 3.0, 5.0],
            "predicted_tokens": [8, 3, 0],
            "documents": [
                [{"id": "x", "predicted_tokens": 2}, {"id": "y", "predicted_tokens": 6}],
                [{"id": "x", "predicted_tokens": 3}],
                [],
            ],
        }
    )
    rows = (
        document_values(values)
        .select("document", "samples", "predicted_tokens", "value_total_nats", "value_per_token")
        .rows()
    )
    assert rows == [("x", 2, 5, 5.0, 1.0), ("y", 1, 6, 6.0, 1.0)]


def test_shard_scores_add_up(values):
    frame = shard_scores(values)
    assert frame["value_total_nats"].sum() == pytest.approx(values["value_total_nats"].sum())
    assert frame["samples"].sum() == values["sample_id"].n_unique()
    first = frame.row(0, named=True)
    own = values.filter(domain=first["domain"], shard=first["shard"])
    assert first["value_per_token"] == pytest.approx(own["value_total_nats"].sum() / own["predicted_tokens"].sum())


def test_shuffled_shards_do_not_differ(values):
    frame = between_shards(values)
    assert frame["verdict"].str.starts_with("shard weights would do nothing").all()
    assert (frame["share_between"] < 0.3).all()


def test_shards_that_differ_are_seen(values):
    frame = between_shards(
        values.with_columns(
            value_total_nats=pl.col("value_total_nats") + 20 * pl.col("predicted_tokens") * (pl.col("shard") % 2)
        )
    )
    assert (frame["p_value"] < 0.01).all()
    assert (frame["share_between"] > 0.3).all()
    assert frame["verdict"].str.starts_with("shards differ").all()


def test_a_step_effect_is_not_a_shard_effect(values):
    """Shards are read one after another, so what differs between steps must not look like a difference of shards."""
    ordered = values.with_columns(
        shard=pl.col("step") // 3, value_total_nats=pl.col("value_total_nats") * 10 ** pl.col("step")
    )
    assert (between_shards(ordered)["p_value"] > 0.001).all()


def test_kruskal_against_scipy(values):
    one_step = values.with_columns(step=0, domain=pl.lit("a"))
    per_token = one_step["value_total_nats"] / one_step["predicted_tokens"]
    groups = [per_token.filter(one_step["shard"] == shard).to_numpy() for shard in one_step["shard"].unique().sort()]
    assert between_shards(one_step)["p_value"].item() == pytest.approx(stats.kruskal(*groups).pvalue, rel=1e-6)


@pytest.mark.parametrize("shard", [pl.lit(0), pl.col("index")])
def test_nothing_to_test(values, shard):
    frame = between_shards(values.with_columns(shard=shard.cast(pl.Int64)))
    assert frame["p_value"].null_count() == 3
    assert frame["verdict"].str.starts_with("cannot be tested").all()


def test_spearman_against_scipy_and_correction(values):
    frame = halves_reliability(values, seed=0, resamples=200)
    pooled = frame.filter(ranking="pooled").row(0, named=True)
    expected = stats.spearmanr(values["value_half_a_nats"], values["value_half_b_nats"]).statistic
    assert pooled["spearman"] == pytest.approx(expected, rel=1e-9)
    assert pooled["reliability"] == pytest.approx(2 * expected / (1 + expected), rel=1e-9)
    assert pooled["low"] < pooled["spearman"] < pooled["high"]
    assert pooled["reliability"] > pooled["spearman"]


def test_within_steps_takes_out_the_scale_of_a_step(make):
    random = np.random.default_rng(0)
    values = make(steps=30)
    level = pl.col("step") * 100.0
    noise = values.with_columns(
        value_half_a_nats=level + pl.Series(random.standard_normal(values.height)),
        value_half_b_nats=level + pl.Series(random.standard_normal(values.height)),
    )
    frame = {row["ranking"]: row for row in halves_reliability(noise, seed=0, resamples=100).iter_rows(named=True)}
    assert frame["pooled"]["spearman"] > 0.9
    assert abs(frame["within_step"]["spearman"]) < 0.15


def test_equal_halves_are_unknown_not_nan(values):
    frame = halves_reliability(values.with_columns(value_half_a_nats=0.0), seed=0, resamples=20)
    assert frame["reliability"].null_count() == 2


def test_spearman_brown():
    assert spearman_brown(np.array([1.0, 0.5, 0.0, -0.9])).tolist() == [1.0, 2 / 3, 0.0, 0.0]


def test_length_bias_is_the_rank_correlation_inside_domains():
    """One domain's long samples are worth more, the other's too; domains themselves differ the other way."""
    random = np.random.default_rng(0)
    rows, oracle = [], []
    for domain, level in (("a", 0.0), ("b", 100.0)):
        tokens = random.permutation(40) + (0 if domain == "a" else 1000)
        value = random.normal(size=40) + 0.05 * tokens - level
        oracle.append(stats.spearmanr(value, tokens).statistic)
        rows += [
            {
                "source": "late",
                "target": "t",
                "domain": domain,
                "step": i % 8,
                "predicted_tokens": int(n),
                "value_total_nats": float(v),
            }
            for i, (n, v) in enumerate(zip(tokens, value, strict=True))
        ]
    (row,) = length_bias(pl.DataFrame(rows), seed=0, resamples=200).to_dicts()
    assert row["spearman"] == pytest.approx(np.mean(oracle), rel=1e-9)
    assert row["low"] < row["spearman"] < row["high"]
    assert row["samples"] == 80
    equal = pl.DataFrame(rows).with_columns(predicted_tokens=pl.lit(32))
    assert length_bias(equal, seed=0, resamples=20)["spearman"].to_list() == [None]


@pytest.mark.parametrize(
    "roll_up",
    [document_values, shard_scores, between_shards, partial(halves_reliability, seed=0), partial(length_bias, seed=0)],
)
def test_every_run_has_the_same_last_digits(make, roll_up):
    values = make(steps=200, batch=50)
    first = roll_up(values)
    assert all(roll_up(values).equals(first) for _ in range(8))


def test_sums_go_row_after_row():
    random = np.random.default_rng(0)
    frame = pl.DataFrame({"key": random.integers(0, 500, 20_000), "x": random.standard_normal(20_000)})
    found = frame.group_by("key").agg(sum=row_sum(pl.col("x")), mean=row_mean(pl.col("x"))).sort("key")
    own = [frame.filter(key=key)["x"].to_list() for key in found["key"]]
    assert found["sum"].to_list() == pytest.approx([sum(one) for one in own], rel=1e-12)
    assert found["mean"].to_list() == pytest.approx([sum(one) / len(one) for one in own], rel=1e-12)
    for _ in range(8):
        again = frame.group_by("key").agg(sum=row_sum(pl.col("x")), mean=row_mean(pl.col("x"))).sort("key")
        assert again.equals(found)
