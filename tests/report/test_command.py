"""`python -m curate.report`, and the report's numbers in a tracker."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import polars as pl
import pytest

from curate.core.errors import UserError
from curate.core.tracking import NoTracker, TrackingConfig
from curate.output.layout import SelectionFolder, newest_reported
from curate.report.__main__ import ReportConfig, render_again
from curate.report.data import load_data, save_data
from curate.report.page import render, write_report
from curate.report.track import log_all, log_report
from tests.report.synthetic import TEXTS, report_data


class Recorded(NoTracker):
    """A tracker that keeps what it was told."""

    def __init__(self) -> None:
        self.config: dict[str, object] = {}
        self.metrics: list[tuple[int | None, Mapping[str, float]]] = []
        self.tables: dict[str, pl.DataFrame] = {}
        self.files: dict[str, Path] = {}
        self.pages: dict[str, str] = {}

    def log_config(self, config):
        self.config |= config

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, metrics))

    def log_table(self, name, table):
        self.tables[name] = table

    def log_html(self, name, page):
        self.pages[name] = page

    def log_artifact(self, name, kind, path):
        self.files[name] = path


def test_the_command_renders_the_newest_selection_again(tmp_path: Path) -> None:
    for place, name in enumerate(("first", "second")):
        selection = SelectionFolder(tmp_path / "select" / name)
        save_data(selection, report_data(target=name))
        os.utime(selection.report_facts, (place, place))
    command = [sys.executable, "-m", "curate.report", "--run", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    page = selection.report
    assert result.stdout == f"report: {page}\n"
    assert page.read_text(encoding="utf-8") == render(report_data(target="second"))


def test_a_selection_and_an_output_can_be_named(tmp_path: Path) -> None:
    save_data(SelectionFolder(tmp_path / "elsewhere"), report_data())
    config = ReportConfig(run=tmp_path, select=tmp_path / "elsewhere", out=tmp_path / "out" / "page.html")
    assert render_again(config) == tmp_path / "out" / "page.html"


def test_a_run_without_a_selection_ends_in_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "curate.report", "--run", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(tmp_path) in result.stderr
    assert "curate.select" in result.stderr


@pytest.mark.parametrize("damage", ["missing", "truncated", "facts"])
def test_damaged_report_data_is_named(tmp_path: Path, damage: str) -> None:
    selection = SelectionFolder(tmp_path)
    save_data(selection, report_data())
    curve = selection.report_data / "curve.parquet"
    if damage == "missing":
        curve.unlink()
    elif damage == "truncated":
        curve.write_bytes(curve.read_bytes()[:100])
    else:
        selection.report_facts.write_text(json.dumps({"run": "demo"}), encoding="utf-8")
    with pytest.raises(UserError, match=r"curve.parquet is (missing|corrupted)|select again"):
        load_data(selection)


def test_the_newest_selection_is_found_at_any_depth(tmp_path: Path) -> None:
    assert newest_reported(tmp_path / "missing") is None
    save_data(SelectionFolder(tmp_path / "a" / "b"), report_data())
    assert newest_reported(tmp_path) == SelectionFolder(tmp_path / "a" / "b")


def test_texts_that_go_nowhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="wandb_texts"):
        ReportConfig(run=tmp_path, wandb_texts=True)


def test_the_tracker_gets_every_number(tmp_path: Path) -> None:
    data, tracker = report_data(), Recorded()
    log_all(tracker, data, tmp_path / "mixture.yaml")
    assert tracker.pages["report/page"] == render(data)
    assert tracker.config["mixture"] == {"prior_strength": 0.5}
    assert tracker.config["sign"] == data.sign
    steps = [step for step, _ in tracker.metrics]
    assert steps == sorted(set(range(300)))
    late = data.curve.filter(source="late", step=280, domain="api_prose")["value"].item()
    metrics = dict(tracker.metrics)[280]
    assert metrics["value/late/api_prose"] == late
    assert metrics["train/loss"] == data.training["loss"][280]
    names = {"reliability", "domains", "mixture", "sweep", "targets", "examples", "shards", "costs"}
    assert set(tracker.tables) == {f"report/{name}" for name in names}
    assert tracker.files["mixture-demo-astronomy-docstrings"] == tmp_path / "mixture.yaml"


def test_wandb_offline_files_hold_the_page_and_the_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    write_report(tmp_path / "report.html", report_data())
    (tmp_path / "mixture.yaml").write_text("domains: {}\n", encoding="utf-8")
    config = TrackingConfig(mode="offline", texts=True)
    log_report(report_data(), tmp_path / "mixture.yaml", config, tmp_path / "run", "demo" * 99, "select")
    assert not [record for record in caplog.records if record.name.startswith("curate")]
    (page,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/html/report/page_*.html")
    assert page.read_bytes() == (tmp_path / "report.html").read_bytes()
    tables = list((tmp_path / "run").glob("wandb/offline-run-*/files/media/table/report/*.table.json"))
    assert len(tables) == 8


def test_no_text_and_no_place_is_told_unless_it_is_asked_for(tmp_path, monkeypatch):
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    (tmp_path / "secret-folder").mkdir()
    monkeypatch.chdir(tmp_path / "secret-folder")
    (tmp_path / "mixture.yaml").write_text("domains: {}\n", encoding="utf-8")
    here = Path.cwd()
    loader = f'StreamingDataset(local="{here}/selection/data/mds", batch_size=...)\nPath("/opt/secret-place/x.yaml")'
    data = dataclasses.replace(report_data(), loader=loader, settings={"target": str(here / "t.jsonl"), "seed": 0})
    log_report(data, tmp_path / "mixture.yaml", TrackingConfig(mode="offline"), here / "run", "demo", "select")
    files = [
        file for file in (here / "run").glob("wandb/offline-run-*/**/*") if file.is_file() and file.suffix != ".log"
    ]
    (page,) = [file.read_text(encoding="utf-8") for file in files if file.suffix == ".html"]
    assert "selection/data/mds" in page
    assert "t.jsonl" in page
    for secret in ("secret", TEXTS["most"][:20], TEXTS["least"][:20], "Average along an axis"):
        assert not [file for file in files if secret.encode() in file.read_bytes()], secret
    assert "Average along an axis" in render(data)  # the report in the run's own folder has them
