"""Value over a stage: the curve equals the embeddings it is made of, the phases are what they look like."""

import numpy as np
import polars as pl
import pytest

from curate.core.artifacts import read_hashed
from pipelines.phases import PhasesConfig, describe, measure, smooth
from tests.tiny import STEPS, record_tiny_run, write_tiny_target


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["dvemb", "adjoint"])
def test_the_curve_of_a_tiny_run(tmp_path, estimator):
    run = record_tiny_run(tmp_path)
    target = write_tiny_target(tmp_path / "target.jsonl")
    config = PhasesConfig(run=run.folder, target=target, estimator=estimator, min_target_tokens=1)
    result = measure(config)
    assert result["horizon"] == "stage_end"
    assert [row["step"] for row in result["curve"]] == list(range(STEPS))
    (folder,) = (run.folder / "embeddings").glob(f"stage-stage_end-{estimator}-*")
    (vectors,) = folder.glob("target-*.npz")
    values = np.load(folder / "embeddings.npy") @ np.load(vectors)["vectors"].mean(0)  # halves of six documents each
    steps = pl.read_parquet(folder / "rows.parquet")["step"].to_numpy()
    for row in result["curve"]:
        assert row["mean_abs"] == pytest.approx(np.abs(values[steps == row["step"]]).mean(), rel=1e-4)
        assert row["std"] == pytest.approx(values[steps == row["step"]].std(), rel=1e-4)
        assert row["lr"] == pytest.approx(1e-2 * (1 - row["step"] / (2 * STEPS)))
        assert row["mean_abs_per_lr"] == pytest.approx(row["mean_abs"] / row["lr"])
    out = run.folder / f"phases-{estimator}"
    assert read_hashed(out / "phases.json") == result
    assert "mean absolute value" in (out / "phases.html").read_text()
    thinned = measure(config.model_copy(update={"every": 4, "out": tmp_path / "thinned"}))
    assert [row["step"] for row in thinned["curve"]] == [0, 4, 8]


def test_phases_of_a_basin():
    steps = np.arange(240)
    values = 1 + 9 * np.exp(-steps / 20) + 3 * np.exp((steps - 239) / 15)
    phases = describe(steps.tolist(), values.tolist())
    assert phases.start == pytest.approx(smooth(values.tolist())[0])
    assert phases.start_ends < 60 < phases.basin_step < 200 < phases.end_begins
    assert phases.line.startswith("starts high (")
    assert ", ends high (" in phases.line
    assert "between" not in phases.line


def test_a_curve_without_phases_is_called_so():
    phases = describe(list(range(0, 200, 2)), [2.0] * 100)
    assert phases.line == "does not start high, lowest around step 0 (2), does not end high"
    warmup = describe([0, 1, 2, 3], [float("nan"), 1.0, 2.0, 4.0])  # the first step had lr 0
    assert warmup.basin_step == 1
    assert warmup.line.startswith("does not start high")
    assert "ends high (4.0 times the lowest level) from step 3" in warmup.line


def test_a_hump_is_no_rise_at_the_end():
    phases = describe(list(range(100)), (1 + np.sin(np.linspace(0, np.pi, 100))).tolist())
    assert phases.line.startswith("does not start high")
    assert "does not end high, highest in between, around step 49" in phases.line
