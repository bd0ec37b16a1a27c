"""States last step first: the same bits within any memory limit, and plans that hold what they say."""

import re
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.embeddings.states import plan_states, states_backward
from curate.training.recorder import RecorderConfig
from curate.training.replay import Replay
from curate.training.run import Run
from tests.tiny import Training, write_tiny_streams

AMPLE = 10**12
START, STOP = 1, 12
VECTORS = ("parameters", "momentum", "second_moment", "gradient")


@pytest.fixture(scope="module", params=["AdamW", "Muon"])
def run(request, tmp_path_factory):
    """Snapshots at 0, 3, 6, 9 and the windows' borders only: most checkpoints stand elsewhere."""
    folder = tmp_path_factory.mktemp("states")
    streams = write_tiny_streams(folder / "data")
    config = RecorderConfig(windows={"early": (0, 4), "late": (8, 12)}, cadence_snapshots=4)
    Training(streams, optimizer=request.param).run(folder / "run", config)
    return Run(folder / "run")


@pytest.fixture(scope="module")
def whole(run):
    return list(Replay(run).states(START, STOP))


def plan_of(replay, steps, stop=STOP):
    return plan_states(replay.layout.size, START, stop, steps * 16 * replay.layout.size, AMPLE)


def check_same(found, wanted):
    assert [state.record.step for state in found] == [state.record.step for state in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.updates == other.updates
        for name in VECTORS:
            assert torch.equal(getattr(one, name), getattr(other, name)), (one.record.step, name)
        for batch, again in zip(one.batches, other.batches, strict=True):
            assert torch.equal(batch.tokens, again.tokens)
            assert torch.equal(batch.weights, again.weights)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 3, 4, 10, 11, 50])
def test_any_memory_limit_gives_the_same_states(run, whole, tmp_path, steps):
    replay = Replay(run)
    found = list(states_backward(replay, plan_of(replay, steps), tmp_path / "states"))
    check_same(found, whole[::-1])
    assert not (tmp_path / "states").exists()


@pytest.mark.parametrize("stopped_at", [11, 8, 7, 2])
def test_an_interrupted_pass_goes_on_with_its_checkpoints(run, whole, tmp_path, monkeypatch, stopped_at):
    """Killed while the state of a step was in use, all checkpoints written; then called again up to that step."""
    replay = Replay(run)
    for state in states_backward(replay, plan_of(replay, 3), tmp_path):
        if state.record.step == stopped_at:
            break
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"state-{s:08d}.safetensors" for s in (4, 7, 10)]
    replayed, original = [], Replay.steps
    monkeypatch.setattr(Replay, "steps", lambda self, *a, **k: replayed.append(a[:2]) or original(self, *a, **k))
    found = list(states_backward(replay, plan_of(replay, 3, stopped_at + 1), tmp_path))
    check_same(found, whole[stopped_at - START :: -1])
    starts = [START, *(start for start in (4, 7, 10) if start <= stopped_at)]
    assert replayed == [(a, b) for a, b in pairwise([*starts, stopped_at + 1])][::-1]  # no second pass of checkpoints


def test_missing_checkpoints_are_made_from_the_one_before_and_those_of_another_plan_are_deleted(
    run, whole, tmp_path, monkeypatch
):
    replay = Replay(run)
    for steps in (2, 3):  # 3, 5, 7, 9, 11, then 4, 7, 10
        next(iter(states_backward(replay, plan_of(replay, steps), tmp_path)))
    assert [path.name for path in sorted(tmp_path.iterdir())] == [f"state-{s:08d}.safetensors" for s in (4, 7, 10)]
    (tmp_path / "state-00000010.safetensors").unlink()
    replayed, original = [], Replay.steps
    monkeypatch.setattr(Replay, "steps", lambda self, *a, **k: replayed.append(a[:2]) or original(self, *a, **k))
    check_same(list(states_backward(replay, plan_of(replay, 3), tmp_path)), whole[::-1])
    assert replayed[0] == (7, 11)


def test_an_empty_range_has_no_states(run, tmp_path):
    replay = Replay(run)
    assert not list(states_backward(replay, plan_of(replay, 3, START), tmp_path / "states"))


PARAMETERS = st.integers(1, 10**9)
STEPS = st.integers(0, 2000)


@given(parameters=PARAMETERS, start=STEPS, steps=STEPS, memory=st.integers(1, 3000), disk=st.integers(0, 3000))
def test_a_plan_covers_the_steps_and_fits(parameters, start, steps, memory, disk):
    """`memory` and `disk` count states and checkpoints."""
    state, checkpoint, stop = 16 * parameters, 12 * parameters, start + steps
    arguments = parameters, start, stop
    try:
        plan = plan_states(*arguments, memory * state + state - 1, disk * checkpoint + checkpoint - 1)
    except UserError as error:
        fitting_disk, fitting_memory = re.search(
            r"set it to (\d+), or adjoint.memory_bytes to (\d+)$", str(error)
        ).groups()
        plan_states(*arguments, memory * state, int(fitting_disk))
        with pytest.raises(UserError):
            plan_states(*arguments, memory * state, int(fitting_disk) - 1)
        plan_states(*arguments, int(fitting_memory), disk * checkpoint)
        with pytest.raises(UserError):
            plan_states(*arguments, int(fitting_memory) - state, disk * checkpoint)
        return
    borders = [*plan.starts, plan.stop]
    lengths = [b - a for a, b in pairwise(borders)]
    assert plan.stop == stop
    assert sum(lengths) == steps
    assert not steps or plan.starts[0] == start
    assert all(0 < length <= memory for length in lengths)
    assert len(lengths) <= disk + 1
    assert plan.replays == (2 if len(lengths) > 1 else 1)


def test_limits_that_are_too_small_say_what_fits():
    with pytest.raises(UserError, match=r"adjoint.memory_bytes is 1,599; the state of one step is 1,600 bytes: set it"):
        plan_states(100, 0, 10, 1599, AMPLE)
    message = (
        r"10 steps in segments of 3 need 3 checkpoints of 1,200 bytes, adjoint.disk_bytes is 2,400: set it to 3600, or "
        r"adjoint.memory_bytes to 6400$"
    )
    with pytest.raises(UserError, match=message):
        plan_states(100, 0, 10, 3 * 1600, 2400)
