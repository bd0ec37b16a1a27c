"""The scheduler with the shipped trainer as its command: whole, piece by piece, killed, and with bad trainers."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from curate.artifacts import file_fingerprint, write_json
from curate.config import parse_command
from curate.errors import UserError
from curate.schedule import BUSY, MORE, TRAINER_FAILED, ScheduleConfig, carry_out, describe, pieces, selection_config
from curate.stages.lock import locked
from curate.stages.plan import load_plan
from curate.trajectory.ledger import stages
from curate.trajectory.run import Run
from tests.pipelines.test_pretrain import MODEL
from tests.tiny import SEQ_LEN, write_tiny_streams, write_tiny_target

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (
    f"{sys.executable} -m pipelines.pretrain --out {{out}} --data {{data}} --model {{model}} --steps {{steps}} "
    "--batch_size 8 --checkpoint_steps 4 --optimizer.warmup_steps 3 --recorder.windows.early [0,3] "
    "--recorder.windows.late [5,8]"
)


def write_plan(place, inputs, **changes):
    """Three stages over the same data; returns the plan's file."""
    stage = {"steps": 8, "settings": {"model": str(inputs / "model.json")}}
    plan = {
        "folder": str(place / "plan"),
        "data": str(inputs / "data"),
        "target": str(inputs / "target.jsonl"),
        "train": TRAIN + " --init_from {checkpoint}",
        "train_first": TRAIN,
        "selection": {
            "min_target_tokens": 100, "budget_tokens": 64 * SEQ_LEN, "tracking": {"mode": "none"},
            "mixture": {"max_epochs": 20},
        },
        "stages": [{"name": name, **stage} for name in ("one", "two", "three")],
        **changes,
    }  # fmt: skip
    path = place / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_tiny_streams(folder / "data")
    write_tiny_target(folder / "target.jsonl")
    write_json(folder / "model.json", MODEL)
    return folder


def start(plan, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "curate.schedule", "--plan", str(plan), *options], cwd=ROOT, env=environment,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def final_bytes(folder):
    """What must not depend on interruptions: scores, mixtures, data, embeddings, states."""
    patterns = "*/selection/scores.parquet", "*/selection/mixture.yaml", "*/run/checkpoint.safetensors"
    found = {str(path.relative_to(folder)): file_fingerprint(path) for each in patterns for path in folder.glob(each)}
    arrays = sorted(path for path in folder.glob("*/run/embeddings/*/embeddings.npy"))
    return {**found, **{str(path.relative_to(folder)): file_fingerprint(path) for path in arrays}}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A plan that was carried out without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_plan(folder, inputs)
    runner = start(path)
    _, errors = runner.communicate(timeout=280)
    assert runner.returncode == 0, errors
    return folder


def test_stages_follow_each_other(whole, inputs):
    plan = load_plan(whole / "plan.yaml")
    assert all(line.startswith("done") for line in describe(plan))
    assert [line.split()[1:3] for line in describe(plan)][:4] == [
        ["train", "one"], ["embed", "one"], ["select", "one"], ["train", "two"]
    ]  # fmt: skip
    third = Run(plan.run_folder(2))
    assert stages(third) == [plan.run_folder(0).resolve(), plan.run_folder(1).resolve(), plan.run_folder(2)]
    assert plan.data_of(2) == whole / "plan" / "two" / "selection" / "data" / "schedule.yaml"
    assert selection_config(plan, 1).earlier == (plan.run_folder(0),)
    assert not (whole / "plan" / "three" / "selection").exists()
    assert len(final_bytes(whole / "plan")) == 2 + 2 + 3 + 4


def test_killed_at_any_moment_it_ends_with_the_same_bytes(whole, inputs, tmp_path):
    path = write_plan(tmp_path, inputs)
    moments, kills = random.Random(0), 0
    while True:
        runner = start(path)
        try:
            runner.communicate(timeout=moments.uniform(3, 16) if kills < 7 else 280)
        except subprocess.TimeoutExpired:
            os.killpg(runner.pid, signal.SIGKILL)
            runner.communicate()
            kills += 1
            continue
        assert runner.returncode == 0
        break
    assert kills > 2
    assert final_bytes(tmp_path / "plan") == final_bytes(whole / "plan")


