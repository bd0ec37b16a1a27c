import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.core.errors import UserError
from curate.domains.domain import domain_scores, shrink
from curate.stats.bootstrap import step_sums, step_weights
from curate.stats.deviation import pooled_deviation

PRIOR = {"a": 0.5, "b": 0.3, "c": 0.2}


def test_against_a_plain_loop(values):
    got = {row["domain"]: row for row in domain_scores(values, PRIOR, seed=0, resamples=50).iter_rows(named=True)}
    rows = values.to_dicts()
    mean, squares = {}, 0.0
    for domain in PRIOR:
        own = [row for row in rows if row["domain"] == domain]
        mean[domain] = sum(row["value_total_nats"] for row in own) / sum(row["predicted_tokens"] for row in own)
        squares += sum(
            row["predicted_tokens"] * (row["value_total_nats"] / row["predicted_tokens"] - mean[domain]) ** 2
            for row in own
        )
        assert got[domain]["samples"] == len(own)
        assert got[domain]["predicted_tokens"] == sum(row["predicted_tokens"] for row in own)
    deviation = (squares / sum(row["predicted_tokens"] for row in rows)) ** 0.5
    centre = sum(PRIOR[domain] * mean[domain] for domain in PRIOR)
    for domain in PRIOR:
        assert got[domain]["value_per_token"] == pytest.approx(mean[domain], rel=1e-12)
        assert got[domain]["score"] == pytest.approx((mean[domain] - centre) / deviation, rel=1e-10)
    assert got["a"]["score"] > got["b"]["score"] > got["c"]["score"]


def test_bootstrap_by_step_sums_equals_resampling_rows(values):
    domains = sorted(PRIOR)
    weights = step_weights(12, 5, np.random.default_rng(3))
    fast = (weights @ step_sums(values, domains, "value_total_nats")) / (
        weights @ step_sums(values, domains, "predicted_tokens")
    )
    for drawn, estimate in zip(weights, fast, strict=True):
        rows = pl.concat([values.filter(pl.col("step") == step) for step in range(12) for _ in range(int(drawn[step]))])
        for position, domain in enumerate(domains):
            own = rows.filter(pl.col("domain") == domain)
            assert estimate[position] == pytest.approx(
                own["value_total_nats"].sum() / own["predicted_tokens"].sum(), rel=1e-12
            )


def test_standard_error_is_that_of_a_ratio_over_steps(make):
    values = make(steps=200, domains=("a", "b"), effect=(0.5, -0.5))
    row = domain_scores(values, {"a": 1, "b": 1}, seed=0, resamples=4000).row(0, named=True)
    per_step = (
        values.filter(pl.col("domain") == "a")
        .group_by("step")
        .agg(pl.col("value_total_nats").sum(), pl.col("predicted_tokens").sum())
    )
    residual = per_step["value_total_nats"] - row["value_per_token"] * per_step["predicted_tokens"]
    expected = float((residual**2).sum()) ** 0.5 / per_step["predicted_tokens"].sum()  # the delta method for a ratio
    assert row["se"] == pytest.approx(expected, rel=0.1)
    assert row["low"] < row["value_per_token"] < row["high"]
    assert row["score_low"] < row["score"] < row["score_high"]


def test_row_order_and_other_domains_names_do_not_matter(values):
    expected = domain_scores(values, PRIOR, seed=1, resamples=100)
    shuffled = domain_scores(
        values.sample(fraction=1.0, shuffle=True, seed=5), dict(reversed(PRIOR.items())), seed=1, resamples=100
    )
    assert_frame_equal(expected, shuffled, rel_tol=1e-9)


def test_scale_and_constant_shift_of_values_do_not_change_scores(values):
    expected = domain_scores(values, PRIOR, seed=1, resamples=100)
    moved = values.with_columns(value_total_nats=7 * (pl.col("value_total_nats") + 3 * pl.col("predicted_tokens")))
    got = domain_scores(moved, PRIOR, seed=1, resamples=100)
    columns = ["score", "score_se", "score_low", "score_high", "shrunk"]
    assert_frame_equal(expected.select(columns), got.select(columns), rel_tol=1e-8)


