"""`import curate` and the command `curate`: what they offer, what they import, and names that are modules too."""

import ast
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import curate
from curate.__main__ import COMMANDS
from tests.test_project import HEAVY, ROOT, commands

# functions that are modules too
CALLED = ("select", "embed", "search", "verify", "branch_test", "reconstruct", "report")
RUNNABLE = [name.partition(".")[2] for name in commands() if name.startswith("curate.") and name.count(".") == 1]
MADE_OF = {"select": {"curate.embed"}, "schedule": {"curate.select", "curate.embed"}}  # commands that a command calls


def python(code, *arguments, options=(), **more):
    command = [sys.executable, *options, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, **more)


def run_cli(*arguments, cwd=ROOT, options=()):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *options, "-m", "curate", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def imported(stderr):
    return {line.rpartition("|")[2].strip() for line in stderr.splitlines() if line.startswith("import time:")}


def test_every_public_name_is_there_and_the_one_that_type_checkers_see():
    (block,) = [
        node for node in ast.parse(Path(curate.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name)
    ]  # fmt: skip
    typed = {alias.name: import_module(node.module) for node in block.body for alias in node.names}
    assert sorted(typed) == curate.__all__
    for name, module in typed.items():
        offered = getattr(curate, name)
        assert callable(offered)
        assert offered is (module if name in CALLED else getattr(module, name))
        assert name in dir(curate)
    assert not hasattr(curate, "nonsense")


def test_the_package_imports_no_library_before_a_name_is_used():
    code = "import sys; before = set(sys.modules); import curate; dir(curate); print(*set(sys.modules) - before)"
    new = {name.partition(".")[0] for name in python(code).stdout.split()}
    assert "curate" in new
    assert not new - sys.stdlib_module_names - {"curate"}
    done = python(
        "import curate; curate.SelectConfig; curate.RecorderConfig; curate.select", options=["-X", "importtime"]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert not {name.partition(".")[0] for name in imported(done.stderr)} & HEAVY


@pytest.mark.parametrize("name", CALLED)
def test_a_function_is_called_by_its_name_whatever_was_imported(name):
    code = """
import inspect, sys
import curate
name, wanted = sys.argv[1:]
for line in ["", f"import curate.{name}", f"from curate.{name} import {name}", f"import curate.{name} as module"]:
    exec(line)
    assert list(inspect.signature(getattr(curate, name)).parameters) == wanted.split(","), line
    try:
        getattr(curate, name)(1, 2, 3, 4)
    except TypeError as error:
        assert f"{name}() takes" in str(error), error
    else:
        raise AssertionError(line)
"""
    wanted = dict.fromkeys(("select", "embed", "search", "verify"), "config,run")
    for before in ("", f"import curate.{name}\n"):
        done = python(before + code, name, wanted.get(name, "config"))
        assert done.returncode == 0, done.stderr


def test_the_five_steps_from_python(folder, tmp_path):
    run = curate.Run(folder / "run")
    settings = {
        "target": folder / "target.jsonl", "values": {"min_target_tokens": 100}, "budget_tokens": 500,
        "out": tmp_path / "selection", "output": {"wandb": "none"},
    }  # fmt: skip
    selection = curate.select(curate.SelectConfig(**settings), run)
    assert selection == tmp_path / "selection"
    import curate.select as module

    assert curate.select(module.SelectConfig(**settings), run) == selection  # complete already
    mixture = curate.read_mixture(selection / "mixture.yaml")
    assert isinstance(mixture, curate.Mixture)
    assert set(mixture.domains) == set(run.spec.streams)
    scores = curate.read_scores(selection / "scores.parquet")
    assert set(scores["domain"]) == set(run.spec.streams)
    assert curate.report(curate.ReportConfig(run=run.folder, select=selection, out=tmp_path / "again.html")).exists()
    dataset = curate.open_dataset(selection / "data" / "mds", batch_size=4, seed=0)
    assert len(dataset) == sum(part.samples for part in mixture.domains.values())
    with pytest.raises(curate.UserError):
        curate.Run(tmp_path / "nothing")


def test_the_command_knows_every_command_of_the_package():
    named = {f"curate.{name}" for name in RUNNABLE}
    assert named <= {module.removesuffix(".__main__") for module, _ in COMMANDS.values()}


def test_the_command_lists_its_commands_and_imports_none():
    listed = run_cli("--help", options=["-X", "importtime"])
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)
    assert not {name.partition(".")[0] for name in imported(listed.stderr)} & {*HEAVY, "pydantic", "numpy"}
    for arguments in ([], ["no\x1b[31m such\ncommand"]):
        refused = run_cli(*arguments)
        assert (refused.returncode, refused.stdout) == (2, "")
        assert set(COMMANDS) <= set(refused.stderr.split())
        assert "\x1b" not in refused.stderr


@pytest.mark.parametrize("name", RUNNABLE)
def test_a_command_is_the_module_of_its_name(name, tmp_path):
    by_name = run_cli(name, "--help", options=["-X", "importtime"], cwd=tmp_path)
    assert by_name.returncode == 0, by_name.stderr[-2000:]
    names = imported(by_name.stderr)
    assert not {each.partition(".")[0] for each in names} & HEAVY
    assert names & {module for module, _ in COMMANDS.values()} <= {COMMANDS[name][0], *MADE_OF.get(name, ())}
    assert name in by_name.stdout.partition("[")[0]  # the usage
    assert run_cli(name, "--no-such-option", "1").returncode == 2


@pytest.mark.parametrize("safe", [False, True])
def test_modules_of_the_working_folder_are_found_behind_all_others(tmp_path, safe):
    """The code of a model; `python -m` finds it too."""
    (tmp_path / "homemade.py").write_text("def main(): print('homemade')")
    (tmp_path / "json.py").write_text("raise AssertionError('shadows the library')")
    code = """
import sys
sys.path[:] = [path for path in sys.path if path]  # as an installed script has it
import curate.__main__ as command
command.COMMANDS["mine"] = ("homemade", "")
sys.argv = ["curate", "mine"]
command.main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *(["-P"] if safe else []), "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == ((1, "") if safe else (0, "homemade\n")), done.stderr
