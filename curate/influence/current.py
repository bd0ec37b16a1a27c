"""Values of samples for the next step, by forward passes alone: some of every domain, then the most promising ones.

All samples share one direction per target (`influence.direction`); the first-order value of a sample is the directional
derivative of its own loss along it. The samples are the run's own (source `current`) or candidates that were never
trained on (source `candidates`). Both artifacts lie in the run, go by content (a re-sharded stream needs no new ones)
and are continued where they were interrupted:

- `influence/<source>-*`: the directions, and some samples of every domain, measured token by token for each target.
  Domains are scored by them and all other samples predicted from them (`ngrams.regression`).
- `influence/measured-*`: one value, for all targets together, of each other sample that is measured.

T targets, N samples, n tokens, P parameters.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.arrays import read_arrays, read_table, write_arrays, write_table
from curate.core.artifacts import finalize, fingerprint, making
from curate.core.progress import progress
from curate.embeddings.store import add_time, read_timings
from curate.influence.direction import moves_along, sample_derivatives, target_directions, token_derivatives
from curate.influence.draw import as_measured_values, as_sample_values, draw_measured
from curate.influence.extrapolate import blocks_of
from curate.ngrams.regression import means
from curate.stats.deviation import combined_values, target_shares
from curate.tables import MeasuredValues, Samples, SampleValues
from curate.training.fit import check_fit
from curate.training.replay import Replay, records
from curate.training.run import ContinuedRun
from curate.training.samples import samples_fingerprint
from curate.training.source import CURRENT
from curate.training.target import check_vocabulary

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.data.mds import Sample
    from curate.training.run import Run
    from curate.training.source import SampleSource
    from curate.training.target import Target

    Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)
LR_SHARE = 0.1
"""Of the run's median lr, see `influence.direction`."""
_FORWARD_PASSES = 0.4  # of a forward+backward pass: what a forward pass costs
_BATCH = 64  # samples read at a time
# Names of files in an artifact; renaming one makes finished artifacts unreadable.
DIRECTIONS, TOKEN_VALUES = "directions.npz", "tokens.npz"


@dataclass(frozen=True, kw_only=True)
class NextStepOptions:
    """How values of the next step are measured.

    Attributes:
        per_domain: how many samples of each domain are measured for every target.
        seed: of the draw.
        device: of the model.
        batch_size: sequences per pass over a target.
        tolerance: of the replay, where the run has no snapshot at its end.
    """

    per_domain: int = 100
    seed: int = 0
    device: str = "cpu"
    batch_size: int = 16
    tolerance: float = 1e-3


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """Directions of the targets for the next step, and values of the measured samples of every domain along them.

    Positive = it lowers the target's loss.

    Attributes:
        name: of the source: current or candidates.
        folder: the artifact; `directions.npz` has `u` of each target, float32 (T, P), `tokens.npz` the values of the
            predicted tokens of that part, float32 (n, T), one sample after the other.
        values: of a part of every domain for every target; `step` is a group, see `draw_measured`. Derivatives know no
            halves of a target: these have the whole value.
        fingerprint: identity of what it is made from.
        seconds: time that it took.
        passes: the same in forward+backward passes of a training batch.
    """

    name: str
    folder: Path
    values: dy.DataFrame[MeasuredValues]
    fingerprint: str
    seconds: float
    passes: float


@dataclass(frozen=True, kw_only=True)
class MeasuredSamples:
    """What one more use of some samples would do now. Positive = it lowers the targets' losses.

    Attributes:
        folder: the artifact.
        values: for all targets together (`deviation.combined_values`); those of halves are the same.
        seconds: time that it took.
        passes: the same in forward+backward passes of a training batch.
    """

    folder: Path
    values: dy.DataFrame[SampleValues]
    seconds: float
    passes: float


