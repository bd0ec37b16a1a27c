"""The scheduler with the shipped trainer as its command: whole, piece by piece, killed, and with bad trainers."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from curate.core.artifacts import file_fingerprint, list_files, write_json
from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.mixture.constraints import MixtureConfig
from curate.plans.check import check_data, check_stage, check_states, check_supply, open_stage
from curate.plans.plan import load_plan
from curate.plans.runner import (
    BUSY,
    MORE,
    TRAINER_FAILED,
    carry_out,
    check_plan,
    describe,
    is_done,
    pieces,
    selection_config,
)
from curate.schedule import ScheduleConfig
from curate.training.run import Run
from curate.training.token_accounting import stages
from tests.crash import crash_environment
from tests.pipelines.test_pretrain import MODEL
from tests.tiny import SEQ_LEN, write_tiny_streams, write_tiny_target

pytestmark = pytest.mark.timeout(1800)
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
            "mode": "both", "budget_tokens": 64 * SEQ_LEN, "output": {"wandb": "none"},
            "values": {"min_target_tokens": 100, "sources": ["early", "late"]},
            "mixture": {"max_epochs": 20, "schedule": "early-and-late"},
        },
        "stages": [{"name": name, **stage} for name in ("one", "two", "three")],
        **changes,
    }  # fmt: skip
    place.mkdir(exist_ok=True)
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


def start(plan, environment=None):
    return subprocess.Popen(
        [sys.executable, "-m", "curate.schedule", "--plan", str(plan)], cwd=ROOT, env=environment,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def final_bytes(folder):
    """What must not depend on interruptions: scores, mixtures, data, embeddings, states."""
    patterns = "*/selection/scores.parquet", "*/selection/mixture.yaml", "*/run/checkpoint.safetensors"
    patterns += ("*/run/final.pt", "*/run/steps.parquet", "*/selection/data/mds/**/*.*")
    found = {str(path.relative_to(folder)): file_fingerprint(path) for each in patterns for path in folder.glob(each)}
    for path in folder.glob("*/selection/data/schedule.yaml"):
        entries = yaml.safe_load(path.read_text())
        chosen = [{Path(s["local"]).name: s["choose"] for s in entry["streams"]} for entry in entries]
        found[str(path.relative_to(folder))] = [entry["start_sample"] for entry in entries], chosen
    arrays = sorted(path for path in folder.glob("*/run/embeddings/*/embeddings.npy"))
    return {**found, **{str(path.relative_to(folder)): file_fingerprint(path) for path in arrays}}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    """A plan that was carried out without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    path = write_plan(folder, inputs)
    runner = start(path)
    _, errors = runner.communicate()
    assert runner.returncode == 0, errors
    return folder


@pytest.mark.slow
def test_stages_follow_each_other(whole, inputs):
    plan = load_plan(whole / "plan.yaml")
    assert all(line.startswith("done") for line in describe(plan))
    assert [line.split()[1:3] for line in describe(plan)][:4] == [
        ["train", "one"], ["embed", "one"], ["select", "one"], ["train", "two"]
    ]  # fmt: skip
    third = Run(plan.run_folder(2))
    assert stages(third) == [plan.run_folder(0).resolve(), plan.run_folder(1).resolve(), plan.run_folder(2)]
    assert plan.data_of(2) == whole / "plan" / "two" / "selection" / "data" / "schedule.yaml"
    assert selection_config(plan, 1).source.earlier_runs == (plan.run_folder(0),)
    assert not (whole / "plan" / "three" / "selection").exists()
    assert len([path for path in final_bytes(whole / "plan") if "mds" not in path]) == 2 + 2 + 3 + 3 + 2 + 4


