"""What the next step asks for, by forward passes alone: of a part of every domain, and of the most promising samples.

All samples share one direction, what a target asks of the next step (`pools.probe`), and the linear value of each is
the slope of its own loss along it. Two artifacts in the run, both by content, so that a re-sharded stream needs no new
ones, and continued where they were interrupted: `pools/next-*` has the directions and a part of every domain, valued
token by token for each target, which domains are scored by and all other samples predicted from (`pools.ngram_slopes`);
`pools/slopes-*` has one value for all targets together of each sample that is measured beside that part.

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
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.arrays import read_arrays, read_table, write_arrays
from curate.artifacts import fingerprint, making, seal
from curate.deviation import combined_values, target_shares
from curate.embeddings.adjoint_estimator import curvature_units
from curate.embeddings.store import add_time, read_timings
from curate.pools.draw import VALUES, draw_probes, probe_frame, values_frame
from curate.pools.ngram_slopes import fit, means, ngrams_of
from curate.pools.probe import forward_slopes, look_ahead, moves_along, target_directions, token_slopes
from curate.pools.spread import blocks_of, from_fit, settled
from curate.progress import progress
from curate.target import check_vocabulary
from curate.trajectory.replay import Replay, records
from curate.trajectory.samples import read_batches, samples_fingerprint
from curate.writing import replacing

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.embeddings.adjoint_estimator import AdjointConfig
    from curate.formats.mds import Sample
    from curate.pools.values import ProbeConfig
    from curate.target import Target
    from curate.trajectory.run import Run

    Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)
NEXT = "next_step"
"""Where a window's name stands in tables of values."""
_FORWARD_UNITS = 0.4  # of a forward+backward pass: a forward pass
_BATCH = 64  # samples read at a time
_DIRECTIONS, _TOKENS = "directions.npz", "tokens.npz"


@dataclass(frozen=True, kw_only=True)
class NextStep:
    """What some targets ask of the next step, and what it would do to train on some samples of every domain in it.

    Positive = it lowers the target's loss.

    Attributes:
        folder: the artifact; `directions.npz` has `u` of each target, float32 (T, P), `tokens.npz` the values of the
            predicted tokens of that part, float32 (n, T), one sample after the other.
        values: the values frame (`scores.schema`, with documents) of a part of every domain for every target, `window`
            being "next_step"; `step` is a group, see `draw_probes`. Slopes know no halves of a target: `value_a` and
            `value_b` are `value`.
        fingerprint: identity of what it is made from.
        seconds: time that it took.
        cost_units: the same in forward+backward passes of a training batch.
    """

    folder: Path
    values: pl.DataFrame
    fingerprint: str
    seconds: float
    cost_units: float


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """What one more use of some samples would do now. Positive = it lowers the targets' losses.

    Attributes:
        folder: the artifact.
        values: the values frame that samples are chosen by, for all targets together (`deviation.combined_values`):
            `window`, `target` (the first), `domain`, `index`, `sample_id`, `tokens` (predicted), `value`, `value_a`,
            `value_b`; all three are the same.
        seconds: time that it took.
        cost_units: the same in forward+backward passes of a training batch.
    """

    folder: Path
    values: pl.DataFrame
    seconds: float
    cost_units: float


