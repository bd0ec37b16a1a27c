"""A recorded run on disk: `run.json`, `steps.parquet`, `snapshots/`.

`steps.parquet` has one row per (step, rank, micro-batch); see `STEPS`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated

import dataframely as dy
import polars as pl
from pydantic import Field, ValidationError

from curate.core.arrays import read_table
from curate.core.artifacts import checked, file_fingerprint, fingerprint, hash_of, list_files, read_json
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.validation import first_problem
from curate.core.writing import atomic_write
from curate.data.documents import tokenizer_file
from curate.data.mds import Columns, MdsStream
from curate.data.streams import NAME, DomainName, check_same_tokenizer
from curate.tables import Catalogue, SampleUses
from curate.training.fit import check_tokens
from curate.training.snapshots import snapshot_path, snapshot_steps
from curate.training.source import SampleSource
from curate.training.task import TaskSpec

_log = logging.getLogger(__name__)
_NUMBERS = ("lr", "weight_decay", "beta1", "beta2", "eps", "momentum", "dampening", "ns_a", "ns_b", "ns_c")
# the fields of `GroupSettings`; Float64 keeps Python's floats to the last digit, so replay sets the very same
_SETTINGS = {
    "optimizer": pl.String,
    **dict.fromkeys(_NUMBERS, pl.Float64),
    "nesterov": pl.Boolean,
    "ns_steps": pl.Int64,
    "adjust_lr_fn": pl.String,
    "updated": pl.Boolean,  # whether the group's optimizer took the step
}
STEPS = pl.Schema(
    [
        ("step", pl.Int64()),
        ("rank", pl.Int32()),
        ("micro_batch", pl.Int32()),
        ("sample_ids", pl.List(pl.Int64)),
        ("weights", pl.List(pl.Float32)),  # c_z of L_k = sum over all ranks and micro-batches of c_z l_z
        ("tokens", pl.List(pl.Int32)),  # predicted tokens per sample
        ("loss", pl.Float64()),  # L_k, nats per token, the same on every row of a step; null where it was not logged
        ("grad_norm", pl.Float64()),  # before clipping; null where the trainer does not measure it
        ("clip_factor", pl.Float64()),  # what clipping multiplied the gradient by; null where it is not known
        ("groups", pl.List(pl.Struct(_SETTINGS))),  # one entry per parameter group
    ]
)

# whether any optimizer took the step
_UPDATED = pl.col("groups").list.eval(pl.element().struct.field("updated")).list.any()


class RunSpec(Config):
    """Description of a run, which the recorder writes to `run.json`."""

    task: TaskSpec
    """Model and precision."""
    streams: dict[DomainName, Path]
    """Domain -> MDS folder that the run trained on. Domains become folder names: letters, digits, '_', '-' and '.'."""
    columns: Columns = Columns()
    """Columns of the streams."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the tokens; needed for targets and examples given as text."""
    seq_len: int = Field(ge=1)
    """Tokens of a training sequence; long target documents are split to it."""
    steps: int = Field(ge=1)
    """Optimizer steps of the stage."""
    windows: dict[Annotated[str, Field(pattern=f"^{NAME}$")], tuple[int, int]]
    """Name -> first step and step after the last. Names become folder names, as domains do."""
    optimizers: list[str]
    """Class name of each parameter group's optimizer, in `torch.optim`."""
    groups: list[list[str]]
    """Parameter names of each group."""
    clip_norm: float | None = Field(gt=0, allow_inf_nan=True)
    """Clipping threshold of the global gradient norm; none: no clipping."""
    previous: Path | None = None
    """Run of the stage that this one continued from; its samples count as seen too (`training.token_accounting`)."""


