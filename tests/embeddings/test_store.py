"""Whole windows: embeddings from a recorded run, their values against real removal, interruption, reuse."""

import numpy as np
import pytest
import torch

from curate.core.errors import UserError
from curate.embeddings import adjoint_estimator, dvemb_adam_estimator, dvemb_estimator
from curate.embeddings.estimators import AdjointConfig, DvembAdamConfig, DvembConfig, make_estimator
from curate.embeddings.store import embed_window, embedding_folder, plan_job
from curate.training.replay import Replay, records
from curate.training.run import Run
from curate.training.target import load_target, target_loss
from tests.tiny import Training

NAMES = ["adjoint", "dvemb", "dvemb-adam", "dvemb-adam-shortcut"]


@pytest.fixture
def run(folder, tmp_path):
    """A run of its own for tests that write below it."""
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    return Run(tmp_path / "run")


def job_of(run, folder, window="late", horizon="window_end", batch_size=4):
    target = load_target(folder / "target.jsonl", run.spec, min_tokens=100)
    return plan_job(Replay(run), window, horizon, target, batch_size=batch_size)


def make(name, **settings):
    shortcut = DvembAdamConfig(width=4, rows_per_block=10, shortcut=name.endswith("-shortcut"))
    projected = DvembConfig(width=4, rows_per_block=10)
    return make_estimator(name.removesuffix("-shortcut"), AdjointConfig(**settings), projected, shortcut)


def make_dvemb(**settings):
    return make_estimator("dvemb", AdjointConfig(), DvembConfig(**settings), DvembAdamConfig())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_values_rank_samples_like_removing_them(folder, run, name):
    """Replay the late window with one sample's gradient taken out, for every sample, and compare the target's loss."""
    job = job_of(run, folder)
    embedding = embed_window(job, "late", "window_end", make(name))
    values = embedding.vectors @ embedding.targets.T @ np.array(job.target.half_weights)
    removed = np.array([loss_without(job, row) for row in range(len(values))])
    ranks = [np.argsort(np.argsort(array)) for array in (values, removed)]
    assert np.corrcoef(*ranks)[0, 1] > {"adjoint": 0.9, "dvemb": 0.25}.get(name, 0.7)


def loss_without(job, row):
    """Target loss at the horizon after training the window without one (sample, step)."""
    replay, position = Replay(job.replay.run), 0
    optimizers = replay.restore(job.start)
    for record in records(job.replay.run, job.start, job.horizon):
        batches = replay.batches(record)
        replay.backward(batches, optimizers)
        for batch in batches:
            if position <= row < position + len(batch):
                weight = torch.zeros_like(batch.weights)
                weight[row - position] = batch.weights[row - position]
                (-(replay.task.sample_losses(batch) * weight).sum()).backward()
            position += len(batch)
        replay.update(record, optimizers)
    return target_loss(replay.task, job.target, 16)


