"""Slopes of samples of a run's streams on a tiny run, and the selection that is made by them."""

import math
import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal, assert_series_equal

from curate.choice import candidates
from curate.stats.deviation import combined_values, pooled_deviation
from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.core.errors import UserError
from curate.data.mds import COLUMNS, content_id, write_stream
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.pools.ngram_slopes import fit, means, ngrams_of
from curate.pools.open import open_pool
from curate.pools.probe import forward_slopes, moved, moves_along, token_slopes
from curate.pools.slopes import NEXT, predict_all, read_together, replay_ahead, slope_units, value_all, value_next
from curate.pools.values import ProbeConfig, value_pool
from curate.domains.domain import domain_scores
from curate.domains.likeness import find_likeness, sample_likeness
from curate.select import select
from curate.selection import SelectConfig
from curate.shards.choose import ScreenConfig, ShardsConfig
from curate.shards.grain import GrainConfig
from curate.training.target import load_target
from curate.core.tracking import TrackingConfig
from curate.training.token_accounting import consumed, stages, uses
from curate.training.run import Run
from curate.training.samples import fresh_shares, trained_tokens, usable_samples
from tests.tiny import SEQ_LEN, Training, write_tiny_streams, write_tiny_target

WEIGHTS = {"target": 1.0, "general": 1.0}
PROBE = ProbeConfig(share=1.0, steps=4, min_rank_correlation=-1.0, rest="none")


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


@pytest.fixture(scope="module")
def targets(folder, run, tmp_path_factory):
    general = tmp_path_factory.mktemp("general") / "general.jsonl"
    write_tiny_target(general, documents=18)
    return [load_target(path, run.spec, 100) for path in (folder / "target.jsonl", general)]


def ahead(run, targets, least=10**6, steps=4, **settings):
    probe = PROBE.model_copy(update={"share": 1e-3, "min_per_domain": least, "steps": steps})
    return value_next(
        run, usable_samples(run.places), targets, probe, adjoint=AdjointConfig(own_step="linear"), **settings
    )  # fmt: skip


def slopes(run, targets, weights=WEIGHTS, least=6, samples=None, **settings):
    samples = usable_samples(run.places) if samples is None else samples
    return value_all(run, run, samples, ahead(run, targets, least, **settings), targets, weights, PROBE)


def per_sample(values):
    return values.select("domain", "sample_id", "value").sort("domain", "sample_id")["value"]


def test_the_next_step_has_the_linear_values_of_probes(run, targets):
    found = ahead(run, targets)
    pool = open_pool(run.folder.parent / "data", run, consumed(uses(stages(run))), "keep")
    probed = value_pool(run, pool, targets, PROBE, adjoint=AdjointConfig(own_step="linear")).every
    assert set(probed["source"]) == {"probe"}
    assert set(found.values["window"]) == {NEXT}
    assert len(found.values) == len(targets) * len(run.places.unique("sample_id"))
    for target in targets:
        wanted = probed.filter(target=target.name).select("domain", "sample_id", wanted="value")
        both = found.values.filter(target=target.name).join(wanted, on=["domain", "sample_id"])
        centred = both.select(
            one - one.mean().over("domain") for one in (pl.col("value") / pl.col("tokens"), pl.col("wanted"))
        )
        assert len(both) == len(wanted)
        assert (centred["value"] - centred["wanted"]).abs().max() < 0.02 * centred["wanted"].std()


def test_one_step_ahead_needs_no_second_derivative(run, targets, monkeypatch):
    wanted = ahead(run, targets[:1], least=10, steps=1)
    shutil.rmtree(wanted.folder)
    monkeypatch.setattr("curate.pools.probe.check_curvature", None)
    monkeypatch.setattr("curate.pools.probe.adjoint_step", None)
    with pytest.raises(TypeError):
        ahead(run, targets[:1], least=10, steps=2)
    assert_frame_equal(ahead(run, targets[:1], least=10, steps=1).values, wanted.values)