class Run:
    """A finished recorded run.

    Args:
        folder: its directory.
        streams: where streams lie now, by domain, if they were moved since.
        tokenizer: that made the tokens, for a run that was recorded without one.

    Raises:
        UserError: no run there, not finished, damaged, without snapshots, or of another tokenizer.
    """

    def __init__(self, folder: Path, streams: Mapping[str, Path] | None = None, tokenizer: Path | None = None) -> None:
        folder = Path(folder)  # a string is what people type
        self.folder = folder
        if folder.is_file():
            raise UserError(f"{folder} is a file; name the run's folder, {folder.parent}")
        raw = read_json(folder / "run.json")
        for name in sorted(set(streams or {}) - set(raw.get("streams", {}))):
            _log.warning("%s is no stream of run %s: its samples are taken in as a domain of their own", name, folder)
        raw["streams"] = {**raw.get("streams", {}), **(streams or {})}
        try:
            self.spec = _resolved(RunSpec.model_validate(raw), folder)
        except ValidationError as error:
            raise UserError(f"{folder / 'run.json'} does not describe a run: {first_problem(error)}") from None
        # steps.parquet is written last, so it alone tells a finished run
        if not (folder / "steps.parquet").exists():
            raise UserError(f"{folder} is not finished (no steps.parquet): resume its training to the end first")
        # snapshots are large, so their sums are checked when one is read (`snapshot`)
        config = self.spec.task.model.hf_config
        for path in (folder / "run.json", folder / "steps.parquet", *([config] if config else [])):
            checked(path, by=folder)
        if not self.snapshots:
            raise UserError(
                f"{folder} has no snapshots: values need the states at the window borders; "
                "train with the recorder's windows set"
            )
        tokenizer = None if tokenizer is None else tokenizer_file(tokenizer)
        # a tokenizer that the run did not name decides what targets say, so the fingerprint has to know it
        self._added_tokenizer = tokenizer if self.spec.tokenizer is None else None
        if tokenizer is not None:
            self._set_tokenizer(tokenizer)

    def _set_tokenizer(self, tokenizer: Path) -> None:
        # where the recorded file is gone, the token ids of the streams are the only check left
        if self.spec.tokenizer is not None and self.spec.tokenizer.exists():
            check_same_tokenizer(tokenizer, self.spec.tokenizer, "of the run")
        check_tokens(self.catalogue, self.spec.streams, tokenizer)
        self.spec = self.spec.model_copy(update={"tokenizer": tokenizer})

    @cached_property
    def unknown(self) -> dy.DataFrame[SampleUses]:
        """Samples that the run trained on and that are in none of its streams; a warning gives their number."""
        trained = sample_uses(self.steps)
        unknown = SampleUses.validate(trained.join(self.catalogue, on="sample_id", how="anti").sort("sample_id"))
        if len(unknown):
            _log.warning(
                "%s of %s samples that run %s trained on (%s of %s uses) are in none of its streams and count nowhere: "
                "the streams were changed since, or other rows than theirs were trained on (labels, special tokens)",
                f"{len(unknown):,}",
                f"{len(trained):,}",
                self.folder,
                f"{unknown['uses'].sum():,}",
                f"{trained['uses'].sum():,}",
            )
        return unknown

    @property
    def snapshots(self) -> list[int]:
        """Steps whose state is stored."""
        return snapshot_steps(self.folder)

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the recorded trajectory: spec and steps, not where the files lie."""
        # paths are left out: streams may be moved, and the content ids in the steps say which samples they were
        spec = self.spec.model_dump(mode="json", exclude={"streams", "tokenizer", "task", "previous"})
        added = [] if self._added_tokenizer is None else [file_fingerprint(self._added_tokenizer)]
        return fingerprint([spec, file_fingerprint(self.folder / "steps.parquet"), *added])

    @cached_property
    def steps(self) -> pl.DataFrame:
        """The step records, ordered by step, rank, micro-batch.

        Raises:
            UserError: the file is truncated, has other columns, or steps are missing.
        """
        path = self.folder / "steps.parquet"
        frame = read_table(path)
        if frame.schema != STEPS:
            raise UserError(
                f"{path} has columns {list(frame.schema)}, expected {list(STEPS)}; it was not written by the recorder"
            )
        missing = sorted(set(range(self.spec.steps)) - set(frame["step"].unique()))
        if missing:
            raise UserError(
                f"{path} lacks step {missing[0]} and {len(missing) - 1} more of {self.spec.steps}; "
                "train the stage again"
            )
        return frame.sort("step", "rank", "micro_batch")

    def window(self, name: str) -> tuple[int, int]:
        """First step and step after the last of a declared window.

        Raises:
            UserError: the run declared no such window.
        """
        if name not in self.spec.windows:
            raise UserError(f"run {self.folder} has no window {name!r}; it declared {sorted(self.spec.windows)}")
        return self.spec.windows[name]

    def snapshot_before(self, step: int) -> int:
        """The last snapshot at or before `step`.

        Raises:
            UserError: there is none.
        """
        earlier = [snapshot for snapshot in self.snapshots if snapshot <= step]
        if not earlier:
            raise UserError(
                f"run {self.folder} has no snapshot at or before step {step} (it has {self.snapshots}): "
                f"restore {snapshot_path(self.folder, step)}"
            )
        return earlier[-1]

    def snapshot(self, step: int) -> Path:
        """File of the snapshot at `step`.

        Raises:
            UserError: it is missing, or is not what the recorder wrote.
        """
        return checked(snapshot_path(self.folder, step), by=self.folder)

    @cached_property
    def diverged(self) -> int | None:
        """The first updated step whose loss or gradient norm is not finite; what follows it means nothing."""
        # a number that was not logged is null; the filter drops null, so it does not count as divergence
        not_finite = ~(pl.col("loss").is_finite() & pl.col("grad_norm").is_finite())
        # a skipped step is not divergence: a GradScaler skips exactly the steps that overflow
        steps = self.steps.filter(not_finite & _UPDATED)["step"]
        return int(steps[0]) if len(steps) else None

    @property
    def usual_step(self) -> int:
        """The updated step of median lr (of the first group). Its settings stand for the steps of another stage.

        The last step would not do: its lr has decayed to almost nothing.
        """
        lr = pl.col("groups").list.first().struct.field("lr")
        steps = self.steps.filter(_UPDATED).unique("step", keep="first", maintain_order=True)
        # by step too: a constant lr must give the same step every time
        rates = steps.select("step", lr=lr).sort("lr", "step")
        return int(rates["step"][len(rates) // 2])

    @cached_property
    def source(self) -> SampleSource:
        """The samples of the streams that the run trained on."""
        return SampleSource(self.folder, self.spec.streams, self.spec.columns)

    @property
    def streams(self) -> dict[str, MdsStream]:
        """The streams that the run trained on, by domain."""
        return self.source.streams

    @property
    def catalogue(self) -> dy.DataFrame[Catalogue]:
        """Every sample of the streams, see `SampleSource.catalogue`."""
        return self.source.catalogue

    @property
    def unique_samples(self) -> dy.DataFrame[Catalogue]:
        """Every distinct sample of the streams once, see `SampleSource.unique_samples`."""
        return self.source.unique_samples


class ContinuedRun(Run):
    """A run with one more step: the batch of its last update, with the settings of the usual step.

    The added step has neither loss nor gradient norm. It is a trajectory of its own, with its own fingerprint.

    Args:
        run: that is continued.
        lr_share: factor of the usual step's lr.

    Raises:
        UserError: no step of the run took an update.
    """

    def __init__(self, run: Run, lr_share: float) -> None:
        self.folder, self._added_tokenizer = run.folder, run._added_tokenizer  # noqa: SLF001 (its own kind)
        self.spec = run.spec.model_copy(update={"steps": run.spec.steps + 1})
        # values for the cached properties of `Run`, which would read the files of the run without the added step
        self.__dict__["source"] = run.source
        self.__dict__["fingerprint"] = fingerprint([run.fingerprint, "continued", lr_share])
        self.__dict__["steps"] = _continued_steps(run, lr_share)


def _continued_steps(run: Run, lr_share: float) -> pl.DataFrame:
    """The steps of a run and the added one, see `ContinuedRun`."""
    updated = run.steps.filter(_UPDATED)["step"]
    if updated.is_empty():
        raise UserError(f"run {run.folder} was updated in no step: there is none to be repeated")
    # the batch matters: its gradient is what clipping and the moments of the added step see
    last = run.steps.filter(step=updated.max()).with_columns(step=pl.lit(run.spec.steps, pl.Int64))
    lr = (pl.element().struct.field("lr") * lr_share).alias("lr")
    settings = pl.col("groups").list.eval(pl.element().struct.with_fields(lr))
    # one row is enough: all rows of a step hold the same settings
    usual = run.steps.filter(pl.col("step") == run.usual_step).head(1).select(settings)
    # null: replay compares only what was recorded
    unknown = pl.lit(None, pl.Float64)
    added = last.drop("groups").with_columns(loss=unknown, grad_norm=unknown, clip_factor=unknown)
    # select: concat needs the columns of `STEPS` in their order
    return pl.concat([run.steps, added.join(usual, how="cross").select(STEPS.names())])


def sample_uses(steps: pl.DataFrame) -> dy.DataFrame[SampleUses]:
    """How often each sample occurs in a table of steps (its `sample_ids`)."""
    counted = steps.select(sample_id="sample_ids").explode("sample_id").group_by("sample_id").len("uses")
    # polars counts in UInt32, where a difference below 0 wraps around
    return SampleUses.validate(counted.with_columns(pl.col("uses").cast(pl.Int64)))


def keep_model_config(folder: Path, task: TaskSpec, *, write: bool = True) -> TaskSpec:
    """Copy the model's config into the run, so that later edits of the original do not matter.

    Args:
        folder: the run.
        task: as the trainer gave it.
        write: whether this process writes; only rank 0 should.

    Returns:
        The task with the config's path relative to the run.
    """
    source = task.model.hf_config
    if source is None:
        return task
    copy = folder / "model" / "config.json"
    if write:
        with atomic_write(copy) as part:
            part.write_bytes((source / "config.json" if source.is_dir() else source).read_bytes())
        list_files(folder, [copy])
    model = task.model.model_copy(update={"hf_config": copy.relative_to(folder)})
    return task.model_copy(update={"model": model})


def part_rows(path: Path) -> pl.DataFrame:
    """Read a part of the step records of an unfinished run; its name ends in its hash.

    Raises:
        UserError: it is damaged.
    """
    content = path.read_bytes()
    if hash_of(content) != path.stem.rpartition("-")[2]:
        raise UserError(f"{path} is corrupted: restore it, or start this stage anew in another folder")
    return pl.read_parquet(content)


def _resolved(spec: RunSpec, folder: Path) -> RunSpec:
    """Resolve the path of the model's config, which is kept relative to the run, so that a run can be moved."""
    config = spec.task.model.hf_config
    if config is None:
        return spec
    model = spec.task.model.model_copy(update={"hf_config": folder / config})
    return spec.model_copy(update={"task": spec.task.model_copy(update={"model": model})})


def open_run(path: Path, streams: Mapping[str, Path] | None = None, tokenizer: Path | None = None) -> Run:
    """Open a run, or the newest finished one below a folder; see `Run`."""
    # a file goes to `Run` too, which names the folder to give instead
    return Run(path if (path / "run.json").exists() or path.is_file() else find_run(path), streams, tokenizer)


def find_run(root: Path) -> Path:
    """The newest finished run below `root`.

    Raises:
        UserError: there is none.
    """
    finished = [path.parent for path in root.glob("**/run.json") if (path.parent / "steps.parquet").exists()]
    if not finished:
        raise UserError(f"no finished run below {root}; train one with the recorder, or name it with --run")
    # by name where times are equal, as after a copy without times
    return max(finished, key=lambda path: ((path / "steps.parquet").stat().st_mtime, str(path)))
