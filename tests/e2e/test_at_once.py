"""Commands that want the same folder at once: one does the work, the others use it, wait or say who has it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from curate.core.artifacts import MANIFEST, SUMS, write_json
from curate.core.lock import BusyError, locked
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from tests.crash import crash_environment
from tests.pipelines.test_pretrain import MODEL
from tests.tiny import SEQ_LEN, TASK, Training, factory, write_tiny_streams

ROOT = Path(__file__).resolve().parents[2]


def start(*words, environment=None):
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=ROOT, env=environment, text=True, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_selections_at_once_with_the_same_settings_all_end_with_the_same_bytes(folder, tmp_path):
    words = (
        "curate.select", "--run", folder / "run", "--target", folder / "target.jsonl", "--method", "dsir", "--mode",
        "samples", "--output.wandb", "none", "--values.min_target_tokens", 100, "--budget-tokens", 60 * SEQ_LEN,
    )  # fmt: skip
    at_once = [start(*words) for _ in range(3)]
    for process in at_once:
        _, said = process.communicate()
        assert process.returncode == 0, said
        assert said.splitlines()[-1].startswith("wrote ")
    (out,) = (folder / "run" / "selections").iterdir()
    alone = start(*words, "--out", tmp_path / "alone")
    _, said = alone.communicate()
    assert alone.returncode == 0, said
    made, wanted = ({str(path.relative_to(place)) for path in place.rglob("*")} for place in (out, tmp_path / "alone"))
    assert made == wanted  # nothing lies there besides
    for name in ("scores.parquet", "mixture.yaml", "domains.parquet", "data/mds/index.json"):
        assert (out / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name


@pytest.mark.slow
def test_value_indexes_made_at_once_have_every_row_once(tmp_path):
    write_tiny_streams(tmp_path / "data")
    Training({name: tmp_path / "data" / name for name in ("json", "dataclasses")}).run(tmp_path / "run")
    at_once = [start("curate.embed", "--run", tmp_path / "run") for _ in range(2)]
    for process in at_once:
        _, said = process.communicate()
        assert process.returncode == 0, said
    files = [np.load(path) for path in tmp_path.glob("run/index/*/rows/*.npy")]
    (index,) = (tmp_path / "run" / "index").iterdir()
    numbers = np.load(index / "space.npz")["compression"].shape[1]
    assert sum(map(len, files)) == 160 * (numbers + 12)
    assert len(list((index / "groups").glob(f"*/{MANIFEST}"))) == 1


@pytest.mark.slow
def test_a_second_training_in_one_folder_is_refused(tmp_path):
    write_tiny_streams(tmp_path / "data")
    write_json(tmp_path / "model.json", MODEL)
    words = (
        "pipelines.pretrain", "--out", tmp_path / "run", "--data", tmp_path / "data", "--model",
        tmp_path / "model.json", "--steps", 4, "--batch_size", 8,
    )  # fmt: skip
    with locked(tmp_path / "run"):
        second = start(*words)
        _, said = second.communicate()
        assert second.returncode == 2
        assert said.startswith(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on ")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    first = start(*words)
    _, said = first.communicate()
    assert first.returncode == 0, said
    assert (tmp_path / "run" / "steps.parquet").exists()
    assert not (tmp_path / "run" / ".lock").exists()


RECORDING = """
import sys
from pathlib import Path
from tests.e2e.test_at_once import recorder
held = recorder(Path(sys.argv[1]))
print("recording", flush=True)
sys.stdin.read()
"""


def recorder(folder, **changes):
    model = factory()
    settings = {"task": TASK, "streams": {}, "steps": 10, "seq_len": SEQ_LEN, "clip_norm": None, **changes}
    return TrajectoryRecorder(folder, RecorderConfig(), model, torch.optim.SGD(model.parameters(), lr=0.1), **settings)


@pytest.mark.slow
def test_a_foreign_trainer_is_protected_by_its_recorder(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", RECORDING, str(tmp_path)], cwd=ROOT, text=True, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert other.stdout.readline() == "recording\n"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(BusyError, match=rf"in use by process {other.pid} on "):
        recorder(tmp_path, steps=12)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other.communicate()
    first = recorder(tmp_path)
    again = recorder(tmp_path)  # one process, such as a notebook, starts over
    assert (first.folder, again.folder) == (tmp_path, tmp_path)


def test_what_a_killed_finish_left_is_removed_by_whoever_looks_next(tmp_path):
    streams = write_tiny_streams(tmp_path / "data")
    Training(streams).run(tmp_path / "run")
    (tmp_path / "run" / "steps.parts" / "rank-00000").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds a finished run"):
        recorder(tmp_path / "run")
    assert not (tmp_path / "run" / "steps.parts").exists()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/x$", "/b$", "/data/manifest.json$"])
def test_data_that_was_killed_between_sealing_and_renaming_is_made_again(tmp_path, place):
    for name in ("first", "second"):
        (tmp_path / name).write_text("".join(f'{{"text": "{name} {number} and so on"}}\n' for number in range(40)))
        (tmp_path / name).rename(tmp_path / f"{name}.jsonl")

    def words(out):
        domains = (f"--domains.x={tmp_path / 'first.jsonl'}", f"--domains.b={tmp_path / 'second.jsonl'}")
        return ("pipelines.prepare", "--out", out / "data", *domains, "--vocab_size", 300, "--seq_len", 16)

    killed = start(*words(tmp_path), environment=crash_environment(place, alone=True))
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    for out in (tmp_path, tmp_path / "whole"):
        process = start(*words(out))
        _, said = process.communicate()
        assert process.returncode == 0, said
    made, wanted = (
        {str(path.relative_to(out / "data")): path.read_bytes() for path in (out / "data").rglob("*") if path.is_file()}
        for out in (tmp_path, tmp_path / "whole")
    )
    assert made == wanted
    assert {name.partition("/")[0] for name in made} == {"b", "x", MANIFEST, SUMS, "tokenizer.json"}
