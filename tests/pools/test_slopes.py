"""Slopes of all samples of a run's streams on a tiny run, and the selection that is made by them."""

import shutil
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal

from curate.choice import likely
from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.formats.mds import COLUMNS, content_id, write_stream
from curate.mixture.record import read_mixture
from curate.pools.open import open_pool
from curate.pools.probe import moved
from curate.pools.slopes import value_all
from curate.pools.values import ProbeConfig, value_pool
from curate.scores.likeness import find_likeness, sample_likeness
from curate.scores.values import combined_values
from curate.select import select
from curate.selection import SelectConfig
from curate.shards.choose import ScreenConfig, ShardsConfig
from curate.shards.grain import GrainConfig
from curate.target import load_target
from curate.tracking import TrackingConfig
from curate.trajectory.ledger import consumed, stages, uses
from curate.trajectory.run import Run
from curate.trajectory.samples import usable_samples
from tests.tiny import SEQ_LEN, write_tiny_target

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


def slopes(run, targets, weights=WEIGHTS, **settings):
    samples = usable_samples(run.places)
    return value_all(
        run, run, samples, targets, weights, PROBE, adjoint=AdjointConfig(own_step="linear"), **settings
    )  # fmt: skip


def test_slopes_are_the_linear_values_of_probing_every_sample(run, targets, monkeypatch):
    monkeypatch.setattr("curate.pools.slopes._PILOT", 10**6)
    together, alone = slopes(run, targets).values, slopes(run, targets[:1]).values
    pool = open_pool(run.folder.parent / "data", run, consumed(uses(stages(run))), "keep")
    probed = value_pool(run, pool, targets, PROBE, adjoint=AdjointConfig(own_step="linear")).every
    assert set(probed["source"]) == {"probe"}
    whole = probed.with_columns(pl.col("value") * pl.col("tokens"))
    for found, weights in ((together, WEIGHTS), (alone, {"target": 1.0})):
        wanted = combined_values(whole, weights).select("domain", "sample_id", wanted="value")
        both = found.join(wanted, on=["domain", "sample_id"])
        assert len(both) == len(found) == len(run.places.unique("sample_id"))
        centred = both.select(
            pl.col(name) - pl.col(name).mean().over("domain") for name in ("value", "wanted")
        )  # fmt: skip
        assert (centred["value"] - centred["wanted"]).abs().max() < 0.02 * centred["wanted"].std()


def test_they_are_continued_and_kept(run, targets, monkeypatch):
    wanted = slopes(run, targets, batch_size=7)
    shutil.rmtree(wanted.folder)
    monkeypatch.setattr("curate.pools.spread._BLOCK", 50)
    with monkeypatch.context() as patch:
        patch.setattr("curate.pools.slopes.replacing", None)  # the blocks are there, the table is not
        with pytest.raises(TypeError):
            slopes(run, targets)
    assert len(list((wanted.folder / "scratch").glob("slopes-*.npz"))) > 2
    monkeypatch.setattr("curate.pools.slopes.forward_slopes", None)
    found = slopes(run, targets)
    assert (found.values["value"] - wanted.values["value"]).abs().max() < 0.02 * wanted.values["value"].std()
    assert not (found.folder / "scratch").exists()
    monkeypatch.setattr("curate.pools.slopes.look_ahead", None)
    assert_frame_equal(slopes(run, targets).values, found.values)
    assert found.cost_units > 0


def selected(folder, out, shards=None, **settings):
    usual = {"drop_fraction": 0.5, "sample_temperature": 0, "likeness_share": 0, "duplicate_overlap": 1}
    shards = ShardsConfig(**{**usual, **(shards or {})}, screen=ScreenConfig(mode="none"))
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", min_target_tokens=100, window="late",
        budget_tokens=20 * SEQ_LEN, tracking=TrackingConfig(mode="none"), shards=shards, probe=PROBE, out=out,
        **{"mode": "filter", **settings},
    )  # fmt: skip
    return select(config, Run(config.run, config.streams))


