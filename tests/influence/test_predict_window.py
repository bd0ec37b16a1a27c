"""Values of samples outside the window, predicted from their text."""

import numpy as np
import polars as pl
import pytest

from curate.data.mds import COLUMNS, Columns, content_id, write_stream
from curate.influence import predict_window as module
from curate.influence.predict_window import predict_unmeasured
from curate.tables import VALUES_TOTAL, SampleValues
from curate.training.run import Run
from curate.training.source import SampleSource
from curate.training.target import load_target
from tests.frames import fill
from tests.tiny import SEQ_LEN

KINDS = (range(3, 23), range(40, 60))  # tokens of samples that help, and of samples that hurt


@pytest.fixture(scope="module")
def source(folder, tmp_path_factory):
    """A domain of two kinds of text, in turn, and a small one."""
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
    return SampleSource(folder / "run", {name: where / name for name in ("two", "few")}, Columns())


def values_of(source, counts, noise=0.3, seed=0):
    random = np.random.default_rng(seed)
    frames = []
    for domain, count in counts.items():
        own = source.catalogue.filter(domain=domain).sample(count, seed=seed)
        kind = 1 - 2.0 * (own["index"].to_numpy() % 2)
        value = (kind + noise * random.standard_normal(count)) * own["predicted_tokens"].to_numpy()
        frames.append(own.with_columns(pl.Series(name, value) for name in VALUES_TOTAL))
    return fill(SampleValues, pl.concat(frames))


@pytest.fixture(scope="module")
def target(folder):
    return load_target(folder / "target.jsonl", Run(folder / "run").spec, 100)


def test_what_the_text_says_is_predicted_and_what_was_valued_is_kept(source, target):
    values = values_of(source, {"two": 60, "few": 3})
    every, judged = predict_unmeasured(source, values, [target], 0.2, seed=0)
    row = judged.row(1, named=True)
    assert judged.select("domain", "used").rows() == [("few", "too few"), ("two", "predictor")]
    assert (row["samples"], row["measured"], row["used"]) == (200, 60, "predictor")
    assert row["spearman"] > 0.6
    assert every.group_by("domain").len().sort("domain").rows() == [("few", 3), ("two", 200)]
    rest = every.join(values, on="sample_id", how="anti")
    right = (rest["value_total"].to_numpy() > 0) == (rest["index"].to_numpy() % 2 == 0)
    assert right.mean() > 0.9
    both = every.join(values, on=["domain", "sample_id"], suffix="_known")
    assert len(both) == 63
    np.testing.assert_allclose(both["value_total"], both["value_total_known"], rtol=1e-12)


def test_values_that_no_text_explains_are_not_predicted(source, target):
    values = values_of(source, {"two": 60})
    dealt = values.with_columns(pl.col(VALUES_TOTAL).shuffle(seed=1))
    every, judged = predict_unmeasured(source, dealt, [target], 0.2, seed=0)
    assert judged["used"].to_list() == ["too few", "domain mean"]
    assert sorted(every["sample_id"]) == sorted(values["sample_id"])


def test_too_few_values_are_left_as_they_are(source, target):
    values = values_of(source, {"few": 5})
    every, judged = predict_unmeasured(source, values, [target], 0.2, seed=0)
    assert judged["used"].to_list() == ["too few", "too few"]
    assert every.equals(values)


def test_more_values_than_the_fit_takes_are_all_kept(source, target, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 40)
    values = values_of(source, {"two": 60})
    every, judged = predict_unmeasured(source, values, [target], 0.2, seed=0)
    assert judged["measured"].to_list() == [0, 40]
    assert every.n_unique("sample_id") == len(every) == 200
    assert every.head(60).equals(values.select(every.columns))


def test_every_domain_keeps_enough_for_the_fit(source, target, monkeypatch):
    monkeypatch.setattr(module, "_MOST", 8)
    values = values_of(source, {"two": 150, "few": 25})
    _, judged = predict_unmeasured(source, values, [target], 0.2, seed=0)
    assert judged["measured"].to_list() == [20, 20]


def test_the_order_of_values_does_not_matter(source, target):
    values = values_of(source, {"two": 60})
    one, _ = predict_unmeasured(source, values, [target], 0.2, seed=0)
    other, _ = predict_unmeasured(source, values.sample(fraction=1, shuffle=True, seed=3), [target], 0.2, seed=0)
    assert one.sort("sample_id").equals(other.sort("sample_id"))
