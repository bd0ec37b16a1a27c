"""A run seen as it would go on, and over other data."""

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.training.replay import Replay
from curate.training.run import STEPS as COLUMNS
from tests.tiny import STEPS, record_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_tiny_run(tmp_path_factory.mktemp("run"))


def test_a_continued_run_takes_its_last_batches_again_at_its_median_lr(run):
    longer = run.continued(3, 0.5)
    assert (longer.spec.steps, longer.fingerprint, longer.steps.schema) == (STEPS + 3, run.fingerprint, COLUMNS)
    assert_frame_equal(longer.steps.filter(pl.col("step") < STEPS), run.steps)
    added = longer.steps.filter(pl.col("step") >= STEPS)
    last = run.steps.filter(pl.col("step") >= STEPS - 3)
    kept = ["rank", "micro_batch", "sample_ids", "weights", "tokens"]
    assert_frame_equal(added.select(kept), last.select(kept))
    assert added["step"].to_list() == [step + 3 for step in last["step"]]
    rates = sorted(row[0]["lr"] for row in run.steps.unique("step")["groups"].to_list())
    for groups in added["groups"].to_list():
        assert [group["lr"] for group in groups] == pytest.approx([rates[STEPS // 2] / 2] * 2)
        assert groups[0]["weight_decay"] == 0.1
    assert [replayed.record.step for replayed in Replay(longer).steps(STEPS, STEPS + 3)] == [12, 13, 14]
    assert run.spec.steps == STEPS


def test_a_run_over_other_data_reads_that(run):
    other = run.over({"only": run.spec.streams["json"]})
    assert set(run.catalogue["domain"]) == {"json", "dataclasses"}
    assert set(other.catalogue["domain"]) == {"only"}
    assert other.fingerprint == run.fingerprint
    assert list(run.streams) == list(run.spec.streams)
