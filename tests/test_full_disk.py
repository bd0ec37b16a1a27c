"""Disks that are full or read-only, and outputs that cannot be: one sentence that names the place, before the work."""

import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from curate.core.arrays import create_memmap, write_arrays
from curate.core.artifacts import write_json
from curate.core.config import run_command
from curate.core.writing import atomic_write
from curate.data.mds import write_stream
from curate.influence.rows import embed_samples
from curate.influence.space import open_space
from curate.seen import main as ledger
from curate.select import main as select
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.samples import usable_samples
from curate.training.snapshots import save_state
from pipelines.prepare import main as prepare
from pipelines.pretrain import main as pretrain
from tests.tiny import TinyLM, build_optimizers


@pytest.fixture
def disk(tmp_path):
    """A file system of one megabyte."""
    (tmp_path / "disk").mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


@pytest.fixture
def read_only(disk):
    """Make that file system read-only."""
    return lambda: subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def table(path):
    with atomic_write(path) as part:
        pl.DataFrame({"x": np.random.default_rng(0).random(400_000)}).write_parquet(part)


def state(path):
    model = TinyLM(width=512)
    save_state(path, model, build_optimizers(model, "SGD"))


def stream(path):
    noise = np.random.default_rng(0).integers(0, 1000, 40_000).astype(np.int32)
    write_stream(path, {"tokens": "ndarray:int32"}, ({"tokens": noise} for _ in range(20)), 1 << 18)


WRITERS = {
    "text": lambda path: write_json(path, {"text": "x" * 3_000_000}),
    "arrays": lambda path: write_arrays(path, {"x": np.zeros(500_000)}),
    "memory map": lambda path: create_memmap(path, (1000, 1000)),
    "table": table, "state": state, "stream": stream,
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")  # writers that are closed too late
def test_whatever_finds_the_disk_full_names_its_file_and_leaves_nothing(disk, kind):
    torch.manual_seed(0)
    with pytest.raises(OSError, match="No space left") as caught:
        WRITERS[kind](disk / "made")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "made"))
    assert list(disk.iterdir()) == []


def test_a_file_that_may_not_grow_is_told_as_well(tmp_path):
    code = """
import resource, sys
from pathlib import Path
from curate.core.arrays import create_memmap
from curate.core.config import run_command
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
run_command(lambda: create_memmap(Path(sys.argv[1]), (1000, 1000)))
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "map.npy")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {tmp_path / 'map.npy'}: file too large")


def test_a_memory_map_has_its_place_on_the_disk(tmp_path):
    made = create_memmap(tmp_path / "map.npy", (1000, 100))
    assert (tmp_path / "map.npy").stat().st_blocks * 512 >= 400_000
    assert not made.any()
    made[3] = 1
    made.flush()
    assert np.load(tmp_path / "map.npy").sum() == 100


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(FileNotFoundError) as caught, atomic_write(tmp_path / "x"):
        (tmp_path / "gone.npz").read_bytes()
    assert caught.value.filename == str(tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="bug"), atomic_write(tmp_path / "x"):
        raise ValueError("bug")


@pytest.fixture
def said(monkeypatch, capsys):
    """Run a command's main function; its status and the last line that it says on stderr."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def run(command, *words):
        monkeypatch.setattr("sys.argv", ["command", *map(str, words)])
        capsys.readouterr()
        try:
            run_command(command)
        except SystemExit as left:
            return left.code, capsys.readouterr().err.splitlines()[-1]
        return 0, ""

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def words_of(folder, out):
    rows = [json.dumps({"text": f"{number} is one more than {number - 1}. " * 9}) for number in range(60)]
    (folder / "documents.jsonl").write_text("\n".join(rows))
    choice = ("--values.min_target_tokens", 100, "--output.wandb", "none", "--budget-tokens", 120)
    return {
        select: ("--run", folder / "run", "--target", folder / "target.jsonl", "--out", out, *choice),
        pretrain: ("--out", out, "--data", folder / "data", "--model", folder / "model.json", "--steps", 9),
        prepare: ("--out", out, "--domains.a", folder / "documents.jsonl", "--vocab_size", 300, "--seq_len", 8),
    }


@pytest.mark.parametrize("command", [select, pretrain, prepare])
def test_an_output_that_cannot_be_is_refused_before_the_work(folder, said, tmp_path, command):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc/out"):
        status, line = said(command, *words_of(folder, out)[command])
        assert status == 2
        assert line.startswith("error: ")
        assert str(out) in line or str(tmp_path / "file") in line
    assert not (folder / "run" / "influence").exists()
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("command", [select, pretrain, prepare])
def test_a_read_only_output_is_refused_before_the_work(folder, said, disk, read_only, command):
    read_only()
    status, line = said(command, *words_of(folder, disk / "out")[command])
    assert status == 2
    assert f"{disk / 'out'}: read-only file system" in line
    assert not (folder / "run" / "influence").exists()


def test_a_read_only_run_is_refused_before_the_work(folder, said, disk, read_only):
    subprocess.run(["cp", "-r", str(folder / "run"), str(disk / "run")], check=True)
    for path in (disk / "run").glob("catalogue-*"):
        path.unlink()
    read_only()
    for status, line in (
        said(ledger, "--run", disk / "run"),
        said(select, *words_of(folder, folder / "elsewhere")[select], "--run", disk / "run"),
    ):
        assert status == 2
        assert f"error: {disk / 'run'}" in line
        assert "read-only file system" in line
        assert not (folder / "elsewhere").exists()


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_loses_nothing(folder, said, disk):
    words = words_of(folder, disk / "out")[prepare]
    filler = disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 8192))
    status, line = said(prepare, *words)
    assert status == 2
    assert "no space left on device; free some space and run the same command again" in line
    filler.unlink()
    assert said(prepare, *words) == (0, "")


@pytest.mark.filterwarnings("ignore:.*:pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_fills_up_while_rows_are_written_loses_none(folder, disk, tmp_path):
    run = Run(folder / "run")
    replay, samples = Replay(run), usable_samples(run.unique_samples)
    space, small = (replace(open_space(run, replay), folder=place / "index") for place in (tmp_path, disk))
    embed_samples(run, run.source, samples, space, replay)
    wanted = {path.name: path.read_bytes() for path in (space.folder / "rows").iterdir() if path.suffix == ".npy"}
    filler = disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 12288))
    with pytest.raises(OSError, match="No space left") as caught:
        embed_samples(run, run.source, samples, small, replay)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename in [str(small.folder / "rows" / name) for name in wanted]
    kept = {path.name: path.read_bytes() for path in (small.folder / "rows").iterdir() if path.suffix == ".npy"}
    assert kept.items() < wanted.items()
    assert kept
    filler.unlink()
    embed_samples(run, run.source, samples, small, replay)
    made = {path.name: path.read_bytes() for path in (small.folder / "rows").iterdir() if path.suffix == ".npy"}
    assert made == wanted