def value_next_step(
    run: Run,
    source: SampleSource,
    samples: dy.DataFrame[Samples],
    targets: Sequence[Target],
    options: NextStepOptions,
    name: Literal["current", "candidates"] = CURRENT,
) -> NextStep:
    """Measure some samples of every domain for each target, or open what was measured; the cost is logged before.

    Args:
        run: a finished run, whose last state is the current one.
        source: of the samples.
        samples: N samples of the source: what the part is drawn from.
        targets: T targets.
        options: how many, and how.
        name: of the source.

    Raises:
        UserError: bad target, or samples that the model cannot read.
    """
    # drawn before the lock: the draw is part of the identity
    drawn = draw_measured(samples, options.per_domain, step_samples(run), options.seed)
    settings = {
        "run": run.fingerprint,
        "source": name,
        "samples": samples_fingerprint(drawn),
        "targets": [target.fingerprint for target in targets],
        "lr_share": LR_SHARE,
    }
    identity = fingerprint(settings)
    folder = run.folder / "influence" / f"{name}-{targets[0].name}-{identity[:8]}"
    with making(folder, settings) as missing:
        if missing:
            replay = _continued_replay(run, targets, options)
            # all that may be drawn, not the part alone
            check_fit(source.catalogue, source.folders, replay.model, replay.task.vocabulary)
            _say_cost(run, targets, len(drawn))
            with timed(folder, replay) as scratch:
                _write_part(run, source, replay, drawn, targets, options, scratch, folder)
            finalize(folder, "next step", settings, targets=[target.name for target in targets])
    # outside of the lock and after the seal: an interrupted call that had sealed leaves its scratch behind
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    values = _read_part(run, source, folder, drawn, targets, name)
    return NextStep(name=name, folder=folder, values=values, fingerprint=identity, **timings_of(folder))


def _say_cost(run: Run, targets: Sequence[Target], samples: int) -> None:
    # 0 where the run left a snapshot at its end
    lead = run.spec.steps - run.snapshot_before(run.spec.steps)
    sequences = sum(len(half) for target in targets for half in target.halves)
    direction = lead + 2 + sequences / step_samples(run)  # the replay to the last state, the added step, the targets
    measuring = forward_passes(run, len(targets), samples)
    _log.info(
        "the next step will cost about %.0f forward+backward passes: %.0f for what the targets ask of it, %.0f to "
        "measure %s samples for each",
        direction + measuring,
        direction,
        measuring,
        f"{samples:,}",
    )


def _write_part(
    run: Run,
    source: SampleSource,
    replay: Replay,
    drawn: pl.DataFrame,
    targets: Sequence[Target],
    options: NextStepOptions,
    scratch: Path,
    folder: Path,
) -> None:
    losses = [half for target in targets for half in target.halves]
    state, directions = target_directions(replay, losses, _half_weights(targets), options.batch_size)
    tokens = linear_values(
        replay,
        state.parameters,
        directions,
        drawn,
        "tokens",
        read=partial(read_together, run, source),
        scratch=scratch,
        by_token=True,
    ) / (step_tokens(run) * LR_SHARE)
    # kept: `measure_samples` goes along the same directions, in another process perhaps
    write_arrays(folder / DIRECTIONS, {"directions": directions.cpu().numpy()})
    write_arrays(folder / TOKEN_VALUES, {"values": tokens.astype(np.float32)})
    of_samples = means(tokens, drawn["predicted_tokens"].to_numpy())
    # a target by its position, not its name: the same text under another file name is the same artifact
    tables = (_of_target(drawn, position, values) for position, values in enumerate(of_samples.T))
    write_table(folder / "values.parquet", pl.concat(tables))


