"""Methods as scores: weights come back from the solver, and shuffled values are a null."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.domains.domain import domain_scores
from curate.domains.methods import shuffled, weight_scores
from curate.mixture.weights import solve

PRIOR = {"a": 20.0, "b": 30.0, "c": 50.0}


@given(st.lists(st.floats(1e-6, 1e6), min_size=3, max_size=3), st.sampled_from([0.1, 1.0, 3.0]))
def test_the_solver_gives_the_weights_back_at_the_prior_strength_they_were_made_for(weights, strength):
    table = weight_scores(dict(zip("abc", weights, strict=True)), PRIOR, "late", "t", strength)
    prior = table["prior"].to_numpy()
    found = solve(prior, table["shrunk"].to_numpy(), strength, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(found, np.array(weights) / sum(weights), rtol=1e-9, atol=1e-300)
    flat = solve(prior, table["shrunk"].to_numpy(), 1e9, np.zeros(3), np.ones(3))
    np.testing.assert_allclose(flat, prior, rtol=1e-6)


def test_the_table_has_the_columns_of_scores_by_values(values):
    prior = dict.fromkeys("abc", 1.0)
    table = weight_scores(prior, prior, "late", "t", 1.0)
    assert table.schema == domain_scores(values, prior, seed=0).schema
    assert table["shrunk"].to_list() == [0.0, 0.0, 0.0]


def test_shuffling_keeps_values_per_token_and_moves_them_between_domains(make):
    values = make(sources=("early", "late"))
    again = shuffled(values, 0)
    assert again.columns == values.columns
    for source in ("early", "late"):
        before, after = (frame.filter(source=source) for frame in (values, again))
        for name in ("value_total_nats", "value_half_a_nats", "value_half_b_nats"):
            per_token = [np.sort((frame[name] / frame["predicted_tokens"]).to_numpy()) for frame in (before, after)]
            np.testing.assert_allclose(*per_token, rtol=1e-12)
        assert before.drop("value_total_nats", "value_half_a_nats", "value_half_b_nats").equals(
            after.drop("value_total_nats", "value_half_a_nats", "value_half_b_nats")
        )
        assert (before["value_total_nats"] != after["value_total_nats"]).mean() > 0.9
    assert shuffled(values, 0).equals(again)
    assert not shuffled(values, 1).equals(again)


def test_shuffled_values_score_as_a_null(make):
    """Scores lie within about their errors of 0, and shrinking leaves a small part of real ones."""
    values, prior = make(steps=20), dict.fromkeys("abc", 1.0)
    real = domain_scores(values, prior, seed=0)
    ratios, left = [], []
    for seed in range(20):
        found = domain_scores(shuffled(values, seed), prior, seed=0)
        ratios += (found["score"] / found["score_se"]).to_list()
        left.append(found["shrunk"].abs().max())
    assert np.mean(np.square(ratios)) == pytest.approx(1, abs=0.5)
    assert np.median(left) < 0.15 * real["shrunk"].abs().max()


def test_lengths_do_not_make_a_null_favour_a_domain(make):
    """Domains whose samples are of different length and worth the same per token stay equal."""
    values = make(steps=30, effect=(1.0, 1.0, 1.0))
    longer = pl.when(pl.col("domain") == "a").then(4).otherwise(1)
    values = values.with_columns(
        predicted_tokens=pl.col("predicted_tokens") * longer, value_total_nats=pl.col("value_total_nats") * longer
    )
    found = [
        domain_scores(shuffled(values, seed), dict.fromkeys("abc", 1.0), seed=0)["score"].to_numpy()
        for seed in range(30)
    ]
    assert np.abs(np.mean(found, axis=0)).max() < 4 * np.std(found) / 30**0.5