@pytest.mark.parametrize("name", NAMES)
def test_the_batch_size_of_the_target_changes_nothing(folder, run, name):
    one = embed_window(job_of(run, folder, batch_size=4), "late", "window_end", make(name))
    first, targets = np.array(one.vectors), one.targets
    for path in one.folder.iterdir():
        path.unlink()
    other = embed_window(job_of(run, folder, batch_size=7), "late", "window_end", make(name))
    np.testing.assert_allclose(first, other.vectors, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(targets, other.targets, rtol=1e-3, atol=1e-7)


class Killed(BaseException):
    """Stands for kill -9 at a chosen place."""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_window_continues_to_the_same_bytes(folder, run, name, tmp_path, monkeypatch):
    job = job_of(run, folder, window="early", horizon="stage_end")
    whole = embed_window(job, "early", "stage_end", make(name))
    wanted = whole.vectors.tobytes(), (whole.folder / "manifest.json").read_bytes()
    Training(run.spec.streams).run(tmp_path / "again")
    again = job_of(Run(tmp_path / "again"), folder, window="early", horizon="stage_end")
    calls, original = [], adjoint_estimator.adjoint_step

    def killing(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise Killed
        return original(*arguments)

    monkeypatch.setattr(adjoint_estimator, "adjoint_step", killing)
    for module in (dvemb_estimator, dvemb_adam_estimator):
        monkeypatch.setattr(module, "recursion", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        embed_window(again, "early", "stage_end", make(name, save_seconds=0))
    monkeypatch.undo()
    continued = []
    monkeypatch.setattr(adjoint_estimator, "adjoint_step", lambda *a: continued.append(1) or original(*a))
    embedding = embed_window(again, "early", "stage_end", make(name, save_seconds=0))
    assert (embedding.vectors.tobytes(), (embedding.folder / "manifest.json").read_bytes()) == wanted
    assert len(continued) == (6 if name == "adjoint" else 0)
    assert not (embedding.folder / "scratch").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES[1:])
def test_an_interrupted_capture_continues_to_the_same_bytes(folder, run, name, tmp_path, monkeypatch):
    """Killed at the tenth step: the capture goes on from the last snapshot it passed, not from the start."""
    wanted = embed_window(job_of(run, folder, "early", "stage_end"), "early", "stage_end", make(name))
    Training(run.spec.streams).run(tmp_path / "again")
    again = job_of(Run(tmp_path / "again"), folder, "early", "stage_end")
    original, steps = Replay.steps, []

    def killed_at(last):
        def replayed(self, *arguments):
            for step in original(self, *arguments):
                steps.append(step.record.step)
                if step.record.step == last:
                    raise Killed
                yield step

        return replayed

    monkeypatch.setattr(Replay, "steps", killed_at(9))
    with pytest.raises(Killed):
        embed_window(again, "early", "stage_end", make(name))
    steps.clear()
    monkeypatch.setattr(Replay, "steps", killed_at(None))
    embedding = embed_window(again, "early", "stage_end", make(name))
    assert 0 < steps[0] <= 9
    assert embedding.vectors.tobytes() == wanted.vectors.tobytes()
    assert embedding.targets.tobytes() == wanted.targets.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_last_steps_of_a_window_have_the_values_that_they_have_in_the_whole(folder, run, name):
    whole = embed_window(job_of(run, folder), "late", "window_end", make(name))
    target = load_target(folder / "target.jsonl", run.spec, min_tokens=100)
    job = plan_job(Replay(run), "late", "window_end", target, batch_size=4, window_steps=2)
    part = embed_window(job, "late", "window_end", make(name))
    assert part.rows["sample_id"].to_list() == whole.rows["sample_id"].to_list()[12:]
    np.testing.assert_allclose(part.vectors, whole.vectors[12:], rtol=1e-4, atol=1e-9)


def test_a_complete_embedding_is_reused_and_other_settings_get_another_folder(folder, run):
    job = job_of(run, folder)
    first = embed_window(job, "late", "window_end", make("dvemb"))
    stamp = (first.folder / "embeddings.npy").stat().st_mtime_ns
    assert embed_window(job, "late", "window_end", make("dvemb")).folder == first.folder
    assert (first.folder / "embeddings.npy").stat().st_mtime_ns == stamp
    wider = make_dvemb(width=5)
    assert embedding_folder(job, "late", "window_end", wider)[0] != first.folder


def test_full_and_block_diagonal_operators_differ_only_through_the_operator(folder, run):
    job = job_of(run, folder)
    block = embed_window(job, "late", "window_end", make_dvemb(width=4))
    full = embed_window(job, "late", "window_end", make_dvemb(width=4, operator="full"))
    last = block.rows["step"].to_numpy() == 11
    np.testing.assert_allclose(block.vectors[last], full.vectors[last], rtol=1e-6)
    assert not np.allclose(block.vectors[~last], full.vectors[~last], rtol=1e-4)


def test_a_step_that_does_not_fit_into_memory_says_what_fits(folder, run):
    with pytest.raises(
        UserError, match=r"adjoint.memory_bytes is 10,000; the state of one step is 22,144 bytes: set it"
    ):
        embed_window(job_of(run, folder), "late", "window_end", make("adjoint", memory_bytes=10_000))