def measure_samples(
    run: Run,
    source: SampleSource,
    samples: dy.DataFrame[Samples],
    next_step: NextStep,
    targets: Sequence[Target],
    weights: Mapping[str, float],
    options: NextStepOptions,
) -> MeasuredSamples:
    """Measure samples for the next step, or open their values; the cost is stated before.

    Targets count in their own standard deviations, which the part of every domain tells; all others have the derivative
    along the one direction that the targets have together, so that more targets cost no more.

    Args:
        run: a finished run, whose last state is the current one.
        source: of the samples.
        samples: N samples of the source.
        next_step: of the run and the targets; samples that it values are not passed over again.
        targets: T targets.
        weights: target -> weight.
        options: device and tolerance of the replay.
    """
    target_weights = {target.name: weights[target.name] for target in targets}
    # in the unit of the part's values, so that both kinds of measured samples can stand in one ranking
    known = combined_values(next_step.values, target_weights)
    unmeasured = samples.join(known, on="sample_id", how="anti", maintain_order="left")
    settings = {
        "next": next_step.fingerprint,
        "samples": samples_fingerprint(unmeasured),
        "weights": list(target_weights.values()),
    }
    folder = run.folder / "influence" / f"measured-{targets[0].name}-{fingerprint(settings)[:8]}"
    with making(folder, settings) as missing:
        if missing:
            replay = _continued_replay(run, targets, options)
            _log.info(
                "measuring %s samples for the next step will cost about %.0f forward+backward passes",
                f"{len(unmeasured):,}",
                forward_passes(run, 1, len(unmeasured)),
            )
            with timed(folder, replay) as scratch:
                values_per_token = _along_all_targets(
                    run, source, replay, unmeasured, next_step, target_weights, scratch
                )
                table = unmeasured.select("domain", "sample_id", value_per_token=pl.Series(values_per_token))
                write_table(folder / "values.parquet", table)
            finalize(folder, "measured samples", settings, targets=[target.name for target in targets])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    stored = unmeasured.join(read_table(folder / "values.parquet"), on=["domain", "sample_id"], maintain_order="left")
    stored = stored.select(*samples.columns, value_total=pl.col("value_per_token") * pl.col("predicted_tokens"))
    measured_before = samples.join(known.select("sample_id", "value_total"), on="sample_id", maintain_order="left")
    values = as_sample_values(pl.concat([stored, measured_before]), next_step.name, targets[0].name)
    return MeasuredSamples(folder=folder, values=values, **timings_of(folder))


def _along_all_targets(
    run: Run,
    source: SampleSource,
    replay: Replay,
    samples: pl.DataFrame,
    next_step: NextStep,
    target_weights: Mapping[str, float],
    scratch: Path,
) -> Floats:
    """(N,) values per token of samples along the one direction that the targets have together."""
    parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
    # a retention target may have no say here
    rows = [target_positions(next_step)[name] for name in target_weights]
    directions = parameters.new_tensor(read_arrays(next_step.folder / DIRECTIONS)["directions"][rows])
    shares = parameters.new_tensor(list(target_shares(next_step.values, target_weights).values()))
    # derivatives are linear in the direction: one weighted direction costs as much as one target
    derivatives = linear_values(
        replay,
        parameters,
        shares[None] @ directions,
        samples,
        "samples",
        read=partial(read_together, run, source),
        scratch=scratch,
    )
    values: Floats = derivatives[:, 0] / (step_tokens(run) * LR_SHARE)
    return values


def target_positions(next_step: NextStep) -> dict[str, int]:
    """Target -> its row of `directions.npz` and column of `tokens.npz`."""
    return {name: position for position, name in enumerate(next_step.values["target"].unique(maintain_order=True))}


def _of_target(drawn: pl.DataFrame, position: int, values: Floats) -> pl.DataFrame:
    """Table of values (N,) per token of samples for one target."""
    return drawn.select(
        pl.lit(position, pl.Int64).alias("of"), "domain", "sample_id", value_per_token=pl.Series(values)
    )


def _read_part(
    run: Run, source: SampleSource, folder: Path, drawn: pl.DataFrame, targets: Sequence[Target], name: str
) -> dy.DataFrame[MeasuredValues]:
    names = pl.DataFrame({"of": range(len(targets)), "target": [target.name for target in targets]})
    stored = read_table(folder / "values.parquet").join(names, on="of", maintain_order="left")
    measured = stored.join(drawn, on=["domain", "sample_id"], maintain_order="left").with_columns(
        value_total_nats=pl.col("value_per_token") * pl.col("predicted_tokens")
    )
    return as_measured_values(measured, name, step_tokens(run), partial(read_together, run, source))


