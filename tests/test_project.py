"""Promises of the project as a whole: light commands, loadable configs, files of a readable length."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = {"torch", "transformers", "streaming", "datasets", "wandb", "plotly", "faiss", "sklearn", "matplotlib"}


def commands() -> list[str]:
    """Every module that `python -m` runs as a command, but for `curate` itself, which starts them."""
    files = [*ROOT.glob("curate/**/*.py"), *ROOT.glob("pipelines/**/*.py")]
    runnable = [file for file in files if 'if __name__ == "__main__":' in file.read_text(encoding="utf-8")]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__") for file in runnable]
    return sorted(module for module in modules if module != "curate")


@pytest.mark.parametrize("module", commands())
def test_help_answers_without_importing_heavy_libraries(module: str) -> None:
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert f"python -m {module}" in result.stdout
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in result.stderr.splitlines()}
    assert "curate" in imported
    assert not imported & HEAVY


@pytest.mark.parametrize("module", commands())
def test_an_unknown_option_is_refused(module: str) -> None:
    command = [sys.executable, "-m", module, "--no-such-option", "1"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "no_such_option" in result.stderr


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    module = command_of(path)
    command = [sys.executable, "-m", module, "--config", os.fspath(path), "--print_config"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def command_of(path: Path) -> str:
    """The command that a config is for: the one of its name, or the one that its first comment names."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    named = [command for command in commands() if command.endswith(f".{path.stem}") or f"python -m {command}" in first]
    assert len(named) == 1, f"{path}: name it after its command, or write 'python -m COMMAND' in its first line"
    return named[0]


def test_scripts_are_never_imported() -> None:
    for file in [*ROOT.glob("curate/**/*.py"), *ROOT.glob("pipelines/**/*.py")]:
        assert "scripts" not in [line.split()[1].split(".")[0] for line in _imports(file)], file


def _imports(file: Path) -> list[str]:
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line.startswith(("import ", "from ")) and len(line.split()) > 1]
