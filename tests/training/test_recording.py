"""Recording changes nothing, survives a crash, and replays."""

import re
import shutil

import numpy as np
import polars as pl
import pytest
import torch

from curate.core.artifacts import list_files
from curate.core.errors import UserError
from curate.data.mds import COLUMNS, MdsStream, write_stream
from curate.training.declared import default_windows, window_steps
from curate.training.model import named_parameters
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.replay import Replay, records
from curate.training.run import STEPS, Run, find_run
from curate.training.samples import window_rows
from curate.training.snapshots import load_state, snapshot_schedule
from tests import tiny
from tests.tiny import Training, record_tiny_run, write_tiny_streams


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return record_tiny_run(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def copy(run, tmp_path) -> Run:
    """A run that a test may damage."""
    Training(run.spec.streams).run(tmp_path / "run")
    return Run(tmp_path / "run")


def test_losses_with_and_without_the_recorder_are_the_same_bits(run, tmp_path):
    without = Training(run.spec.streams).run(None)
    assert Training(run.spec.streams).run(tmp_path / "run") == without


def test_the_record_holds_what_training_did(run):
    losses = Training(run.spec.streams).run(None)
    assert run.steps.schema == STEPS
    assert len(run.steps) == tiny.STEPS * 2
    assert run.steps.filter(pl.col("micro_batch") == 0)["loss"].to_list() == losses
    for record in records(run, 0, tiny.STEPS):
        assert record.size == 6
        assert sum(sum(weights) for _, weights in record.micro_batches) == pytest.approx(1, abs=1e-6)
        assert record.groups[0].lr == pytest.approx(1e-2 * (1 - record.step / 24))
        assert (record.groups[0].weight_decay, record.groups[1].weight_decay) == (0.1, 0.0)
        assert record.clip_factor == pytest.approx(min(1, tiny.CLIP_NORM / (record.grad_norm + 1e-6)))
    assert any(record.clip_factor < 1 for record in records(run, 0, tiny.STEPS))


def test_replay_from_every_snapshot_repeats_training(run):
    assert {0, 4, 8, 12} <= set(run.snapshots)
    replay = Replay(run, tolerance=1e-5)
    for start in (0, 4, 8):
        for _ in replay.steps(start, tiny.STEPS):
            pass
        replayed = {name: tensor.clone() for name, tensor in named_parameters(replay.model).items()}
        load_state(run.snapshot(tiny.STEPS), replay.model)
        for name, tensor in named_parameters(replay.model).items():
            torch.testing.assert_close(tensor, replayed[name], rtol=1e-5, atol=1e-7)


def test_states_hold_what_each_update_read(run):
    replay = Replay(run)
    states = list(replay.states(2, 5))
    assert [state.record.step for state in states] == [2, 3, 4]
    assert [state.updates for state in states] == [[2, 2], [3, 3], [4, 4]]
    replay.load(4)
    parameters = replay.layout.flatten(named_parameters(replay.model))
    torch.testing.assert_close(states[2].parameters, parameters, rtol=0, atol=0)
    assert (states[2].second_moment >= 0).all()


def test_a_run_killed_and_resumed_records_the_same(run, tmp_path):
    """Rows after the last flush are lost with the process; the trainer repeats those steps and the record has each
    step once.
    """
    config = RecorderConfig(windows={"early": (0, 4), "late": (8, tiny.STEPS)}, flush_steps=5)
    Training(run.spec.streams).run(tmp_path / "run", config, stop=9)
    with pytest.raises(UserError, match=r"not finished.*resume"):
        Run(tmp_path / "run")
    Training(run.spec.streams).run(tmp_path / "run", config)
    assert Run(tmp_path / "run").steps.equals(run.steps)
    assert Run(tmp_path / "run").fingerprint == run.fingerprint


def test_window_rows_name_each_sample_with_its_documents(run):
    rows = window_rows(run, "late", 8, 12, "window_end")
    assert rows["step"].to_list() == list(np.repeat(np.arange(8, 12), 6))
    assert rows["row"].to_list() == list(range(24))
    first = run.streams[rows["domain"][0]][rows["index"][0]]
    assert first.sample_id == rows["sample_id"][0]
    assert first.predicted_tokens == rows["predicted_tokens"][0]
    assert sum(document["predicted_tokens"] for document in rows["documents"][0]) == rows["predicted_tokens"][0]
    assert rows["domain"].unique().sort().to_list() == ["dataclasses", "json"]


def test_training_does_not_go_on_over_a_gap_in_the_records(run, tmp_path):
    config = RecorderConfig(windows={"early": (0, 4), "late": (8, tiny.STEPS)}, flush_steps=3)
    Training(run.spec.streams).run(tmp_path / "run", config, stop=9)
    parts = sorted((tmp_path / "run" / "steps.parts").glob("*/*.parquet"))
    assert len(parts) == 3
    kept = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(UserError, match=r"no record of step 3.* at step 8"):
        Training(run.spec.streams).run(tmp_path / "run", config, start=8)
    parts[1].write_bytes(kept[:50] + bytes([kept[50] ^ 1]) + kept[51:])
    with pytest.raises(UserError, match=re.escape(f"{parts[1]} is corrupted")):
        Training(run.spec.streams).run(tmp_path / "run", config, start=8)
    parts[1].write_bytes(kept)
    Training(run.spec.streams).run(tmp_path / "run", config, start=8)
    assert Run(tmp_path / "run").steps.equals(run.steps)


def test_the_newest_finished_run_is_found(run, tmp_path):
    assert find_run(run.folder.parent) == run.folder
    with pytest.raises(UserError, match="no finished run"):
        find_run(tmp_path)


class TestBadInput:
    def test_another_loss_is_named_with_step_numbers_and_causes(self, copy):
        steps = copy.steps.with_columns(loss=pl.when(pl.col("step") == 5).then(pl.col("loss") * 1.01).otherwise("loss"))
        steps.write_parquet(copy.folder / "steps.parquet")
        list_files(copy.folder, [copy.folder / "steps.parquet"])
        with pytest.raises(UserError, match=r"replay of step 5 gives loss .* recorded was .*dropout"):
            list(Replay(Run(copy.folder)).steps(4, 8))

    def test_a_truncated_record(self, copy):
        path = copy.folder / "steps.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(UserError, match=r"steps.parquet is corrupted"):
            Run(copy.folder)

    def test_a_missing_step(self, copy):
        copy.steps.filter(pl.col("step") != 7).write_parquet(copy.folder / "steps.parquet")
        list_files(copy.folder, [copy.folder / "steps.parquet"])
        with pytest.raises(UserError, match="lacks step 7"):
            Run(copy.folder).steps  # noqa: B018

    def test_no_snapshots(self, copy):
        for path in (copy.folder / "snapshots").iterdir():
            path.unlink()
        with pytest.raises(UserError, match=r"no snapshots.*recorder's windows"):
            Run(copy.folder)

    def test_a_truncated_snapshot(self, copy):
        path = copy.snapshot(4)
        path.write_bytes(path.read_bytes()[:-10])
        with pytest.raises(UserError, match=r"step-00000004.safetensors is corrupted"):
            Replay(copy).load(4)

    def test_a_snapshot_of_another_model(self, run):
        with pytest.raises(UserError, match=r"is of another model: 8 tensors differ"):
            load_state(run.snapshot(4), tiny.TinyLM(width=6))

    def test_streams_changed_after_training(self, run, tmp_path):
        streams = write_tiny_streams(tmp_path / "data")
        Training(streams).run(tmp_path / "run")
        write_tiny_streams(tmp_path / "data", samples=3)
        with pytest.raises(UserError, match="they were changed after training"):
            list(Replay(Run(tmp_path / "run")).steps(0, 4))

    def test_a_corrupted_shard(self, run, tmp_path):
        streams = write_tiny_streams(tmp_path / "data")
        Training(streams).run(tmp_path / "run")
        shard = streams["json"] / "shard.00000.mds"
        shard.write_bytes(shard.read_bytes()[:-7])
        with pytest.raises(UserError, match=r"shard.00000.mds has .* bytes, its index says .* corrupted"):
            list(Replay(Run(tmp_path / "run")).steps(0, 4))

    def test_a_shard_with_flipped_bytes(self, run, tmp_path):
        streams = write_tiny_streams(tmp_path / "data")
        Training(streams).run(tmp_path / "run")
        shard = streams["json"] / "shard.00000.mds"
        content = bytearray(shard.read_bytes())
        content[-20] ^= 0xFF
        shard.write_bytes(bytes(content))
        with pytest.raises(UserError, match=r"shard.00000.mds is corrupted: its xxh64"):
            list(Replay(Run(tmp_path / "run")).steps(0, 4))

    def test_a_finished_run_is_not_overwritten(self, run):
        with pytest.raises(UserError, match="holds a finished run"):
            Training(run.spec.streams).run(run.folder)

    def test_an_unknown_window(self, run):
        with pytest.raises(UserError, match=r"no window 'middle'.*early"):
            run.window("middle")


def test_a_moved_run_and_moved_streams_still_replay(copy, tmp_path):
    for stream in copy.spec.streams.values():
        shutil.copytree(stream, tmp_path / "elsewhere" / stream.name)
    before = copy.fingerprint
    copy.folder.rename(tmp_path / "moved")
    moved = Run(tmp_path / "moved", {name: tmp_path / "elsewhere" / name for name in copy.spec.streams})
    assert moved.fingerprint == before
    assert len(list(Replay(moved).steps(8, 12))) == 4


def test_copies_of_another_domain_are_said_and_a_domain_of_copies_is_refused(tmp_path, caplog):
    streams = write_tiny_streams(tmp_path / "data")
    rows = [MdsStream(streams["json"]).row(index) for index in range(80)]
    write_stream(tmp_path / "data" / "zzz", COLUMNS, rows)
    Training({**streams, "zzz": tmp_path / "data" / "zzz"}).run(tmp_path / "run")
    copied = Run(tmp_path / "run")
    with pytest.raises(UserError, match="domain zzz holds only exact copies"):
        copied.unique_samples  # noqa: B018
    assert "80 samples are exact copies" in caplog.text


def test_what_replay_could_not_repeat_is_refused_before_training(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.1))
    settings = {"task": tiny.TASK, "streams": {}, "steps": 10, "seq_len": 8, "clip_norm": None}

    def recorder(model, optimizer, **changes):
        return TrajectoryRecorder(tmp_path / "run", RecorderConfig(), model, optimizer, **{**settings, **changes})

    with pytest.raises(UserError, match="1 is a dropout with p > 0"):
        recorder(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(UserError, match="/data/web"):
        recorder(model[0], torch.optim.AdamW(model[0].parameters()), streams={"/data/web": tmp_path})


def test_windows_as_fractions_and_steps():
    assert window_steps({"early": (0.0, 0.1), "late": (350, 1.0)}, 400) == {"early": (0, 40), "late": (350, 400)}
    assert default_windows(2000) == {"early": (0, 50), "late": (1950, 2000)}
    assert default_windows(300) == {"early": (0, 30), "late": (270, 300)}
    with pytest.raises(UserError, match=r"window 'late' covers steps 350 to 500 of a stage of 400"):
        window_steps({"late": (350, 500)}, 400)


def test_snapshots_at_borders_first_then_a_cadence_within_the_budget():
    windows = {"early": (0, 10), "late": (90, 100)}
    assert snapshot_schedule(windows, 100, 8, 10, 40) == {0, 10, 90, 100}
    assert snapshot_schedule(windows, 100, 4, 10, 1000) == {0, 10, 25, 50, 75, 90, 100}
    with pytest.raises(UserError, match=r"need 40 bytes, 39 are there"):
        snapshot_schedule(windows, 100, 8, 10, 39)
