"""The general problem: repetition and shared constraints, against brute force and its own certificate."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.mixture.weights import Problem, expected_gain, max_slack, objective, optimum, solve


def draw_problem(seed, size=None, shared=None, prior_strength=None):
    """A feasible problem of 2 to 6 domains with up to two shared constraints; half of them lose value by repetition."""
    random = np.random.default_rng(seed)
    size = size or int(random.integers(2, 7))
    shared = int(random.integers(0, 3)) if shared is None else shared
    prior = random.dirichlet(np.ones(size))
    lo = prior * random.uniform(0, 0.8, size)
    hi = np.minimum(1, prior * random.uniform(1.1, 6, size)) if random.random() < 0.7 else np.ones(size)
    rows = random.standard_normal((shared, size))
    inside = solve(prior, random.standard_normal(size), 1.0, lo, hi)
    return Problem(
        prior=prior,
        scores=random.standard_normal(size) * random.choice([0.1, 1, 3]),
        prior_strength=prior_strength or float(random.choice([0.3, 1, 5])),
        lo=lo,
        hi=hi,
        used=random.uniform(0, 3, size),
        epochs=random.uniform(0.1, 20, size),
        decay_epochs=float(random.choice([math.inf, 15.4, 2.0])),
        rows=rows if shared else None,
        least=rows @ inside - random.choice([0.003, 0.1]) if shared else None,
    )


SEEDS = st.integers(0, 2**32 - 1)


@settings(max_examples=30)
@given(SEEDS)
def test_every_constraint_holds_and_the_gap_is_closed(seed):
    problem = draw_problem(seed)
    solution = optimum(problem)
    weights = solution.weights
    assert (weights >= problem.lo).all()
    assert (weights <= problem.hi).all()
    assert math.fsum(weights) == pytest.approx(1, abs=1e-9)
    if problem.rows is not None:
        slack = problem.rows @ weights - problem.least
        assert (slack >= -1e-8).all()
        assert (solution.prices >= 0).all()
        assert solution.prices @ np.maximum(slack, 0) <= 1e-6
    assert solution.gap <= 1e-6


@settings(max_examples=8)
@given(SEEDS)
def test_no_feasible_mixture_is_better(seed):
    """Brute force: random mixtures within all constraints, and small moves away from the solution."""
    problem = draw_problem(seed, shared=1)
    solution = optimum(problem)
    random = np.random.default_rng(seed)
    rows, least = problem.rows, problem.least
    inside = max_slack(rows, least, problem.lo, problem.hi)[0]
    for _ in range(60):
        other = solve(problem.prior, 3 * random.standard_normal(len(inside)), 1.0, problem.lo, problem.hi)
        for share in (1.0, 0.3, 0.01):
            tried = solution.weights + share * (other - solution.weights)
            if (rows @ tried >= least).all():
                assert objective(problem, tried) <= objective(problem, solution.weights) + 1e-7


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shared", [0, 1, 2])
def test_the_best_point_of_a_grid_is_no_better_and_near(seed, shared):
    problem = draw_problem(seed, size=3, shared=shared, prior_strength=0.3)
    fine = 120
    points = np.array([(i, j, fine - i - j) for i, j in product(range(fine + 1), repeat=2) if i + j <= fine]) / fine
    allowed = ((points >= problem.lo) & (points <= problem.hi)).all(axis=1)
    if shared:
        allowed &= (points @ problem.rows.T >= problem.least).all(axis=1)
    solution = optimum(problem)
    best = max((objective(problem, point) for point in points[allowed]), default=-math.inf)
    reached = objective(problem, solution.weights)
    assert reached >= best - 1e-7
    if allowed.any():
        assert reached <= best + 0.3  # a grid of 1/120 comes near


@settings(max_examples=20)
@given(SEEDS, st.randoms(use_true_random=False))
def test_order_of_domains_does_not_matter(seed, random):
    problem = draw_problem(seed)
    order = random.sample(range(len(problem.prior)), len(problem.prior))
    moved = {name: getattr(problem, name)[order] for name in ("prior", "scores", "lo", "hi", "used", "epochs")}
    rows = None if problem.rows is None else problem.rows[:, order]
    permuted = optimum(replace(problem, **moved, rows=rows)).weights
    np.testing.assert_allclose(permuted, optimum(problem).weights[order], atol=1e-5)


@given(SEEDS)
@settings(max_examples=20)
def test_scores_and_temperature_share_their_unit(seed):
    problem = replace(draw_problem(seed, shared=0), decay_epochs=math.inf)
    scaled = replace(problem, scores=7 * problem.scores, prior_strength=7 * problem.prior_strength)
    np.testing.assert_allclose(optimum(scaled).weights, optimum(problem).weights, atol=1e-9)


def test_without_repetition_or_shared_constraints_it_is_the_bisection():
    problem = replace(draw_problem(3, shared=0), decay_epochs=math.inf)
    plain = solve(problem.prior, problem.scores, problem.prior_strength, problem.lo, problem.hi)
    assert (optimum(problem).weights == plain).all()


@given(SEEDS)
@settings(max_examples=20)
def test_repetition_never_raises_the_only_repeated_domain(seed):
    problem = draw_problem(seed, shared=0)
    scores = np.append(1.0, np.zeros(len(problem.prior) - 1))
    worn = replace(problem, scores=scores, decay_epochs=3.0)
    new = replace(problem, scores=scores, decay_epochs=math.inf)
    assert optimum(worn).weights[0] <= optimum(new).weights[0] + 1e-9


def test_the_gain_is_the_integral_of_the_discount():
    """Against a sum over small steps: one epoch at full worth, then exp(-(e - 1) / R); harm is not discounted."""
    problem = replace(
        draw_problem(0, size=3, shared=0),
        scores=np.array([2.0, 1.0, -1.0]),
        used=np.array([0.0, 2.0, 5.0]),
        epochs=np.array([8.0, 4.0, 10.0]),
        decay_epochs=4.0,
        hi=np.ones(3),
    )
    weights = np.array([0.5, 0.3, 0.2])
    total = 0.0
    for domain in range(3):
        steps = (np.arange(200_000) + 0.5) * weights[domain] / 200_000
        epochs = problem.used[domain] + problem.epochs[domain] * steps
        worth = np.exp(-np.maximum(epochs - 1, 0) / 4.0) if problem.scores[domain] > 0 else np.ones_like(steps)
        total += problem.scores[domain] * worth.mean() * weights[domain]
    assert expected_gain(problem, weights) == pytest.approx(total, rel=1e-6)


def test_the_price_is_the_gain_of_loosening():
    problem = draw_problem(5, size=4, shared=1)
    free = optimum(replace(problem, rows=None, least=None)).weights
    least = problem.rows @ free + 0.02  # just out of reach of the unconstrained weights
    tight = replace(problem, least=least)
    looser = replace(problem, least=least - 1e-5)
    gained = objective(looser, optimum(looser).weights) - objective(tight, optimum(tight).weights)
    assert gained / 1e-5 == pytest.approx(optimum(tight).prices[0], rel=1e-2)


def test_infinite_temperature_keeps_to_the_prior_as_far_as_the_constraints_allow():
    prior, row = np.array([0.6, 0.3, 0.1]), np.array([0.0, 1.0, 2.0])
    problem = Problem(
        prior=prior,
        scores=np.array([5.0, 0, 0]),
        prior_strength=math.inf,
        lo=np.zeros(3),
        hi=np.ones(3),
        rows=row[None],
        least=np.array([0.9]),
    )
    weights = optimum(problem).weights
    assert row @ weights == pytest.approx(0.9, abs=1e-8)
    tilts = np.log(weights / prior)  # the projection tilts the prior along the constraint
    assert tilts[2] - tilts[0] == pytest.approx(2 * (tilts[1] - tilts[0]), abs=1e-6)
