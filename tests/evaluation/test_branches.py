"""The branch test: branches that differ in one domain only, effects against training by hand, what a result allows."""

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.core.artifacts import list_files, read_hashed, write_hashed
from curate.core.errors import UserError
from curate.evaluation import branches
from curate.evaluation.branch_record import (
    TRUSTED,
    BranchTest,
    check_tested,
    read_branch_test,
    strength_factor,
    verdict_of,
)
from curate.evaluation.branches import (
    BASE,
    Agreement,
    BranchTestConfig,
    _draw,
    _record,
    agreement,
    branch_passes,
    ceiling,
    realised_changes,
)
from curate.stats.rank_correlation import spearman
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.snapshots import load_state
from curate.training.target import load_target, target_loss
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
    return dict(run.unique_samples.select("sample_id", "domain").iter_rows())


def test_branches_share_all_places_but_a_share_which_one_domain_fills(replay):
    config = BranchTestConfig(share=0.25, steps=10)
    drawn = _draw(replay.run, PRIOR, config, 8, 0)
    owner = domain_of(replay.run)
    places = {}
    for name in PRIOR:
        own = np.array([owner[one] == name for one in drawn[name].tolist()])
        other = drawn[name] != drawn[BASE]
        places[name] = other
        assert own[other].all()
        assert other.sum() <= 20
    assert (places["json"] | places["dataclasses"]).sum() == 20
    share = np.mean([owner[one] == "json" for one in drawn[BASE].tolist()])
    assert share == pytest.approx(0.25, abs=0.15)
    again = _draw(replay.run, PRIOR, config, 8, 0)
    assert all((drawn[name] == again[name]).all() for name in drawn)
    assert not (_draw(replay.run, PRIOR, config, 8, 1)[BASE] == drawn[BASE]).all()


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
        base = loss_after(drawn[BASE])
        for name in PRIOR:
            assert changes[name][repeat] == pytest.approx(base - loss_after(drawn[name]), abs=2e-6)
    assert any(abs(one) > 1e-5 for name in PRIOR for one in changes[name])


@pytest.fixture
def trained(monkeypatch):
    """The branches that are trained, in order."""
    keys = []
    train = branches._train

    def watched(*args, **kwargs):
        for key, loss in train(*args, **kwargs):
            keys.append(key)
            yield key, loss

    monkeypatch.setattr(branches, "_train", watched)
    return keys


def kept_file(folder, target):
    (path,) = (folder / "run" / "branch-tests").glob(f"{target.name}-*.json")
    return path


@pytest.fixture
def named(target, request):
    """The target under a name of its own, so that its kept branches are found."""
    return replace(target, name=request.node.name)


def test_finished_branches_are_kept_and_only_others_are_trained(folder, replay, named, trained):
    whole = realised_changes(replay, named, PRIOR, CONFIG, seed=3, batch_size=5)
    assert len(trained) == 2 * 3
    path = kept_file(folder, named)
    kept = path.read_bytes()
    losses = read_hashed(path)
    write_hashed(path, {name: loss for name, loss in losses.items() if name not in (f"1/{BASE}", "1/json")})
    trained.clear()
    assert realised_changes(replay, named, PRIOR, CONFIG, seed=3, batch_size=5) == whole
    assert trained == [f"1/{BASE}", "1/json"]
    trained.clear()
    assert realised_changes(replay, named, PRIOR, CONFIG, seed=3, batch_size=5) == whole
    assert trained == []
    assert read_hashed(path) == losses
    path.write_bytes(kept.replace(b"0/json", b"0/jsom"))
    with pytest.raises(UserError, match=path.name):
        realised_changes(replay, named, PRIOR, CONFIG, seed=3, batch_size=5)


def test_a_branch_that_diverges_is_refused_and_the_finished_ones_stay(folder, replay, named, monkeypatch):
    losses = iter([1.0, math.nan])
    monkeypatch.setattr(branches, "target_loss", lambda *args: next(losses))
    with pytest.raises(UserError, match="dataclasses"):
        realised_changes(replay, named, PRIOR, CONFIG, seed=0, batch_size=5)
    assert read_hashed(kept_file(folder, named)) == {f"0/{BASE}": 1.0}


