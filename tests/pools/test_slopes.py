"""Slopes of all samples of a run's streams on a tiny run, and the selection that is made by them."""

import shutil

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.choice import likely
from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.mixture.record import read_mixture
from curate.pools.open import open_pool
from curate.pools.slopes import value_all
from curate.pools.values import ProbeConfig, value_pool
from curate.scores.values import combined_values
from curate.select import select
from curate.selection import SelectConfig
from curate.shards.choose import ScreenConfig, ShardsConfig
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


def selected(folder, out, **settings):
    shards = ShardsConfig(
        drop_fraction=0.5, sample_temperature=0, likeness_share=0, duplicate_overlap=1, screen=ScreenConfig(mode="none")
    )
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", min_target_tokens=100, window="late",
        budget_tokens=20 * SEQ_LEN, tracking=TrackingConfig(mode="none"), shards=shards, probe=PROBE, out=out,
        **{"mode": "filter", **settings},
    )  # fmt: skip
    return select(config, Run(config.run))


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
    assert "are chosen by slopes" in (out / "report.html").read_text(encoding="utf-8")


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
