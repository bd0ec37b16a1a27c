"""Values of samples for the next step, by forward passes alone: of a whole pool, or of what a run can draw from.

All samples share one direction, what the target asks of the next step (`pools.probe`), and the linear value of each is
the slope of its own loss along it. Kept in the run as `pools/slopes-*` by content, so that a re-sharded pool needs no
new ones, and continued where it was interrupted.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.artifacts import fingerprint, is_complete, read_arrays, read_json, replacing, seal, write_arrays
from curate.deviation import pooled_deviation
from curate.embeddings.adjoint_estimator import curvature_units
from curate.embeddings.store import add_time
from curate.pools.probe import Outlook, forward_slopes, look_ahead, target_moves
from curate.pools.spread import VALUES, blocks_of
from curate.progress import progress
from curate.rng import generator
from curate.target import check_vocabulary
from curate.trajectory.replay import Replay, records
from curate.trajectory.samples import read_batches, samples_fingerprint

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.embeddings.adjoint_estimator import AdjointConfig
    from curate.formats.mds import Sample
    from curate.pools.values import ProbeConfig
    from curate.target import Target
    from curate.trajectory.run import Run

    Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)
SLOPES = "slopes"
"""Where a window's name stands in tables of values."""
_FORWARD_UNITS = 0.4  # of a forward+backward pass: a forward pass
_PILOT = 32  # samples of each domain that the deviations of several targets are measured on


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """What one more use of each sample would do now. Positive = it lowers the targets' losses.

    Attributes:
        folder: the artifact.
        values: the values frame that samples are chosen by, for all targets together (`scores.values.combined_values`):
            `window`, `target` (the first), `domain`, `index`, `sample_id`, `tokens` (predicted), `value`, `value_a`,
            `value_b`; slopes know no halves of a target, all three are the same.
        seconds: time that it took.
        cost_units: the same in forward+backward passes of a training batch.
    """

    folder: Path
    values: pl.DataFrame
    seconds: float
    cost_units: float


def value_all(
    run: Run,
    stock: Run,
    samples: pl.DataFrame,
    targets: Sequence[Target],
    weights: Mapping[str, float],
    config: ProbeConfig,
    *,
    adjoint: AdjointConfig,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 16,
    tolerance: float = 1e-3,
) -> Slopes:
    """Value samples for the next step, or open their values; the cost is stated before.

    Targets count in their own standard deviations, which a few samples of each domain tell; all others have the slope
    along the one direction that the targets have together, so that more targets cost no more.

    Args:
        run: a finished run, whose last state is the current one.
        stock: the run as if it had the samples' streams.
        samples: N rows of `usable_samples` of its places, in that order.
        targets: T targets.
        weights: target -> weight.
        config: `steps` and `lr_share`: how far ahead the targets are read.
        adjoint: how the steps ahead are differentiated.
        seed: of the draw of those few.
        device: of the model.
        batch_size: sequences per pass over a target.
        tolerance: of the replay, where the run has no snapshot at its end.

    Raises:
        UserError: bad target or settings.
    """
    ahead, pilot = min(config.steps, run.spec.steps), _pilot(samples, len(targets), seed)
    settings = {
        "run": run.fingerprint,
        "samples": [samples_fingerprint(samples), samples_fingerprint(pilot)],
        "targets": {target.fingerprint: weights[target.name] for target in targets},
        "steps": ahead,
        "lr_share": config.lr_share,
        "adjoint": adjoint.model_dump(include={"hessian", "hessian_share"}),
    }
    folder = run.folder / "pools" / f"slopes-{targets[0].name}-{fingerprint(settings)[:8]}"
    if not is_complete(folder, settings):
        replay = replay_ahead(run, targets, ahead, config.lr_share, device, tolerance)
        looking = look_ahead_units(run, targets, ahead, adjoint)
        passes = slope_units(run, len(targets), len(pilot)) + slope_units(run, 1, len(samples))
        _log.info(
            "valuing samples for the next step will cost about %.0f forward+backward passes: %.0f to look %d steps "
            "ahead, %.0f for %s samples", looking + passes, looking, ahead, passes, f"{len(samples):,}",
        )  # fmt: skip
        begin, scratch = perf_counter(), folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            losses = [half for target in targets for half in target.halves]
            outlook = look_ahead(replay, run.spec.steps, losses, adjoint, batch_size=batch_size, scratch=scratch)
            measure = partial(linear_values, replay, outlook, read=partial(read_together, run, stock), scratch=scratch)
            shares, unit = np.array([weights[target.name] for target in targets]), step_tokens(run) * config.lr_share
            value = _combined(measure, samples, pilot, targets, shares / shares.sum(), unit)
            with replacing(folder / "values.parquet") as part:
                samples.select("domain", "sample_id", value=pl.Series(value)).write_parquet(part)
        finally:
            add_time(folder, perf_counter() - begin, replay.unit_seconds)
        seal(folder, "slopes", settings, targets=[target.name for target in targets])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    timings = read_json(folder / "timings.json")
    return Slopes(
        folder=folder, values=_frame(samples, pl.read_parquet(folder / "values.parquet"), targets[0].name),
        seconds=timings["seconds"], cost_units=timings["cost_units"],
    )  # fmt: skip