def test_a_stage_takes_the_samples_of_the_largest_slopes(folder, run, targets, tmp_path):
    path = tmp_path / "general.jsonl"
    write_tiny_target(path, documents=18)
    out = selected(folder, tmp_path / "out", guard=path)
    values = slopes(run, targets).values
    per_token = values.with_columns(x=pl.col("value") / pl.col("tokens"))
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    for domain, part in read_mixture(out / "mixture.yaml").domains.items():
        own = per_token.filter(domain=domain).sort("x", descending=True)
        best = own.head(part.samples)["sample_id"]
        assert part.samples > 0
        assert not set(best) & set(dropped.filter(domain=domain)["sample_id"])
    judged = pl.read_parquet(out / "predicted.parquet")
    scores = combined_values(pl.read_parquet(out / "scores.parquet"), WEIGHTS)
    own = scores.group_by("domain", "sample_id").agg(pl.col("value").sum() / pl.col("tokens").sum())
    both = own.join(per_token, on=["domain", "sample_id"])
    for row in judged.iter_rows(named=True):
        pairs = both.filter(domain=row["domain"])
        assert (row["used"], row["probed"]) == ("slopes", len(pairs))
        assert row["spearman"] == pytest.approx(pairs.select(pl.corr("value", "x", method="spearman")).item())
    assert "What samples are chosen by" in (out / "report.html").read_text(encoding="utf-8")


def test_baselines_and_streams_that_are_only_weighted_have_none(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.choice.value_all", None)
    for name, settings in (("less", {"method": "less"}), ("dvemb", {"estimator": "dvemb"})):
        assert "slopes" not in set(
            pl.read_parquet(selected(folder, tmp_path / name, **settings) / "predicted.parquet")["used"]
        )
    weighted = selected(folder, tmp_path / "weighted", mode="reweight")
    assert not (weighted / "predicted.parquet").exists()


def test_only_the_samples_most_like_the_targets_have_slopes():
    samples = pl.DataFrame({"domain": ["a"] * 5 + ["b"], "sample_id": range(6)})
    texts = samples.with_columns(likeness=pl.Series([0.1, 0.5, 0.5, -2.0, 0.5, 0.0]))
    assert likely(samples, texts, 0.4)["sample_id"].to_list() == [1, 2, 5]
    assert likely(samples, texts, 1.0).equals(samples)
    assert likely(samples, None, 0.4).equals(samples)


def test_half_of_each_domain_has_slopes_and_the_rest_its_likeness(folder, run, targets, tmp_path, monkeypatch):
    asked = []

    def spy(run, stock, samples, *args, **settings):
        asked.append(samples)
        return value_all(run, stock, samples, *args, **settings)

    monkeypatch.setattr("curate.choice.value_all", spy)
    out = selected(folder, tmp_path / "out", {"likeness_share": 0.5, "consume_once": True, "drop_fraction": 0})
    like = find_likeness(run, targets[:1], dict.fromkeys(run.streams, 1.0), 0)
    samples = usable_samples(run.places)
    texts = sample_likeness(run, samples, like, {"target": 1.0})
    used = consumed(uses(stages(run)))
    left = samples.join(texts, on=["domain", "sample_id"]).join(used, on="sample_id", how="anti")
    for (domain,), own in left.group_by("domain"):
        best = own.sort("likeness", descending=True).head(len(own) // 2)["sample_id"]
        assert set(asked[0].filter(domain=domain)["sample_id"]) == set(best)
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert dropped["value"].null_count() > 0
    assert (dropped.filter(pl.col("reason") == "consumed").height) == len(used)


def test_likeness_alone_needs_no_slopes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.choice.value_all", None)
    assert not (selected(folder, tmp_path / "out", {"likeness_share": 1}) / "predicted.parquet").exists()


@pytest.mark.parametrize("by", ["domains", "shards"])
def test_a_stream_that_nothing_was_drawn_from_is_left_alone(folder, run, tmp_path, by):
    random, rows = np.random.default_rng(0), []
    for _ in range(9):
        tokens, mask = random.integers(3, 60, SEQ_LEN).astype(np.int32), np.ones(SEQ_LEN, np.uint8)
        rows.append(
            {"tokens": tokens, "loss_mask": mask, "sample_id": content_id(tokens, mask), "domain": "extra",
             "documents": []}
        )  # fmt: skip
    write_stream(tmp_path / "extra", COLUMNS, rows, shard_bytes=4000)
    streams = {**run.spec.streams, "extra": tmp_path / "extra"}
    out = selected(folder, tmp_path / "out", {"likeness_share": 0.5}, streams=streams, grain=GrainConfig(by=by))
    assert not any("extra" in domain for domain in read_mixture(out / "mixture.yaml").domains)


def test_groups_whose_optimizer_keeps_nothing_count_in_slopes():
    state = SimpleNamespace(
        momentum=torch.tensor([1.0, 0.0, 0.0, 0.0]), second_moment=torch.tensor([1.0, 1.0, 0.0, 0.0])
    )
    groups = [SimpleNamespace(place=slice(0, 3)), SimpleNamespace(place=slice(3, 4))]
    assert moved(state, groups).tolist() == [True, True, False, True]
