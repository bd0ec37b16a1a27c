"""Capture inside the run: training keeps its bits, rows are those of replay, no failure of a disk ends a training."""

import json
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from curate.core.errors import UserError
from curate.embeddings.captured import CapturedRows, RowWriter
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.embeddings.store import embed_window, plan_job
from curate.gradients.projection import projection
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.replay import Replay, records
from curate.training.run import Run
from curate.training.snapshots import load_state
from curate.training.task import Task
from tests.ranks import STEPS, train
from tests.tiny import TASK, Training, factory, write_tiny_streams

WINDOWS = RecorderConfig(windows={"early": (0, 4), "late": (8, 12)})
WIDTH = 4


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_tiny_streams(tmp_path_factory.mktemp("data"))


def estimator_of(name, width=WIDTH, **settings):
    if name == "dvemb":
        return DvembEstimator(DvembConfig(width=width, **settings))
    return DvembAdamEstimator(DvembAdamConfig(width=width, **settings))


def job_of(run, window="late", horizon="window_end"):
    return plan_job(Replay(run), window, horizon, None, batch_size=4)


def step_rows(run, name, window="late", **options):
    """What the estimator's recursion would see: step -> its stored arrays."""
    job, estimator = job_of(run, window, **options), estimator_of(name)
    capture = estimator._capture(job)
    with capture:
        return dict(estimator._step_rows(job, capture, job.start))


def without_captures(run, folder):
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("captures", "embeddings"))
    return Run(folder)


def refuse_replay(monkeypatch):
    def steps(*arguments, **settings):
        raise AssertionError("replayed")

    monkeypatch.setattr(Replay, "steps", steps)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dvemb", {}),
        ("dvemb-adam", {}),
        ("dvemb", {"autocast": True}),
        ("dvemb-adam", {"autocast": True}),
        ("dvemb", {"loss_scale": 1024.0, "said_scale": 1024.0}),
        ("dvemb-adam", {"loss_scale": 1024.0, "said_scale": 1024.0}),
        ("dvemb", {"optimizer": "Muon"}),
        ("dvemb", {"dropped": frozenset({(9, 1), (9, 4)})}),
    ],
)
def test_training_keeps_its_bits_and_rows_are_those_of_replay(streams, tmp_path, monkeypatch, name, settings):
    """Tolerance 1e-5 of the largest number: the same kernels on the same state; 2e-2 where bfloat16 was scaled."""
    plain, watched = (
        Training(streams, capture=capture, **settings) for capture in (None, CaptureConfig(estimator=name, width=WIDTH))
    )
    losses = plain.run(tmp_path / "plain", WINDOWS)
    assert watched.run(tmp_path / "run", WINDOWS) == losses
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    for window in ("early", "late"):
        wanted = step_rows(Run(tmp_path / "plain"), name, window)
        with monkeypatch.context() as patch:
            refuse_replay(patch)
            found = step_rows(Run(tmp_path / "run"), name, window)
        assert list(found) == list(wanted)
        for step, arrays in wanted.items():
            assert len(arrays) == (2 if name == "dvemb-adam" else 1)
            for one, other in zip(found[step], arrays, strict=True):
                assert np.abs(other).max() > 0
                np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


def test_rows_against_single_samples_in_float64(streams, tmp_path):
    """Tolerance 1e-4: the training itself is float32."""
    Training(streams, capture=CaptureConfig(width=WIDTH)).run(tmp_path / "run", WINDOWS)
    run = Run(tmp_path / "run")
    task, replay = Task(TASK, dtype=torch.float64), Replay(run)
    for step in (0, 8):  # with a snapshot
        load_state(run.snapshot(step), task.model)
        record = next(records(run, step, step + 1))
        found = step_rows(run, "dvemb", "early" if step == 0 else "late")[step][0]
        samples = [sample for batch in replay.batches(record) for sample in batch.split(1)]
        for row, sample in zip(found, samples, strict=True):
            columns = 0
            for layer in ("mix", "up", "down"):
                weight = task.model.get_submodule(layer).weight
                gradient = torch.autograd.grad(task.sample_losses(sample).sum(), weight)[0]
                left = projection(gradient.shape[0], WIDTH, 0, layer, "output").double()
                right = projection(gradient.shape[1], WIDTH, 0, layer, "input").double()
                wanted = (left.T @ gradient @ right).flatten().numpy()
                np.testing.assert_allclose(row[columns : columns + 16], wanted, rtol=1e-4, atol=1e-5)
                columns += 16


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dvemb", "dvemb-adam"])
def test_embeddings_are_those_of_replay_and_only_what_is_missing_is_replayed(streams, tmp_path, name):
    Training(streams, capture=CaptureConfig(estimator="dvemb-adam", width=WIDTH)).run(tmp_path / "run", WINDOWS)
    run = Run(tmp_path / "run")
    other = without_captures(run, tmp_path / "other")
    estimator = estimator_of(name)
    assert estimator.passes(job_of(run)) == 0
    assert estimator.passes(job_of(other)) == 4
    assert estimator.passes(job_of(run, "early", "stage_end")) == 4  # steps 4 to 8, between the windows
    assert estimator_of(name, width=3).passes(job_of(run)) == 4  # other coordinates
    assert estimator_of(name, seed=1).passes(job_of(run)) == 4
    assert estimator_of("dvemb-adam", shortcut=True).passes(job_of(run)) == 4
    for window, horizon in (("late", "window_end"), ("early", "stage_end")):
        embeddings = [embed_window(job_of(one, window, horizon), window, horizon, estimator) for one in (run, other)]
        found, wanted = (np.array(one.vectors) for one in embeddings)
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * np.abs(wanted).max())
        assert embeddings[0].rows.equals(embeddings[1].rows)
    assert embeddings[0].folder.name == embeddings[1].folder.name


