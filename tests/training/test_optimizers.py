"""Every supported optimizer, or mix of them, is recorded, replayed and resumed; every other one is refused at once."""

from itertools import pairwise

import pytest
import torch

from curate.core.errors import UserError
from curate.optimizers.state import TrainingState
from curate.optimizers.step import update_state
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.replay import Replay, records
from curate.training.run import Run
from curate.training.snapshots import load_state, state_bytes
from tests import tiny
from tests.tiny import OPTIMIZERS, Training, build_optimizers, write_tiny_streams


@pytest.fixture(scope="module")
def streams(tmp_path_factory):
    return write_tiny_streams(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", params=OPTIMIZERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(name, streams, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("recorded")
    Training(streams, optimizer=name).run(folder / "run")
    return Run(folder / "run")


def test_recording_changes_nothing_and_replay_repeats_every_step(run, name):
    losses = run.steps["loss"].to_list()[::2]
    assert Training(run.spec.streams, optimizer=name).run(None) == losses
    replay = Replay(run, tolerance=1e-6)
    for start in (0, 4, 8):
        assert len(list(replay.steps(start, tiny.STEPS))) == tiny.STEPS - start
        replayed = replay.layout.flatten(dict(replay.model.named_parameters())).detach()
        replay.load(tiny.STEPS)
        recorded = replay.layout.flatten(dict(replay.model.named_parameters())).detach()
        torch.testing.assert_close(replayed, recorded, rtol=0, atol=0)


def test_states_follow_from_each_other_by_the_pure_update(run):
    """Names, slices, shapes, settings and counts of updates of a real run are those of the pure functions."""
    replay = Replay(run)
    states = list(replay.states(0, 6))
    muon = run.spec.optimizers[0] == "Muon"
    for before, after in pairwise(states):
        new = update_state(
            TrainingState(
                parameters=before.parameters, momentum=before.momentum, second_moment=before.second_moment
            ),
            before.gradient, before.updates, replay.layout.groups(before.record.groups), run.spec.clip_norm,
        )  # fmt: skip
        torch.testing.assert_close(new.momentum, after.momentum, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(new.second_moment, after.second_moment, rtol=1e-5, atol=1e-9)
        exact = slice(replay.layout.group_slices[0].stop if muon else 0, None)
        torch.testing.assert_close(new.parameters[exact], after.parameters[exact], rtol=1e-5, atol=1e-6)
        moved = float((after.parameters - before.parameters).norm())
        assert float((new.parameters - after.parameters).norm()) < (0.02 if muon else 1e-4) * moved


def test_a_run_killed_and_resumed_from_its_state_records_the_same(run, name, tmp_path):
    training = Training(run.spec.streams, optimizer=name)
    training.run(tmp_path / "run", RecorderConfig(windows={"early": (0, 4), "late": (8, 12)}, flush_steps=2), stop=10)
    training.run(tmp_path / "run", start=8)
    assert Run(tmp_path / "run").steps.equals(run.steps)
    assert Run(tmp_path / "run").fingerprint == run.fingerprint
    for step in run.snapshots:
        assert Run(tmp_path / "run").snapshot(step).read_bytes() == run.snapshot(step).read_bytes()


def test_a_rewound_replay_takes_the_same_steps_again(run):
    replay = Replay(run)
    optimizers = replay.restore(4)
    checkpoint = replay.checkpoint(optimizers)
    kept = {key: tensor.clone() for key, tensor in checkpoint.items()}
    ends = []
    for _ in range(3):
        for record in records(run, 4, 7):
            replay.backward(replay.batches(record), optimizers)
            replay.update(record, optimizers)
        ends.append(replay.checkpoint(optimizers))
        replay.rewind(checkpoint, optimizers)
    for key, tensor in kept.items():
        torch.testing.assert_close(checkpoint[key], tensor, rtol=0, atol=0)
    for end in ends[1:]:
        assert end.keys() == ends[0].keys()
        for key, tensor in end.items():
            torch.testing.assert_close(tensor, ends[0][key], rtol=0, atol=0)
    assert any(not torch.equal(tensor, kept[key]) for key, tensor in ends[0].items())


@pytest.mark.parametrize("other", ["AdamW", "momentum", "Muon"])
def test_a_snapshot_of_another_optimizer_is_refused(run, name, other):
    model = tiny.factory()
    optimizers = build_optimizers(model, other)
    kept = {"Adam": "AdamW", "Nesterov": "momentum", "Muon without Nesterov": "Muon"}.get(name, name)
    if kept in (other, "SGD"):  # the same buffers, or none
        load_state(run.snapshot(4), model, optimizers)
    else:
        with pytest.raises(UserError, match=r"snapshot .* was written with another optimizer"):
            load_state(run.snapshot(4), model, optimizers)


def test_a_snapshots_size_is_known_before_training(run, name):
    model = tiny.factory()
    stated = state_bytes(model, build_optimizers(model, name))
    assert stated <= run.snapshot(8).stat().st_size < stated + 6000  # names and shapes


def test_what_replay_could_not_rebuild_is_refused_before_training(tmp_path):
    model = torch.nn.Linear(2, 2)
    settings = {"task": tiny.TASK, "streams": {}, "steps": 10, "seq_len": 8, "clip_norm": None}
    parameters = list(model.parameters())

    def recorder(*optimizers, model=model):
        return TrajectoryRecorder(tmp_path / "run", RecorderConfig(), model, optimizers, **settings)

    class AdamW(torch.optim.AdamW):
        """Another's optimizer of torch's name."""

    adam, adamw, sgd = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD
    with pytest.raises(UserError, match=r"the optimizer is torch.optim.\w+.RMSprop.*AdamW, Adam, SGD, Muon"):
        recorder(torch.optim.RMSprop(parameters))
    with pytest.raises(UserError, match=r"the optimizer is .*test_optimizers.*AdamW; values"):
        recorder(AdamW(parameters))
    with pytest.raises(UserError, match=r"AdamW with amsgrad cannot be replayed; set amsgrad=False"):
        recorder(adamw(parameters, amsgrad=True))
    with pytest.raises(UserError, match=r"SGD with maximize cannot be replayed; set maximize=False"):
        recorder(sgd(parameters, lr=0.1, maximize=True))
    with pytest.raises(UserError, match=r"Adam with decoupled_weight_decay=True .* use torch.optim.AdamW"):
        recorder(adam(parameters, decoupled_weight_decay=True))
    with pytest.raises(UserError, match="SGD holds a parameter that another optimizer holds too"):
        recorder(adam(parameters), sgd(parameters[1:], lr=0.1))
    table = torch.nn.Embedding(3, 2, sparse=True)
    with pytest.raises(UserError, match="has sparse gradients"):
        recorder(sgd(table.parameters(), lr=0.1), model=torch.nn.Sequential(table))
    assert not (tmp_path / "run").exists()
