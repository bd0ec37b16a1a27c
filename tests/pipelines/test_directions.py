"""Directions of a window on a tiny run: in its last step all that pull back through the update are one."""

import numpy as np

from curate.training.target import load_target
from pipelines.fidelity import directions
from tests.tiny import record_tiny_run, write_tiny_target


def test_directions_part_where_steps_follow(tmp_path):
    run = record_tiny_run(tmp_path)
    config = directions.DirectionsConfig(
        run=run.folder, target=write_tiny_target(tmp_path / "t.jsonl"), min_target_tokens=10
    )
    values = directions._along_directions(config, run, load_target(config.target, run.spec, 10))
    last = values.filter(step=values["step"].max())
    before = values.filter(step=values["step"].min())
    for name in ("own", "carried"):
        np.testing.assert_allclose(last[name], last["last"], rtol=1e-4, atol=1e-12)
    assert not np.allclose(before["own"], before["carried"], rtol=1e-2)
    table = directions.measure(config, run)
    assert set(table["direction"]) == {"last", "own", "carried"}
    assert set(table.filter(table["domain"].is_null())["samples"]) == {len(values)}
    assert table["spearman"].is_between(-1, 1).all()
