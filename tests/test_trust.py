"""A file that names code runs none of it unless the caller trusts the module that it lies in."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from curate.core.artifacts import list_files
from curate.core.config import Config, parse_command
from curate.core.errors import UserError
from curate.core.trust import VARIABLE, is_trusted, trust, trusted_function
from curate.plans.plan import PlanConfig
from curate.training.task import ModelSpec, build_model

ROOT = Path(__file__).resolve().parents[1]
MODULE = """
import pathlib
from subprocess import run
from tests.tiny import factory as other
pathlib.Path(__file__).with_name("marker").write_text("imported")
def build(**settings): return other(**settings)
"""


@pytest.fixture(autouse=True)
def _nothing_is_trusted(monkeypatch):
    monkeypatch.setenv(VARIABLE, "")


@pytest.fixture
def module(tmp_path, monkeypatch) -> Path:
    """A module of which importing alone leaves a trace."""
    (tmp_path / "foreign_model.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "marker"
    sys.modules.pop("foreign_model", None)


def test_a_module_is_not_imported_before_it_is_trusted(module):
    with pytest.raises(UserError, match=r"--trust foreign_model "):
        build_model(ModelSpec(factory="foreign_model:build"))
    assert not module.exists()
    trust(["foreign_model"])
    assert build_model(ModelSpec(factory="foreign_model:build")).training
    assert module.exists()


def test_what_a_trusted_module_imported_is_not_trusted_with_it(module, tmp_path):
    trust(["foreign_model"])
    hostile = ModelSpec(factory="foreign_model:run", kwargs={"args": ["touch", str(tmp_path / "ran")]})
    with pytest.raises(UserError, match=r"subprocess"):
        build_model(hostile)
    with pytest.raises(UserError, match=r"--trust tests\.tiny"):
        build_model(ModelSpec(factory="foreign_model:other"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "source", ["os:system", "builtins:eval", "foreign_model", ":build", "foreign_model:", "", "..:x"]
)
def test_other_names_are_refused(source, module):
    trust(["foreign_mode", "foreign_model.inner"])
    with pytest.raises(UserError, match=r"model\.factory"):
        trusted_function(source, "model.factory")
    assert not module.exists()


def test_a_package_is_trusted_with_its_modules():
    trust(["tests", "a.b"])
    assert is_trusted("tests.tiny")
    assert is_trusted("a.b")
    assert not is_trusted("a")
    assert not is_trusted("tests_of_another")


class Settings(Config):
    """A command's."""

    steps: int = 1
    """Some."""


def test_every_command_takes_the_option_and_no_config_file_can(tmp_path):
    assert parse_command(Settings, "x", "", ["--trust", "a,b.c", "--steps", "2", "--trust=d"]).steps == 2
    assert os.environ[VARIABLE] == "a,b.c,d"
    (tmp_path / "config.yaml").write_text("trust: e\n")
    for arguments in (["--config", str(tmp_path / "config.yaml")], ["--trust"], ["--trust", "--steps", "2"]):
        with pytest.raises(UserError, match="trust"):
            parse_command(Settings, "x", "", arguments)
    assert not is_trusted("e")
    plan = PlanConfig(folder="x", data="x", target="x", train="x", trust=["f"], stages=[{"name": "one", "steps": 1}])
    assert plan.trust == ("f",)


def command(module: str, *options: str | Path, path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, options)], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_a_run_of_somebody_else_runs_nothing(folder, module, tmp_path):
    shutil.copytree(folder / "run", tmp_path / "run")
    spec = json.loads((tmp_path / "run" / "run.json").read_text())
    spec["task"]["model"]["factory"] = "foreign_model:build"
    (tmp_path / "run" / "run.json").write_text(json.dumps(spec))
    list_files(tmp_path / "run", [tmp_path / "run" / "run.json"])  # as whoever made the folder would
    options = ["--run", tmp_path / "run", "--target", folder / "target.jsonl"]
    refused = command("curate.embed", *options[:2], path=tmp_path)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.splitlines()[-1].startswith("error: model.factory 'foreign_model:build'")
    assert "--trust foreign_model" in refused.stderr
    assert not module.exists()
    small = ["--values.min_target_tokens", "100", "--output.wandb", "none"]
    done = command("curate.select", *options, *small, "--trust", "tests,foreign_model", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert module.exists()


LLAMA = {
    "model_type": "llama", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 1, "max_position_embeddings": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        {"_attn_implementation": "org/repo"},
        {"attn_implementation": "org/repo@main:forward"},
        {"attn_implementation": "flash_attention_2"},  # which transformers fetches where it is not installed
        {"attn_implementation": {"": "sdpa", "text_config": "org/repo"}},
        {"text_config": {"_attn_implementation": "org/repo"}},
        {"layers": [{"_attn_implementation_internal": "org/repo"}]},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"configuration_files": ["config.4.0.0.json"]},
        {"model_type": "theirs", "auto_map": {"AutoConfig": "foreign_model.Config"}},
    ],
)  # fmt: skip
def test_a_model_config_that_names_code_is_refused(more, module, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **more}))
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(UserError, match=r"config"):
            build_model(ModelSpec(hf_config=place))
    assert not module.exists()


@pytest.mark.parametrize("attention", [None, "eager", "sdpa"])
def test_the_attention_that_a_config_asks_for_is_built(attention, tmp_path):
    more = {"auto_map": {"AutoModelForCausalLM": "org/repo--modeling.Model"}}  # transformers' own class stands for it
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **more, "attn_implementation": attention}))
    model = build_model(ModelSpec(hf_config=tmp_path))
    assert model.config._attn_implementation == (attention or "sdpa")
