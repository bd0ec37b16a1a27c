"""A run seen as it would go on, and its samples as a source."""

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.training.replay import Replay
from curate.training.run import STEPS as COLUMNS
from curate.training.run import ContinuedRun
from curate.training.source import SampleSource
from tests.tiny import STEPS, record_tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_tiny_run(tmp_path_factory.mktemp("run"))


def test_a_continued_run_takes_its_last_batch_again_at_a_share_of_its_median_lr(run):
    longer = ContinuedRun(run, 0.5)
    assert (longer.spec.steps, longer.steps.schema) == (STEPS + 1, COLUMNS)
    assert len({run.fingerprint, longer.fingerprint, ContinuedRun(run, 0.25).fingerprint}) == 3
    assert_frame_equal(longer.steps.filter(pl.col("step") < STEPS), run.steps)
    added = longer.steps.filter(pl.col("step") >= STEPS)
    last = run.steps.filter(pl.col("step") == STEPS - 1)
    kept = ["rank", "micro_batch", "sample_ids", "weights", "tokens"]
    assert_frame_equal(added.select(kept), last.select(kept))
    assert set(added["step"]) == {STEPS}
    rates = sorted(row[0]["lr"] for row in run.steps.unique("step")["groups"].to_list())
    for groups in added["groups"].to_list():
        assert [group["lr"] for group in groups] == pytest.approx([rates[STEPS // 2] / 2] * 2)
        assert groups[0]["weight_decay"] == 0.1
    assert [replayed.record.step for replayed in Replay(longer).steps(STEPS, STEPS + 1)] == [STEPS]
    assert run.spec.steps == STEPS


def test_other_streams_are_another_source_of_samples(run):
    other = SampleSource(run.folder, {"only": run.spec.streams["json"]}, run.spec.columns)
    assert set(run.catalogue["domain"]) == {"json", "dataclasses"}
    assert set(other.catalogue["domain"]) == {"only"}
    assert len(other.unique_samples) == 80
    assert list(run.streams) == list(run.spec.streams)
