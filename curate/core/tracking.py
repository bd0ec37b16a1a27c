"""Experiment tracking behind one protocol: nothing, or Weights & Biases (the only module that imports wandb).

It gets numbers and names: no text of a sample unless `texts` is set, and nothing of the machine (its name, its user,
absolute paths, the command line).

A tracker never stops a job: its first error (no network, a full disk, a refused key) is logged as a warning, and the
job continues without it. The run's files, not the tracker, are the record.
"""

import logging
import math
import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import polars as pl
from pydantic import Field

from curate.core.config import Config

LOGGER = logging.getLogger(__name__)
# wandb.Table.MAX_ROWS: what it shows of one logged table.
MAX_TABLE_ROWS = 10_000

PROJECT = "curate"
"""W&B project where WANDB_PROJECT names none."""
TrackingMode = Literal["auto", "wandb", "offline", "none"]


class TrackingConfig(Config):
    """Where a job's numbers go besides its own folder. WANDB_PROJECT, WANDB_ENTITY and WANDB_TAGS say where to."""

    mode: TrackingMode = "auto"
    """auto: W&B online where a key is set (WANDB_API_KEY or ~/.netrc), else offline; offline files can be synced later
    with `wandb sync`."""
    texts: bool = False
    """Whether texts of training samples go there too (the examples of a report)."""
    timeout_seconds: float = Field(default=20.0, gt=0)
    """How long to wait for the W&B server at the start, and for uploads at the end, before going on without it."""


class Tracker(Protocol):
    """Receives what a job reports. No method raises."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The resolved settings of the job (JSON values); see `without_places`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers of one training step; steps never decrease. It drops numbers that are not finite."""

    def log_table(self, name: str, table: pl.DataFrame) -> None:
        """A table, all of its rows and columns."""

    def log_html(self, name: str, page: str) -> None:
        """A self-contained HTML page."""

    def log_artifact(self, name: str, kind: str, path: Path) -> None:
        """A file as a versioned artifact of a kind, e.g. "mixture"."""

    def finish(self) -> None:
        """Nothing is logged after this."""


class NoTracker:
    """A tracker that keeps nothing."""

    def log_config(self, config: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Keep nothing."""

    def log_table(self, name: str, table: pl.DataFrame) -> None:
        """Keep nothing."""

    def log_html(self, name: str, page: str) -> None:
        """Keep nothing."""

    def log_artifact(self, name: str, kind: str, path: Path) -> None:
        """Keep nothing."""

    def finish(self) -> None:
        """Nothing was started."""


class WandbTracker:
    """Weights & Biases: online, or offline files below a run's folder.

    Args:
        run: what `wandb.init` returned.
    """

    def __init__(self, run: Any) -> None:
        self._run = run
        # Nothing is tried after the first failure: each attempt could wait for a time-out.
        self._failed = False

    def log_config(self, config: Mapping[str, Any]) -> None:
        """The job's settings as the run's config."""
        self._attempt(lambda: self._run.config.update(without_places(dict(config)), allow_val_change=True))

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers of one step."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if finite:
            self._attempt(lambda: self._run.log(finite, step=step))

    def log_table(self, name: str, table: pl.DataFrame) -> None:
        """A `wandb.Table`; of more than `MAX_TABLE_ROWS` rows only the first ones, with a warning."""
        if table.height > MAX_TABLE_ROWS:
            LOGGER.warning("W&B shows the first %d of %d rows of %s", MAX_TABLE_ROWS, table.height, name)
        self._attempt(lambda: self._run.log({name: _table(table.head(MAX_TABLE_ROWS))}))

    def log_html(self, name: str, page: str) -> None:
        """A page that W&B shows in its workspace."""
        self._attempt(lambda: self._run.log({name: _html(page)}))

    def log_artifact(self, name: str, kind: str, path: Path) -> None:
        """A `wandb.Artifact` with one file."""
        self._attempt(lambda: self._run.log_artifact(_artifact(name, kind, path)))

    def finish(self) -> None:
        """Upload what is left, at most for the time that the config allows."""
        self._attempt(self._run.finish)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Run `action`, unless one failed before."""
        if self._failed:
            return
        try:
            action()
        except Exception as error:  # noqa: BLE001 (whatever fails in a tracker must not stop the job)
            self._failed = True
            LOGGER.warning("W&B failed (%s); the job goes on without it, nothing in its folder is missing", error)


def open_tracker(config: TrackingConfig, folder: Path, name: str, job: str) -> Tracker:
    """Start a tracker: W&B online, else offline where it cannot be reached, else none.

    Args:
        config: which tracker.
        folder: the run's folder; W&B writes below `folder/wandb`.
        name: the run's name as W&B shows it.
        job: what the run does, e.g. "train" or "select".
    """
    if config.mode == "none":
        return NoTracker()
    # `auto` without a key would ask for one on the terminal.
    modes = ("online", "offline") if config.mode == "wandb" or (config.mode == "auto" and has_key()) else ("offline",)
    for mode in modes:
        try:
            return WandbTracker(_start(config, mode, folder, name, job))
        except Exception as error:  # noqa: BLE001 (whatever fails in a tracker must not stop the job)
            LOGGER.warning("W&B did not start (%s: %s)", mode, error)
    return NoTracker()


def without_places(value: Any) -> Any:
    """Shorten absolute paths in JSON values: relative to the working folder, or only the last name outside of it."""
    if isinstance(value, Mapping):
        return {without_places(key): without_places(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(inner) for inner in value]
    if not isinstance(value, str) or not value.startswith(("/", "~")):
        return value
    path, here = Path(value), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def has_key() -> bool:
    """Whether a W&B key is set: `WANDB_API_KEY`, or an entry for its host in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return host is not None and netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _start(config: TrackingConfig, mode: str, folder: Path, name: str, job: str) -> Any:
    import wandb

    folder.mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(
        init_timeout=config.timeout_seconds,
        login_timeout=config.timeout_seconds,
        finish_timeout=config.timeout_seconds if mode == "online" else 0.0,  # offline: until the file is complete
        console="off",
        silent=True,
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        # Otherwise it records the machine: host, user, command line, program, paths, processors.
        x_disable_meta=True,
        x_disable_machine_info=True,
        host="",
        program="",
    )
    return wandb.init(
        # An argument wins over the environment, so only what the environment leaves open is given; WANDB_ENTITY and
        # WANDB_TAGS act on their own.
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=name,
        job_type=job,
        dir=folder,
        mode="online" if mode == "online" else "offline",
        reinit="create_new",  # a training of the same process may have a W&B run of its own
        settings=settings,
    )


def _table(table: pl.DataFrame) -> Any:
    import wandb

    columns: list[str | int] = [*table.columns]
    return wandb.Table(columns=columns, data=[list(row) for row in table.iter_rows()])


def _html(page: str) -> Any:
    import wandb

    # Nothing of W&B's style in our page, and text that happens to be a path is no file to read.
    return wandb.Html(page, inject=False, data_is_not_path=True)


def _artifact(name: str, kind: str, path: Path) -> Any:
    import wandb

    artifact = wandb.Artifact(name, type=kind)
    # Copied at once: the file may be replaced before the upload.
    artifact.add_file(str(path), policy="mutable")
    return artifact