def value_next(
    run: Run,
    samples: pl.DataFrame,
    targets: Sequence[Target],
    config: ProbeConfig,
    *,
    adjoint: AdjointConfig,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 16,
    tolerance: float = 1e-3,
) -> NextStep:
    """Look ahead, and value a part of every domain for each target, or open that; the cost is stated before.

    Args:
        run: a finished run, whose last state is the current one.
        samples: N rows of `usable_samples` of its places, in that order: what the part is drawn from.
        targets: T targets.
        config: `min_per_domain`: how many of each domain; `steps` and `lr_share`: how far ahead the targets are read.
        adjoint: how the steps ahead are differentiated, where there are more than one.
        seed: of the draw.
        device: of the model.
        batch_size: sequences per pass over a target.
        tolerance: of the replay, where the run has no snapshot at its end.

    Raises:
        UserError: bad target or settings.
    """
    probes = draw_probes(samples, 0.0, config.min_per_domain, step_samples(run), seed)
    ahead = min(config.steps, run.spec.steps)
    settings = {
        "run": run.fingerprint,
        "samples": samples_fingerprint(probes),
        "targets": [target.fingerprint for target in targets],
        "ahead": [ahead, config.lr_share],
        "adjoint": adjoint.model_dump(include={"hessian", "hessian_share"}) if ahead > 1 else None,
        "of": "tokens",
    }
    identity = fingerprint(settings)
    folder = run.folder / "pools" / f"next-{targets[0].name}-{identity[:8]}"
    with making(folder, settings) as missing:
        if missing:
            replay = replay_ahead(run, targets, ahead, config.lr_share, device, tolerance)
            looking = look_ahead_units(run, targets, ahead, adjoint)
            passes = slope_units(run, len(targets), len(probes))
            _log.info(
                "looking ahead will cost about %.0f forward+backward passes: %.0f for what the targets ask of the next "
                "step, %.0f to value %s samples for each",
                looking + passes, looking, passes, f"{len(probes):,}",
            )  # fmt: skip
            with timed(folder, replay) as scratch:
                losses = [half for target in targets for half in target.halves]
                outlook = look_ahead(replay, run.spec.steps, losses, adjoint, batch_size=batch_size, scratch=scratch)
                directions = target_directions(replay, outlook, each_target(targets).tolist())
                found = linear_values(
                    replay, outlook.state.parameters, directions, probes, "part", read=partial(read_together, run, run),
                    scratch=scratch, by_token=True,
                ) / (step_tokens(run) * config.lr_share)  # fmt: skip
                write_arrays(folder / _DIRECTIONS, {"directions": directions.cpu().numpy()})
                write_arrays(folder / _TOKENS, {"values": found.astype(np.float32)})
                whole = means(found, probes["tokens"].to_numpy())
                with replacing(folder / "values.parquet") as part:
                    pl.concat(_of_target(probes, place, own) for place, own in enumerate(whole.T)).write_parquet(part)
            seal(folder, "next step", settings, targets=[target.name for target in targets])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return NextStep(
        folder=folder,
        values=_part_frame(run, folder, probes, targets, ahead),
        fingerprint=identity,
        **timings_of(folder),
    )


def value_all(
    run: Run,
    stock: Run,
    samples: pl.DataFrame,
    ahead: NextStep,
    targets: Sequence[Target],
    weights: Mapping[str, float],
    config: ProbeConfig,
    *,
    device: str = "cpu",
    tolerance: float = 1e-3,
) -> Slopes:
    """Value samples for the next step, or open their values; the cost is stated before.

    Targets count in their own standard deviations, which the part of every domain tells; all others have the slope
    along the one direction that the targets have together, so that more targets cost no more.

    Args:
        run: a finished run, whose last state is the current one.
        stock: the run as if it had the samples' streams.
        samples: N rows of `usable_samples` of its places, in that order.
        ahead: of the run and the targets; samples that it values are not passed over again.
        targets: T targets.
        weights: target -> weight.
        config: `steps` and `lr_share`, as of `ahead`.
        device: of the model.
        tolerance: of the replay, where the run has no snapshot at its end.
    """
    aimed = {target.name: weights[target.name] for target in targets}
    known = combined_values(ahead.values, aimed)
    rest = samples.join(known, on="sample_id", how="anti", maintain_order="left")
    settings = {
        "next": ahead.fingerprint,
        "samples": samples_fingerprint(rest),
        "weights": list(aimed.values()),
    }
    folder = run.folder / "pools" / f"slopes-{targets[0].name}-{fingerprint(settings)[:8]}"
    with making(folder, settings) as missing:
        if missing:
            replay = replay_ahead(run, targets, min(config.steps, run.spec.steps), config.lr_share, device, tolerance)
            _log.info(
                "valuing %s samples for the next step will cost about %.0f forward+backward passes",
                f"{len(rest):,}", slope_units(run, 1, len(rest)),
            )  # fmt: skip
            with timed(folder, replay) as scratch:
                parameters = next(replay.states(run.spec.steps, run.spec.steps + 1)).parameters
                own = [_places(ahead)[name] for name in aimed]  # a guard may have no say here
                directions = parameters.new_tensor(read_arrays(ahead.folder / _DIRECTIONS)["directions"][own])
                shares = parameters.new_tensor(list(target_shares(ahead.values, aimed).values()))
                value = linear_values(
                    replay, parameters, shares[None] @ directions, rest, "slopes",
                    read=partial(read_together, run, stock), scratch=scratch,
                ) / (step_tokens(run) * config.lr_share)  # fmt: skip
                with replacing(folder / "values.parquet") as part:
                    rest.select("domain", "sample_id", value=pl.Series(value[:, 0])).write_parquet(part)
            seal(folder, "slopes", settings, targets=[target.name for target in targets])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    found = rest.join(read_table(folder / "values.parquet"), on=["domain", "sample_id"], maintain_order="left")
    found = found.with_columns(pl.col("value") * pl.col("tokens"))
    again = samples.join(known.select("sample_id", "value"), on="sample_id", maintain_order="left")
    values = values_frame(pl.concat([found, again]), NEXT, targets[0].name)
    return Slopes(folder=folder, values=values, **timings_of(folder))