def test_a_domain_may_have_any_name(folder, replay, named, tmp_path):
    """Also one that branches without more of a domain might be called by."""
    streams = {"json": folder / "data" / "json", "base": folder / "data" / "dataclasses"}
    raw = json.loads((folder / "run" / "run.json").read_text())
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "run" / "curate.sums.json").unlink()
    (tmp_path / "run" / "run.json").write_text(json.dumps({**raw, "streams": {k: str(v) for k, v in streams.items()}}))
    list_files(tmp_path / "run", [path for path in (tmp_path / "run").rglob("*") if path.is_file()])
    renamed = Replay(Run(tmp_path / "run"))
    prior = {"base": 3.0, "json": 1.0}
    found = realised_changes(renamed, named, prior, CONFIG, seed=0, batch_size=5)
    assert any(abs(change) > 1e-5 for change in found["base"])


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


@given(st.floats(-1, 1))
def test_a_weak_agreement_raises_the_prior_strength_and_a_strong_one_does_nothing(r):
    factor = strength_factor(r)
    if r >= TRUSTED:
        assert factor == 1
    else:
        assert 1 / TRUSTED <= factor <= 20 * (1 + 1e-12)
        assert factor >= strength_factor(min(r + 0.1, 1.0))
    assert strength_factor(None) == strength_factor(-1.0)


def test_the_verdict_is_of_the_correlation_and_of_what_noise_leaves_to_reach():
    assert verdict_of(None, None) == "undefined"
    assert [verdict_of(0.7, reach) for reach in (None, 0.1, 0.9)] == ["trusted"] * 3
    assert [verdict_of(0.6, reach) for reach in (None, 0.69, 0.9)] == ["weak", "too_noisy", "weak"]


def test_scores_are_those_of_valued_samples_and_must_differ():
    rows = pl.DataFrame({"domain": ["a", "b", "c"], "samples": [5, 5, 0], "score": [1.0, -1.0, 0.0]})
    assert branches.tested_scores(rows) == {"a": 1.0, "b": -1.0}
    for useless in (rows.with_columns(samples=pl.lit(0)), rows.with_columns(score=pl.lit(0.5)), rows[:1]):
        with pytest.raises(UserError):
            branches.tested_scores(useless)


def test_the_cost_is_that_of_the_steps_and_of_reading_the_target(replay, target):
    sequences, size = sum(map(len, target.halves)), _record(replay.run).size
    assert branch_passes(replay.run, target, CONFIG, 6) == pytest.approx(6 * (3 + sequences / size / 3))


RECORD = BranchTest(
    run="r", target="t", target_name="docs", selection="s", source="late", scores={"a": 1.0, "b": -2.0},
    changes={"a": [0.1, 0.2], "b": [0.0, -0.1], "c": [1.0, 2.0]}, spearman=None, low=None, high=None, ceiling=None,
    verdict="undefined", strength_factor=20.0, steps=3, share=0.5, repeats=2, seed=0, forward_backward_passes=27.5,
)  # fmt: skip


def test_a_record_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "branch_test.json"
    write_hashed(path, RECORD.model_dump(mode="json"))
    assert read_branch_test(path, "r", "t") == RECORD
    assert read_branch_test(path) == RECORD


def test_a_record_that_is_missing_damaged_or_of_something_else_is_refused(tmp_path):
    path = tmp_path / "branch_test.json"
    with pytest.raises(UserError, match=path.name):
        read_branch_test(path, "r", "t")
    write_hashed(path, RECORD.model_dump(mode="json"))
    for wrong in (("other", "t"), ("r", "other")):
        with pytest.raises(UserError, match="other"):
            read_branch_test(path, *wrong)
    whole = path.read_bytes()
    for damaged in (whole[:-40], whole.replace(b"-2.0", b"+2.0"), whole.replace(b"-2.0", b"2.00"), b"", b"[]", b"{}"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=path.name):
            read_branch_test(path, "r", "t")
    write_hashed(path, {"0/json": 1.0})  # what is kept of branches
    with pytest.raises(UserError, match=path.name):
        read_branch_test(path, "r", "t")


def test_a_record_is_of_its_scores_only(tmp_path):
    check_tested(tmp_path, RECORD, "late", {"a": 1.0 + 1e-9, "b": -2.0})
    wrong = [("early", RECORD.scores), ("late", {"a": 1.0, "b": -2.1}), ("late", {"a": 1.0}), ("late", {})]
    for source, scores in [*wrong, ("late", {**RECORD.scores, "c": 0.0})]:
        with pytest.raises(UserError):
            check_tested(tmp_path, RECORD, source, scores)


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
