"""The benches of the value index on a tiny run: ranks, cost, and a larger index made of its rows."""

import json

import pytest

from pipelines import index_query
from pipelines.fidelity import rows
from tests.tiny import record_tiny_run, write_tiny_target


def test_rows_of_a_tiny_run_rank_like_exact_values_and_the_index_of_their_copies_is_asked(tmp_path):
    run = record_tiny_run(tmp_path)
    targets = (write_tiny_target(tmp_path / "t.jsonl"), write_tiny_target(tmp_path / "u.jsonl", source=json.__file__))
    asked = {"run": run.folder, "targets": targets, "min_target_tokens": 10}
    table, summary = rows.measure(rows.RowsConfig(**asked, samples_per_domain=20, rounds=2), run)
    assert table.select("target", "domain").rows() == [(t, d) for t in ("t", "u") for d in ("dataclasses", "json")]
    assert set(table["measured"]) == {20}
    assert (table["low"] <= table["spearman"]).all()
    assert (table["spearman"] <= table["high"]).all()
    assert summary["mean"] == pytest.approx(table["spearman"].mean())
    assert summary["least"] == table["spearman"].min()
    assert summary["cost"] > 0

    large = index_query.QueryConfig(**asked, rows=3000, domains=3, top=50, out=tmp_path / "large")
    first, second = index_query.measure(large, run), index_query.measure(large, run)
    assert first["build"] == second["build"]
    assert second["build"]["rows"] == 3000
    for found in (first, second):
        assert [(row["domains"], row["found"], row["recall"]) for row in found["queries"]] == [(3, 50, 1.0)] * 2
