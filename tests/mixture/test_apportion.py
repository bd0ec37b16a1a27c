from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.mixture.apportion import allocate, apportion
from curate.mixture.constraints import Supply

NAMES = st.sampled_from("abcdefgh")
WEIGHTS = st.dictionaries(NAMES, st.floats(0, 1), min_size=1).filter(lambda weights: sum(weights.values()) > 1e-6)
TOTALS = st.integers(0, 10**12)


@given(WEIGHTS, TOTALS)
def test_without_limits_within_one_of_the_quota(weights, total):
    result = apportion(weights, total, dict.fromkeys(weights, total + 1))
    whole = sum(map(Fraction, weights.values()))
    assert sum(result.values()) == total
    assert all(abs(result[name] - Fraction(weight) * total / whole) < 1 for name, weight in weights.items())


@given(WEIGHTS, TOTALS, st.data())
def test_limits_hold_and_the_sum_is_exact(weights, total, data):
    limits = {name: data.draw(st.integers(0, 2 * total // len(weights) + 1)) for name in weights}
    assume(sum(limits[name] for name, weight in weights.items() if weight > 0) >= total)
    result = apportion(weights, total, limits)
    assert sum(result.values()) == total
    assert all(0 <= result[name] <= limits[name] for name in weights)


@given(WEIGHTS, st.integers(0, 1000), st.randoms(use_true_random=False))
def test_order_does_not_matter(weights, total, random):
    names = random.sample(list(weights), len(weights))
    limits = dict.fromkeys(weights, total)
    assume(sum(weight > 0 for weight in weights.values()) > 0)
    assert apportion({name: weights[name] for name in names}, total, limits) == apportion(weights, total, limits)


def test_ties_go_by_name_and_caps_pass_the_rest_on():
    assert apportion({"b": 1, "a": 1, "c": 1}, 4, dict.fromkeys("abc", 9)) == {"a": 2, "b": 1, "c": 1}
    assert apportion({"a": 8, "b": 1, "c": 1}, 100, {"a": 10, "b": 99, "c": 99}) == {"a": 10, "b": 45, "c": 45}
    assert apportion({"a": 8, "b": 1, "c": 0}, 20, {"a": 10, "b": 10, "c": 99}) == {"a": 10, "b": 10, "c": 0}


def test_more_than_the_limits():
    with pytest.raises(UserError, match="21 samples are wanted, the limits allow 20"):
        apportion({"a": 8, "b": 1, "c": 0}, 21, {"a": 10, "b": 10, "c": 99})


def test_allocate_counts_tokens_not_samples():
    supply = {"long": Supply(samples=100, tokens=10_000), "short": Supply(samples=100, tokens=1_000)}
    assert allocate({"long": 0.5, "short": 0.5}, 2_000, supply, {"long": 1, "short": 1}) == {"long": 10, "short": 100}


@given(st.integers(8, 10**9))
def test_allocate_never_exceeds_the_budget(budget):
    supply = {name: Supply(samples=10**9, tokens=8 * 10**9) for name in "abc"}
    samples = allocate({"a": 1 / 3, "b": 1 / 3, "c": 1 - 2 / 3}, budget, supply, dict.fromkeys("abc", 1))
    assert sum(samples.values()) == budget // 8


def test_allocate_keeps_below_the_ceilings():
    supply = {"a": Supply(samples=10, tokens=80), "b": Supply(samples=10, tokens=80)}
    samples = allocate({"a": 0.5, "b": 0.5}, 1000, supply, {"a": 0.075, "b": 0.16})
    assert samples == {"a": 9, "b": 20}


def test_less_than_one_sample():
    with pytest.raises(UserError, match="less than one sample"):
        allocate({"a": 1.0}, 7, {"a": Supply(samples=1, tokens=8)}, {"a": 1})
