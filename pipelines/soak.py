"""`python -m pipelines.soak`: kill commands at random, run them again, and compare what they end with.

A plan, a selection, embeddings, data preparation and a recorded training run at once, again and again. At random
moments, or when something new lies on the disk, one of them is killed: its process group, its process alone, or the
trainer that it started. It is started again until it is done; then every file must be the one of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from curate.core.artifacts import SUMS, read_json, write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.lock import LOCK
from curate.data.memory import sweep
from curate.plans.runner import BUSY, TRAINER_FAILED

JobName = Literal["schedule", "select", "embed", "prepare", "train"]
How = Literal["group", "alone", "trainer"]
_DONE, _KILLED = 0, -signal.SIGKILL  # Popen gives the number of a signal as a negative status
_MOST_KILLS = 4  # of a job in a round, so that slow jobs come to their end
_LOOK_SECONDS = 0.01  # between two looks at the jobs: short beside what a command writes
_MEASURED = {"timings.json", "costs.parquet", "report.html"}  # they hold times, which differ from run to run
# Locks, and temporary names, which a killed command leaves and the next one of its kind must remove.
_STRAYS = re.compile(r"(.*\.part|\.(.*\.)?lock|steps\.parts|scratch)")
# A file's hash over its own content, which has paths in it.
_OWN_HASH = re.compile(rb'"hash": "[0-9a-f]{16}"')
_MODEL = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 32, "tie_word_embeddings": True,
}  # fmt: skip


class SoakConfig(Config):
    """How long, and what."""

    minutes: float = Field(default=30.0, gt=0)
    """Time for kills, after the undisturbed run; what runs then is brought to its end and compared."""
    kills: int | None = Field(default=None, ge=1)
    """Stop after so many kills instead, if that is sooner."""
    seed: int = 0
    """Seed of what is killed, how and when."""
    jobs: tuple[JobName, ...] = ("schedule", "select", "embed", "prepare", "train")
    """What runs at once."""
    out: Path = Path("runs/soak")
    """Folder to work in; it is deleted first."""


@dataclass
class Job:
    """A command that is killed and started again.

    Attributes:
        name: which.
        command: words.
        folder: all that it writes.
        seconds: what it takes undisturbed.
        kills_left: in this round.
        process: what runs now.
    """

    name: JobName
    command: list[str]
    folder: Path
    seconds: float
    kills_left: int = 0
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    kill_at: float = float("inf")
    seen: int | None = None

    def start(self, moments: random.Random) -> None:
        """Start it, and draw when it is to be killed."""
        path = self.folder.with_suffix(".log")
        with path.open("ab") as log:
            # a session of its own, so that killpg reaches the job's children and nobody else
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)  # noqa: S603
        self.started = time.monotonic()
        # not in the first fifth: there Python imports, and a kill cuts nothing
        self.kill_at = self.started + moments.uniform(0.2, 1.0) * self.seconds if self.kills_left else float("inf")
        self.seen = None

    def is_due(self, at_event: bool) -> bool:
        """Whether the moment has come; `at_event`: whether something has changed on the disk since then."""
        if time.monotonic() < self.kill_at:
            return False
        state = _state_of(self.folder)
        # the first look after the moment: from here on a change on the disk is an event, a write that may be cut
        if self.seen is None:
            self.seen = state
        return not at_event or state != self.seen

    def kill(self, how: How) -> int:
        """Kill it; returns the process."""
        assert self.process is not None
        # once for this start: `start` draws the next moment
        self.kills_left, self.kill_at = self.kills_left - 1, float("inf")
        process = self.process.pid
        if how == "trainer":
            process = _trainer_of(self.folder) or process
        with suppress(ProcessLookupError):
            (os.killpg if how == "group" else os.kill)(process, signal.SIGKILL)
        return process


def _state_of(folder: Path) -> int:
    """A number that changes with what lies in a folder."""
    modified = []
    for path in folder.rglob("*"):
        # the job renames and deletes files while they are listed
        with suppress(FileNotFoundError):
            modified.append((str(path), path.stat().st_mtime_ns))
    return hash(tuple(sorted(modified)))


def _trainer_of(folder: Path) -> int | None:
    with suppress(FileNotFoundError):
        match = re.match(r"process (\d+) \(the trainer", (folder / "plan" / LOCK).read_text(encoding="utf-8"))
        return int(match[1]) if match else None
    return None


def make_inputs(folder: Path, jobs: Sequence[JobName]) -> None:
    """Documents, a model and, where a job needs them, prepared data and a recorded run."""
    import argparse
    import inspect
    import optparse

    folder.mkdir(parents=True)
    for name, module in (("a", argparse), ("b", optparse), ("target", shutil)):
        # text of the standard library: the soak needs no download
        text = inspect.getsource(module)
        lines = [json.dumps({"text": text[start : start + 400]}) for start in range(0, 24_000, 400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "model.json", _MODEL)
    if set(jobs) - {"prepare"}:
        _run(_prepare(folder, folder / "data"))
    if {"select", "embed"} & set(jobs):
        _run(_train(folder, folder / "run"))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise UserError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr[-1000:]}")


def _module(name: str, *words: object) -> list[str]:
    return [sys.executable, "-m", name, *map(str, words)]


def _prepare(inputs: Path, out: Path) -> list[str]:
    domains = [f"--domains.{name}={inputs / name}.jsonl" for name in "ab"]
    return _module("pipelines.prepare", "--out", out, *domains, "--vocab_size", 512, "--seq_len", 32)


def _train(inputs: Path, out: object, data: object = None, steps: object = 30) -> list[str]:
    words = ["--model", inputs / "model.json", "--steps", steps, "--batch_size", 8, "--checkpoint_steps", 4]
    # a checkpoint every 4 steps and two windows: kills fall before, in and after each
    windows = ["--recorder.windows.early", "[0,3]", "--recorder.windows.late", "[8,11]"]
    return _module("pipelines.pretrain", "--out", out, "--data", data or inputs / "data", *words, *windows)


def _write_plan(inputs: Path, folder: Path) -> Path:
    command = " ".join(_train(inputs, "{out}", "{data}", "{steps}"))
    folder.mkdir(parents=True)
    plan = {
        "folder": str(folder / "plan"),
        "data": str(inputs / "data"),
        "target": str(inputs / "target.jsonl"),
        "train_first": command,
        "train": command + " --init_from {checkpoint}",
        "selection": {
            "mode": "both",
            "values": {"sources": ["late"]},
            "output": {"wandb": "none"},
            "mixture": {"max_epochs": 20},
        },
        "stages": [{"name": "one", "steps": 12}, {"name": "two", "steps": 12}],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    return folder / "plan.yaml"


def _with_run(inputs: Path, folder: Path, module: str, *words: object) -> list[str]:
    # embed and select write into the run: each job has its own copy
    shutil.copytree(inputs / "run", folder / "run")
    return _module(module, "--run", folder / "run", *words)


def make_jobs(inputs: Path, folder: Path, config: SoakConfig, seconds: dict[str, float]) -> list[Job]:
    """The jobs of a round, each in a folder of its own."""
    target = ("--target", inputs / "target.jsonl")
    select = ("--values.sources", "[late]", "--mode", "both", "--output.wandb", "none")
    window = ("--window", "both", "--estimator", "dvemb-adam")
    commands: dict[JobName, Callable[[Path], list[str]]] = {
        "schedule": lambda job_folder: _module("curate.schedule", "--plan", _write_plan(inputs, job_folder)),
        "select": lambda job_folder: _with_run(inputs, job_folder, "curate.select", *target, *select),
        "embed": lambda job_folder: _with_run(inputs, job_folder, "curate.embed", *target, *window),
        "prepare": lambda job_folder: _prepare(inputs, job_folder / "data"),
        "train": lambda job_folder: _train(inputs, job_folder / "run", steps=60),
    }
    return [
        Job(name, commands[name](folder / name), folder / name, seconds.get(name, 0.0))
        for name in dict.fromkeys(config.jobs)
    ]


def files_of(folder: Path) -> dict[str, str]:
    """Path -> hash of every file that must be the same; what a killed command left lying is listed as "stray"."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if _STRAYS.fullmatch(path.name):
            hashes[name] = "stray"
        elif path.is_file() and path.name not in _MEASURED and path.suffix != ".log" and "report_data" not in name:
            # a list of files has hashes of files that hold times and paths: only its names are compared
            listed = path.name == SUMS
            content = path.read_bytes() if not listed else json.dumps(list(read_json(path)["files"])).encode()
            # each round has a folder of its own: its path is no difference
            content = _OWN_HASH.sub(b"", content.replace(str(folder).encode(), b"FOLDER"))
            hashes[name] = blake2b(content, digest_size=8).hexdigest()
    return hashes


