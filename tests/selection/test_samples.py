"""What the samples of a selection are chosen by, on a tiny run."""

import math

import numpy as np
import polars as pl
import pytest

from curate.data.mds import COLUMNS, content_id, write_stream
from curate.domains.domain import domain_scores
from curate.filter.choose import choose
from curate.filter.overlap import scan
from curate.influence.current import NextStepOptions, forward_passes, measure_samples, value_next_step
from curate.mixture.record import read_mixture
from curate.selection import samples as module
from curate.selection.config import SelectConfig
from curate.selection.pipeline import select
from curate.selection.samples import MEASURED_PER_SAMPLE, most_promising
from curate.tables import NgramRatios, Samples, SampleValues
from curate.training.run import Run
from curate.training.samples import trained_tokens, usable_samples
from curate.training.target import load_target
from tests.frames import fill
from tests.tiny import SEQ_LEN, Training, write_tiny_streams, write_tiny_target

OPTIONS = NextStepOptions(per_domain=6)


@pytest.fixture(scope="module")
def run(folder):
    return Run(folder / "run")


@pytest.fixture(scope="module")
def general(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("general") / "general.jsonl", documents=18)


@pytest.fixture
def asked(monkeypatch):
    """The samples that are measured beside the part of every domain, call by call."""
    calls = []

    def spy(run, source, samples, *args, **settings):
        calls.append(samples)
        return measure_samples(run, source, samples, *args, **settings)

    monkeypatch.setattr(module, "measure_samples", spy)
    return calls


def selected(folder, out, values=None, filtering=None, **settings):
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", budget_tokens=20 * SEQ_LEN, out=out,
        values={"min_target_tokens": 100, **(values or {})},
        filter={"contamination_overlap": None, **(filtering or {})}, output={"wandb": "none"}, **settings,
    )  # fmt: skip
    return select(config, Run(config.run))


@pytest.mark.parametrize("sources", [("late",), ("current",)])
def test_a_stage_takes_the_samples_of_the_largest_values(folder, run, general, tmp_path, monkeypatch, sources):
    """Whatever sets the weights of domains; all samples measured, and drawn without noise."""
    monkeypatch.setattr(module, "MEASURED_PER_SAMPLE", 1e6)
    monkeypatch.setitem(choose.__kwdefaults__, "noise", 0.0)
    values = {"sources": sources, "ngram_share": 0, "measured_per_domain": 6, "measured_passes": 1e6}
    filtering = {"drop_fraction": 0.5, "duplicate_overlap": 1}
    out = selected(folder, tmp_path / "out", values, filtering, retain=general)
    targets = [load_target(path, run.spec, 100) for path in (folder / "target.jsonl", general)]
    samples = usable_samples(run.unique_samples)
    part = value_next_step(run, run.source, samples, targets, OPTIONS)
    weights = {"target": 1.0, "general": 1.0}
    values = measure_samples(run, run.source, samples, part, targets, weights, OPTIONS).values
    per_token = values.with_columns(x=pl.col("value_total") / pl.col("predicted_tokens"))
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    mixture = read_mixture(out / "mixture.yaml")
    assert mixture.source == sources[0]
    for domain, own in mixture.domains.items():
        best = per_token.filter(domain=domain).sort("x", descending=True).head(own.samples)
        assert own.samples > 0
        assert not set(best["sample_id"]) & set(dropped.filter(domain=domain)["sample_id"])
    judged = pl.read_parquet(out / "predicted.parquet")
    assert set(judged["source"]) == {"current"}
    assert judged["measured"].to_list() == [6] * len(mixture.domains)
    assert judged["also_measured"].to_list() == (judged["samples"] - judged["measured"]).to_list()
    assert set(pl.read_parquet(out / "scores.parquet")["source"]) == {"current", *sources}
    phases = set(pl.read_parquet(out / "costs.parquet")["phase"])
    assert phases == {"training", "current state", "measure samples", "select"} | (
        {"embed late"} if sources == ("late",) else set()
    )


def test_a_window_that_is_valued_for_the_report_changes_no_byte_of_the_data(folder, tmp_path):
    first, second = (
        selected(folder, tmp_path / str(len(sources)), {"sources": sources, "measured_per_domain": 6})
        for sources in (("late", "current"), ("current",))
    )
    names = sorted(path.relative_to(first / "data") for path in (first / "data").rglob("*") if path.is_file())
    assert names
    for name in names:
        assert (first / "data" / name).read_bytes() == (second / "data" / name).read_bytes(), name


def test_streams_are_weighted_by_the_next_step_where_no_window_is_valued(folder, run, tmp_path, asked):
    out = selected(folder, tmp_path / "out", {"measured_per_domain": 6}, mode="weights")
    assert read_mixture(out / "mixture.yaml").source == "current"
    assert not (out / "predicted.parquet").exists()
    assert not asked
    target = load_target(folder / "target.jsonl", run.spec, 100)
    part = value_next_step(run, run.source, usable_samples(run.unique_samples), [target], OPTIONS).values
    wanted = domain_scores(part, trained_tokens(run), seed=0, novel_shares=run.source.novel_shares)
    found = pl.read_parquet(out / "domains.parquet")
    assert found["value_score"].to_list() == pytest.approx(wanted["score"].to_list())


