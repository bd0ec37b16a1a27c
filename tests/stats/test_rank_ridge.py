"""Ridge regression from measured samples to the rest of their domains, against obvious oracles."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from curate.stats.rank_ridge import _PENALTIES, _ridge, cross_validated_scores, fit, normal_scores


def problem(samples=120, features=8, noise=0.1, seed=0):
    random = np.random.default_rng(seed)
    blocks = [random.standard_normal((samples, features)), 50 * random.standard_normal((samples, 3))]
    hidden = blocks[0] @ random.standard_normal(features) + noise * random.standard_normal(samples)
    domains = np.array(["a", "b", "b"])[np.arange(samples) % 3]
    values = np.exp(3 * hidden) * 1e-6 + (domains == "b")  # heavy tails, other levels: only the order is linear
    return blocks, np.stack([values, -values], axis=1), domains


def test_the_order_inside_domains_is_found_whatever_the_tails():
    blocks, values, domains = problem()
    found = cross_validated_scores(blocks, values, domains, 0)
    for name in ("a", "b"):
        own = domains == name
        assert spearmanr(found[own, 0], values[own, 0]).statistic > 0.9
        np.testing.assert_allclose(found[own, 0], -found[own, 1], atol=1e-8)


def test_nothing_is_found_where_nothing_is():
    blocks, values, domains = problem(samples=300)
    shuffled = np.random.default_rng(1).permutation(values)
    found = cross_validated_scores(blocks, shuffled, domains, 0)
    for name in ("a", "b"):
        own = domains == name
        assert abs(spearmanr(found[own, 0], shuffled[own, 0]).statistic) < 3 / own.sum() ** 0.5


def test_predictions_are_values_of_the_domain_in_predicted_order():
    blocks, values, domains = problem()
    made = fit(blocks, values, domains)
    features = np.concatenate(blocks, axis=1)
    for name in ("a", "b"):
        own = domains == name
        predicted = made.predict(features[own], name)
        assert predicted.min() >= values[own].min()
        assert (predicted.max(axis=0) <= values[own].max(axis=0)).all()
        assert spearmanr(predicted[:, 0], made.scores(features[own], name)[:, 0]).statistic == pytest.approx(1)
        assert spearmanr(predicted[:, 0], values[own, 0]).statistic > 0.9


@given(st.integers(0, 50))
def test_the_order_of_samples_and_the_scale_of_values_and_blocks_are_irrelevant(seed):
    blocks, values, domains = problem(samples=60, seed=seed)
    order = np.random.default_rng(seed).permutation(len(values))
    one = fit(blocks, values, domains)
    other = fit([7 * block[order] for block in blocks], 3 * values[order], domains[order])
    features = np.concatenate(blocks, axis=1)
    np.testing.assert_allclose(3 * one.predict(features, "a"), other.predict(7 * features, "a"), rtol=1e-6)


@pytest.mark.parametrize(("samples", "features"), [(12, 30), (40, 5)])
def test_the_penalty_is_that_of_least_leave_one_out_error(samples, features):
    random = np.random.default_rng(0)
    domains = np.arange(samples) % 3 % 2  # one of two thirds, one of a third
    x = centred(random.standard_normal((samples, features)), domains)
    t = centred(x[:, :2] @ random.standard_normal((2, 1)) + random.standard_normal((samples, 1)), domains)

    def solved(rows, wanted, penalty):
        return np.linalg.solve(rows.T @ rows + penalty * np.eye(features), rows.T @ wanted)

    def error(out, penalty):
        rest = np.arange(samples) != out
        own = rest & (domains == domains[out])
        weights = solved(centred(x[rest], domains[rest]), centred(t[rest], domains[rest]), penalty)
        return t[out] - t[own].mean(axis=0) - (x[out] - x[own].mean(axis=0)) @ weights

    penalties = (x**2).sum() / samples * _PENALTIES
    errors = [np.mean([error(out, penalty) ** 2 for out in range(samples)]) for penalty in penalties]
    expected = solved(x, t, penalties[int(np.argmin(errors))])
    np.testing.assert_allclose(_ridge(x, t, 1 / np.bincount(domains)[domains]), expected, rtol=1e-6, atol=1e-9)


def test_many_features_that_say_nothing_are_held_down():
    """A fit that goes through every sample has residuals of 0: they are no reason to trust it."""
    random = np.random.default_rng(1)
    domains = np.arange(60) % 3
    x, t = (centred(random.standard_normal((60, width)), domains) for width in (500, 1))
    weights = _ridge(x, t, 1 / np.bincount(domains)[domains])
    assert np.std(x @ weights) < 0.1 * np.std(t)


def test_the_only_sample_of_a_domain_is_no_trouble():
    blocks, values, domains = problem(samples=20)
    domains[0] = "c"
    made = fit(blocks, values, domains)
    assert np.isfinite(made.weights).all()
    np.testing.assert_array_equal(made.predict(np.concatenate(blocks, axis=1)[:1], "c"), values[:1])


def centred(rows, domains):
    means = np.stack([rows[domains == name].mean(axis=0) for name in np.unique(domains)])
    return rows - means[np.searchsorted(np.unique(domains), domains)]


def test_a_constant_feature_and_ties_do_no_harm():
    blocks, values, domains = problem(samples=30)
    flat = [np.zeros((30, 2)), np.ones((30, 1))]
    assert np.isfinite(fit([*blocks, *flat], values, domains).weights).all()
    np.testing.assert_allclose(normal_scores(np.zeros((5, 1))), 0, atol=1e-12)


def test_a_domain_of_one_sample_has_no_held_out_prediction():
    blocks, values, domains = problem(samples=30)
    domains = domains.astype("U4")
    domains[0] = "lone"
    found = cross_validated_scores(blocks, values, domains, 0)
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).all()