def predict_all(
    run: Run, samples: pl.DataFrame, ahead: NextStep, weights: Mapping[str, float], least: float, seed: int
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Predict what samples would do in the next step, for all targets together; no pass through the model.

    Args:
        run: that `ahead` is of.
        samples: rows of `usable_samples` of its places, in that order, among them those that `ahead` values.
        ahead: of the run and the targets.
        weights: target -> weight.
        least: held-out rank correlation from which a domain's predictions are used, if it is certainly positive; else
            its mean stands for what `ahead` does not value.
        seed: of folds and intervals.

    Returns:
        `domain`, `sample_id`, `value` (per token) of the samples; those that `ahead` values have that value.
        `domain`, `samples`, `probed`, `spearman`, `low`, `high`, `used`: as of `pools.PoolValues.domains`.
    """
    probes = combined_values(ahead.values, weights)
    shares = np.array(list(target_shares(ahead.values, weights).values()))
    stored = read_arrays(ahead.folder / _TOKENS)["values"][:, [_places(ahead)[name] for name in weights]]
    keys = [ngrams_of(sample) for batch in read_batches(run, probes, _BATCH) for sample in batch]
    tokens = stored.astype(np.float64) @ shares
    made, held_out = fit(np.concatenate(keys), tokens[:, None], probes["tokens"].to_numpy(), seed)
    batches = read_batches(run, samples, _BATCH)
    shown = progress(batches, total=-(-len(samples) // _BATCH), what="predict", unit="batch")
    known = (probes["value"] / probes["tokens"]).to_numpy()
    predicted = np.concatenate([made.samples(batch) for batch in shown])
    every, judged = settled(*from_fit(samples, probes, known, predicted[:, 0], held_out[:, 0], seed), least)
    return every.select("domain", "sample_id", "value"), judged.drop("of")


def _places(ahead: NextStep) -> dict[str, int]:
    """Target -> its place among those that the next step is valued for."""
    return {name: place for place, name in enumerate(ahead.values["target"].unique(maintain_order=True))}


def _of_target(probes: pl.DataFrame, place: int, values: Floats) -> pl.DataFrame:
    """Values (N,) per token of probes for one target."""
    return probes.select(pl.lit(place, pl.Int64).alias("of"), "domain", "sample_id", value=pl.Series(values))


def _part_frame(run: Run, folder: Path, probes: pl.DataFrame, targets: Sequence[Target], steps: int) -> pl.DataFrame:
    names = pl.DataFrame({"of": range(len(targets)), "target": [target.name for target in targets]})
    stored = read_table(folder / "values.parquet").join(names, on="of", maintain_order="left")
    probed = stored.join(probes, on=["domain", "sample_id"], maintain_order="left").with_columns(
        *((pl.col("value") * pl.col("tokens")).alias(name) for name in VALUES)
    )
    return probe_frame(probed, NEXT, steps, step_tokens(run), partial(read_together, run, run))


@contextmanager
def timed(folder: Path, replay: Replay) -> Iterator[Path]:
    """A folder for what an interrupted call continues from; the time is added up, whatever happens."""
    begin, scratch = perf_counter(), folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    try:
        yield scratch
    finally:
        add_time(folder, perf_counter() - begin, replay.unit_seconds)


def timings_of(folder: Path) -> dict[str, float]:
    """`seconds` and `cost_units` that an artifact took."""
    timings = read_timings(folder)
    return {"seconds": timings["seconds"], "cost_units": timings["cost_units"]}


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
    parameters: Tensor,
    directions: Tensor,
    samples: pl.DataFrame,
    name: str,
    *,
    read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
    scratch: Path,
    by_token: bool = False,
) -> Floats:
    """(N, V) linear values of samples of weight 1 (the mean loss of a step has 1 / its tokens), at the replay's lr.

    Args:
        replay: of `Run.continued`.
        parameters: (P,) of the current state.
        directions: (V, P), see `probe.target_directions`.
        samples: N samples.
        name: of the files that an interrupted call continues from.
        read: gives the samples of a table in its order, some at a time.
        scratch: folder of those files.
        by_token: (n, V) of their predicted tokens instead, each as if its sample had no others.
    """
    blocks, found = blocks_of(samples), [np.zeros((0, len(directions)))]
    moves, slopes = moves_along(directions, parameters), token_slopes if by_token else forward_slopes
    for number, block in enumerate(progress(blocks, total=len(blocks), what=name, unit="block")):
        path = scratch / f"{name}-{number:06d}.npz"
        if not path.exists():
            made = [slopes(replay, parameters, moves, part) for part in read(block)]
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