@pytest.mark.parametrize("weights", [WEIGHTS, {"target": 3.0, "general": 0.5}])
def test_one_direction_gives_what_the_targets_do_together(run, targets, weights):
    part, every = ahead(run, targets, 6), ahead(run, targets)
    total = np.zeros(len(every.values) // 2)
    for target in targets:
        scale = pooled_deviation(part.values.filter(target=target.name))
        values = every.values.filter(target=target.name)
        total += weights[target.name] / sum(weights.values()) * values["value"].to_numpy() / scale
    wanted = per_sample(every.values.filter(target=targets[0].name).with_columns(value=pl.Series(total)))
    found = per_sample(slopes(run, targets, weights).values)
    assert (found - wanted).abs().max() < 0.02 * wanted.std()


def test_a_single_target_keeps_its_unit(run, targets):
    wanted = per_sample(ahead(run, targets[:1]).values)
    assert (per_sample(slopes(run, targets[:1]).values) - wanted).abs().max() < 0.02 * wanted.std()


def test_what_the_next_step_values_is_not_passed_over_again(run, targets, monkeypatch):
    part = ahead(run, targets, 6)
    some = usable_samples(run.places).join(part.values, on="sample_id", how="semi", maintain_order="left")
    monkeypatch.setattr("curate.pools.slopes.forward_slopes", None)
    found = slopes(run, targets, samples=some).values
    assert_series_equal(per_sample(found), per_sample(combined_values(part.values, WEIGHTS)))


def test_they_are_continued_and_kept(run, targets, monkeypatch):
    wanted = slopes(run, targets, batch_size=7)
    shutil.rmtree(wanted.folder)
    shutil.rmtree(ahead(run, targets, 6).folder)
    monkeypatch.setattr("curate.pools.spread._BLOCK", 50)
    for number, find in enumerate((lambda: ahead(run, targets, 6), lambda: slopes(run, targets))):
        with monkeypatch.context() as patch:
            patch.setattr("curate.pools.slopes.replacing", None)  # the blocks are there, the table is not
            with pytest.raises(TypeError):
                find()
        blocks = list(run.folder.glob(f"pools/*/scratch/{('part', 'slopes')[number]}-*.npz"))
        assert len(blocks) > number
        with monkeypatch.context() as patch:
            patch.setattr("curate.pools.slopes.forward_slopes", None)
            found = find()
        assert not (found.folder / "scratch").exists()
    assert (per_sample(found.values) - per_sample(wanted.values)).abs().max() < 0.02 * wanted.values["value"].std()
    monkeypatch.setattr("curate.pools.slopes.look_ahead", None)
    monkeypatch.setattr("curate.pools.slopes.linear_values", None)
    assert_frame_equal(slopes(run, targets).values, found.values)
    assert found.cost_units > 0


def selected(folder, out, shards=None, **settings):
    usual = {"drop_fraction": 0.5, "sample_temperature": 0, "likeness_share": 0, "duplicate_overlap": 1}
    usual |= {"slopes_per_sample": 1e6, "slopes_passes": 1e6}
    shards = ShardsConfig(**{**usual, **(shards or {})}, screen=ScreenConfig(mode="none"))
    probe = PROBE.model_copy(update={"share": 1e-3, "min_per_domain": 6})
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", min_target_tokens=100, budget_tokens=20 * SEQ_LEN,
        tracking=TrackingConfig(mode="none"), shards=shards, probe=probe, out=out,
        **{"mode": "filter", "window": "late", **settings},
    )  # fmt: skip
    return select(config, Run(config.run, config.streams))


@pytest.mark.parametrize("window", ["late", "none"])
def test_a_stage_takes_the_samples_of_the_largest_slopes(folder, run, targets, tmp_path, window):
    path = tmp_path / "general.jsonl"
    write_tiny_target(path, documents=18)
    out = selected(folder, tmp_path / "out", guard=path, window=window)
    values = slopes(run, targets).values
    per_token = values.with_columns(x=pl.col("value") / pl.col("tokens"))
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    mixture = read_mixture(out / "mixture.yaml")
    assert mixture.window == (NEXT if window == "none" else "late")
    for domain, part in mixture.domains.items():
        own = per_token.filter(domain=domain).sort("x", descending=True)
        best = own.head(part.samples)["sample_id"]
        assert part.samples > 0
        assert not set(best) & set(dropped.filter(domain=domain)["sample_id"])
    judged = pl.read_parquet(out / "predicted.parquet")
    assert set(judged["window"]) == {NEXT}
    assert judged["probed"].to_list() == [6] * len(mixture.domains)
    assert judged["slopes"].to_list() == judged["samples"].to_list()
    scores = pl.read_parquet(out / "scores.parquet")
    assert set(scores["window"]) == {NEXT} | ({"late"} if window == "late" else set())
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What samples are chosen by" in page
    assert f"It was then measured of {judged['slopes'].sum():,} of the most promising" in page
    assert ("Value over training" in page) == (window == "late")
    phases = set(pl.read_parquet(out / "costs.parquet")["phase"])
    assert phases == {"training", "next step", "slopes", "select"} | ({"embed late"} if window == "late" else set())


