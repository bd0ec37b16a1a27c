"""How much samples helped: one protocol for the values of recorded windows and of the run's current state.

Sign: positive = the sample lowers the target's loss = it helps. Unit: `tables.MeasuredValues`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import dataframely as dy
import numpy as np
import polars as pl

from curate.domains.methods import shuffled
from curate.embeddings.embed import embed, index_folder
from curate.embeddings.values import embedded_values
from curate.influence.current import value_next_step
from curate.influence.draw import HORIZON
from curate.influence.space import check_layers
from curate.selection.rows import open_source_rows
from curate.tables import MeasuredValues
from curate.training.replay import Replay

if TYPE_CHECKING:
    from curate.embeddings.store import Embedding
    from curate.influence.current import NextStep
    from curate.selection.resolve import Resolved
    from curate.selection.rows import SourceRows
    from curate.selection.source import Source
    from curate.training.target import Target, Targets


class SourceValues(Protocol):
    """Values of one source's samples for every target."""

    @property
    def frame(self) -> dy.DataFrame[MeasuredValues]:
        """Of all targets, one after the other."""

    @property
    def horizon(self) -> str:
        """The state that the targets' losses are read at."""

    @property
    def residual(self) -> float | None:
        """Share of the target's gradient that anchors leave unexplained; None where it was not solved into any."""

    @property
    def costs(self) -> Sequence[Cost]:
        """What making it cost."""

    def extremes(self, target: Target, count: int) -> dict[str, list[int]]:
        """Rows of largest ("most") and of smallest ("least") value for a target, farthest first."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a phase cost.

    Attributes:
        phase: its name in the report.
        folder: what it wrote.
        seconds: that it took.
        passes: the same in forward+backward passes of a training batch.
    """

    phase: str
    folder: Path
    seconds: float
    passes: float


@dataclass(frozen=True, kw_only=True)
class WindowValues:
    """Values of a recorded window (`early`, `late`): inner products of its embedding with each target's vectors."""

    window: str
    embeddings: Sequence[Embedding]  # one per target
    targets: Sequence[Target]
    index: Path
    frame: dy.DataFrame[MeasuredValues]

    @property
    def horizon(self) -> str:
        """Of the embedding."""
        return str(self.frame["horizon"][0])

    @property
    def residual(self) -> float | None:
        """Of the first target."""
        return self.embeddings[0].residual

    @property
    def costs(self) -> Sequence[Cost]:
        """Of the embedding."""
        # one for all targets: they are read from the same rows
        first = self.embeddings[0]
        return [Cost(phase=f"embed {self.window}", folder=first.folder, seconds=first.seconds, passes=first.passes)]

    def extremes(self, target: Target, count: int) -> dict[str, list[int]]:
        """By the FAISS index."""
        from curate.index.open import extremes

        position = [candidate.name for candidate in self.targets].index(target.name)
        vectors = self.embeddings[position].targets
        assert vectors is not None
        # the value is linear in the target's vector: the halves' vectors, weighted, are the whole target's
        return extremes(self.index, np.asarray(target.half_weights, np.float32) @ vectors, count)


@dataclass(frozen=True, kw_only=True)
class CurrentValues:
    """Values of samples at the run's last state (`current`, `candidates`), for one more step."""

    next_step: NextStep
    rows: SourceRows | None

    @property
    def frame(self) -> dy.DataFrame[MeasuredValues]:
        """Of the measured samples."""
        return self.next_step.values

    @property
    def horizon(self) -> str:
        """One step on."""
        return HORIZON

    @property
    def residual(self) -> float | None:
        """No anchors are used."""
        return None

    @property
    def costs(self) -> Sequence[Cost]:
        """Of the measurement, and of the rows that were made for it."""
        step, rows = self.next_step, self.rows
        costs = [Cost(phase=f"{step.name} state", folder=step.folder, seconds=step.seconds, passes=step.passes)]
        if rows is not None:
            costs.append(Cost(phase="value index", folder=rows.space.folder, seconds=rows.seconds, passes=rows.passes))
        return costs

    def extremes(self, target: Target, count: int) -> dict[str, list[int]]:
        """By sorting: there are few."""
        order = self.frame.filter(target=target.name)["value_total_nats"].arg_sort(descending=True).to_list()
        return {"most": order[:count], "least": order[::-1][:count]}


@dataclass(frozen=True, kw_only=True)
class Values:
    """What was measured.

    Attributes:
        by_source: name of the source -> its values; windows first.
        next_step: of the current state, where anything depends on it.
        rows: of the value index for the same samples, where there are any.
        finished: when, by `perf_counter`.
    """

    by_source: Mapping[str, SourceValues]
    next_step: NextStep | None
    rows: SourceRows | None = None
    finished: float = field(default_factory=perf_counter)

    @property
    def frame(self) -> dy.DataFrame[MeasuredValues]:
        """Of all sources, one below the other; without rows where nothing was valued."""
        # the empty table gives the schema where there are no sources
        frames = [MeasuredValues.create_empty(), *(values.frame for values in self.by_source.values())]
        return MeasuredValues.validate(pl.concat(frames))

    def of(self, source: str) -> dy.DataFrame[MeasuredValues]:
        """Of one source; without rows where it was not valued."""
        values = self.by_source.get(source)
        return MeasuredValues.create_empty() if values is None else values.frame

    @property
    def residuals(self) -> dict[str, float]:
        """Source -> relative residual, where the target was solved into anchors."""
        return {name: values.residual for name, values in self.by_source.items() if values.residual is not None}


def measure(plan: Resolved, source: Source, targets: Targets) -> Values:
    """Measure values of the samples of every source for every target; what was measured before is opened.

    Args:
        plan: of the selection.
        source: what the next stage draws from; values of the current state are of a part of it.
        targets: the targets, and what must be retained.
    """
    by_source: dict[str, SourceValues] = {}
    if plan.windows:
        by_source |= _windows(plan, targets)
    next_step = source_rows = None
    # also where domains are scored by a window: samples are chosen by the current state
    if plan.asks_next_step:
        replay = None
        if plan.config.values.rows:
            replay = Replay(plan.run, plan.config.device, plan.embedding.tolerance)
            check_layers(replay)  # before anything is measured: a model may have none
        next_step = value_next_step(
            plan.run, source.samples, source.usable, targets.every, plan.next_step, plan.next_step_name
        )
        if replay is not None:
            source_rows = open_source_rows(plan, source, next_step, replay)
        by_source[plan.next_step_name] = CurrentValues(next_step=next_step, rows=source_rows)
    return Values(by_source=by_source, next_step=next_step, rows=source_rows)


def _windows(plan: Resolved, targets: Targets) -> dict[str, SourceValues]:
    embedded = embed(plan.embedding, plan.run, targets)
    values: dict[str, SourceValues] = {}
    for window in plan.windows:
        embeddings = embedded[window]
        frames = [embedded_values(*pair) for pair in zip(embeddings, targets.every, strict=True)]
        if plan.config.method == "shuffled":  # a null control: each target's values dealt anew
            frames = [shuffled(frame, plan.config.seed) for frame in frames]
        values[window] = WindowValues(
            window=window,
            embeddings=embeddings,
            targets=targets.every,
            index=index_folder(embeddings[0], plan.embedding.index),
            frame=MeasuredValues.validate(pl.concat(frames)),
        )
    return values