@contextmanager
def timed(folder: Path, replay: Replay) -> Iterator[Path]:
    """A folder for what an interrupted call continues from; its time is added to the artifact's, whatever happens."""
    begin, scratch = perf_counter(), folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        add_time(folder, perf_counter() - begin, replay.pass_seconds)


def timings_of(folder: Path) -> dict[str, float]:
    """`seconds` and `passes` that an artifact took."""
    timings = read_timings(folder)
    return {"seconds": timings["seconds"], "passes": timings["cost_units"]}


def _continued_replay(run: Run, targets: Sequence[Target], options: NextStepOptions) -> Replay:
    """The replay of a run that is continued by a step, for targets of its vocabulary.

    Raises:
        UserError: a target has other tokens than the model.
    """
    replay = Replay(ContinuedRun(run, LR_SHARE), options.device, options.tolerance)
    for target in targets:
        check_vocabulary(target, replay.task)
    return replay


def _half_weights(targets: Sequence[Target]) -> list[list[float]]:
    """(T, 2 T) the share of every half in each target."""
    weights = np.zeros((len(targets), 2 * len(targets)))
    for row, target in enumerate(targets):
        weights[row, 2 * row : 2 * row + 2] = target.half_weights
    table: list[list[float]] = weights.tolist()
    return table


def linear_values(
    replay: Replay,
    parameters: Tensor,
    directions: Tensor,
    samples: pl.DataFrame,
    name: str,
    *,
    read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
    scratch: Path,
    by_token: bool = False,
) -> Floats:
    """(N, V) first-order values of samples of weight 1 (a step's mean loss gives 1 / its tokens), at the replay's lr.

    Args:
        replay: of the `ContinuedRun`.
        parameters: (P,) of the current state.
        directions: (V, P), see `target_directions`.
        samples: N samples.
        name: of the files that an interrupted call continues from.
        read: gives the samples of a table in its order, some at a time.
        scratch: folder of those files.
        by_token: (n, V) of their predicted tokens instead, each as if its sample had no others.
    """
    blocks, parts = blocks_of(samples), [np.zeros((0, len(directions)))]  # the shape where there are no samples
    moves, derivatives = moves_along(directions, parameters), token_derivatives if by_token else sample_derivatives
    for number, block in enumerate(progress(blocks, total=len(blocks), what=f"measure {name}", unit="block")):
        # blocks are consecutive rows of a table that the artifact's identity fixes: a finished one can be kept
        path = scratch / f"{name}-{number:06d}.npz"
        if not path.exists():
            batches = [derivatives(replay, parameters, moves, batch) for batch in read(block)]
            write_arrays(path, {"derivatives": np.concatenate(batches)})
        parts.append(read_arrays(path)["derivatives"])
    # minus: a loss that rises along the direction is one whose step lowers the target's, see `influence.direction`
    values: Floats = -np.concatenate(parts)
    return values


def step_tokens(run: Run) -> float:
    """Predicted tokens of a training step, the mean."""
    return float(run.steps["tokens"].list.sum().sum()) / run.spec.steps


def step_samples(run: Run) -> int:
    """Samples of a training step."""
    return max(next(records(run, run.usual_step, run.usual_step + 1)).size, 1)


def read_together(run: Run, source: SampleSource, samples: pl.DataFrame) -> Iterable[list[Sample]]:
    """Samples in the order of a table, as many at a time as training took through the model together."""
    # batches that fitted into memory with gradients fit without
    usual = next(records(run, run.usual_step, run.usual_step + 1))
    return source.read_batches(samples, max(len(ids) for ids, _ in usual.micro_batches))


def forward_passes(run: Run, targets: int, samples: int) -> float:
    """Forward+backward passes of a training batch that the derivatives of some samples cost."""
    return _FORWARD_PASSES * (1 + targets) * samples / step_samples(run)
