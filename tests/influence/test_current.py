"""What one more use of a sample would do now, on a tiny run: measured samples, and all others predicted from them."""

import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal, assert_series_equal

from curate.core.errors import UserError
from curate.influence.current import (
    NextStepOptions,
    measure_samples,
    read_together,
    value_next_step,
)
from curate.influence.direction import moved, moves_along, sample_derivatives, token_derivatives
from curate.ngrams.regression import fit, means, ngrams_of
from curate.stats.deviation import combined_values, pooled_deviation
from curate.tables import Scores
from curate.training.replay import Replay
from curate.training.run import ContinuedRun, Run
from curate.training.samples import usable_samples
from curate.training.target import load_target
from tests.influence.predictions import predict_samples
from tests.tiny import write_tiny_target

WEIGHTS = {"target": 1.0, "general": 1.0}
CLOSE = 0.02  # deviations of a sample: float32 differences of a loss


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


@pytest.fixture(scope="module")
def targets(folder, run, tmp_path_factory):
    general = tmp_path_factory.mktemp("general") / "general.jsonl"
    write_tiny_target(general, documents=18)
    return [load_target(path, run.spec, 100) for path in (folder / "target.jsonl", general)]


def usable(run):
    return usable_samples(run.unique_samples)


def next_step(run, targets, per_domain=10**6, **settings):
    options = NextStepOptions(per_domain=per_domain, **settings)
    return value_next_step(run, run.source, usable(run), targets, options)


def measured(run, targets, weights=WEIGHTS, per_domain=6, samples=None, **settings):
    samples = usable(run) if samples is None else samples
    part = next_step(run, targets, per_domain, **settings)
    return measure_samples(run, run.source, samples, part, targets, weights, NextStepOptions())


def per_sample(values):
    """Of one target, or for all together."""
    column = "value_total" if "value_total" in values.columns else "value_total_nats"
    return values.sort("domain", "sample_id")[column].alias("value")


def assert_close(found, wanted):
    assert (found - wanted).abs().max() < CLOSE * wanted.std()


def test_every_target_has_values_of_the_same_samples(run, targets):
    part, every = next_step(run, targets, 6), next_step(run, targets)
    Scores.validate(part.values.select(Scores.column_names()))
    assert set(part.values["source"]) == {"current"}
    assert part.values.group_by("target", "domain").len()["len"].to_list() == [6] * 4
    assert len(every.values) == len(targets) * len(usable(run))
    for target in targets:
        own = part.values.filter(target=target.name)
        whole = every.values.filter(target=target.name).join(own, on="sample_id", how="semi")
        assert_close(per_sample(own), per_sample(whole))
    assert every.passes > part.passes > 0