def test_gradients_alone_do_not_serve_adam(streams, tmp_path):
    Training(streams, capture=CaptureConfig(width=WIDTH)).run(tmp_path / "run", WINDOWS)
    assert estimator_of("dvemb").passes(job_of(Run(tmp_path / "run"))) == 0
    assert estimator_of("dvemb-adam").passes(job_of(Run(tmp_path / "run"))) == 4


@pytest.mark.slow
def test_rows_of_other_samples_or_damaged_files_are_replayed(streams, tmp_path, caplog):
    Training(streams, capture=CaptureConfig(width=WIDTH)).run(tmp_path / "run", WINDOWS)
    run = Run(tmp_path / "run")
    wanted = step_rows(without_captures(run, tmp_path / "other"), "dvemb")
    (folder,) = (run.folder / "captures").glob("*/rank-00000")
    (folder / "step-00000011.npz").write_bytes((folder / "step-00000010.npz").read_bytes())  # other samples
    damaged = bytearray((folder / "step-00000009.npz").read_bytes())
    damaged[-700:-300] = bytes(400)
    (folder / "step-00000009.npz").write_bytes(damaged)
    first = dict(np.load(folder / "step-00000008.npz"))
    first["gradients"] *= 2
    np.savez(folder / "step-00000008.npz", **first)
    found = step_rows(run, "dvemb")
    assert "do not add up" in caplog.text
    for step, (rows,) in wanted.items():
        np.testing.assert_allclose(found[step][0], rows, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_crashed_run_resumes_its_capture(streams, tmp_path, monkeypatch):
    """Stopped in the window, and again with rows on disk of steps that are repeated."""
    settings = RecorderConfig(windows={"early": (0, 8), "late": (8, 12)}, cadence_snapshots=6, flush_steps=1)
    whole = Training(streams, capture=CaptureConfig(width=WIDTH))
    whole.run(tmp_path / "whole", settings)
    parts = Training(streams, capture=CaptureConfig(width=WIDTH))
    parts.run(tmp_path / "run", settings, stop=6)
    parts.run(tmp_path / "run", settings, start=4, stop=7)
    parts.run(tmp_path / "run", settings, start=6)
    refuse_replay(monkeypatch)
    found, wanted = (step_rows(Run(tmp_path / name), "dvemb", "early") for name in ("run", "whole"))
    for step, (rows,) in wanted.items():
        assert np.array_equal(found[step][0], rows)


@pytest.mark.slow
def test_a_scale_of_the_loss_that_is_not_said_ends_the_capture_not_the_training(streams, tmp_path, caplog):
    settings = {"loss_scale": 1024.0}
    losses = Training(streams, **settings).run(None)
    assert Training(streams, capture=CaptureConfig(width=WIDTH), **settings).run(tmp_path / "run", WINDOWS) == losses
    assert "do not add up to the step's gradient" in caplog.text
    assert "GradScaler.get_scale()" in caplog.text
    caplog.clear()
    assert set(step_rows(Run(tmp_path / "run"), "dvemb")) == {8, 9, 10, 11}
    assert "capture of gradients is incomplete, rank-00000 stopped: step 0" in caplog.text


def test_a_micro_batch_of_another_size_ends_the_capture_not_the_training(streams, tmp_path, caplog, monkeypatch):
    original = RunCapture.micro_batch
    monkeypatch.setattr(RunCapture, "micro_batch", lambda self, ids, w, scale: original(self, ids[:2], w[:2], scale))
    losses = Training(streams).run(None)
    assert Training(streams, capture=CaptureConfig(width=WIDTH)).run(tmp_path / "run", WINDOWS) == losses
    assert "stops, the training goes on: step 0" in caplog.text


def test_a_folder_that_cannot_be_written_ends_the_capture_not_the_training(streams, tmp_path, caplog, monkeypatch):
    """The folder becomes a file while the training runs."""
    original = TrajectoryRecorder.begin_step

    def begin_step(self, step):
        if step == 2:
            self.flush()  # else the writer may be renaming a file in it
            (folder,) = (tmp_path / "run" / "captures").glob("*/rank-00000")
            shutil.rmtree(folder)
            folder.write_text("in the way")
        original(self, step)

    monkeypatch.setattr(TrajectoryRecorder, "begin_step", begin_step)
    losses = Training(streams).run(None)
    assert Training(streams, capture=CaptureConfig(width=WIDTH)).run(tmp_path / "run", WINDOWS) == losses
    assert "nor can the reason be written there" in caplog.text
    monkeypatch.undo()
    assert estimator_of("dvemb").passes(job_of(Run(tmp_path / "run"), "early")) == 4


FULL_DISK = """
import json, resource, sys
from pathlib import Path
from curate.embeddings.run_capture import CaptureConfig
from curate.training.recorder import RecorderConfig
from tests.tiny import Training
folder, data = Path(sys.argv[1]), Path(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, 70_000))  # rows of a step are 77 kB, a snapshot 30 kB
training = Training({name: data / name for name in ("json", "dataclasses")}, batch_size=60,
                    capture=CaptureConfig(width=16))
print(json.dumps(training.run(folder, RecorderConfig(windows={"early": (0, 4), "late": (8, 12)}))))
"""


@pytest.mark.slow
def test_a_full_disk_ends_the_capture_not_the_training(streams, tmp_path, caplog):
    data = next(iter(streams.values())).parent
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "run"), str(data)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert json.loads(result.stdout) == Training(streams, batch_size=60).run(None)
    assert estimator_of("dvemb", width=16).passes(job_of(Run(tmp_path / "run"))) == 4
    assert "incomplete, rank-00000 stopped: step 0 was not written: OSError: " in caplog.text


