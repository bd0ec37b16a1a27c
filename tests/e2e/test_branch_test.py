"""`python -m curate.branch_test` on the selections of a tiny recorded run of four domains."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.stats import spearmanr

from curate.branch_test import BranchTestCommand, branch_test
from curate.core.artifacts import MANIFEST, read_hashed, read_json
from curate.core.errors import UserError
from curate.data.mds import COLUMNS, iterate, write_stream
from curate.evaluation.branch_record import FILE, check_tested, read_branch_test
from curate.evaluation.branches import realised_changes
from curate.mixture.record import read_mixture
from curate.select import SelectConfig, select
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.samples import trained_tokens
from curate.training.target import load_target
from tests.crash import crash_environment
from tests.tiny import SEQ_LEN, record_tiny_run, write_tiny_target

ROOT = Path(__file__).resolve().parents[2]
LATE = {"sources": ("late",)}
SHORT = {"steps": 3, "share": 0.5, "repeats": 2}


@pytest.fixture(scope="module")
def streams(folder):
    """The run's two streams as four: branches need three domains for a correlation."""
    found = {}
    for domain in ("json", "dataclasses"):
        rows = list(iterate(folder / "data" / domain))
        first = [row for i, row in enumerate(rows) if i // 4 % 3 == 0]
        second = [row for i, row in enumerate(rows) if i // 4 % 3]
        for name, part in ((domain, first), (f"{domain}-more", second)):
            write_stream(folder / "split" / name, COLUMNS, part)
            found[name] = folder / "split" / name
    return found


def run_select(folder, streams, *, values=LATE, **settings):
    config = SelectConfig(
        **{
            "run": folder / "run", "target": folder / "target.jsonl", "budget_tokens": 60 * SEQ_LEN,
            "values": {"min_target_tokens": 100, **values}, "output": {"wandb": "none"},
            "source": {"streams": streams}, **settings,
        }
    )  # fmt: skip
    return select(config, Run(folder / "run", streams))


@pytest.fixture(scope="module")
def selection(folder, streams):
    return run_select(folder, streams)


@pytest.fixture(scope="module")
def config(folder, streams, selection):
    return BranchTestCommand(selection=selection, target=folder / "target.jsonl", streams=streams, **SHORT)


@pytest.fixture(scope="module")
def tested(config):
    return branch_test(config)


def test_scores_are_held_against_what_branches_did(folder, streams, selection, tested):
    run = Run(folder / "run", streams)
    target = load_target(folder / "target.jsonl", run.spec, 1)
    test = read_branch_test(tested, run.fingerprint, target.fingerprint)
    assert (tested.name, tested.parents[2]) == (FILE, folder / "run")
    assert test.selection == read_json(selection / MANIFEST)["fingerprint"]
    domains = pl.read_parquet(selection / "domains.parquet").filter(source="late", target="target")
    assert test.scores == dict(domains.select("domain", "score").iter_rows())
    assert set(test.scores) == set(streams)
    check_tested(tested, test, "late", test.scores)
    changes = realised_changes(
        Replay(run), target, trained_tokens(run), BranchTestCommand(selection=selection, target=selection, **SHORT),
        seed=0, batch_size=16,
    )  # fmt: skip
    assert test.changes == changes
    assert all(len(repeats) == 2 and any(repeats) for repeats in test.changes.values())
    wanted = spearmanr([test.scores[name] for name in changes], [np.mean(changes[name]) for name in changes])
    assert test.spearman == pytest.approx(wanted.statistic)
    assert test.strength_factor == pytest.approx(1 if test.spearman >= 0.7 else 1 / max(test.spearman, 0.05))
    assert test.low <= test.spearman <= test.high
    assert test.forward_backward_passes > 2 * 5 * 3


def test_two_domains_have_changes_but_no_agreement(config, tmp_path):
    record_tiny_run(tmp_path)
    selection = run_select(tmp_path, {}, target=config.target)
    test = read_branch_test(branch_test(config.model_copy(update={"selection": selection, "streams": {}})))
    assert set(test.changes) == set(test.scores) == {"json", "dataclasses"}
    assert (test.spearman, test.verdict, test.strength_factor) == (None, "undefined", 20)


def command(config, *more):
    words = [
        "--selection", config.selection, "--target", config.target, "--streams", json.dumps(
            {name: str(path) for name, path in config.streams.items()}
        ), "--steps", config.steps, "--share", config.share, "--repeats", config.repeats, *more,
    ]  # fmt: skip
    return [sys.executable, "-m", "curate.branch_test", *map(str, words)]


def test_killed_while_it_trains_and_run_again_it_ends_with_the_same_bytes(folder, config, tested, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run", ignore=shutil.ignore_patterns("branch-tests"))
    moved = tmp_path / "run" / "selections" / config.selection.name
    arguments = command(config.model_copy(update={"selection": moved}))
    crash = crash_environment(r"branch-tests/target-\w+\.json", 4, alone=True)
    killed = subprocess.run(arguments, cwd=ROOT, env=crash, capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (kept,) = (tmp_path / "run" / "branch-tests").glob("*.json")
    assert len(read_hashed(kept)) == 3
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    finished = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    out = tmp_path / "run" / tested.parent.relative_to(folder / "run")
    assert (out / FILE).read_bytes() == tested.read_bytes()
    assert (out / MANIFEST).read_bytes() == (tested.parent / MANIFEST).read_bytes()
    assert f"--mixture.branch_test {out / FILE}" in finished.stdout
    assert all(name in finished.stdout for name in config.streams)


def test_a_complete_test_is_kept_and_another_selection_shares_its_branches(
    folder, streams, config, tested, monkeypatch
):
    monkeypatch.setattr(Replay, "backward", None)
    assert branch_test(config) == tested
    other = run_select(folder, streams, method="shuffled")
    again = read_branch_test(branch_test(config.model_copy(update={"selection": other})))
    test = read_branch_test(tested)
    assert again.changes == test.changes
    assert again.scores != test.scores
    with pytest.raises(UserError):
        check_tested(tested, test, again.source, again.scores)


def test_a_selection_that_was_moved_needs_its_run(folder, config, tested, tmp_path):
    moved = config.model_copy(update={"selection": shutil.copytree(config.selection, tmp_path / "moved")})
    with pytest.raises(UserError, match="--run"):
        branch_test(moved)
    assert branch_test(moved.model_copy(update={"run": folder / "run"})) == tested
    renamed = shutil.copy(folder / "target.jsonl", tmp_path / "renamed.jsonl")
    out = branch_test(moved.model_copy(update={"run": folder / "run", "target": renamed, "out": tmp_path / "out"}))
    assert out == tmp_path / "out" / FILE
    assert read_branch_test(out).spearman == read_branch_test(tested).spearman


def test_other_parents_are_refused_before_anything_is_trained(folder, config, tmp_path, monkeypatch):
    monkeypatch.setattr(Replay, "backward", None)
    other = record_tiny_run(tmp_path, seed=1).folder
    with pytest.raises(UserError, match=str(other)):
        branch_test(config.model_copy(update={"run": other, "streams": {}}))
    target = write_tiny_target(tmp_path / "other.jsonl", documents=5)
    with pytest.raises(UserError, match=str(target)):
        branch_test(config.model_copy(update={"target": target}))
    with pytest.raises(UserError, match="--streams"):  # as the run was recorded: there are no such domains
        branch_test(config.model_copy(update={"streams": {}}))
    assert not (other / "branch-tests").exists()


def test_what_is_no_selection_of_valued_samples_is_refused(folder, config, streams, tmp_path):
    for wrong in (folder / "run", folder / "gone", folder / "target.jsonl"):
        with pytest.raises(UserError, match=str(wrong)):
            branch_test(config.model_copy(update={"selection": wrong, "run": folder / "run"}))
    for settings in ({"method": "dsir"}, {"method": "proportional"}):
        with pytest.raises(UserError, match="curate"):
            branch_test(config.model_copy(update={"selection": run_select(folder, streams, values={}, **settings)}))
    some = {"candidates": folder / "split", "filter": {"unseen_only": False}}
    candidates = run_select(folder, {}, values={"measured_per_domain": 10}, **some)
    with pytest.raises(UserError, match=str(candidates)):
        branch_test(config.model_copy(update={"selection": candidates}))


@pytest.mark.parametrize("name", ["manifest.json", "mixture.yaml", "domains.parquet"])
def test_damage_to_a_selection_or_a_test_is_refused_by_name(folder, config, tested, name, tmp_path):
    selection = shutil.copytree(config.selection, tmp_path / "selection")
    moved = config.model_copy(update={"selection": selection, "run": folder / "run"})
    content = (selection / name).read_bytes()
    (selection / name).write_bytes(content[:-7] + b"0" + content[-6:])
    with pytest.raises(UserError, match=name):
        branch_test(moved)
    (selection / name).unlink()
    with pytest.raises(UserError, match=str(selection)):
        branch_test(moved)


def test_a_damaged_test_is_refused_and_made_again_when_it_was_deleted(config, tested, tmp_path):
    out = tmp_path / "out"
    moved = config.model_copy(update={"out": out})
    path, whole = branch_test(moved), tested.read_bytes()
    assert path.read_bytes() == whole
    path.write_bytes(whole[:-9])
    with pytest.raises(UserError, match=FILE):
        branch_test(moved)
    with pytest.raises(UserError, match=FILE):
        read_branch_test(path)
    path.unlink()
    (out / MANIFEST).unlink()
    assert branch_test(moved).read_bytes() == whole
    with pytest.raises(UserError, match="seed"):
        branch_test(moved.model_copy(update={"seed": 1}))


def test_a_selection_that_is_given_the_test_stays_nearer_to_the_prior(folder, streams, selection, tested, tmp_path):
    test = read_branch_test(tested)
    out = run_select(folder, streams, mixture={"branch_test": tested})
    before, after = (read_mixture(each / "mixture.yaml") for each in (selection, out))
    assert after.prior_strength == pytest.approx(before.prior_strength * test.strength_factor)
    assert out != selection
    target = write_tiny_target(tmp_path / "other.jsonl", documents=15)
    for other in ({"values": {"sources": ("early",)}}, {"target": target}):
        with pytest.raises(UserError, match=str(tested)):
            run_select(folder, streams, mixture={"branch_test": tested}, **other)