@pytest.mark.parametrize("weights", [WEIGHTS, {"target": 3.0, "general": 0.5}])
def test_one_direction_gives_what_the_targets_do_together(run, targets, weights):
    part, every = next_step(run, targets, 6), next_step(run, targets)
    total = np.zeros(len(every.values) // 2)
    for target in targets:
        scale = pooled_deviation(part.values.filter(target=target.name))
        values = every.values.filter(target=target.name)
        total += weights[target.name] / sum(weights.values()) * values["value_total_nats"].to_numpy() / scale
    wanted = per_sample(every.values.filter(target=targets[0].name).with_columns(value_total_nats=pl.Series(total)))
    assert_close(per_sample(measured(run, targets, weights).values), wanted)


def test_a_single_target_keeps_its_unit(run, targets):
    wanted = per_sample(next_step(run, targets[:1]).values)
    assert_close(per_sample(measured(run, targets[:1]).values), wanted)


def test_a_target_without_a_say_among_samples_changes_no_direction(run, targets):
    alone = measured(run, targets[:1])
    both = next_step(run, targets, 6)
    found = measure_samples(run, run.source, usable(run), both, targets[:1], {"target": 1.0}, NextStepOptions())
    assert_series_equal(per_sample(found.values), per_sample(alone.values))


def test_what_the_next_step_values_is_not_passed_over_again(run, targets, monkeypatch):
    part = next_step(run, targets, 6)
    some = usable(run).join(part.values, on="sample_id", how="semi", maintain_order="left")
    monkeypatch.setattr("curate.influence.current.sample_derivatives", None)
    found = measured(run, targets, samples=some).values
    assert_series_equal(per_sample(found), per_sample(combined_values(part.values, WEIGHTS)))


def test_values_are_continued_and_kept(run, targets, monkeypatch):
    wanted = measured(run, targets, batch_size=7)
    shutil.rmtree(wanted.folder)
    shutil.rmtree(next_step(run, targets, 6).folder)
    monkeypatch.setattr("curate.influence.extrapolate._BLOCK", 50)
    for name, make in (("tokens", lambda: next_step(run, targets, 6)), ("samples", lambda: measured(run, targets))):
        with monkeypatch.context() as patch:
            patch.setattr("curate.influence.current.write_table", None)  # the blocks are there, the table is not
            with pytest.raises(TypeError):
                make()
        assert list(run.folder.glob(f"influence/*/scratch/{name}-*.npz"))
        with monkeypatch.context() as patch:
            for derivatives in ("token_derivatives", "sample_derivatives"):
                patch.setattr(f"curate.influence.current.{derivatives}", None)
            found = make()
        assert not (found.folder / "scratch").exists()
    assert_close(per_sample(found.values), per_sample(wanted.values))
    monkeypatch.setattr("curate.influence.current.target_directions", None)
    monkeypatch.setattr("curate.influence.current.linear_values", None)
    assert_frame_equal(measured(run, targets).values, found.values)
    assert found.passes > 0


def replay_of(run):
    return Replay(ContinuedRun(run, 0.1), "cpu", 1e-3)


def test_the_value_of_a_sample_is_the_mean_of_its_tokens(run):
    replay = replay_of(run)
    parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
    moves = moves_along(torch.randn(2, len(parameters), generator=torch.manual_seed(0)), parameters)
    for batch in read_together(run, run.source, usable(run).head(20)):
        whole = sample_derivatives(replay, parameters, moves, batch)
        tokens = token_derivatives(replay, parameters, moves, batch)
        counts = np.array([sample.predicted_tokens for sample in batch])
        assert tokens.shape == (counts.sum(), 2)
        np.testing.assert_allclose(means(tokens, counts), whole, rtol=0, atol=0.01 * whole.std())


@pytest.mark.parametrize("least", [-1.0, 1.0])
def test_all_samples_are_predicted_from_the_tokens_of_a_part(run, targets, monkeypatch, least):
    monkeypatch.setattr("curate.influence.predict_next_step.MIN_RANK_CORRELATION", least)
    part, samples = next_step(run, targets, 20, seed=3), usable(run)
    found, judged = predict_samples(run.source, samples, part, WEIGHTS, 5)
    known = combined_values(part.values, WEIGHTS)
    shown = [sample for batch in read_together(run, run.source, known) for sample in batch]
    shares = [weight / 2 / pooled_deviation(part.values.filter(target=target)) for target, weight in WEIGHTS.items()]
    with np.load(part.folder / "tokens.npz") as stored:
        values = stored["values"].astype(float) @ np.array(shares)
    counts = known["predicted_tokens"].to_numpy()
    np.testing.assert_allclose(
        means(values, counts), known["value_total"] / known["predicted_tokens"], rtol=1e-4, atol=1e-7
    )
    made, _ = fit(np.concatenate([ngrams_of(sample) for sample in shown]), values[:, None], counts, 5)
    assert found["sample_id"].to_list() == samples["sample_id"].to_list()
    rest = samples.join(known, on="sample_id", how="anti", maintain_order="left")
    told = found.join(rest, on="sample_id", how="semi", maintain_order="left")
    if least < 0:
        wanted = np.concatenate([made.samples(batch)[:, 0] for batch in read_together(run, run.source, rest)])
        sure = (judged["low"] > 0).to_list()
        here = told["domain"].is_in(judged.filter(sure)["domain"].implode()).to_numpy()
        np.testing.assert_allclose(told["value_per_token"].to_numpy()[here], wanted[here], rtol=1e-9)
        assert here.any()
        assert set(judged["used"]) <= {"predictor", "domain mean"}
    else:
        assert set(judged["used"]) == {"domain mean"}
        assert told.group_by("domain").agg(pl.col("value_per_token").n_unique())["value_per_token"].to_list() == [
            1
        ] * len(judged)
    own = found.join(known, on="sample_id")
    assert (own["value_per_token"] - own["value_total"] / own["predicted_tokens"]).abs().max() < 1e-12


def test_a_loss_that_is_not_finite_is_an_error(run):
    replay = replay_of(run)
    parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
    moves = moves_along(torch.full((1, len(parameters)), torch.nan), parameters)
    batch = next(iter(read_together(run, run.source, usable(run))))
    with pytest.raises(UserError, match=str(batch[0].sample_id)):
        token_derivatives(replay, parameters, moves, batch)


def test_groups_whose_optimizer_keeps_nothing_count_in_a_direction():
    state = SimpleNamespace(
        momentum=torch.tensor([1.0, 0.0, 0.0, 0.0]), second_moment=torch.tensor([1.0, 1.0, 0.0, 0.0])
    )
    groups = [SimpleNamespace(place=slice(0, 3)), SimpleNamespace(place=slice(3, 4))]
    assert moved(state, groups).tolist() == [True, True, False, True]