@pytest.mark.slow
def test_killed_before_any_file_operation_it_ends_with_the_same_bytes(whole, inputs, tmp_path):
    path = write_plan(tmp_path, inputs)
    for at in (2, 5, 14):
        runner = start(path, environment=crash_environment(".", at))
        runner.communicate()
        assert runner.returncode == -signal.SIGKILL
    runner = start(path)
    _, said = runner.communicate()
    assert runner.returncode == 0, said
    assert final_bytes(tmp_path / "plan") == final_bytes(whole / "plan")
    assert strays(tmp_path / "plan") == strays(whole / "plan") == []


def strays(folder):
    """What a killed process leaves and the next one has to remove."""
    return [
        str(path) for each in ("*.part", ".lock", ".*.lock", "steps.parts", "scratch") for path in folder.rglob(each)
    ]


PHASES = {
    "train": (r"/run/trainer.json", 2), "finish": (r"/run/steps.parquet", 1),
    "embed": (r"/run/embeddings/late.*/manifest.json", 1), "select": (r"/selection/scores.parquet", 1),
    "write": (r"/selection/data/.mds.part/\w+$", 2), "seal": (r"/selection/manifest.json", 1),
}  # fmt: skip


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_with_the_same_bytes(whole, inputs, tmp_path):
    path = write_plan(tmp_path, inputs)
    for name, phase in (*(("one", phase) for phase in PHASES), ("two", "train")):
        before, at = PHASES[phase]
        runner = start(path, environment=crash_environment(name + before, at))
        runner.communicate()
        assert runner.returncode == -signal.SIGKILL, f"{phase} of {name} was never there"
    runner = start(path)
    _, said = runner.communicate()
    assert runner.returncode == 0, said
    assert final_bytes(tmp_path / "plan") == final_bytes(whole / "plan")
    assert strays(tmp_path / "plan") == []


