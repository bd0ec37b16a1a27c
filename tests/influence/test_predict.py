"""Values of samples outside the window, predicted from their text."""

import numpy as np
import polars as pl
import pytest

from curate.data.mds import COLUMNS, content_id, write_stream
from curate.mixture.record import read_mixture
from curate.select import select
from curate.selection import SelectConfig
from curate.shards import predict
from curate.shards.choose import ShardsConfig
from curate.shards.predict import predict_rest
from curate.training.target import load_target
from curate.core.tracking import TrackingConfig
from curate.training.run import Run
from tests.tiny import SEQ_LEN

KINDS = (range(3, 23), range(40, 60))  # tokens of samples that help, and of samples that hurt


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """The run over a domain of two kinds of text, in turn, and one of which three samples were valued."""
    random, where = np.random.default_rng(0), tmp_path_factory.mktemp("kinds")
    for domain, count in (("two", 200), ("few", 40)):
        rows = []
        for index in range(count):
            tokens, mask = random.choice(KINDS[index % 2], SEQ_LEN).astype(np.int32), np.ones(SEQ_LEN, np.uint8)
            rows.append(
                {"tokens": tokens, "loss_mask": mask, "sample_id": content_id(tokens, mask), "domain": domain,
                 "documents": []}
            )  # fmt: skip
        write_stream(where / domain, COLUMNS, rows, shard_bytes=4000)
    return Run(folder / "run").over({"two": where / "two", "few": where / "few"})


def values_of(run, counts, noise=0.3, seed=0):
    random = np.random.default_rng(seed)
    frames = []
    for domain, count in counts.items():
        own = run.catalogue.filter(domain=domain).sample(count, seed=seed).with_row_index("step")
        kind = 1 - 2.0 * (own["index"].to_numpy() % 2)
        value = (kind + noise * random.standard_normal(count)) * own["tokens"].to_numpy()
        frames.append(
            own.select("step", "domain", "index", "sample_id", "tokens", "length").with_columns(
                pl.Series("value", value), pl.Series("value_a", value), pl.Series("value_b", value),
                window=pl.lit("late"), target=pl.lit("t"),
            )
        )  # fmt: skip
    return pl.concat(frames)


@pytest.fixture(scope="module")
def target(folder, run):
    return load_target(folder / "target.jsonl", run.spec, 100)


def test_what_the_text_says_is_predicted_and_what_was_valued_is_kept(run, target):
    values = values_of(run, {"two": 60, "few": 3})
    every, judged = predict_rest(run, values, [target], 0.2, seed=0)
    row = judged.row(1, named=True)
    assert judged.select("domain", "used").rows() == [("few", "too few"), ("two", "predictor")]
    assert (row["samples"], row["probed"], row["used"]) == (200, 60, "predictor")
    assert row["spearman"] > 0.6
    assert every.group_by("domain").len().sort("domain").rows() == [("few", 3), ("two", 200)]
    rest = every.join(values, on="sample_id", how="anti")
    right = (rest["value"].to_numpy() > 0) == (rest["index"].to_numpy() % 2 == 0)
    assert right.mean() > 0.9
    both = every.join(values, on=["domain", "sample_id"], suffix="_known")
    assert len(both) == 63
    np.testing.assert_allclose(both["value"], both["value_known"], rtol=1e-12)


def test_values_that_no_text_explains_are_not_predicted(run, target):
    values = values_of(run, {"two": 60})
    dealt = values.with_columns(pl.col("value", "value_a", "value_b").shuffle(seed=1))
    every, judged = predict_rest(run, dealt, [target], 0.2, seed=0)
    assert judged["used"].to_list() == ["too few", "domain mean"]
    assert sorted(every["sample_id"]) == sorted(values["sample_id"])


def test_too_few_values_are_left_as_they_are(run, target):
    values = values_of(run, {"few": 5})
    every, judged = predict_rest(run, values, [target], 0.2, seed=0)
    assert judged["used"].to_list() == ["too few", "too few"]
    assert every.equals(values)


def test_more_values_than_the_fit_takes_are_all_kept(run, target, monkeypatch):
    monkeypatch.setattr(predict, "_MOST", 40)
    values = values_of(run, {"two": 60})
    every, judged = predict_rest(run, values, [target], 0.2, seed=0)
    assert judged["probed"].to_list() == [0, 40]
    assert every.n_unique("sample_id") == len(every) == 200
    assert every.head(60).equals(values.select(every.columns))


def test_every_domain_keeps_enough_for_the_fit(run, target, monkeypatch):
    monkeypatch.setattr(predict, "_MOST", 8)
    values = values_of(run, {"two": 150, "few": 25})
    _, judged = predict_rest(run, values, [target], 0.2, seed=0)
    assert judged["probed"].to_list() == [20, 20]


def test_the_order_of_values_does_not_matter(run, target):
    values = values_of(run, {"two": 60})
    one, _ = predict_rest(run, values, [target], 0.2, seed=0)
    other, _ = predict_rest(run, values.sample(fraction=1, shuffle=True, seed=3), [target], 0.2, seed=0)
    assert one.sort("sample_id").equals(other.sort("sample_id"))


def test_a_filtered_selection_says_how_well_it_predicts(folder):
    config = SelectConfig(
        run=folder / "run", target=folder / "target.jsonl", min_target_tokens=100, mode="filter",
        budget_tokens=60 * SEQ_LEN, tracking=TrackingConfig(mode="none"),
        shards=ShardsConfig(drop_fraction=0.3, unvalued="predict"),
    )  # fmt: skip
    out = select(config, Run(config.run))
    table = pl.read_parquet(out / "predicted.parquet")
    scores = pl.read_parquet(out / "scores.parquet").filter(window="late")
    counted = scores.group_by("domain").agg(pl.col("sample_id").n_unique())
    large = {domain for domain, count in counted.iter_rows() if count >= 20}
    assert set(table.filter(pl.col("used") != "too few")["domain"]) == large
    assert read_mixture(out / "mixture.yaml").samples == 60
    assert "Samples outside the window" in (out / "report.html").read_text(encoding="utf-8")