def test_a_window_that_is_valued_for_the_report_changes_no_byte_of_the_data(folder, tmp_path):
    given = {"shards": {"likeness_share": 0.5}, "mixture": MixtureConfig(window=NEXT)}
    first, second = (selected(folder, tmp_path / window, window=window, **given) for window in ("late", "none"))
    names = sorted(path.relative_to(first / "data") for path in (first / "data").rglob("*") if path.is_file())
    assert names
    for name in names:
        assert (first / "data" / name).read_bytes() == (second / "data" / name).read_bytes(), name


def test_streams_are_weighted_by_the_next_step_where_no_window_is_valued(folder, run, targets, tmp_path):
    out = selected(folder, tmp_path / "out", mode="reweight", window="none")
    assert read_mixture(out / "mixture.yaml").window == NEXT
    assert not (out / "predicted.parquet").exists()
    part = ahead(run, targets[:1], 6).values
    wanted = domain_scores(part, trained_tokens(run), seed=0, fresh=fresh_shares(run))
    found = pl.read_parquet(out / "domains.parquet")
    assert found["value_score"].to_list() == pytest.approx(wanted["score"].to_list())


@pytest.mark.parametrize("settings", [{"estimator": "dvemb"}, {"method": "less"}])
def test_only_curate_with_adjoint_looks_ahead(folder, tmp_path, settings):
    with pytest.raises(UserError, match="values windows only: set window to early, late or both"):
        selected(folder, tmp_path / "out", window="none", **settings)


