"""Probes against training that really goes on with the sample, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.data.mds import MdsStream
from curate.pools.probe import look_ahead, probe_values
from curate.training.target import load_target
from curate.training.task import Task, collate
from curate.training.layout import FlatLayout
from curate.training.replay import Replay, optimizer_state, records
from curate.training.run import Run
from tests.tiny import STEPS, Training, write_tiny_streams, write_tiny_target

AHEAD, LR_SHARE = 4, 0.5


class Double(Replay):
    """A replay in float64, from the recorded float32 states."""

    def __init__(self, run):
        super().__init__(run, tolerance=1.0)
        self.task = Task(run.spec.task, dtype=torch.float64)
        self.layout = FlatLayout(self.task.model, run.spec.groups)

    def restore(self, step, checkpoint=None):
        optimizers = super().restore(step, checkpoint)
        for buffers in optimizer_state(optimizers).values():
            for name, value in buffers.items():
                if name != "step":
                    buffers[name] = value.double()
        return optimizers


@pytest.fixture(scope="module", params=["AdamW", "momentum"])
def problem(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("probe")
    Training(write_tiny_streams(folder / "data"), optimizer=request.param).run(folder / "run")
    run = Run(folder / "run")
    target = load_target(write_tiny_target(folder / "target.jsonl"), run.spec, 100)
    losses = [replace(half, weights=half.weights.double()) for half in target.halves]
    stream = MdsStream(run.spec.streams["json"])
    used = set(run.steps["sample_ids"].explode())
    new = [sample for i in range(len(stream)) if (sample := stream[i]).sample_id not in used]
    return run, losses, new[:6]


def step_tokens(run):
    return float(run.steps["tokens"].list.sum().sum()) / run.spec.steps


def losses_after(run, losses, sample, factor):
    """Training goes on for the same steps, with the sample in the first of them at so many times its weight."""
    continued = run.continued(AHEAD, LR_SHARE)
    replay = Double(continued)
    optimizers = replay.restore(STEPS)
    for record in records(continued, STEPS, STEPS + AHEAD):
        batches = replay.batches(record)
        if record.step == STEPS and factor:
            weight = factor * sample.predicted_tokens / step_tokens(run)
            batch = collate([sample], np.ones(1, np.float32))
            batches.append(replace(batch, weights=torch.tensor([weight], dtype=torch.float64)))
        replay.backward(batches, optimizers)
        replay.update(record, optimizers)
    with torch.no_grad():
        return np.array([float((replay.task.sample_losses(half) * half.weights).sum()) for half in losses])


def values_of(run, losses, samples, folder, **settings):
    replay, config = Double(run.continued(AHEAD, LR_SHARE)), AdjointConfig(**settings)
    outlook = look_ahead(replay, STEPS, losses, config, batch_size=16, scratch=folder)
    return probe_values(replay, outlook, samples, config, step_tokens=step_tokens(run), scratch=folder)


def test_linear_probes_are_the_derivative_of_training_on_the_sample(problem, tmp_path):
    run, losses, new = problem
    found = values_of(run, losses, [new], tmp_path, own_step="linear")
    h = 1e-4
    for sample, row in zip(new, found, strict=True):
        slope = (losses_after(run, losses, sample, -h) - losses_after(run, losses, sample, h)) / (2 * h)
        np.testing.assert_allclose(row, slope, rtol=2e-3, atol=2e-3 * np.abs(found).max())


def test_exact_own_steps_come_nearer_to_a_whole_sample(problem, tmp_path):
    run, losses, new = problem
    before = losses_after(run, losses, new[0], 0)
    truth = np.array([before - losses_after(run, losses, sample, 1) for sample in new])
    errors = {
        own: np.abs(values_of(run, losses, [new], tmp_path / own, own_step=own) - truth).max()
        for own in ("exact", "linear")
    }
    assert errors["exact"] <= errors["linear"] * 1.001
    assert errors["exact"] < 0.25 * np.abs(truth).max()


def test_batches_change_nothing_and_an_interrupted_call_goes_on(problem, tmp_path, monkeypatch):
    run, losses, new = problem
    whole = values_of(run, losses, [new], tmp_path / "a")
    monkeypatch.setattr("curate.pools.probe._SAVED", 1)
    values_of(run, losses, [new[:1], new[1:4]], tmp_path / "b")  # interrupted before the last batch
    monkeypatch.setattr("curate.pools.probe.loss_gradients", None)  # the look ahead is kept
    parts = values_of(run, losses, [new[:1], new[1:4], new[4:]], tmp_path / "b")
    np.testing.assert_allclose(parts, whole, rtol=1e-6, atol=1e-12)