def test_piece_by_piece_the_status_says_whether_more_is_left(whole, monkeypatch):
    plan = load_plan(whole / "plan.yaml")
    assert carry_out(plan, once=True) == 0  # nothing is left
    done = []
    monkeypatch.setattr("curate.schedule.is_done", lambda plan, piece: piece in done)
    monkeypatch.setattr("curate.schedule.work", lambda plan, piece: done.append(piece))
    statuses = [carry_out(plan, once=True) for _ in pieces(plan)]
    assert statuses == [MORE] * (len(statuses) - 1) + [0]
    assert done == list(pieces(plan))


def test_two_runners_do_not_both_work(whole):
    with locked(whole / "plan" / "lock"):
        runner = start(whole / "plan.yaml")
        _, errors = runner.communicate(timeout=100)
    assert runner.returncode == BUSY
    assert "another runner" in errors
    with locked(whole / "plan" / "lock"):
        pass  # released


@pytest.mark.parametrize(
    ("train", "status", "message"),
    [
        (f"{sys.executable} -c 'raise SystemExit(7)'", TRAINER_FAILED, "exited with status 7"),
        ("no-such-program", TRAINER_FAILED, "no-such-program cannot be started"),
        (f"{sys.executable} -c pass", 2, "left no finished run"),
    ],
)
def test_a_trainer_that_fails_is_told(inputs, tmp_path, train, status, message):
    runner = start(write_plan(tmp_path, inputs, train=train, train_first=None))
    _, errors = runner.communicate(timeout=100)
    assert runner.returncode == status
    assert message in errors
    assert "Traceback" not in errors


def test_a_stage_that_is_not_the_plans_is_refused(whole, inputs, tmp_path):
    folder = str(whole / "plan")
    longer = {"name": "one", "steps": 9, "settings": {"model": "m"}}
    with pytest.raises(UserError, match=r"has 8 steps, stage one of the plan 9"):
        carry_out(load_plan(write_plan(tmp_path, inputs, folder=folder, stages=[longer])), once=True)
    write_tiny_streams(tmp_path / "other")
    with pytest.raises(UserError, match=r"trained on .*dataclasses, which is not in .*other"):
        carry_out(load_plan(write_plan(tmp_path, inputs, folder=folder, data=str(tmp_path / "other"))), once=True)
    with pytest.raises(UserError, match=r"has no final.pt for the next stage to start from"):
        carry_out(load_plan(write_plan(tmp_path, inputs, folder=folder, checkpoint="final.pt")), once=True)
    selection = {"min_target_tokens": 100, "tracking": {"mode": "none"}}
    with pytest.raises(UserError, match=r"selection is complete but was made .*budget_tokens"):
        carry_out(load_plan(write_plan(tmp_path, inputs, folder=folder, selection=selection)), once=True)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--plan", "p"], (False, False)),
        (["--once", "--plan", "p"], (True, False)),
        (["--plan", "p", "--dry-run"], (False, True)),
        (["--once", "false", "--plan=p", "--dry_run=true"], (False, True)),
    ],
)
def test_switches_need_no_value(arguments, wanted):
    config = parse_command(ScheduleConfig, "schedule", "", arguments)
    assert (config.once, config.dry_run) == wanted
    assert config.plan == Path("p")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": []}, "stages: "),
        ({"train": "train {lr}", "train_first": None}, r"asks for \{lr\}; there are data, model"),
        ({"train_first": None}, r"asks for \{checkpoint\}.*give it a train_first"),
        ({"train": "train {"}, "is not a template"),
        ({"colour": 1}, "colour: "),
        ({"stages": [{"name": "a", "steps": 1}] * 2}, "two stages are called a"),
    ],
)
def test_a_plan_that_does_not_hold_together_is_refused(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_plan(write_plan(tmp_path, inputs, **changes))


def test_settings_that_are_the_plans_own_or_nobodys_are_named(inputs, tmp_path):
    for selection, message in (
        ({"out": "x"}, r"selection.out is set by the plan"),
        ({"modee": 1}, r"selection.modee of"),
    ):
        with pytest.raises(UserError, match=message):
            selection_config(load_plan(write_plan(tmp_path, inputs, selection=selection)), 0)
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"cannot be read as a plan"):
        load_plan(tmp_path / "bad.yaml")
