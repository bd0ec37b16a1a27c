"""The tracker: real W&B files without a network, and jobs that it cannot stop."""

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from curate.core.tracking import (
    PROJECT,
    NoTracker,
    Tracker,
    TrackingConfig,
    WandbTracker,
    has_key,
    open_tracker,
    without_places,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("API_KEY", "PROJECT", "ENTITY", "TAGS"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))


def log_all(tracker: Tracker, folder: Path) -> None:
    page = folder / "mixture.yaml"
    page.write_text("a: 1", encoding="utf-8")
    tracker.log_config({"budget_tokens": 5, "model": {"layers": 2}})
    tracker.log_metrics({"loss": 1.5, "diverged": float("nan")}, step=0)
    tracker.log_metrics({"loss": 1.25}, step=7)
    tracker.log_table("domains", pl.DataFrame({"domain": ["a", None], "score": [1.0, None]}))
    tracker.log_html("report", "<p>hello</p>")
    tracker.log_artifact("mixture", "mixture", page)
    tracker.finish()


def logged(folder: Path, last: bytes) -> bytes:
    """Every byte of the offline transaction log (names and values stand in it as plain text) once `last` is in it.

    W&B's own process writes the log; the first one of a session may be flushed a moment after `finish` returns.
    """
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    while last not in log.read_bytes():  # the time limit is that of the test
        time.sleep(0.05)
    return log.read_bytes()


def test_offline_files_hold_everything_that_was_logged(tmp_path: Path) -> None:
    tracker = open_tracker(TrackingConfig(mode="offline"), tmp_path / "run", "first", "select")
    assert isinstance(tracker, WandbTracker)
    log_all(tracker, tmp_path)
    content = logged(tmp_path / "run", last=b"mixture")
    for text in (b"budget_tokens", b"loss", b"1.25", b"first", b"select", PROJECT.encode(), b"mixture"):
        assert text in content
    assert b"diverged" not in content
    (table,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/table/domains_*.table.json")
    assert json.loads(table.read_text(encoding="utf-8"))["data"] == [["a", 1.0], [None, None]]
    (page,) = (tmp_path / "run").glob("wandb/offline-run-*/files/media/html/report_*.html")
    assert page.read_text(encoding="utf-8") == "<p>hello</p>"


def test_the_environment_says_where_to(tmp_path: Path) -> None:
    names = {"WANDB_PROJECT": "other-project", "WANDB_ENTITY": "some-team", "WANDB_TAGS": "tag-one,tag-two"}
    program = """if True:
        import sys
        from pathlib import Path
        from curate.core.tracking import TrackingConfig, open_tracker

        tracker = open_tracker(TrackingConfig(mode="offline"), Path(sys.argv[1]), "first", "select")
        tracker.log_metrics({"loss": 1.5})
        tracker.finish()
    """
    # a process of its own: wandb reads the environment once
    command = [sys.executable, "-c", program, str(tmp_path / "run")]
    subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **names}, check=True)
    content = logged(tmp_path / "run", last=b"loss")
    for name in (b"other-project", b"some-team", b"tag-one", b"tag-two"):
        assert name in content
    assert PROJECT.encode() not in content


def test_the_machine_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {name: f"secret-{name}" for name in ("host", "folder", "program", "argument", "user")}
    (tmp_path / secrets["folder"]).mkdir()
    monkeypatch.chdir(tmp_path / secrets["folder"])
    monkeypatch.setattr("platform.node", lambda: secrets["host"])
    monkeypatch.setattr("socket.gethostname", lambda: secrets["host"])
    monkeypatch.setattr("sys.argv", [f"/opt/{secrets['program']}.py", f"--out={secrets['argument']}"])
    monkeypatch.setenv("USER", secrets["user"])
    monkeypatch.setenv("LOGNAME", secrets["user"])
    folder = Path.cwd() / "run"
    tracker = open_tracker(TrackingConfig(mode="offline"), folder, "run", "select")
    tracker.log_config(
        {"target": str(Path.cwd() / "t.jsonl"), "runs": ["/opt/secret-user/r", {"/opt/secret-user/d": 1}]}
    )
    log_all(tracker, tmp_path)
    content = logged(folder, last=b"mixture")
    assert b"t.jsonl" in content
    told = [file.read_bytes() for file in folder.glob("wandb/offline-run-*/files/**/*") if file.is_file()]
    assert told
    for secret in (*secrets.values(), sys.executable, str(Path.home())):
        assert not [secret for file in (content, *told) if secret.encode() in file]


def test_places_are_told_from_the_working_folder_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {
        "a": str(tmp_path / "b" / "c"),
        "d": ["/home/x/e", "~/f", 1, None],
        "/g/h": "i/j",
        "k": "text / text",
        "l": "/",
    }
    wanted = {"a": "b/c", "d": ["e", "f", 1, None], "h": "i/j", "k": "text / text", "l": ""}
    assert without_places(given) == wanted


def test_auto_is_offline_without_a_key(tmp_path: Path) -> None:
    assert not has_key()
    tracker = open_tracker(TrackingConfig(), tmp_path, "run", "train")
    tracker.finish()
    assert list(tmp_path.glob("wandb/offline-run-*"))


def test_a_key_is_found_in_the_environment_or_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine tracker.example login user password not-a-key\n", encoding="utf-8")
    (tmp_path / "netrc").chmod(0o600)
    assert not has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://tracker.example:8080/")
    assert has_key()
    monkeypatch.delenv("WANDB_BASE_URL")
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    assert has_key()


def test_an_unreachable_server_delays_but_never_stops_a_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nothing listens there
    tracker = open_tracker(TrackingConfig(timeout_seconds=1.0), tmp_path / "run", "run", "train")
    log_all(tracker, tmp_path)
    assert "W&B did not start (online" in caplog.text
    assert list((tmp_path / "run").glob("wandb/offline-run-*"))


def test_a_failing_tracker_warns_once_and_goes_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        config: dict[str, object] = {}

        def log(self, *_: object, **__: object) -> None:
            raise OSError("disk full")

        def finish(self) -> None:
            raise AssertionError("not tried after a failure")

    with caplog.at_level(logging.WARNING):
        log_all(WandbTracker(Broken()), tmp_path)
    assert [record.getMessage().count("without it") for record in caplog.records] == [1]


def test_a_folder_that_cannot_be_written_means_no_tracker(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    tracker = open_tracker(TrackingConfig(mode="offline"), tmp_path / "file" / "run", "run", "train")
    assert isinstance(tracker, NoTracker)


def test_none_writes_nothing(tmp_path: Path) -> None:
    log_all(open_tracker(TrackingConfig(mode="none"), tmp_path / "run", "run", "train"), tmp_path)
    assert not (tmp_path / "run").exists()
