"""`schedule.yaml`: the streams of a stage phase by phase.

    - start_sample: 0          # counted in samples, so that it holds at any batch size
      streams:                 # arguments of one `Stream` each; `choose` samples of it in this phase
      - {local: data/web, choose: 900}
      - {local: data/code, choose: 100}
    - start_sample: 1000
      ...

An entry holds until the next one starts. A relative `local` counts from the file's own folder.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from curate.core.artifacts import checked
from curate.core.config import Config, FileName
from curate.core.errors import UserError
from curate.core.reading import read_yaml
from curate.core.validation import first_problem


class StreamArguments(Config):
    """Arguments of one `Stream` of mosaicml-streaming, whose data lies in a local folder."""

    local: FileName
    """MDS folder."""
    split: str | None = None
    """Folder in it."""
    remote: str | None = None
    """URL that it is downloaded from."""
    proportion: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Share of all samples."""
    repeat: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """How often each sample is used."""
    choose: int | None = Field(default=None, ge=0)
    """Samples of it."""
    download_retry: int | None = Field(default=None, ge=0)
    """How often a failed download is tried again."""
    download_timeout: float | None = Field(default=None, gt=0)
    """Seconds of a download."""
    validate_hash: str | None = None
    """Hash that downloads are compared by."""
    keep_zip: bool | None = None
    """Whether the compressed form stays."""

    @model_validator(mode="after")
    def _one_amount(self) -> Self:
        # Streaming allows one of them, and says so only when the training starts.
        given = [name for name in ("proportion", "repeat", "choose") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} exclude each other; set one")
        return self


class PhaseStream(StreamArguments):
    """A stream of a phase."""

    choose: int = Field(ge=1)
    """Samples of it in the phase."""


class Entry(Config):
    """One phase of a stage."""

    start_sample: int = Field(ge=0)
    """Where it starts, in samples."""
    streams: Annotated[tuple[PhaseStream, ...], Field(min_length=1)]
    """What it is made of."""

    @property
    def samples(self) -> int:
        """Samples of the phase."""
        return sum(stream.choose for stream in self.streams)


@dataclass(frozen=True)
class Schedule:
    """The entries of a schedule in order, without gaps.

    Raises:
        UserError: entries are out of order, or an entry has not as many samples as there are until the next one.
    """

    entries: tuple[Entry, ...]

    def __post_init__(self) -> None:
        for entry, after in zip(self.entries, self.entries[1:], strict=False):
            if entry.start_sample + entry.samples != after.start_sample:
                raise UserError(
                    f"the entry at start_sample {entry.start_sample} has {entry.samples} samples, the next starts at "
                    f"{after.start_sample}: set it to {entry.start_sample + entry.samples}, or change `choose`"
                )

    @property
    def stop(self) -> int:
        """First sample after the schedule."""
        return self.entries[-1].start_sample + self.entries[-1].samples

    def at(self, step: int) -> Entry:
        """The entry that a sample of the stage falls into.

        Raises:
            UserError: it lies before the first entry or after the last.
        """
        first = self.entries[0].start_sample
        if not first <= step < self.stop:
            where = f"before the first entry (start_sample {first})" if step < first else f"after the end ({self.stop})"
            raise UserError(
                f"step {step} lies {where} of the schedule, which says nothing about it: a stage is served from "
                "start_sample 0 to the schedule's end, in samples"
            )
        # The last entry that starts at or before the sample.
        return self.entries[bisect_right([entry.start_sample for entry in self.entries], step) - 1]

    def totals(self) -> list[dict[str, Any]]:
        """Sum the samples of all phases per stream, as `Stream` arguments ordered by folder.

        Raises:
            UserError: a stream has other arguments in another phase.
        """
        by_stream: dict[tuple[str, str], dict[str, Any]] = {}
        for entry in self.entries:
            for stream in entry.streams:
                arguments = stream.model_dump(exclude_unset=True)
                total = by_stream.setdefault(stream_key(arguments), {**arguments, "choose": 0})
                # One `Stream` serves all phases, so it can have one set of download settings only.
                if {**total, "choose": 0} != {**arguments, "choose": 0}:
                    raise UserError(f"the schedule has {stream.local} with other arguments at {entry.start_sample}")
                total["choose"] += stream.choose
        # Sorted: the order of streams numbers the samples, and must not depend on the phases' order.
        return [by_stream[key] for key in sorted(by_stream)]


def stream_key(stream: dict[str, Any]) -> tuple[str, str]:
    """Identify a stream by folder and split."""
    return str(stream["local"]), str(stream.get("split") or "")


def is_schedule(value: Any) -> bool:
    """Whether the content of a YAML file is meant as a schedule, and not as a list of streams."""
    return isinstance(value, list) and bool(value) and all(isinstance(e, dict) and "start_sample" in e for e in value)


def parse_schedule(value: Sequence[Any], path: Path) -> Schedule:
    """Parse the content of a schedule file.

    Args:
        value: the file's content.
        path: the file; relative folders count from it.

    Raises:
        UserError: an entry lacks something, or the entries do not follow each other.
    """
    try:
        entries = tuple(map(Entry.model_validate, value))
    except ValidationError as error:
        raise UserError(f"{path} is not a schedule of streams: {first_problem(error)}") from None
    try:
        schedule = Schedule(tuple(_placed(entry, path.resolve().parent) for entry in entries))
        # Raises where phases disagree about a stream.
        schedule.totals()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return schedule


def _placed(entry: Entry, here: Path) -> Entry:
    """Put the folders of an entry's streams below `here`; absolute ones stay."""
    streams = [stream.model_copy(update={"local": str(here / stream.local)}) for stream in entry.streams]
    return entry.model_copy(update={"streams": tuple(streams)})


def load_schedule(path: Path) -> Schedule | None:
    """Read a schedule; None where the file holds something else (a list of streams).

    Raises:
        UserError: the file cannot be read, or its schedule does not hold together.
    """
    if path.suffix not in (".yaml", ".yml"):
        return None
    # A list of streams is YAML too: only entries with `start_sample` make it a schedule.
    value = read_yaml(checked(path))
    return parse_schedule(value, path) if is_schedule(value) else None
