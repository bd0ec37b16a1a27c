"""The benches of the value index on a tiny run: ranks, cost, and a larger index made of its rows."""

import json
import subprocess
import sys

import polars as pl
import pytest

from curate.core.artifacts import read_json
from tests.tiny import record_tiny_run, write_tiny_target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    record_tiny_run(folder)
    write_tiny_target(folder / "t.jsonl")
    write_tiny_target(folder / "other.jsonl", source=json.__file__)
    return folder


def _run(module, folder, *options):
    targets = f"[{folder / 't.jsonl'}, {folder / 'other.jsonl'}]"
    command = [sys.executable, "-m", module, "--run", folder / "run", "--targets", targets, "--min_target_tokens", 10]
    done = subprocess.run([*map(str, command), *map(str, options)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_rows_of_a_tiny_run_rank_like_exact_values_and_the_index_of_their_copies_is_asked(folder):
    _run("pipelines.fidelity.rows", folder, "--samples_per_domain", 20, "--rounds", 2, "--out", folder / "out")
    table, summary = pl.read_parquet(folder / "out" / "rows.parquet"), read_json(folder / "out" / "rows.json")
    assert table.select("target", "domain").rows() == [(t, d) for t in ("t", "other") for d in ("dataclasses", "json")]
    assert set(table["measured"]) == {20}
    assert (table["low"] <= table["spearman"]).all()
    assert (table["spearman"] <= table["high"]).all()
    assert summary["mean"] == pytest.approx(table["spearman"].mean())
    assert summary["least"] == table["spearman"].min()
    assert summary["cost"] > 0

    options = ["--rows", 3000, "--domains", 3, "--top", 50, "--out", folder / "large"]
    _run("pipelines.index_query", folder, *options)
    samples = pl.read_parquet(folder / "large" / "samples.parquet")
    assert samples.group_by("domain").len()["len"].to_list() == [1000] * 3
    built = (folder / "large" / "build.json").stat().st_mtime_ns
    _run("pipelines.index_query", folder, *options)
    assert (folder / "large" / "build.json").stat().st_mtime_ns == built
    asked = read_json(folder / "large" / "queries.json")
    assert asked["build"]["rows"] == 3000
    assert [(row["domains"], row["found"], row["recall"]) for row in asked["queries"]] == [(3, 50, 1.0)] * 2