def test_a_domain_without_samples_is_reported_and_neutral(values):
    frame = domain_scores(values, {**PRIOR, "unseen": 0.5}, seed=0, resamples=50)
    row = frame.filter(pl.col("domain") == "unseen").row(0, named=True)
    assert (row["samples"], row["predicted_tokens"], row["score"], row["shrunk"]) == (0, 0, 0.0, 0.0)
    assert row["value_per_token"] is None
    assert row["se"] is None
    without = domain_scores(values, PRIOR, seed=0, resamples=50)
    assert_frame_equal(frame.filter(pl.col("domain") != "unseen").drop("prior"), without.drop("prior"), rel_tol=1e-9)


def test_one_step_gives_no_confidence(values):
    frame = domain_scores(values.filter(pl.col("step") == 0), PRIOR, seed=0, resamples=50)
    assert frame["score_se"].null_count() == 3
    assert frame["shrunk"].to_list() == [0.0, 0.0, 0.0]
    assert (frame["score"] != 0).all()


def test_equal_values_score_zero_without_nan(values):
    frame = domain_scores(
        values.with_columns(value_total_nats=pl.col("predicted_tokens") * 0.1), PRIOR, seed=0, resamples=50
    )
    assert frame["score"].to_list() == [0.0, 0.0, 0.0]
    assert frame["shrunk"].to_list() == [0.0, 0.0, 0.0]
    assert not any(frame[name].is_nan().any() for name in frame.columns if frame[name].dtype.is_float())


def test_samples_without_predicted_tokens_are_harmless(values):
    empty = values.with_columns(
        predicted_tokens=pl.when(pl.col("index") % 7 == 0).then(0).otherwise("predicted_tokens")
    )
    empty = empty.with_columns(
        value_total_nats=pl.when(pl.col("predicted_tokens") == 0).then(0.0).otherwise("value_total_nats")
    )
    frame = domain_scores(empty, PRIOR, seed=0, resamples=50)
    assert frame["score"].is_finite().all()


def test_noise_is_shrunk_away_and_signal_is_kept(make):
    noise = domain_scores(make(3, steps=40, effect=(0, 0, 0)), PRIOR, seed=0)
    signal = domain_scores(make(3, steps=40), PRIOR, seed=0)
    assert noise["shrunk"].abs().max() < 0.1
    assert (signal["shrunk"] / signal["score"]).filter(signal["domain"] != "b").min() > 0.9


def test_sources_and_targets_are_kept_apart(make):
    values = make(sources=("early", "late"), targets=("t", "u"))
    frame = domain_scores(values, PRIOR, seed=0, resamples=50)
    assert frame.select("source", "target", "domain").rows() == [
        (source, target, domain) for source in ("early", "late") for target in ("t", "u") for domain in "abc"
    ]
    alone = domain_scores(values.filter(source="late", target="u"), PRIOR, seed=0, resamples=50)
    assert_frame_equal(frame.filter(source="late", target="u"), alone)


def test_shrink_formula():
    score, se = np.array([2.0, -2.0, 0.0, np.nan]), np.array([1.0, 3.0, np.nan, np.nan])
    assert shrink(score, se, 4.0).tolist() == [2.0 * (1 - 1 / 4), 0.0, 0.0, 0.0]


def test_pooled_deviation_ignores_the_distance_between_domains(values):
    apart = values.with_columns(
        value_total_nats=pl.col("value_total_nats") + pl.col("predicted_tokens") * 100 * (pl.col("domain") == "a")
    )
    assert pooled_deviation(apart) == pytest.approx(pooled_deviation(values))


@pytest.mark.parametrize(("prior", "message"), [({"a": 1.0}, "without a prior: b, c"), ({**PRIOR, "a": 0}, "positive")])
def test_bad_prior(values, prior, message):
    with pytest.raises(UserError, match=message):
        domain_scores(values, prior, seed=0)


def test_benefits_of_repeated_text_count_once_and_harm_every_time(make):
    values = make(5, steps=20)
    plain = domain_scores(values, PRIOR, seed=0, resamples=20)
    assert plain["score"][0] > 0 > plain["score"][2]
    found = domain_scores(values, PRIOR, seed=0, novel_shares={"a": 0.1, "b": 1.0, "c": 0.1}, resamples=20)
    assert found["score"].to_list() == pytest.approx([0.1 * plain["score"][0], *plain["score"][1:]])
    assert found["value_per_token"].to_list() == plain["value_per_token"].to_list()