def test_a_disk_that_hangs_is_waited_for_only_so_long(tmp_path):
    """The queue is full, the training waits; then the capture ends."""
    release = threading.Event()

    class Slow:
        def detach(self):
            release.wait()
            return torch.zeros(1)

    identity = {"width": 1}
    writer = RowWriter(tmp_path, identity, rank=0, first_step=0, queue_steps=2, patience_seconds=0.2)
    for step in range(6):
        writer.put(step, {"rows": Slow()})
    assert "capture.patience_seconds" in writer.failure
    release.set()
    writer.close()


@pytest.mark.slow
def test_two_ranks_together_capture_what_one_process_does(streams, tmp_path, monkeypatch):
    """DDP over gloo: union of the ranks' rows, 1e-4 of the largest number (sums of gradients round differently)."""
    data = next(iter(streams.values())).parent
    commands = [[sys.executable, "-m", "tests.ranks", str(tmp_path / "two"), str(data), str(r), "2"] for r in range(2)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    train(tmp_path / "one", streams, 0, 1)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert set(two.steps["rank"]) == {0, 1}
    names = ("gradients", "preconditioned")
    capture = estimator_of("dvemb-adam")._capture(job_of(one))
    for step in range(STEPS):
        keyed = []
        for run in (one, two):
            arrays = CapturedRows(run, capture.identity, names).read(step)
            ids = [z for micro in next(records(run, step, step + 1)).micro_batches for z in micro[0]]
            order = np.argsort(ids)
            keyed.append([np.array(ids)[order], *(array[order] for array in arrays)])
        assert np.array_equal(keyed[0][0], keyed[1][0])
        for found, wanted in zip(keyed[1][1:], keyed[0][1:], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-4 * np.abs(wanted).max())
    replayed = step_rows(without_captures(two, tmp_path / "other"), "dvemb-adam")
    refuse_replay(monkeypatch)
    for step, arrays in step_rows(two, "dvemb-adam").items():
        for found, wanted in zip(arrays, replayed[step], strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-4 * np.abs(wanted).max())


def recorder_of(model, optimizer, folder):
    return TrajectoryRecorder(
        folder, RecorderConfig(), model, optimizer, task=TASK, streams={}, steps=10, seq_len=12, clip_norm=None
    )


def test_what_cannot_be_captured_is_refused_before_training(tmp_path):
    model = factory()
    recorder = recorder_of(model, torch.optim.SGD(model.parameters(), lr=0.1), tmp_path / "sgd")
    with pytest.raises(UserError, match="dvemb-adam follows AdamW, mix is trained with SGD; use dvemb"):
        RunCapture(recorder, CaptureConfig(estimator="dvemb-adam"))
    model.up.compile(backend="eager")
    with pytest.raises(UserError, match="up is compiled"):
        RunCapture(recorder, CaptureConfig())
    compiled = torch.compile(factory(), backend="eager")
    recorder = recorder_of(compiled, torch.optim.AdamW(compiled.parameters()), tmp_path / "compiled")
    with pytest.raises(UserError, match=r"the model is compiled \(torch.compile\)"):
        RunCapture(recorder, CaptureConfig())