def _combined(
    measure: Callable[[Floats, pl.DataFrame, str], Floats],
    samples: pl.DataFrame,
    pilot: pl.DataFrame,
    targets: Sequence[Target],
    shares: Floats,
    unit: float,
) -> Floats:
    """(N,) values for all targets together, each in the deviations that the pilot tells.

    Args:
        measure: `linear_values` of weights and samples, with the name of its files.
        samples: N samples.
        pilot: some of them; none: a single target.
        targets: T targets.
        shares: (T,) of each, summing to 1.
        unit: what linear values are divided by.
    """
    if len(pilot):
        found, tokens = measure(each_target(targets), pilot, "pilot") / unit, pilot["tokens"].to_numpy()
        scales = np.array([pooled_deviation(pilot.with_columns(value=pl.Series(own * tokens))) for own in found.T])
        shares = np.divide(shares, scales, out=np.zeros_like(shares), where=scales > 0)
    value: Floats = measure(shares[None] @ each_target(targets), samples, "slopes")[:, 0] / unit
    return value


def replay_ahead(
    run: Run, targets: Sequence[Target], steps: int, lr_share: float, device: str, tolerance: float
) -> Replay:
    """The replay of a run that is continued by some steps, for targets of its vocabulary.

    Raises:
        UserError: a target has other tokens than the model.
    """
    replay = Replay(run.continued(steps, lr_share), device, tolerance)
    for target in targets:
        check_vocabulary(target, replay.task)
    return replay


def each_target(targets: Sequence[Target]) -> Floats:
    """(T, 2 T) the share of every half in each target."""
    weights = np.zeros((len(targets), 2 * len(targets)))
    for place, target in enumerate(targets):
        weights[place, 2 * place : 2 * place + 2] = target.half_weights
    return weights


def linear_values(
    replay: Replay,
    outlook: Outlook,
    weights: Floats,
    samples: pl.DataFrame,
    name: str,
    *,
    read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
    scratch: Path,
) -> Floats:
    """(N, V) linear values of samples of weight 1 (the mean loss of a step has 1 / its tokens), at the replay's lr.

    Args:
        replay: of `Run.continued`.
        outlook: for the R halves of some targets, one after the other.
        weights: (V, R), what each value is of them.
        samples: N samples.
        name: of the files that an interrupted call continues from.
        read: gives the samples of a table in its order, some at a time.
        scratch: folder of those files.
    """
    blocks, found = blocks_of(samples), []
    moves = target_moves(replay, outlook, weights.tolist())
    for number, block in enumerate(progress(blocks, total=len(blocks), what=name, unit="block")):
        path = scratch / f"{name}-{number:06d}.npz"
        if not path.exists():
            made = [forward_slopes(replay, outlook, moves, part) for part in read(block)]
            write_arrays(path, {"slopes": np.concatenate(made)})
        found.append(read_arrays(path)["slopes"])
    values: Floats = -np.concatenate(found)
    return values


def step_tokens(run: Run) -> float:
    """Predicted tokens of a training step, the mean."""
    return float(run.steps["tokens"].list.sum().sum()) / run.spec.steps


def step_samples(run: Run) -> int:
    """Samples of a training step."""
    return max(next(records(run, run.usual_step, run.usual_step + 1)).size, 1)


def read_together(run: Run, stock: Run, samples: pl.DataFrame) -> Iterable[list[Sample]]:
    """Samples of `stock` in the order of a table, as many at a time as training took through the model together."""
    usual = next(records(run, run.usual_step, run.usual_step + 1))
    return read_batches(stock, samples, max(len(ids) for ids, _ in usual.micro_batches))


def look_ahead_units(run: Run, targets: Sequence[Target], steps: int, adjoint: AdjointConfig) -> float:
    """Forward+backward passes of `probe.look_ahead`, and those over the targets."""
    lead = run.spec.steps - run.snapshot_before(run.spec.steps)
    sequences = sum(len(half) for target in targets for half in target.halves)
    curvature = (steps - 1) * curvature_units(adjoint, 2 * len(targets))
    return lead + 2 * steps + curvature + sequences / step_samples(run)


def slope_units(run: Run, targets: int, samples: int) -> float:
    """Forward+backward passes of the slopes of some samples."""
    return _FORWARD_UNITS * (1 + targets) * samples / step_samples(run)


def _pilot(samples: pl.DataFrame, targets: int, seed: int) -> pl.DataFrame:
    """Some samples of each domain, drawn by content; none for a single target, whose deviation does not matter."""
    if targets == 1:
        return samples.clear()
    drawn = samples.with_columns(draw=pl.Series(generator(seed, "pilot").random(len(samples))))
    return drawn.filter(pl.col("draw").rank("ordinal").over("domain") <= _PILOT).drop("draw")


def _frame(samples: pl.DataFrame, values: pl.DataFrame, target: str) -> pl.DataFrame:
    """The samples with their values (of all their tokens)."""
    joined = samples.join(values, on=["domain", "sample_id"], maintain_order="left")
    return joined.select(
        pl.lit(SLOPES).alias("window"), pl.lit(target).alias("target"), "domain", "index", "sample_id", "tokens",
        *((pl.col("value") * pl.col("tokens")).alias(name) for name in VALUES),
    )  # fmt: skip