def test_baselines_and_streams_weighted_by_a_window_ask_nothing_of_the_next_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("curate.selection.values.value_next_step", None)
    weighted = selected(folder, tmp_path / "weighted", {"sources": ("late",)}, mode="weights")
    assert not (weighted / "predicted.parquet").exists()
    out = selected(folder, tmp_path / "baseline", method="grad-dot")
    judged = pl.read_parquet(out / "predicted.parquet")
    assert set(judged["source"]) == {"late"}
    counted = pl.read_parquet(out / "scores.parquet").group_by("domain").agg(pl.col("sample_id").n_unique())
    large = {domain for domain, count in counted.iter_rows() if count >= 20}
    assert set(judged.filter(pl.col("used") != "too few")["domain"]) == large
    assert read_mixture(out / "mixture.yaml").samples == 20


def test_n_grams_alone_predict_no_values(folder, tmp_path, asked):
    assert not (selected(folder, tmp_path / "out", {"ngram_share": 1}) / "predicted.parquet").exists()
    assert not asked


def test_texts_are_read_once_or_where_nothing_is_compared_not_at_all(folder, run, tmp_path, monkeypatch):
    read = []

    def spy(samples, *args):
        read.append(len(samples))
        return scan(samples, *args)

    monkeypatch.setattr("curate.selection.texts.scan", spy)
    selected(folder, tmp_path / "samples", {"measured_per_domain": 6})
    selected(folder, tmp_path / "weights", {"measured_per_domain": 6}, mode="weights")
    selected(folder, tmp_path / "held out", {"measured_per_domain": 6}, {"contamination_overlap": 0.5}, mode="weights")
    assert read == [len(run.catalogue), 0, len(run.catalogue)]


def test_only_the_most_promising_samples_are_measured():
    samples = fill(Samples, pl.DataFrame({"domain": ["a"] * 5 + ["b", "c"], "sample_id": range(7)}))
    ratios = fill(NgramRatios, samples.with_columns(ngram_ratio=pl.Series([0.0, 1.0, 0.0, -2.0, 1.0, 0.0, 0.0])))
    values = fill(SampleValues, samples.with_columns(value_total=pl.Series([1.0, 0.0, 3.0, 0.5, 1.0, 0.0, 0.0])))
    wanted = {"a": 1, "b": 1}

    def chosen(ratios, per_sample, share=0.5):
        return most_promising(samples, values, ratios, share, wanted, per_sample)["sample_id"].to_list()

    assert chosen(ratios, 2.5) == [2, 4, 5]
    assert chosen(ratios, 9) == [0, 1, 2, 3, 4, 5]
    assert chosen(ratios, 2.5, 0.9) == [1, 4, 5]
    assert chosen(None, 2.5) == [0, 2, 5]
    assert chosen(ratios, 0.5) == []


def test_some_are_measured_for_each_sample_that_the_stage_takes(folder, run, tmp_path, asked):
    """Of those that it may take: what was trained on is neither measured nor taken."""
    filtering = {"unseen_only": True, "drop_fraction": 0}
    out = selected(folder, tmp_path / "out", {"measured_per_domain": 6}, filtering)
    seen = set(run.steps["sample_ids"].explode())
    (found,) = asked
    assert not set(found["sample_id"]) & seen
    assert not set(pl.read_parquet(out / "scores.parquet")["sample_id"]) & seen
    taken = read_mixture(out / "mixture.yaml").domains
    counts = dict(found.group_by("domain").len().iter_rows())
    assert sum(counts.values()) <= MEASURED_PER_SAMPLE * 20
    for domain, own in taken.items():  # the mixture's bounds are not known yet when samples are measured
        assert counts[domain] == pytest.approx(MEASURED_PER_SAMPLE * own.samples, abs=2)
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert dropped.filter(reason="seen").height == len(seen)
    assert dropped.filter(pl.col("reason") != "seen")["value_per_token"].null_count() == 0


def test_measuring_costs_no_more_passes_than_it_may(folder, run, tmp_path, asked):
    whole = forward_passes(run, 1, 20)  # of all samples of the stage
    for passes in (0.5 * whole, 10 * whole):
        selected(folder, tmp_path / str(passes), {"measured_per_domain": 6, "measured_passes": passes})
        most = min(math.floor(20 * passes / whole), math.floor(20 * MEASURED_PER_SAMPLE))
        assert most - 2 <= len(asked.pop()) <= most


def test_a_selection_that_measures_no_sample_alone_passes_over_nothing_more(folder, run, tmp_path, asked):
    out = selected(folder, tmp_path / "out", {"measured_per_domain": 6, "measured_passes": 0})
    assert not asked
    assert set(pl.read_parquet(out / "costs.parquet")["phase"]) == {"training", "current state", "select"}
    assert pl.read_parquet(out / "data" / "mds" / "dropped.parquet")["value_per_token"].null_count() == 0
    assert pl.read_parquet(out / "predicted.parquet")["also_measured"].to_list() == [0] * len(run.streams)


def test_a_stream_that_nothing_was_drawn_from_is_left_alone(tmp_path):
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
    out = selected(tmp_path, tmp_path / "out", {"measured_per_domain": 6})
    assert set(read_mixture(out / "mixture.yaml").domains) == {"json", "dataclasses"}
