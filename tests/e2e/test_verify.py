"""`python -m curate.verify` on a tiny recorded run."""

import json

import pytest

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.evaluation.draw import DrawConfig
from curate.evaluation.verify import VerifyConfig, named_windows, verify
from tests.tiny import record_tiny_run, write_tiny_target

DRAW = DrawConfig(pairs=8, pairs_per_step=4, groups=3, group_share=0.25, repeats=1, part_pairs=1, parts=(0.5,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_tiny_run(tmp_path_factory.mktemp("verify"))


def test_adjoint_agrees_with_reruns_and_the_result_is_kept(run, tmp_path):
    target = write_tiny_target(tmp_path / "docs.jsonl")
    config = VerifyConfig(target=(target,), min_target_tokens=1, draw=DRAW, out=tmp_path / "out")
    out = verify(config, run)
    result = json.loads((out / "verify.json").read_text())
    cells = {(row["window"], row["horizon"]) for row in result["rows"]}
    assert cells == {(window, horizon) for window in ("early", "middle", "late") for horizon in config.horizons}
    assert all(row["n"] == 8 and row["target"] == "docs" for row in result["rows"])
    late = [row for row in result["rows"] if row["window"] == "late"]
    assert all(row["spearman"] > 0.8 for row in late)
    assert {row["kind"] for row in result["pairs"]} if "kind" in result["pairs"][0] else True
    assert result["cost"]["reruns"] == 3 * (8 + 3 + 1 + 1)
    before = (out / "verify.json").read_bytes()
    (out / "manifest.json").unlink()
    (out / "verify.json").unlink()
    assert (verify(config, run) / "verify.json").read_bytes() == before


def test_without_targets_the_runs_own_streams_are_the_targets(run, tmp_path):
    config = VerifyConfig(draw=DRAW, out=tmp_path / "out", windows=("late",), horizons=("window_end",))
    rows = json.loads((verify(config, run) / "verify.json").read_text())["rows"]
    assert {row["target"] for row in rows} == {"json", "dataclasses", "general"}
    assert all((row["spearman_of_difference"] is None) == (row["target"] == "general") for row in rows)


def test_dvemb_can_be_verified_too(run, tmp_path):
    target = write_tiny_target(tmp_path / "docs.jsonl")
    config = VerifyConfig(
        target=(target,), min_target_tokens=1, draw=DRAW, out=tmp_path / "out", windows=("late",), estimator="dvemb"
    )
    rows = json.loads((verify(config, run) / "verify.json").read_text())["rows"]
    assert [row["estimator"] for row in rows] == ["dvemb", "dvemb"]


def test_a_window_that_was_not_declared_is_named(run):
    assert named_windows(run, ("middle",)) == {"middle": (4, 8)}
    with pytest.raises(UserError, match=r"no window 'end'; it declared \['early', 'late'\]"):
        named_windows(run, ("end",))


def test_the_command_reads_nested_options():
    config = parse_command(VerifyConfig, "verify", "", ["--draw.pairs", "5", "--horizons", "[window_end]"])
    assert config.draw.pairs == 5
    assert config.horizons == ("window_end",)
