"""A small plan of stages, made once by the project's own commands, to be damaged and put back again and again."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import optparse
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import pipelines.pretrain
from curate.core.artifacts import sum_of
from curate.core.config import parse_command, run_command
from curate.plans.plan import load_plan
from curate.plans.runner import carry_out, selection_config
from curate.training.run import Run
from pipelines.pretrain import PretrainConfig, train

MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip
STEPS = 8
OPTIONS = "--batch_size 8 --optimizer.warmup_steps 3 --recorder.windows.early [0,3] --recorder.windows.late [5,8]"
TRAIN = (
    "python -m pipelines.pretrain --out {out} --data {data} --model {model} --steps {steps} --checkpoint_steps 4 "
    + OPTIONS
)
SELECTION = {
    "mode": "both", "output": {"wandb": "none", "shard_bytes": 6000},
    "values": {"min_target_tokens": 100, "sources": ["early", "late"], "measured_per_domain": 20},
    "mixture": {"max_epochs": 20, "schedule": "early-and-late"},
}  # fmt: skip
TIMED = re.compile(r"timings\.json|costs\.parquet|report\.html|report\.json|curate\.sums\.json|lock|.*\.lock")
"""Files whose bytes depend on the time that something took, and locks."""


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status and what it wrote to the standard error."""

    status: int
    said: str

    @property
    def error(self) -> str:
        """The error, without the log before it."""
        return self.said.rpartition("error: ")[2].strip()


def call(main: Callable[[], None], *arguments: object) -> Outcome:
    """Run a command's main function as its module would; an exception that is a bug comes through."""
    said, given = io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, arguments)]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            run_command(main)
    except SystemExit as stop:
        return Outcome(int(stop.code or 0), said.getvalue())
    finally:
        sys.argv = given
    return Outcome(0, said.getvalue())


def write_documents(path: Path, module: object, pieces: int) -> None:
    """Consecutive pieces of a module's source, one a line."""
    text = inspect.getsource(module)
    rows = [text[start : start + 300] for start in range(0, 300 * pieces, 300)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


def prepare_words(folder: Path, out: str, *domains: str) -> list[str]:
    """Arguments of `pipelines.prepare`."""
    named = [word for name in domains for word in (f"--domains.{name}", str(folder / f"{name}.jsonl"))]
    sizes = ["--vocab_size", "512", "--seq_len", "32", "--shard_bytes", "6000"]
    return ["--out", str(folder / out), *named, *sizes]


def make(folder: Path) -> None:
    """Below `folder`: prepared data, a plan with two finished stages and selections, an interrupted training."""
    from curate.embed import main as embed
    from curate.search import main as search
    from curate.select import SelectConfig, select
    from pipelines.prepare import main as prepare

    folder.mkdir(parents=True)
    for name, module, pieces in (("a", argparse, 40), ("b", optparse, 40), ("c", inspect, 40), ("t", shutil, 12)):
        write_documents(folder / f"{name}.jsonl", module, pieces)
    (folder / "model.json").write_text(json.dumps(MODEL))
    for out, domains in (("data", "ab"), ("other-data", "cb")):
        assert call(prepare, *prepare_words(folder, out, *domains)).status == 0
    stage = {"steps": STEPS, "settings": {"model": str(folder / "model.json")}}
    raw: dict[str, Any] = {
        "folder": str(folder / "plan"), "data": str(folder / "data"), "target": str(folder / "t.jsonl"),
        "train": TRAIN + " --init_from {checkpoint}", "train_first": TRAIN, "selection": SELECTION,
        "stages": [{"name": name, **stage} for name in ("one", "two", "three")],
    }  # fmt: skip
    (folder / "plan.yaml").write_text(yaml.safe_dump(raw))
    plan = load_plan(folder / "plan.yaml")
    for index in range(2):
        train(parse_command(PretrainConfig, "", "", plan.arguments(index)[3:]))
        carry_out(plan, once=True)
        carry_out(plan, once=True)
        config = selection_config(plan, index, Run(plan.run_folder(index)))
        settings = config.model_dump(mode="json", exclude_unset=True)
        (folder / f"select-{index}.yaml").write_text(yaml.safe_dump(settings))
    # Where training is next, a runner that got so far says so by its exit status, and trains nothing.
    (folder / "stop.yaml").write_text(yaml.safe_dump({**raw, "train": "false {data} {checkpoint} {out}"}))
    plain = SelectConfig(
        run=config.run, target=config.target, out=folder / "plain", mode="weights", method="proportional",
        budget_tokens=config.budget_tokens, values={"min_target_tokens": 100}, mixture={"max_epochs": 20},
    )  # fmt: skip
    select(plain, Run(plan.run_folder(1)))
    assert call(embed, "--run", plan.run_folder(0)).status == 0
    assert call(search, *search_words(folder)).status == 0
    for name, seed in (("half", 0), ("other-half", 1)):
        interrupt(half_words(folder, name, seed))


def search_words(folder: Path) -> list[object]:
    """Arguments of a search of the first stage's value index."""
    places = ("--run", folder / "plan/one/run", "--target", folder / "t.jsonl", "--out", folder / "found")
    # as many as the selection measures: it is the same artifact
    return [*places, "--min_target_tokens", 100, "--measured_per_domain", 20, "--top", 5]


def half_words(folder: Path, name: str, seed: int = 0) -> list[str]:
    """Arguments of a training that is interrupted."""
    words = f"--out {folder / name} --data {folder / 'data'} --model {folder / 'model.json'} --steps 12 --seed {seed}"
    return f"{words} --checkpoint_steps 3 {OPTIONS}".split()


def interrupt(words: Sequence[str]) -> None:
    """Train until the second checkpoint is written, then stop as a crash would."""
    save, count = pipelines.pretrain.save, [0]

    def stop(*arguments: Any) -> None:
        save(*arguments)
        count[0] += 1
        if count[0] == 2:
            raise InterruptedError

    pipelines.pretrain.save = stop  # type: ignore[assignment]
    try:
        with contextlib.suppress(InterruptedError):
            train(parse_command(PretrainConfig, "", "", words))
    finally:
        pipelines.pretrain.save = save


def link_copy(source: Path, target: Path) -> None:
    """Copy a folder with hard links: commands replace files, they do not write into them."""
    subprocess.run(["cp", "-al", str(source), str(target)], check=True)


def contents(folder: Path) -> dict[str, Any]:
    """Size and hash of every file whose bytes depend on nothing but its inputs."""
    files = (path for path in folder.rglob("*") if path.is_file() and not TIMED.fullmatch(path.name))
    return {path.relative_to(folder).as_posix(): sum_of(path) for path in files}
