"""Windows by evidence: known change points are found through noise and spikes, and none where there is none."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.core.artifacts import write_hashed
from curate.core.errors import UserError
from curate.training.windows import find_windows, lr_restarts, run_windows
from tests.tiny import record_tiny_run


def curve(steps, first, second, slopes, noise, seed, spikes=0.03):
    """Three lines that meet at two steps, with noise and upward spikes."""
    rng = np.random.default_rng(seed)
    at = np.arange(steps)
    loss = 5 + slopes[0] * at + (slopes[1] - slopes[0]) * np.maximum(at - first, 0)
    loss = loss + (slopes[2] - slopes[1]) * np.maximum(at - second, 0) + noise * rng.standard_normal(steps)
    return loss + (rng.random(steps) < spikes) * rng.exponential(3.0, steps)


def cosine(steps):
    return 0.5 + 0.5 * np.cos(np.pi * np.arange(steps) / steps)


@given(st.integers(150, 3000), st.floats(0.1, 0.4), st.floats(0.6, 0.9), st.floats(0.005, 0.03), st.integers(0, 10**6))
@settings(max_examples=8)
def test_known_changes_are_found_within_a_twentieth(steps, first, second, noise, seed):
    first, second = round(first * steps), round(second * steps)
    loss = curve(steps, first, second, (-2 / first, -0.2 / (second - first), -1 / (steps - second)), noise, seed)
    norm = curve(steps, first, second, (-1 / first, 0.0, 0.5 / (steps - second)), noise, seed + 1)
    found = find_windows({"loss": loss, "gradient norm": norm}, np.ones(steps), longest=steps)
    assert abs(found["early"].stop - first) <= steps / 20 + 3
    assert abs(found["late"].start - second) <= steps / 20 + 3
    assert found["early"].start == 0
    assert found["late"].stop == steps


@given(st.integers(150, 3000), st.floats(0.01, 0.3), st.floats(-1, 0), st.integers(0, 10**6))
@settings(max_examples=8)
def test_where_nothing_changes_the_ends_are_taken(steps, noise, drop, seed):
    found = find_windows({"loss": curve(steps, 1, 2, [drop / steps] * 3, noise, seed)}, np.ones(steps))
    length = min(steps // 10, 50)
    assert [found["early"].changes, found["late"].changes] == [None, None]
    assert (found["early"].start, found["early"].stop) == (0, length)
    assert (found["late"].start, found["late"].stop) == (steps - length, steps)
    assert "no clear change" in found["early"].line


def test_warm_up_is_skipped_and_a_short_anneal_is_not_overrun():
    steps = 600
    lr = np.minimum(np.minimum(np.arange(1, steps + 1) / 60, 1), (steps - np.arange(steps)) / 30)
    flat = np.random.default_rng(0).normal(3, 0.1, steps)
    found = find_windows({"loss": flat}, lr)
    assert found["early"].start == 29
    assert found["late"].start == 574  # the window may be 50 steps long, lr falls for 26
    assert "lr falls from step" in found["late"].line


def test_warm_restarts_bound_both_windows():
    lr = np.concatenate([cosine(200), cosine(300), cosine(100)])
    assert lr_restarts(lr) == [200, 500]
    loss = np.concatenate([5 - np.arange(200) / 100, 3.4 - np.arange(300) / 1000, 3.3 - np.arange(100) / 300])
    found = find_windows({"loss": loss + np.random.default_rng(1).normal(0, 0.01, 600)}, lr, longest=600)
    assert found["early"].stop <= 200
    assert found["late"].start >= 500
    assert "restart at step 500" in found["late"].line
    assert lr_restarts(np.ones(50)) == lr_restarts(cosine(50)) == []


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 13, 40])
def test_short_stages_have_windows_too(steps):
    found = find_windows({"loss": np.linspace(5, 3, steps)}, cosine(steps))
    for window in found.values():
        assert 0 <= window.start < window.stop <= steps


def test_gaps_in_the_curves_do_not_matter():
    loss = curve(1000, 250, 700, (-0.01, -0.0005, -0.004), 0.02, 3)
    sparse = np.where(np.arange(1000) % 10 == 0, loss, np.nan)
    found = find_windows({"loss": sparse}, np.ones(1000), longest=1000)
    assert abs(found["early"].stop - 250) <= 50


def test_a_run_says_its_windows_and_its_value_curve_counts(tmp_path):
    run = record_tiny_run(tmp_path, steps=40)
    assert run_windows(run) == run_windows(run)
    assert "loss" in run_windows(run)["late"].line or "no clear change" in run_windows(run)["late"].line
    values = np.exp(np.interp(np.arange(40), [0, 10, 30, 40], [0, -4, -4, -1]))
    rows = [{"step": step, "mean_abs": float(value)} for step, value in enumerate(values)]
    curve = tmp_path / "phases.json"
    write_hashed(curve, {"run": run.fingerprint, "curve": rows})
    found = run_windows(run, curve)
    assert (found["early"].changes, found["late"].changes) == (pytest.approx(10, abs=2), pytest.approx(30, abs=2))
    assert "value change" in found["early"].line
    write_hashed(curve, {"run": "another", "curve": rows})
    with pytest.raises(UserError, match=r"phases\.json"):
        run_windows(run, curve)
    assert run_windows(run)["early"] != found["early"]