class Soak:
    """Rounds of jobs that are killed.

    Attributes:
        kills: so far.
        differences: lines that say what was not as in the undisturbed run.
    """

    def __init__(self, config: SoakConfig, write: Callable[[str], object] = sys.stdout.write) -> None:
        self.config, self.kills, self.differences = config, 0, list[str]()
        self._write = write
        self._end = float("inf")
        self._inputs, self._seconds = config.out / "inputs", dict[str, float]()
        self._wanted: dict[str, str] = {}

    def run(self) -> None:
        """The undisturbed run, then rounds until time or kills are over."""
        shutil.rmtree(self.config.out, ignore_errors=True)
        make_inputs(self._inputs, self.config.jobs)
        # no kills: `_wanted` is still empty, see `_round`
        self._wanted = self._round("undisturbed", random.Random(0))
        self._end = time.monotonic() + 60 * self.config.minutes
        for number in range(1, sys.maxsize):
            if self._is_over():
                return
            name = f"round-{number:03d}"
            hashes = self._round(name, random.Random(f"{self.config.seed} {number}"))
            different = sorted(path for path in {*self._wanted, *hashes} if self._wanted.get(path) != hashes.get(path))
            self.differences += [f"{name}: {path} ({hashes.get(path, 'missing')})" for path in different]
            for line in self.differences[-len(different) :] if different else ():
                self._write(f"DIFFERENCE {line}\n")
            # a round with differences stays on the disk for whoever looks into it
            if not different:
                shutil.rmtree(self.config.out / name)

    def _is_over(self) -> bool:
        return time.monotonic() > self._end or (self.config.kills is not None and self.kills >= self.config.kills)

    def _round(self, name: str, moments: random.Random) -> dict[str, str]:
        """Run all jobs to their ends; returns what lies there then."""
        folder = (self.config.out / name).resolve()
        jobs = make_jobs(self._inputs.resolve(), folder, self.config, self._seconds)
        for job in jobs:
            job.folder.mkdir(parents=True, exist_ok=True)
            job.kills_left = moments.randint(1, _MOST_KILLS) if self._wanted else 0
            job.start(moments)
        running = list(jobs)
        try:
            while running:
                running = [job for job in running if self._goes_on(job, name, moments)]
                time.sleep(_LOOK_SECONDS)
        finally:
            for job in running:
                job.kill("group")
            # a killed trainer leaves shared memory of its data loader
            sweep()
        return files_of(folder)

    def _goes_on(self, job: Job, name: str, moments: random.Random) -> bool:
        """Look after one job: kill it when its moment has come, start it again when it was; False when it is over."""
        assert job.process is not None
        status = job.process.poll()
        if status is None:
            if not self._is_over() and job.is_due(at_event=moments.random() < 1 / 2):
                self._kill(job, name, moments)
            return True
        if status == _DONE:
            # of the undisturbed run, which is the first: moments are drawn from its length
            self._seconds.setdefault(job.name, time.monotonic() - job.started)
            return False
        # these are what a kill leads to; any other status is a fault of the command
        if status in (_KILLED, TRAINER_FAILED, BUSY):
            if status == BUSY:  # the trainer of the killed runner works on
                time.sleep(0.2)
            job.start(moments)
            return True
        line = f"{name}: {job.name} ended with status {status}, see {job.folder.with_suffix('.log')}"
        self.differences.append(line)
        self._write(f"DIFFERENCE {line}\n")
        return False

    def _kill(self, job: Job, name: str, moments: random.Random) -> None:
        ways: list[How] = ["group", "alone", "trainer"] if job.name == "schedule" else ["group", "alone"]
        how = moments.choice(ways)
        after = time.monotonic() - job.started
        process = job.kill(how)
        self.kills += 1
        self._write(f"kill {self.kills}: {name}, {job.name}, {how}, process {process}, after {after:.1f} s\n")


def main() -> None:
    """Entry point."""
    config = parse_command(SoakConfig, "python -m pipelines.soak", "Kill commands at random and compare their results.")
    sys.stdout.write(f"seed {config.seed}, jobs {', '.join(config.jobs)}, in {config.out}\n")
    soak = Soak(config, _write_line)
    soak.run()
    sys.stdout.write(f"seed {config.seed}: {soak.kills} kills, {len(soak.differences)} differences\n")
    raise SystemExit(1 if soak.differences else 0)


def _write_line(line: str) -> None:
    sys.stdout.write(line)
    sys.stdout.flush()


if __name__ == "__main__":
    run_command(main)
