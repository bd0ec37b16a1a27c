"""Measures of agreement against scipy and plain loops."""

from itertools import pairwise

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import rankdata, spearmanr

from curate.evaluation.measure import (
    Estimates,
    fidelity_rows,
    keyed,
    noise_cap,
    noise_rows,
    smoothness_rows,
    spearman,
    spearman_interval,
    within_step,
)
from curate.evaluation.truth import TRUTH


@given(seed=st.integers(0, 1000), n=st.integers(3, 40))
def test_spearman_equals_scipy(seed, n):
    random = np.random.default_rng(seed)
    a, b = random.integers(0, 9, n).astype(float), random.normal(size=n)
    if len(set(a)) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(n), b) is None


def test_within_step_ignores_what_differs_between_steps():
    random = np.random.default_rng(0)
    steps = np.repeat(np.arange(5), 6)
    a = random.normal(size=30)
    assert within_step(a, a + 100 * steps, steps) == pytest.approx(1.0)
    assert within_step(a, -a - 100 * steps, steps) == pytest.approx(-1.0)
    ranks = np.concatenate([rankdata(a[steps == s]) - 3.5 for s in range(5)])
    b = random.normal(size=30)
    other = np.concatenate([rankdata(b[steps == s]) - 3.5 for s in range(5)])
    assert within_step(a, b, steps) == pytest.approx(float(np.corrcoef(ranks, other)[0, 1]))
    assert within_step(a[:5], b[:5], np.arange(5)) is None


def test_intervals_hold_the_estimate_and_shrink_with_more_steps():
    random = np.random.default_rng(1)
    widths = []
    for count in (8, 80):
        steps = np.repeat(np.arange(count), 5)
        a = random.normal(size=len(steps))
        b = a + 0.5 * random.normal(size=len(steps))
        low, high = spearman_interval(a, b, steps, seed=0)
        assert low < spearman(a, b) < high
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_a_noise_cap_falls_from_one_with_the_noise():
    values = np.random.default_rng(2).normal(size=200)
    caps = [noise_cap(values, noise, seed=0) for noise in (0.0, 0.1, 1.0, 10.0)]
    assert caps[0] == pytest.approx(1.0)
    assert caps == sorted(caps, reverse=True)
    assert caps[2] == pytest.approx(np.sqrt(0.5), abs=0.05)
    assert caps[3] < 0.2
    assert noise_cap(values, None, seed=0) is None


def test_values_are_keyed_by_step_and_position():
    assert keyed([3, 3, 4, 7, 7], np.arange(5.0)) == {(3, 0): 0.0, (3, 1): 1.0, (4, 0): 2.0, (7, 0): 3.0, (7, 1): 4.0}


def truth_of(values: dict[tuple[int, int], float]) -> pl.DataFrame:
    """Pairs, groups of two (their sum), a repeat that is off by 0.02 and parts that are linear."""
    rows = []

    def add(kind, samples, value, part=1.0):
        for target, sign in (("docs", 1.0), ("general", -0.5)):
            rows.append(
                {"removal": f"{kind}{samples}{part}", "kind": kind, "window": "late", "samples": samples, "part": part,
                 "horizon": 9, "target": target, "value": sign * value}
            )  # fmt: skip

    keys = sorted(values)
    for key in keys:
        add("pair", [list(key)], values[key])
    for one, other in pairwise(keys):
        add("group", [list(one), list(other)], values[one] + values[other])
    add("repeat", [list(keys[0])], values[keys[0]] + 0.02)
    add("part", [list(keys[1])], 0.5 * values[keys[1]], 0.5)
    add("part", [list(keys[2])], 0.6 * values[keys[2]], 0.5)
    return pl.DataFrame(rows, schema=TRUTH)


def test_exact_estimates_get_perfect_rows():
    random = np.random.default_rng(3)
    values = {(step, position): float(random.normal()) for step in range(4) for position in range(4)}
    truth = truth_of(values)
    estimates = Estimates(
        estimator="adjoint", window="late", horizon=9, cost_units_per_step=2.5, bytes_per_sample=8.0,
        values={"docs": values, "general": {key: -0.5 * value for key, value in values.items()}},
    )  # fmt: skip
    docs, general = fidelity_rows(truth, estimates, "stage_end", 0, "general")
    assert (docs["n"], docs["estimator"], docs["horizon"], docs["seed"]) == (16, "adjoint", "stage_end", 0)
    for key in ("spearman", "spearman_within_step", "spearman_of_difference", "group_lds"):
        assert docs[key] == pytest.approx(1.0)
    assert general["spearman_of_difference"] is None
    assert docs["noise_cap"] > 0.99
    names = {("late", 9): "stage_end"}
    assert noise_rows(truth, names)[0]["noise"] == pytest.approx(0.02 / np.sqrt(2))
    smooth = smoothness_rows(truth, names)[0]
    one, two = values[0, 1], values[0, 2]
    wanted = np.sqrt((0.2 * two) ** 2 / 2) / np.sqrt((one**2 + two**2) / 2)
    assert smooth["relative_deviation"] == pytest.approx(wanted)
    assert smooth["n"] == 2
