"""What a plan says: stages, how one is trained, and what is selected between two of them.

The trainer is the user's own command: a template, split as a shell would and run without one. These are filled in:

    {out}         folder that the recorded run must end up in
    {data}        the stage's data: `data` of the plan, or what the selection before the stage wrote
    {checkpoint}  state that the stage starts from: `checkpoint` of the stage before it (not in the first stage)
    {previous}    folder of the run before it (not in the first stage)
    {lr} {schedule} {warmup_steps} {min_lr_ratio}   of the stage's `lr_schedule`, where it has one
    {windows}     the stage's `windows` as JSON, where it has some
    {name} {steps} {tokens} and every setting of the stage
"""

from __future__ import annotations

import json
import re
import shlex
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from curate.core.config import Config, TokenCount
from curate.core.errors import UserError
from curate.core.reading import read_yaml
from curate.core.renamed import leaves, replacements
from curate.core.validation import first_problem
from curate.mixture.constraints import MixtureConfig
from curate.output.layout import SelectionFolder
from curate.selection.config import SelectConfig
from curate.training.declared import window_steps

Data = Literal["streams", "mds"]
_NAME = r"^\w[\w.-]*$"


class LrSchedule(Config):
    """Learning rate of a stage, handed on to the trainer; the peak is held against what was recorded."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: str = "cosine"
    """The trainer's name for its course after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of warm-up."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """lr at the end, as a share of the peak."""