def paused(command):
    """A trainer that says its process id and waits, before it trains, until a file is there."""
    code = (
        "import os, sys, time; from pathlib import Path; go = Path(sys.argv[1]);"
        "go.with_suffix('.pid').write_text(str(os.getpid()));"
        "exec('while not go.exists(): time.sleep(0.01)'); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return f"{sys.executable} -c {shlex.quote(code.replace('{', '{{').replace('}', '}}'))} {{go}} {command}"


def wait_for(path):
    """Wait for a file; the time limit is that of the test."""
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    return path.read_text()


def paused_plan(place, inputs, go):
    stage = {"steps": 8, "settings": {"model": str(inputs / "model.json"), "go": str(go)}}
    stages = [{"name": name, **stage} for name in ("one", "two", "three")]
    return write_plan(
        place, inputs, stages=stages, train_first=paused(TRAIN), train=paused(TRAIN + " --init_from {checkpoint}")
    )


@pytest.mark.slow
def test_a_trainer_that_outlives_its_runner_keeps_others_out_until_it_has_ended(whole, inputs, tmp_path):
    go = tmp_path / "go"
    path = paused_plan(tmp_path, inputs, go)
    killed = start(path)
    trainer = int(wait_for(go.with_suffix(".pid")))
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    second = start(path)
    _, said = second.communicate()
    assert second.returncode == BUSY
    assert f"process {trainer} (the trainer of stage one" in said
    go.touch()
    killed.communicate()  # until the trainer has closed its end
    with locked(tmp_path / "plan", wait=True):
        assert (tmp_path / "plan" / "one" / "run" / "steps.parquet").exists()
    last = start(path)
    _, said = last.communicate()
    assert last.returncode == 0, said
    assert final_bytes(tmp_path / "plan") == final_bytes(whole / "plan")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_runner_that_is_told_to_end_ends_its_trainer(inputs, tmp_path, number):
    go = tmp_path / "go"
    path = paused_plan(tmp_path, inputs, go)
    runner = start(path)
    trainer = int(wait_for(go.with_suffix(".pid")))
    os.kill(runner.pid, number)
    _, said = runner.communicate()
    assert runner.returncode == 128 + number
    assert "run the same command again to continue" in said
    assert "Traceback" not in said
    with pytest.raises(ProcessLookupError):
        os.kill(trainer, 0)
    with locked(tmp_path / "plan"):
        pass


@pytest.mark.slow
def test_a_foreign_trainer_killed_in_the_middle_of_its_training_goes_on_from_its_own_checkpoint(inputs, tmp_path):
    command = (
        f"{sys.executable} -m tests.plans.foreign_trainer --out {{out}} --data {{data}} --base {inputs / 'data'} "
        f"--model {{model}} --steps {{steps}} --lr {{lr}} --seq_len {SEQ_LEN}"
    )
    later = command + " --load {checkpoint} --previous {previous}"
    stage = {"steps": 8, "settings": {"model": str(inputs / "model.json")}, "lr_schedule": {"lr": 3e-3}}
    changes = {
        "train_first": command, "train": later, "checkpoint": "final.pt",
        "stages": [{"name": name, **stage} for name in ("one", "two")],
    }  # fmt: skip
    whole = start(write_plan(tmp_path / "whole", inputs, **changes))
    _, errors = whole.communicate()
    assert whole.returncode == 0, errors
    path = write_plan(tmp_path / "killed", inputs, **changes)
    for name in ("one", "two"):
        run = tmp_path / "killed" / "plan" / name / "run"
        runner = start(path, environment=crash_environment(f"{name}/run/resume.pt", 2))
        runner.communicate()
        assert runner.returncode == -signal.SIGKILL
        assert (run / "resume.pt").exists()
        assert not (run / "final.pt").exists()
    runner = start(path)
    _, errors = runner.communicate()
    assert runner.returncode == 0, errors
    assert final_bytes(tmp_path / "killed" / "plan") == final_bytes(tmp_path / "whole" / "plan")


@pytest.mark.slow
def test_piece_by_piece_the_status_says_whether_more_is_left(whole, monkeypatch):
    plan = load_plan(whole / "plan.yaml")
    assert carry_out(plan, once=True) == 0  # nothing is left
    done = []
    monkeypatch.setattr("curate.plans.runner.is_done", lambda plan, piece: piece in done)
    monkeypatch.setattr("curate.plans.runner.work", lambda plan, piece, lock: done.append(piece))
    statuses = [carry_out(plan, once=True) for _ in pieces(plan)]
    assert statuses == [MORE] * (len(statuses) - 1) + [0]
    assert done == list(pieces(plan))


@pytest.mark.slow
def test_two_runners_do_not_both_work(whole):
    with locked(whole / "plan"):
        runner = start(whole / "plan.yaml")
        _, errors = runner.communicate()
    assert runner.returncode == BUSY
    assert f"in use by process {os.getpid()} " in errors
    with locked(whole / "plan"):
        pass  # released


@pytest.mark.slow
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
    _, errors = runner.communicate()
    assert runner.returncode == status
    assert message in errors
    assert "Traceback" not in errors


@pytest.mark.slow
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
    made_with = yaml.safe_load(write_plan(tmp_path, inputs).read_text())["selection"]
    selection = {**made_with, "seed": 5}
    with pytest.raises(UserError, match=r"selection is complete but was made .*seed: 0 there, 5 now"):
        carry_out(load_plan(write_plan(tmp_path, inputs, folder=folder, selection=selection)), once=True)


@pytest.mark.slow
def test_what_a_trainer_did_otherwise_is_named(whole, inputs, tmp_path):
    def refused(index=0, **stage):
        stages = [{"name": "one", "steps": 8, "settings": {"model": "m"}, **stage}, {"name": "two", "steps": 8}]
        plan = load_plan(write_plan(tmp_path, inputs, folder=str(whole / "plan"), stages=stages, train="t"))
        run = open_stage(plan, index)
        check_stage(plan, index, run)
        check_states(plan, index, run)

    refused()
    refused(windows={"early": [0, 3], "late": [5, 8]}, lr_schedule={"lr": 3e-3}, tokens=8 * 8 * SEQ_LEN)
    with pytest.raises(UserError, match=r"recorded the windows .*stage one of the plan has \{'early': \(0, 4\)"):
        refused(windows={"early": [0, 0.5], "late": [5, 8]})
    with pytest.raises(UserError, match=r"reached a learning rate of 0.003, stage one of the plan has 0.1"):
        refused(lr_schedule={"lr": 0.1})
    with pytest.raises(UserError, match=r"trained on 768 tokens, stage one of the plan has 2,000"):
        refused(tokens="2K")


@pytest.mark.slow
def test_a_checkpoint_of_another_stage_is_refused_wherever_it_turns_up(whole, inputs, tmp_path):
    shutil.copytree(whole / "plan", tmp_path / "plan")
    plan = load_plan(write_plan(tmp_path, inputs))
    one, two = (plan.run_folder(index) for index in (0, 1))
    check_states(plan, 1, open_stage(plan, 1))
    kept = (two / "checkpoint.safetensors").read_bytes()
    shutil.copy(one / "checkpoint.safetensors", two / "checkpoint.safetensors")
    for check in (lambda: check_states(plan, 1, open_stage(plan, 1)), lambda: check_data(plan, 2)):
        with pytest.raises(
            UserError, match=r"checkpoint.safetensors is not the state that .*run ended with \(.* differs"
        ):
            check()
    (two / "checkpoint.safetensors").write_bytes(kept)
    shutil.copy(one / "snapshots" / "step-00000000.safetensors", two / "snapshots")
    list_files(two, [two / "snapshots" / "step-00000000.safetensors"])
    with pytest.raises(UserError, match=r"two/run did not start from where .*one/run ended .*load \{checkpoint\}"):
        check_states(plan, 1, open_stage(plan, 1))


@pytest.mark.slow
def test_a_plan_and_data_that_were_moved_are_found(whole, inputs, tmp_path):
    shutil.copytree(whole / "plan", tmp_path / "elsewhere")
    shutil.copytree(inputs / "data", tmp_path / "data")
    recorded = tmp_path / "elsewhere" / "one" / "run" / "run.json"
    recorded.write_text(recorded.read_text().replace(str(inputs / "data"), "/gone/data"))
    list_files(recorded.parent, [recorded])
    moved = {"folder": str(tmp_path / "elsewhere"), "data": str(tmp_path / "data")}
    plan = load_plan(write_plan(tmp_path, inputs, **moved))
    assert open_stage(plan, 0).spec.streams["json"] == tmp_path / "data" / "json"
    assert all(is_done(plan, piece) for piece in pieces(plan))
    schedule = plan.data_of(1)
    schedule.write_text(schedule.read_text().replace(str(inputs / "data"), "/gone/data"))
    list_files(plan.selection_folder(0), [schedule])
    with pytest.raises(
        UserError, match=r"schedule.yaml names /gone/data/\w+, which is not there: put it back, or delete"
    ):
        check_data(plan, 1)


@pytest.mark.slow
def test_stages_that_do_not_follow_are_refused_before_they_cost_anything(whole, inputs, tmp_path):
    stage = {"settings": {"model": "m"}}
    stages = [{"name": "one", "steps": 8, **stage}, {"name": "two", "steps": 8, "tokens": 500, **stage}]
    with pytest.raises(UserError, match=r"two trains on 500 tokens, selection.budget_tokens before it is 768"):
        check_plan(load_plan(write_plan(tmp_path, inputs, stages=stages)))
    for missing, message in (("data", "gone does not exist"), ("target", "the target after stage one, is not there")):
        with pytest.raises(UserError, match=message):
            check_plan(load_plan(write_plan(tmp_path, inputs, **{missing: str(tmp_path / "gone")})))
    stages = [{"name": "one", "steps": 8, **stage}, *({"name": f"s{i}", "steps": 8, **stage} for i in range(9))]
    plan = load_plan(write_plan(tmp_path, inputs, folder=str(whole / "plan"), stages=stages))
    with pytest.raises(UserError, match=r"up to s4 need 3,840 more tokens, the data has 3,072 left at .*max_epochs 2"):
        check_supply(plan, 0, open_stage(plan, 0), MixtureConfig(max_epochs=2))
    with pytest.raises(UserError, match="stage a needs steps or tokens"):
        load_plan(write_plan(tmp_path, inputs, stages=[{"name": "a"}]))
    clash = {"name": "a", "steps": 1, "lr_schedule": {"lr": 1.0}, "settings": {"lr": 2.0}}
    with pytest.raises(UserError, match=r"settings.lr of stage a is filled in by the plan"):
        load_plan(write_plan(tmp_path, inputs, stages=[clash]))


def test_the_plan_hands_on_what_a_stage_says(inputs, tmp_path):
    stage = {
        "name": "one", "tokens": "2K", "windows": {"early": [0, 0.25]}, "settings": {"colour": "red"},
        "lr_schedule": {"lr": 0.5, "warmup_steps": 7, "schedule": "linear"},
    }  # fmt: skip
    train = "t {tokens} {windows} {lr} {warmup_steps} {schedule} {min_lr_ratio} {colour} {out}"
    later = {"name": "two", "steps": 3, "train": "t", "selection": {"mode": "samples"}}
    plan = load_plan(write_plan(tmp_path, inputs, stages=[stage, later], train=train, train_first=None))
    words = ["t", "2000", '{"early":[0,0.25]}', "0.5", "7", "linear", "0.1", "red", str(plan.run_folder(0))]
    assert plan.arguments(0) == words
    assert plan.data_of(1) == plan.selection_folder(0) / "data" / "schedule.yaml"
    for schedule, mode, path in (
        ("constant", "weights", "streams.yaml"),
        ("anneal", "samples", "mds/schedule.yaml"),
        ("anneal", "both", "schedule.yaml"),
        ("constant", "samples", "mds"),
    ):
        selection = {"mode": mode, "mixture": {"schedule": schedule}}
        plan = load_plan(
            write_plan(tmp_path, inputs, stages=[stage, later], train=train, train_first="t", selection=selection)
        )
        assert plan.data_of(1) == plan.selection_folder(0) / "data" / path


@pytest.mark.slow
def test_the_dry_run_states_steps_tokens_bytes_and_cost(whole, inputs, tmp_path):
    done = describe(load_plan(whole / "plan.yaml"))
    assert re.search(r"done  train   one +8 steps, 768 tokens, [\d.]+ MB of states: ", done[0])
    assert re.search(r"done  embed   one +\d+ forward\+backward passes, \d+ % of the stage, \d+ s, [\d.]+ MB", done[1])
    assert re.search(r"done  select  one +768 tokens in 3 phases, [\d.]+ MB", done[2])
    shutil.copytree(whole / "plan" / "one", tmp_path / "plan" / "one")
    stages = [{"name": name, "steps": 8 * n, "settings": {"model": "m"}} for name, n in (("one", 1), ("two", 3))]
    left = describe(load_plan(write_plan(tmp_path, inputs, stages=[*stages, {**stages[0], "name": "three"}])))
    assert re.search(r"left  train   two +24 steps, about 2,304 tokens, about [\d.]+ MB of states: ", left[3])
    assert re.search(r"left  embed   two +about \d+ forward\+backward passes, \d+ % of the stage, about \d+ s", left[4])
    assert re.search(r"left  select  two +about 768 tokens, about [\d.]+ MB of data", left[5])
    nothing = describe(load_plan(write_plan(tmp_path / "new", inputs)))
    assert "known when the first stage is trained" in nothing[0]


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
    with pytest.raises(UserError, match=r"bad.yaml line 1: "):
        load_plan(tmp_path / "bad.yaml")
