"""What a plan says: stages, how one is trained, and what is selected between two of them.

The trainer is the user's own command: a template, split as a shell would and run without one. These are filled in:

    {out}         folder that the recorded run must end up in
    {data}        the stage's data: `data` of the plan, or what the selection before the stage wrote
    {checkpoint}  state that the stage starts from: `checkpoint` of the stage before it (not in the first stage)
    {previous}    folder of the run before it (not in the first stage)
    {name} {steps} and every setting of the stage
"""

from __future__ import annotations

import shlex
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from curate.config import Config
from curate.errors import UserError
from curate.shards.write import SCHEDULE, STREAMS

Data = Literal["streams", "mds"]
_DEFAULTS: dict[str, Any] = {"schedule": {"kind": "early-late"}}  # a stage of known length has phases
_NAME = r"^\w[\w.-]*$"


class StageConfig(Config):
    """One training stage."""

    name: Annotated[str, Field(pattern=_NAME)]
    """Name of its folder."""
    steps: int = Field(ge=1)
    """Optimizer steps that its run must have."""
    train: str | None = None
    """Command of this stage; none: the plan's."""
    settings: dict[str, str | int | float] = {}
    """More values for the template, e.g. {lr: 1e-3}."""
    selection: dict[str, Any] = {}
    """Settings of the selection after this stage, over the plan's."""


class PlanConfig(Config):
    """Stages in order; between two of them, data is selected for the next one."""

    folder: Path
    """Everything that the plan makes: FOLDER/STAGE/run and FOLDER/STAGE/selection."""
    data: Path
    """Data of the first stage."""
    target: Path
    """Target documents (JSONL)."""
    train: str
    """Command that trains a stage, see above; it resumes where it is run again, and exits with 0 when it is done."""
    train_first: str | None = None
    """Command of the first stage, which has no {checkpoint} and no {previous}; none: as `train`."""
    checkpoint: str = "checkpoint.safetensors"
    """File or folder that a stage leaves in its run for the next one to start from."""
    selection: dict[str, Any] = {}
    """Settings of `python -m curate.select`, but for run, target and out; `schedule.kind` is early-late by default."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In the order of training."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]}")
        for index, stage in enumerate(self.stages):
            known = {"out", "data", "name", "steps", *stage.settings}
            if index:
                known |= {"checkpoint", "previous"}
            unknown = sorted(_placeholders(self.command(index)) - known)
            if unknown:
                raise ValueError(
                    f"the command of stage {stage.name} asks for {{{unknown[0]}}}; there are {', '.join(sorted(known))}"
                    + ("" if index else " (the first stage has no checkpoint: give it a train_first)")
                )
        return self

    def command(self, index: int) -> str:
        """Template of one stage."""
        first = self.train_first if index == 0 else None
        return self.stages[index].train or first or self.train

    def run_folder(self, index: int) -> Path:
        """Where a stage's recorded run lies."""
        return self.folder / self.stages[index].name / "run"

    def selection_folder(self, index: int) -> Path:
        """Where the selection after a stage lies."""
        return self.folder / self.stages[index].name / "selection"

    def selection_settings(self, index: int) -> dict[str, Any]:
        """Settings of the selection after a stage: its own over the plan's, phases where nothing else is asked for."""
        return _merged(_merged(_DEFAULTS, self.selection), self.stages[index].selection)

    def data_of(self, index: int) -> Path:
        """What a stage trains on."""
        if index == 0:
            return self.data
        settings, data = self.selection_settings(index - 1), self.selection_folder(index - 1) / "data"
        phases = settings["schedule"]["kind"] != "throughout"
        if settings.get("mode") == "filter":
            return data / "mds" / SCHEDULE if phases else data / "mds"
        return data / (SCHEDULE if phases else STREAMS)

    def arguments(self, index: int) -> list[str]:
        """The command of one stage, filled in."""
        stage = self.stages[index]
        values = {**stage.settings, "name": stage.name, "steps": stage.steps, "data": self.data_of(index)}
        values["out"] = self.run_folder(index)
        if index:
            values["previous"] = self.run_folder(index - 1)
            values["checkpoint"] = self.run_folder(index - 1) / self.checkpoint
        return [word.format(**values) for word in shlex.split(self.command(index))]


def _merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Settings over others, mappings one by one."""
    both = {
        name: _merged(under[name], over[name])
        for name in set(under) & set(over)
        if isinstance(under[name], Mapping) and isinstance(over[name], Mapping)
    }
    return {**under, **over, **both}


def _placeholders(template: str) -> set[str]:
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"the command {template!r} is not a template ({error}); write braces twice") from None


def load_plan(path: Path) -> PlanConfig:
    """Read a plan.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold together.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a plan: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping with folder, data, target, train and stages")
    try:
        return PlanConfig(**raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: {where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
        ) from None