class StageConfig(Config):
    """One training stage."""

    name: Annotated[str, Field(pattern=_NAME)]
    """Name of its folder."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps that its run must have."""
    tokens: TokenCount | None = None
    """Stored tokens that it trains on, e.g. 50M, to within a step; the selection before it delivers as many."""
    lr_schedule: LrSchedule | None = None
    """Learning rate; none: the command's own affair."""
    windows: dict[str, tuple[int | float, int | float]] | None = None
    """Windows to value, as in `RecorderConfig.windows`; none: the recorder's."""
    target: Path | None = None
    """Target of the selection after this stage; none: the plan's."""
    train: str | None = None
    """Command of this stage; none: the plan's."""
    settings: dict[str, str | int | float] = {}
    """More values for the template, e.g. {lr: 1e-3}."""
    selection: dict[str, Any] = {}
    """Settings of the selection after this stage, over the plan's."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.steps is None and self.tokens is None:
            raise ValueError(f"stage {self.name} needs steps or tokens")
        if self.windows is not None and self.steps is not None:
            window_steps(self.windows, self.steps)
        twice = sorted(set(self.settings) & set(self.words(with_settings=False)))
        if twice:
            raise ValueError(f"settings.{twice[0]} of stage {self.name} is filled in by the plan itself; rename it")
        return self

    def words(self, *, with_settings: bool = True) -> dict[str, Any]:
        """What the template of its command may name, but for paths."""
        words = {"name": self.name, "steps": self.steps, "tokens": self.tokens}
        words |= self.lr_schedule.model_dump() if self.lr_schedule else {}
        words["windows"] = json.dumps(self.windows, separators=(",", ":")) if self.windows else None
        return {
            **(self.settings if with_settings else {}),
            **{name: word for name, word in words.items() if word is not None},
        }


class PlanConfig(Config):
    """Stages in order; between two of them, data is selected for the next one."""

    folder: Path
    """Everything that the plan makes: FOLDER/STAGE/run and FOLDER/STAGE/selection."""
    data: Path
    """Data of the first stage."""
    target: Path
    """Target documents (JSONL); a stage may have its own."""
    train: str
    """Command that trains a stage, see above; it resumes where it is run again, and exits with 0 when it is done."""
    train_first: str | None = None
    """Command of the first stage, which has no {checkpoint} and no {previous}; none: as `train`."""
    checkpoint: str = "checkpoint.safetensors"
    """File or folder that a stage leaves in its run for the next one to start from."""
    selection: dict[str, Any] = {}
    """Settings of `python -m curate.select`, but for run, target and out."""
    trust: tuple[str, ...] = ()
    """Modules whose code the model of a run may run (`curate.core.trust`); none are needed for Hugging Face configs."""
    stages: tuple[StageConfig, ...] = Field(min_length=1)
    """In the order of training."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [stage.name for stage in self.stages]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two stages are called {twice[0]}")
        if Path(self.checkpoint).is_absolute() or ".." in Path(self.checkpoint).parts:
            raise ValueError(f"checkpoint {self.checkpoint!r} does not lie in {{out}}; write its place there")
        for index in range(len(self.stages) - 1):
            # old names first: they would be refused as unknown settings without a word of the new ones
            renamed = replacements(SelectConfig, leaves(self.selection_settings(index)))
            if renamed:
                raise ValueError(f"selection after stage {names[index]}: {', '.join(renamed)}")
            self._is_scheduled(index)
        # every command is filled in now: a wrong placeholder of the last stage must not show after days
        for index in range(len(self.stages)):
            self._check_command(index)
        return self

    def _check_command(self, index: int) -> None:
        stage = self.stages[index]
        known = {"out", "data", *stage.words()}
        if index:
            known |= {"checkpoint", "previous"}
        unknown = sorted(_placeholders(self.command(index)) - known)
        if unknown:
            raise ValueError(
                f"the command of stage {stage.name} asks for {{{unknown[0]}}}; there are {', '.join(sorted(known))}"
                + ("" if index else " (the first stage has no checkpoint: give it a train_first)")
            )
        try:
            words = self.arguments(index)
        except (ValueError, LookupError) as error:
            raise ValueError(f"the command of stage {stage.name} cannot be filled in: {error}") from None
        if not "".join(words[:1]).strip():
            raise ValueError(f"the command of stage {stage.name} is blank; write the program that trains it")
        # the system's call would refuse it, as an error about nothing that the user wrote
        if any("\0" in word for word in words):
            raise ValueError(f"the command of stage {stage.name} has a NUL character in a word; leave it out")

    def _is_scheduled(self, index: int) -> bool:
        """Whether the selection after a stage writes phases (a `schedule.yaml`)."""
        try:
            mixture = MixtureConfig.model_validate(self.selection_settings(index).get("mixture", {}))
        except ValidationError as error:
            where = f"selection.mixture after stage {self.stages[index].name}"
            raise ValueError(f"{where}: {first_problem(error)}") from None
        return mixture.schedule != "constant"

    def target_of(self, index: int) -> Path:
        """Target of the selection after a stage."""
        return self.stages[index].target or self.target

    def command(self, index: int) -> str:
        """Template of one stage."""
        first = self.train_first if index == 0 else None
        return next(command for command in (self.stages[index].train, first, self.train) if command is not None)

    def run_folder(self, index: int) -> Path:
        """Where a stage's recorded run lies."""
        return self.folder / self.stages[index].name / "run"

    def selection_folder(self, index: int) -> Path:
        """Where the selection after a stage lies."""
        return self.folder / self.stages[index].name / "selection"

    def selection_settings(self, index: int) -> dict[str, Any]:
        """Settings of the selection after a stage: its own over the plan's."""
        return _merged(self.selection, self.stages[index].selection)

    def data_of(self, index: int) -> Path:
        """What a stage trains on."""
        if index == 0:
            return self.data
        folder, scheduled = SelectionFolder(self.selection_folder(index - 1)), self._is_scheduled(index - 1)
        weighted = self.selection_settings(index - 1).get("mode", "samples") != "samples"
        return folder.weights_for(scheduled=scheduled) if weighted else folder.samples_for(scheduled=scheduled)

    def arguments(self, index: int) -> list[str]:
        """The command of one stage, filled in."""
        stage = self.stages[index]
        values = {**stage.words(), "data": self.data_of(index), "out": self.run_folder(index)}
        if index:
            values["previous"] = self.run_folder(index - 1)
            values["checkpoint"] = self.run_folder(index - 1) / self.checkpoint
        # split first: a path with spaces that is filled in stays one word
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
        fields = [(field, form or "") for _, field, form, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ValueError(f"the command {template!r} is not a template ({error}); write braces twice") from None
    for field, form in fields:
        if "{" in form or re.search(r"\d{4}", form):  # a width of any size would be filled with spaces
            raise ValueError(f"the command {template!r} fills in {{{field}:{form}}}; a format has three digits at most")
    return {field for field, _ in fields}


def load_plan(path: Path) -> PlanConfig:
    """Read a plan.

    Raises:
        UserError: the file is missing, is not YAML, or does not hold together.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping with folder, data, target, train and stages")
    try:
        return PlanConfig.model_validate(raw)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
