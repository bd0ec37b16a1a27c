"""Values of one more step against training that really takes that step with the sample, in float64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from curate.data.mds import COLUMNS, write_stream
from curate.influence.current import NextStepOptions, value_next_step
from curate.training.layout import FlatLayout
from curate.training.replay import Replay, optimizer_state, records
from curate.training.run import ContinuedRun, Run
from curate.training.samples import usable_samples
from curate.training.source import SampleSource
from curate.training.target import load_target
from curate.training.task import Task, collate
from tests.tiny import STEPS, Training, write_tiny_streams, write_tiny_target

LR_SHARE = 0.1  # of the median lr: the step that values are about, by which they are divided again


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


@pytest.fixture(scope="module", params=["AdamW", "SGD", "momentum"])
def problem(request, tmp_path_factory):
    """A run, two targets, and candidates that it never saw."""
    folder = tmp_path_factory.mktemp("next")
    Training(write_tiny_streams(folder / "data"), optimizer=request.param).run(folder / "run")
    run = Run(folder / "run")
    paths = [write_tiny_target(folder / f"{name}.jsonl", length=size) for name, size in (("t", 30), ("u", 24))]
    targets = [load_target(path, run.spec, 100) for path in paths]
    seen = set(run.steps["sample_ids"].explode())
    for domain, stream in run.streams.items():
        rows = [stream.row(at) for at in range(len(stream)) if stream[at].sample_id not in seen]
        write_stream(folder / "new" / domain, COLUMNS, rows[:10], shard_bytes=2000)
    candidates = SampleSource(run.folder, {name: folder / "new" / name for name in run.streams}, run.spec.columns)
    return run, targets, candidates


def losses_after(run, targets, sample, factor):
    """Training goes on for a step with the sample in it at so many times its weight; the targets' losses then."""
    continued = ContinuedRun(run, LR_SHARE)
    replay = Double(continued)
    optimizers = replay.restore(STEPS)
    (record,) = records(continued, STEPS, STEPS + 1)
    step_tokens = float(run.steps["tokens"].list.sum().sum()) / run.spec.steps
    batches = replay.batches(record)
    if factor:
        weight = torch.tensor([factor * sample.predicted_tokens / step_tokens], dtype=torch.float64)
        batches.append(replace(collate([sample], np.ones(1, np.float32)), weights=weight))
    replay.backward(batches, optimizers)
    replay.update(record, optimizers)
    with torch.no_grad():
        return np.array([sum(share * loss_of(replay, half) for half, share in halves(target)) for target in targets])


def halves(target):
    return zip(target.halves, target.half_weights, strict=True)


def loss_of(replay, half):
    return float((replay.task.sample_losses(half) * half.weights.double()).sum())


def test_values_are_those_of_a_step_with_the_sample(problem):
    """Its derivative by the sample's weight, as near as a float32 difference of two passes comes; a whole sample adds
    what is beyond first order (clipping, Adam's scale), which hardly changes the order of samples."""
    run, targets, candidates = problem
    samples = usable_samples(candidates.unique_samples)
    made = value_next_step(run, candidates, samples, targets, NextStepOptions(per_domain=100), "candidates")
    found = [made.values.filter(target=target.name) for target in targets]
    assert [frame["sample_id"].to_list() for frame in found] == [samples["sample_id"].to_list()] * len(targets)
    shown = [sample for batch in candidates.read_batches(samples, 64) for sample in batch]
    h, before = 1e-4, losses_after(run, targets, shown[0], 0)
    ends = [[losses_after(run, targets, one, factor) for factor in (-h, h, 1)] for one in shown]
    slopes = np.array([(less - more) / (2 * h * LR_SHARE) for less, more, _ in ends])
    whole = np.array([(before - after) / LR_SHARE for *_, after in ends])
    for place, frame in enumerate(found):
        values = frame["value_total_nats"].to_numpy()
        assert np.abs(values - slopes[:, place]).max() < 0.08 * slopes[:, place].std()
        assert spearmanr(values, slopes[:, place]).statistic > 0.99
        assert spearmanr(values, whole[:, place]).statistic > 0.9