def test_baselines_and_streams_that_are_only_weighted_have_none(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.choice.predict_all", None)
    monkeypatch.setattr("curate.choice.value_next", None)
    for name, settings in (("less", {"method": "less"}), ("dvemb", {"estimator": "dvemb"})):
        judged = pl.read_parquet(selected(folder, tmp_path / name, **settings) / "predicted.parquet")
        assert set(judged["window"]) == {"late"}
    weighted = selected(folder, tmp_path / "weighted", mode="reweight")
    assert not (weighted / "predicted.parquet").exists()


def test_only_the_most_promising_samples_have_slopes_of_their_own():
    samples = pl.DataFrame({"domain": ["a"] * 5 + ["b", "c"], "sample_id": range(7)})
    texts = samples.with_columns(likeness=pl.Series([0.0, 1.0, 0.0, -2.0, 1.0, 0.0, 0.0]))
    values = samples.with_columns(tokens=2, value=pl.Series([1.0, 0.0, 3.0, 0.5, 1.0, 0.0, 0.0]))
    wanted = {"a": 1, "b": 1}

    def chosen(texts, per, share=0.5):
        return candidates(samples, values, texts, share, wanted, per)["sample_id"].to_list()

    assert chosen(texts, 2.5) == [2, 4, 5]
    assert chosen(texts, 9) == [0, 1, 2, 3, 4, 5]
    assert chosen(texts, 2.5, 0.9) == [1, 4, 5]
    assert chosen(None, 2.5) == [0, 2, 5]
    assert chosen(texts, 0.5) == []


def test_slopes_are_of_some_for_each_sample_that_the_stage_takes(folder, run, targets, tmp_path, monkeypatch):
    asked = []

    def spy(run, stock, samples, ahead, *args, **settings):
        asked.append((samples, ahead))
        return value_all(run, stock, samples, ahead, *args, **settings)

    monkeypatch.setattr("curate.choice.value_all", spy)
    shards = {"likeness_share": 0.5, "consume_once": True, "drop_fraction": 0, "slopes_per_sample": 1.5}
    out = selected(folder, tmp_path / "out", shards, window="none")
    like = find_likeness(run, targets[:1], dict.fromkeys(run.streams, 1.0), 0)
    samples = usable_samples(run.places)
    texts = sample_likeness(run, samples, like, {"target": 1.0})
    used = consumed(uses(stages(run)))
    left = samples.join(used, on="sample_id", how="anti", maintain_order="left")
    taken, (found, part) = read_mixture(out / "mixture.yaml").domains, asked[0]
    assert not set(part.values["sample_id"]) & set(used["sample_id"])
    predicted, _ = predict_all(run, left, part, {"target": 1.0}, -1.0, 0)
    values = left.join(predicted, on=["domain", "sample_id"]).with_columns(pl.col("value") * pl.col("tokens"))
    counts = {domain: part.samples for domain, part in taken.items()}
    assert_frame_equal(found, candidates(left, values, texts, 0.5, counts, 1.5))
    assert found.group_by("domain").len().sort("domain").rows() == [
        (domain, min(math.floor(1.5 * count), len(left.filter(domain=domain)))) for domain, count in counts.items()
    ]
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert dropped.filter(reason="consumed").height == len(used)
    assert dropped.filter(pl.col("reason") != "consumed")["value"].null_count() == 0


def test_slopes_of_their_own_cost_no_more_passes_than_they_may(folder, run, tmp_path, monkeypatch):
    asked = []

    def spy(run, stock, samples, *args, **settings):
        asked.append(samples)
        return value_all(run, stock, samples, *args, **settings)

    monkeypatch.setattr("curate.choice.value_all", spy)
    whole = slope_units(run, 1, 20)  # of all samples of the stage
    for passes, least, most in ((0.5 * whole, 8, 10), (10 * whole, 28, 30)):
        shards = {"likeness_share": 0.5, "slopes_per_sample": 1.5, "slopes_passes": passes}
        selected(folder, tmp_path / str(passes), shards, window="none")
        assert least <= len(asked.pop()) <= most


def test_the_slope_of_a_sample_is_the_mean_of_its_tokens(run, targets):
    replay = replay_ahead(run, targets, 1, 0.1, "cpu", 1e-3)
    parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
    moves = moves_along(torch.randn(2, len(parameters), generator=torch.manual_seed(0)), parameters)
    samples = usable_samples(run.places).head(20)
    for batch in read_together(run, run, samples):
        whole = forward_slopes(replay, parameters, moves, batch)
        tokens = token_slopes(replay, parameters, moves, batch)
        counts = np.array([sample.predicted_tokens for sample in batch])
        assert tokens.shape == (counts.sum(), 2)
        np.testing.assert_allclose(means(tokens, counts), whole, rtol=0, atol=0.01 * whole.std())


@pytest.mark.parametrize("least", [-1.0, 1.0])
def test_all_samples_are_predicted_from_the_tokens_of_a_part(run, targets, least):
    part, samples = ahead(run, targets, 20, seed=3), usable_samples(run.places)
    found, judged = predict_all(run, samples, part, WEIGHTS, least, 5)
    known = combined_values(part.values, WEIGHTS)
    shown = [sample for batch in read_together(run, run, known) for sample in batch]
    shares = [weight / 2 / pooled_deviation(part.values.filter(target=target)) for target, weight in WEIGHTS.items()]
    with np.load(part.folder / "tokens.npz") as stored:
        values = stored["values"].astype(float) @ np.array(shares)
    counts = known["tokens"].to_numpy()
    np.testing.assert_allclose(means(values, counts), known["value"] / known["tokens"], rtol=1e-4, atol=1e-7)
    made, _ = fit(np.concatenate([ngrams_of(sample) for sample in shown]), values[:, None], counts, 5)
    assert found["sample_id"].to_list() == samples["sample_id"].to_list()
    rest = samples.join(known, on="sample_id", how="anti", maintain_order="left")
    told = found.join(rest, on="sample_id", how="semi", maintain_order="left")
    if least < 0:
        wanted = np.concatenate([made.samples(batch)[:, 0] for batch in read_together(run, run, rest)])
        sure = (judged["low"] > 0).to_list()
        here = told["domain"].is_in(judged.filter(sure)["domain"].implode()).to_numpy()
        np.testing.assert_allclose(told["value"].to_numpy()[here], wanted[here], rtol=1e-9)
        assert here.any()
        assert set(judged["used"]) <= {"predictor", "domain mean"}
    else:
        assert set(judged["used"]) == {"domain mean"}
        assert told.group_by("domain").agg(pl.col("value").n_unique())["value"].to_list() == [1] * len(judged)
    own = found.join(known, on="sample_id", suffix="_known")
    assert (own["value"] - own["value_known"] / own["tokens"]).abs().max() < 1e-12


def test_a_guard_without_a_say_among_samples_changes_no_direction(folder, run, tmp_path, targets):
    path = tmp_path / "general.jsonl"
    write_tiny_target(path, documents=18)
    out = selected(folder, tmp_path / "out", {"guard_weight": 0}, guard=path, window="none")
    alone = slopes(run, targets[:1]).values
    found = value_all(run, run, usable_samples(run.places), ahead(run, targets, 6), targets[:1], {"target": 1.0}, PROBE)
    assert_series_equal(per_sample(found.values), per_sample(alone))
    assert read_mixture(out / "mixture.yaml").domains


def test_a_loss_that_is_not_finite_is_an_error(run, targets):
    replay = replay_ahead(run, targets, 1, 0.1, "cpu", 1e-3)
    parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
    moves = moves_along(torch.full((1, len(parameters)), torch.nan), parameters)
    batch = next(iter(read_together(run, run, usable_samples(run.places))))
    with pytest.raises(UserError, match=rf"samples \[{batch[0].sample_id}.*is not finite"):
        token_slopes(replay, parameters, moves, batch)


def test_a_selection_without_slopes_of_its_own_passes_over_nothing_more(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.choice.value_all", None)
    out = selected(folder, tmp_path / "out", {"likeness_share": 0.5, "slopes_per_sample": 0}, window="none")
    assert set(pl.read_parquet(out / "costs.parquet")["phase"]) == {"training", "next step", "select"}
    assert pl.read_parquet(out / "data" / "mds" / "dropped.parquet")["value"].null_count() == 0
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "predicted for the others from their n-grams" in page
    assert "It was then measured of" not in page
    assert pl.read_parquet(out / "predicted.parquet")["slopes"].to_list() == [0] * len(run.streams)


def test_likeness_alone_needs_no_slopes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.choice.predict_all", None)
    assert not (selected(folder, tmp_path / "out", {"likeness_share": 1}) / "predicted.parquet").exists()


@pytest.mark.parametrize("by", ["domains", "shards"])
def test_a_stream_that_nothing_was_drawn_from_is_left_alone(tmp_path, by):
    random, rows = np.random.default_rng(0), []
    for _ in range(9):
        tokens, mask = random.integers(3, 60, SEQ_LEN).astype(np.int32), np.ones(SEQ_LEN, np.uint8)
        rows.append(
            {"tokens": tokens, "loss_mask": mask, "sample_id": content_id(tokens, mask), "domain": "extra",
             "documents": []}
        )  # fmt: skip
    write_stream(tmp_path / "extra", COLUMNS, rows, shard_bytes=4000)
    Training({**write_tiny_streams(tmp_path / "data"), "extra": tmp_path / "extra"}).run(tmp_path / "run")
    write_tiny_target(tmp_path / "target.jsonl")
    out = selected(tmp_path, tmp_path / "out", {"likeness_share": 0.5}, grain=GrainConfig(by=by))
    assert not any("extra" in domain for domain in read_mixture(out / "mixture.yaml").domains)


def test_groups_whose_optimizer_keeps_nothing_count_in_slopes():
    state = SimpleNamespace(
        momentum=torch.tensor([1.0, 0.0, 0.0, 0.0]), second_moment=torch.tensor([1.0, 1.0, 0.0, 0.0])
    )
    groups = [SimpleNamespace(place=slice(0, 3)), SimpleNamespace(place=slice(3, 4))]
    assert moved(state, groups).tolist() == [True, True, False, True]
