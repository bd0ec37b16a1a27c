"""Values from estimated optimizer state, against those from the real one."""

import pytest

from curate.core.errors import UserError
from curate.training.run import Run
from curate.training.snapshots import snapshot_path
from pipelines.fidelity.moments import MomentsConfig, agreement
from tests.tiny import record_tiny_run, write_tiny_target


@pytest.mark.slow
def test_estimated_state_values_nearly_the_same(tmp_path):
    record_tiny_run(tmp_path)
    write_tiny_target(tmp_path / "target.jsonl")
    config = MomentsConfig(run=tmp_path / "run", target=tmp_path / "target.jsonl", out=tmp_path / "copy", steps=8)
    found = agreement(config)
    assert 0.8 < found["pooled"] < 1
    assert 0.8 < found["within_step"] <= 1
    start, _ = Run(tmp_path / "run").window("late")
    ours, theirs = (snapshot_path(tmp_path / name, start).read_bytes() for name in ("run", "copy"))
    assert ours != theirs
    assert len(ours) == pytest.approx(len(theirs), rel=0.1)
    with pytest.raises(UserError, match="window early starts at step 0"):
        agreement(config.model_copy(update={"window": "early"}))
