import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import minimize

from curate.mixture.weights import divergence, effective_number, solve

WHOLE = 1e-12


@st.composite
def problems(draw, prior_strength=None):
    """A feasible problem: 1 to 8 domains, any prior, scores, prior_strength and bounds."""
    size = draw(st.integers(1, 8))

    def floats(low, high):
        return np.array(draw(st.lists(st.floats(low, high, width=32), min_size=size, max_size=size)))

    prior = floats(1 / 1024, 1)
    prior /= prior.sum()
    lo = floats(0, 1) * prior * draw(st.sampled_from([0.0, 0.5, 1.0]))
    hi = np.minimum(1, np.maximum(lo, prior * (1 + 9 * floats(0, 1)) if draw(st.booleans()) else floats(0, 1)))
    assume(hi.sum() >= 1)
    chosen = draw(st.floats(1e-3, 100)) if prior_strength is None else prior_strength
    return prior, floats(-5, 5), chosen, lo, hi


@given(problems())
def test_within_bounds_exactly_and_whole(problem):
    *_, lo, hi = problem
    weights = solve(*problem)
    assert (weights >= lo).all()
    assert (weights <= hi).all()
    assert math.fsum(weights) == pytest.approx(1, abs=WHOLE)


@given(problems())
def test_has_the_clipped_exponential_form(problem):
    """One mu for all: between the bounds log(w / prior) - s / T is the same; at hi it is smaller, at lo larger."""
    prior, scores, prior_strength, lo, hi = problem
    weights = solve(*problem)
    assume((weights > 1e-200).all())
    level = np.log(weights / prior) - scores / prior_strength
    free = (weights > lo) & (weights < hi)
    slack = 1e-7 * (1 + 5 / prior_strength)
    if free.any():
        assert np.ptp(level[free]) <= slack
        assert (level[(weights >= hi) & (lo < hi)] <= level[free].min() + slack).all()
        assert (level[(weights <= lo) & (lo < hi)] >= level[free].max() - slack).all()


@given(problems(), st.randoms(use_true_random=False))
def test_order_of_domains_does_not_matter(problem, random):
    prior, scores, prior_strength, lo, hi = problem
    order = random.sample(range(len(prior)), len(prior))
    permuted = solve(prior[order], scores[order], prior_strength, lo[order], hi[order])
    np.testing.assert_allclose(permuted, solve(*problem)[order], atol=1e-12)


@given(problems(), st.floats(-100, 100))
def test_a_constant_added_to_the_scores_does_not_matter(problem, constant):
    prior, scores, prior_strength, lo, hi = problem
    assume(prior_strength > 0.01)
    shifted = solve(prior, scores + constant, prior_strength, lo, hi)
    np.testing.assert_allclose(shifted, solve(*problem), atol=1e-9)


@given(problems(prior_strength=math.inf))
def test_infinite_temperature_ignores_the_scores(problem):
    prior, scores, _, lo, hi = problem
    np.testing.assert_allclose(solve(*problem), solve(prior, 0 * scores, 1.0, lo, hi), atol=1e-12)


@given(problems(prior_strength=math.inf))
def test_infinite_temperature_without_bounds_gives_the_prior(problem):
    prior, scores, prior_strength, *_ = problem
    free = solve(prior, scores, prior_strength, np.zeros_like(prior), np.ones_like(prior))
    np.testing.assert_allclose(free, prior, rtol=1e-12)


@given(problems())
def test_a_higher_score_never_lowers_the_weight(problem):
    prior, scores, prior_strength, lo, hi = problem
    raised = scores + np.eye(len(scores))[0]
    assert solve(prior, raised, prior_strength, lo, hi)[0] >= solve(*problem)[0] - 1e-12


def test_unconstrained_is_the_softmax():
    prior, scores = np.array([0.2, 0.3, 0.5]), np.array([1.0, -1.0, 0.5])
    expected = prior * np.exp(scores / 0.7)
    np.testing.assert_allclose(
        solve(prior, scores, 0.7, np.zeros(3), np.ones(3)), expected / expected.sum(), rtol=1e-12
    )


@pytest.mark.parametrize("prior_strength", [1e-6, 1e-3])
def test_cold_goes_to_the_caps_of_the_best(prior_strength):
    prior, hi = np.full(4, 0.25), np.array([0.5, 0.3, 0.9, 1.0])
    weights = solve(prior, np.array([3.0, 2.0, 1.0, 0.0]), prior_strength, np.full(4, 0.05), hi)
    np.testing.assert_allclose(weights, [0.5, 0.3, 0.15, 0.05], atol=1e-12)


def test_bounds_that_leave_one_point():
    point = np.array([0.2, 0.3, 0.5])
    for lo, hi in ((point, np.ones(3)), (np.zeros(3), point), (point, point)):
        np.testing.assert_allclose(solve(np.full(3, 1 / 3), np.array([5.0, 0, -5]), 0.1, lo, hi), point, atol=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_against_a_general_optimiser(seed):
    random = np.random.default_rng(seed)
    size = int(random.integers(2, 7))
    prior = random.dirichlet(np.ones(size))
    scores, prior_strength = random.standard_normal(size), float(random.uniform(0.3, 2))
    lo, hi = prior * random.uniform(0, 0.8, size), np.minimum(1, prior * random.uniform(1.1, 3, size))

    def cost(w):
        return -(w @ scores) + prior_strength * (w * np.log(w / prior)).sum()

    slow = minimize(
        cost,
        prior,
        jac=lambda w: -scores + prior_strength * (np.log(w / prior) + 1),
        bounds=list(zip(np.maximum(lo, 1e-12), hi, strict=True)),
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(size)},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 1000},
    )
    weights = solve(prior, scores, prior_strength, lo, hi)
    assert cost(weights) <= cost(slow.x) + 1e-9
    np.testing.assert_allclose(weights, slow.x, atol=1e-4)


def test_diagnostics():
    assert effective_number(np.array([0.5, 0.5, 0.0])) == pytest.approx(2)
    prior = np.array([0.25, 0.75])
    assert divergence(prior, prior) == 0
    assert divergence(np.array([1.0, 0.0]), prior) == pytest.approx(math.log(4))
