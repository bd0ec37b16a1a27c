"""Reruns against a plain training loop that never sees the sample, and the table that survives interruption."""

import numpy as np
import polars as pl
import pytest

from curate.core.errors import UserError
from curate.evaluation.draw import DrawConfig, Removal, draw
from curate.evaluation.heldout import heldout_targets
from curate.evaluation.reruns import Reruns
from curate.evaluation.truth import TRUTH, collect
from curate.training.replay import Replay, records
from curate.training.target import load_target, target_loss
from tests.tiny import STEPS, Training, record_tiny_run, write_tiny_target

WINDOWS = {"early": (0, 4), "late": (8, STEPS)}
HORIZONS = {"early": [4, STEPS], "late": [STEPS]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_tiny_run(tmp_path_factory.mktemp("reruns"))


@pytest.fixture(scope="module")
def target(run, tmp_path_factory):
    return load_target(write_tiny_target(tmp_path_factory.mktemp("target") / "t.jsonl"), run.spec, 1)


def reruns(run, target):
    return Reruns(Replay(run), [target], 16)


def removal(*samples, **settings):
    window = "early" if samples[0][0] < 4 else "late"
    return Removal(kind="pair", window=window, samples=tuple(samples), **settings)


@pytest.mark.parametrize("samples", [[(0, 2)], [(3, 5)], [(9, 0)], [(0, 1), (2, 4), (3, 0)]])
def test_a_rerun_equals_training_that_gives_the_samples_no_weight(run, target, samples):
    (truth,) = reruns(run, target).run([removal(*samples)], HORIZONS)
    losses = {}
    for dropped in (frozenset(), frozenset(samples)):
        training = Training(run.spec.streams, dropped=dropped)
        training.run(None)
        replay = Replay(run)
        replay.model.load_state_dict(training.model.state_dict())
        losses[bool(dropped)] = target_loss(replay.task, target, 16)
    wanted = losses[True] - losses[False]
    assert truth.values[STEPS][0] == pytest.approx(wanted, rel=1e-3, abs=1e-6)
    assert abs(wanted) > 1e-5


def test_outcomes_do_not_depend_on_what_else_is_rerun(run, target):
    wanted = [removal((2, 1)), removal((0, 0)), removal((9, 3)), removal((2, 1), part=0.5)]
    together = {truth.removal: truth.values for truth in reruns(run, target).run(wanted, HORIZONS)}
    for one in wanted:
        (alone,) = reruns(run, target).run([one], HORIZONS)
        assert set(alone.values) == set(HORIZONS[one.window])
        for step, values in alone.values.items():
            np.testing.assert_array_equal(values, together[one][step])


def test_another_order_of_samples_is_the_same_training_but_for_rounding(run, target):
    (plain,) = reruns(run, target).run([removal((1, 1))], HORIZONS)
    (repeat,) = reruns(run, target).run([removal((1, 1), order=5)], HORIZONS)
    np.testing.assert_allclose(repeat.values[STEPS], plain.values[STEPS], rtol=1e-2, atol=1e-5)
    (whole,) = reruns(run, target).run([removal((1, 1), part=0.0)], HORIZONS)
    np.testing.assert_array_equal(whole.values[STEPS], 0.0)


def test_an_interrupted_collection_continues(run, target, tmp_path):
    removals = draw(run, WINDOWS, DrawConfig(pairs=3, pairs_per_step=3, groups=1, repeats=1, part_pairs=1), seed=0)
    whole = collect(tmp_path / "whole.parquet", reruns(run, target), removals, HORIZONS, ["t"])
    assert whole.schema == TRUTH
    assert set(whole["removal"]) == {one.name for one in removals}
    some = whole.filter(pl.col("removal").is_in([one.name for one in removals[::2]]))
    some.write_parquet(tmp_path / "part.parquet")
    rest = collect(tmp_path / "part.parquet", reruns(run, target), removals, HORIZONS, ["t"])
    key = ["removal", "horizon"]
    assert rest.sort(key).equals(whole.sort(key))


def test_draws_are_uniform_in_the_window_and_follow_the_seed(run):
    config = DrawConfig(pairs=8, pairs_per_step=4, groups=3, group_share=0.25)
    sizes = {record.step: record.size for record in records(run, 0, 4)}
    drawn = draw(run, WINDOWS, config, seed=1)
    assert drawn == draw(run, WINDOWS, config, seed=1) != draw(run, WINDOWS, config, seed=2)
    early = [one for one in drawn if one.window == "early"]
    pairs = [one.samples[0] for one in early if one.kind == "pair"]
    assert len(set(pairs)) == 8
    assert len({step for step, _ in pairs}) == 2
    groups = [one.samples for one in early if one.kind == "group"]
    assert [len(set(group)) for group in groups] == [6, 6, 6]
    assert all(0 <= step < 4 and 0 <= position < sizes[step] for group in groups for step, position in group)
    found = {pair for seed in range(60) for one in draw(run, WINDOWS, config, seed) for pair in one.samples}
    assert {pair for pair in found if pair[0] < 4} == {(step, i) for step in range(4) for i in range(6)}


def test_more_pairs_than_the_window_has_are_refused(run):
    with pytest.raises(UserError, match=r"window early has 4 steps of 6 samples; 20 pairs at 4 per step need 5 steps"):
        draw(run, WINDOWS, DrawConfig(pairs=20, pairs_per_step=4), seed=0)


def test_held_out_targets_hold_no_trained_sample(run):
    targets = heldout_targets(run)
    assert [target.name for target in targets] == ["dataclasses", "json", "general"]
    assert all(target.tokens > 100 and len(target.halves) == 2 for target in targets)
