"""The branch test: branches that differ in one domain only, effects against training by hand, what a result allows."""

import logging

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.artifacts import read_hashed, write_hashed
from curate.errors import UserError
from curate.fidelity.branches import (
    TRUSTED,
    Agreement,
    BranchTestConfig,
    _draw,
    _record,
    agreement,
    ceiling,
    check_scores,
    cost_units,
    realised_changes,
    tempered,
)
from curate.fidelity.measure import spearman
from curate.target import load_target, target_loss
from curate.trajectory.replay import Replay
from curate.trajectory.run import Run
from curate.trajectory.snapshots import load_state
from tests.tiny import build_optimizers, factory

PRIOR = {"dataclasses": 3.0, "json": 1.0}
CONFIG = BranchTestConfig(share=0.5, steps=3, repeats=2)


@pytest.fixture
def replay(folder):
    return Replay(Run(folder / "run"))


@pytest.fixture
def target(folder, replay):
    return load_target(folder / "target.jsonl", replay.run.spec, 100)


def domain_of(run):
    return dict(run.places.select("sample_id", "domain").iter_rows())


def test_branches_share_all_places_but_a_share_which_one_domain_fills(replay):
    config = BranchTestConfig(share=0.25, steps=10)
    drawn = _draw(replay.run, PRIOR, config, 8, 0)
    owner = domain_of(replay.run)
    places = {}
    for name in PRIOR:
        own = np.array([owner[one] == name for one in drawn[name].tolist()])
        other = drawn[name] != drawn["base"]
        places[name] = other
        assert own[other].all()
        assert other.sum() <= 20
    assert (places["json"] | places["dataclasses"]).sum() == 20
    share = np.mean([owner[one] == "json" for one in drawn["base"].tolist()])
    assert share == pytest.approx(0.25, abs=0.15)
    again = _draw(replay.run, PRIOR, config, 8, 0)
    assert all((drawn[name] == again[name]).all() for name in drawn)
    assert not (_draw(replay.run, PRIOR, config, 8, 1)["base"] == drawn["base"]).all()


def test_a_change_is_what_training_by_hand_gives(replay, target):
    changes = realised_changes(replay, target, PRIOR, CONFIG, seed=0, batch_size=5)
    run, record = replay.run, _record(replay.run)
    by_id = {sample.sample_id: sample for name in run.streams for sample in run.streams[name]}

    def loss_after(ids):
        model = factory()
        (optimizer,) = build_optimizers(model, "AdamW")
        load_state(run.snapshot(run.spec.steps), model, [optimizer])
        for group, own in zip(optimizer.param_groups, record.groups, strict=True):
            group.update(own.as_group())
        for batch in ids.reshape(CONFIG.steps, record.size).tolist():
            model.zero_grad()
            samples = [by_id[one] for one in batch]
            tokens = torch.tensor(np.stack([sample.tokens for sample in samples]), dtype=torch.long)
            mask = torch.tensor(np.stack([sample.loss_mask for sample in samples]))[:, 1:]
            nll = torch.nn.functional.cross_entropy(
                model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
            )
            ((nll * mask).sum() / mask.sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.spec.clip_norm)
            optimizer.step()
        replay.model.load_state_dict(model.state_dict())
        return target_loss(replay.task, target, 5)

    for repeat in range(CONFIG.repeats):
        drawn = _draw(run, PRIOR, CONFIG, record.size, repeat)
        base = loss_after(drawn["base"])
        for name in PRIOR:
            assert changes[name][repeat] == pytest.approx(base - loss_after(drawn[name]), abs=2e-6)
    assert any(abs(one) > 1e-5 for name in PRIOR for one in changes[name])


def test_finished_branches_are_kept(folder, replay, target, monkeypatch):
    whole = realised_changes(replay, target, PRIOR, CONFIG, seed=3, batch_size=5)
    (path,) = [path for path in (folder / "run" / "branch-tests").iterdir() if path.stat().st_mtime_ns == max(
        other.stat().st_mtime_ns for other in (folder / "run" / "branch-tests").iterdir())]  # fmt: skip
    losses = read_hashed(path)
    kept = {name: loss for name, loss in losses.items() if name not in ("1/base", "1/json")}
    write_hashed(path, kept)
    assert realised_changes(replay, target, PRIOR, CONFIG, seed=3, batch_size=5) == whole
    monkeypatch.setattr(Replay, "backward", None)
    assert realised_changes(replay, target, PRIOR, CONFIG, seed=3, batch_size=5) == whole


def test_agreement_is_over_domains_with_a_score():
    changes = {"a": [0.1, 0.3], "b": [0.0, 0.1], "c": [-0.2, 0.1], "d": [9.0, 9.0]}
    found = agreement({"a": 3.0, "b": 2.0, "c": 1.0}, changes, 0)
    assert found.spearman == pytest.approx(1)
    assert agreement({"a": 1.0, "b": 2.0, "c": 3.0}, changes, 0).spearman == pytest.approx(-1)
    assert agreement({"a": 1.0, "b": 2.0}, changes, 0) == Agreement(spearman=None, low=None, high=None, ceiling=None)
    many = {str(i): float(i) for i in range(8)}
    noisy = {name: [value + (4 if name == "2" else 0)] for name, value in many.items()}
    found = agreement(many, noisy, 0)
    assert found.low < found.spearman < found.high <= 1


@given(st.floats(-1, 1), st.floats(0.1, 10))
def test_a_weak_agreement_raises_the_temperature_and_a_strong_one_does_nothing(r, temperature):
    found = tempered(temperature, Agreement(spearman=r, low=None, high=None, ceiling=None))
    if r >= TRUSTED:
        assert found == temperature
    else:
        assert temperature / TRUSTED <= found <= 20 * temperature * (1 + 1e-12)
        assert found >= tempered(temperature, Agreement(spearman=min(r + 0.1, 1.0), low=None, high=None, ceiling=None))


def test_the_cost_and_the_verdict_are_said_and_equal_scores_are_refused(replay, target, caplog):
    rows = pl.DataFrame({"domain": ["dataclasses", "json"], "samples": [5, 5], "score": [1.0, -1.0]})
    settings = {"temperature": 1.0, "seed": 0, "batch_size": 5}
    with caplog.at_level(logging.INFO):
        found = check_scores(replay, target, PRIOR, CONFIG, domains=rows, **settings)
    assert found["spearman"] is None
    assert found["temperature"] == 20.0
    units = cost_units(replay.run, target, CONFIG)
    assert units > 2 * 3 * 3
    assert f"the branch test will cost about {units:.0f} forward+backward passes" in caplog.text
    assert "mixture.temperature 20 instead of 1" in caplog.text
    with pytest.raises(UserError, match="every domain has the same score"):
        check_scores(replay, target, PRIOR, CONFIG, domains=rows.with_columns(score=pl.lit(0.0)), **settings)


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_the_ceiling_is_what_the_true_effects_reach(noise):
    random = np.random.default_rng(0)
    effects = random.standard_normal(2000)
    changes = effects[:, None] + noise * random.standard_normal((2000, 4))
    assert ceiling(changes.tolist()) == pytest.approx(spearman(effects, changes.mean(axis=1)), abs=0.02)


def test_the_ceiling_of_draws_that_agree_wholly_not_at_all_or_are_alone():
    assert ceiling([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]]) == pytest.approx(1.0)
    assert ceiling([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]) == 0.0
    assert ceiling([[1.0], [2.0], [3.0]]) is None
    assert ceiling([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]]) is None
    assert ceiling([[1.0, 1.0], [2.0, 3.0]]) is None
