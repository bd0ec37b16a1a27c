"""Values of samples for the next step, by forward passes alone: of a whole pool, or of all that a run can draw from.

All samples share one direction, what the target asks of the next step (`pools.probe`), and the linear value of each is
the slope of its own loss along it. Kept in the run as `pools/slopes-*` by content, so that a re-sharded pool needs no
new ones, and continued where it was interrupted.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.artifacts import fingerprint, is_complete, read_arrays, read_json, replacing, seal, write_arrays
from curate.embeddings.adjoint_estimator import curvature_units
from curate.embeddings.store import add_time
from curate.pools.probe import Outlook, forward_slopes, look_ahead, target_moves
from curate.pools.spread import VALUES, blocks_of
from curate.progress import progress
from curate.target import check_vocabulary
from curate.trajectory.replay import Replay, records
from curate.trajectory.samples import read_batches, usable_samples

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
FORWARD_UNITS = 0.4  # of a forward+backward pass: a forward pass


@dataclass(frozen=True, kw_only=True)
class Slopes:
    """What one more use of each sample would do now. Positive = it lowers the target's loss.

    Attributes:
        folder: the artifact.
        values: one row per target and sample: `window`, `target`, `domain`, `index`, `sample_id`, `tokens` (predicted),
            `value`, `value_a`, `value_b`; slopes know no halves of a target, all three are the same.
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
    targets: Sequence[Target],
    config: ProbeConfig,
    *,
    adjoint: AdjointConfig,
    device: str = "cpu",
    batch_size: int = 16,
    tolerance: float = 1e-3,
) -> Slopes:
    """Value every sample of some streams for the next step, or open its values; the cost is stated before.

    Args:
        run: a finished run, whose last state is the current one.
        stock: the run as if it had the streams.
        targets: T targets, in one pass.
        config: `steps` and `lr_share`: how far ahead the target is read.
        adjoint: how the steps ahead are differentiated.
        device: of the model.
        batch_size: sequences per pass over a target.
        tolerance: of the replay, where the run has no snapshot at its end.

    Raises:
        UserError: bad target or settings.
    """
    samples, ahead = usable_samples(stock.places), min(config.steps, run.spec.steps)
    settings = {
        "run": run.fingerprint,
        "samples": samples_fingerprint(samples),
        "targets": [target.fingerprint for target in targets],
        "steps": ahead,
        "lr_share": config.lr_share,
        "adjoint": adjoint.model_dump(include={"hessian", "hessian_share"}),
    }
    folder = run.folder / "pools" / f"slopes-{targets[0].name}-{fingerprint(settings)[:8]}"
    if not is_complete(folder, settings):
        replay = Replay(run.continued(ahead, config.lr_share), device, tolerance)
        for target in targets:
            check_vocabulary(target, replay.task)
        looking, passes = look_ahead_units(run, targets, ahead, adjoint), slope_units(run, len(targets), len(samples))
        _log.info(
            "valuing every sample for the next step will cost about %.0f forward+backward passes: %.0f to look %d "
            "steps ahead, %.0f for %s samples and %d targets",
            looking + passes, looking, ahead, passes, f"{len(samples):,}", len(targets),
        )  # fmt: skip
        begin, scratch = perf_counter(), folder / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        try:
            losses = [half for target in targets for half in target.halves]
            outlook = look_ahead(replay, run.spec.steps, losses, adjoint, batch_size=batch_size, scratch=scratch)
            found = linear_values(
                replay, outlook, targets, samples, lambda part: read_together(run, stock, part), scratch
            )
            table = samples.select("domain", "sample_id").with_columns(
                pl.Series(str(place), values)
                for place, values in enumerate(found.T / step_tokens(run) / config.lr_share)
            )
            with replacing(folder / "values.parquet") as part:
                table.write_parquet(part)
        finally:
            add_time(folder, perf_counter() - begin, replay.unit_seconds)
        seal(folder, "slopes", settings, targets=[target.name for target in targets])
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    timings = read_json(folder / "timings.json")
    return Slopes(
        folder=folder, values=_frame(samples, pl.read_parquet(folder / "values.parquet"), targets),
        seconds=timings["seconds"], cost_units=timings["cost_units"],
    )  # fmt: skip


def linear_values(
    replay: Replay,
    outlook: Outlook,
    targets: Sequence[Target],
    samples: pl.DataFrame,
    read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
    scratch: Path,
) -> Floats:
    """(N, T) linear values of samples of weight 1 (the mean loss of a step has 1 / its tokens), at the replay's lr.

    Args:
        replay: of `Run.continued`.
        outlook: for the halves of T targets, one after the other.
        targets: the targets.
        samples: N samples.
        read: gives the samples of a table in its order, some at a time.
        scratch: folder for what an interrupted call continues from.
    """
    count, blocks, found = len(targets), blocks_of(samples), []
    weights = np.zeros((count, 2 * count))
    for place, target in enumerate(targets):
        weights[place, 2 * place : 2 * place + 2] = target.half_weights
    moves = target_moves(replay, outlook, weights.tolist())
    for number, block in enumerate(progress(blocks, total=len(blocks), what="slopes", unit="block")):
        path = scratch / f"slopes-{number:06d}.npz"
        if not path.exists():
            made = [forward_slopes(replay, outlook, moves, part) for part in read(block)]
            write_arrays(path, {"slopes": np.concatenate(made)})
        found.append(read_arrays(path)["slopes"])
    values: Floats = -np.concatenate(found)
    return values


def samples_fingerprint(samples: pl.DataFrame) -> str:
    """Identity of samples by domain and content, in that order."""
    digest = hashlib.blake2b(digest_size=8)
    for (domain,), own in samples.group_by("domain", maintain_order=True):
        digest.update(str(domain).encode())
        digest.update(own["sample_id"].to_numpy().astype("<i8").tobytes())
    return digest.hexdigest()


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
    return FORWARD_UNITS * (1 + targets) * samples / step_samples(run)


def _frame(samples: pl.DataFrame, slopes: pl.DataFrame, targets: Sequence[Target]) -> pl.DataFrame:
    """The samples with their values (of all their tokens) for each target."""
    joined = samples.join(slopes, on=["domain", "sample_id"], maintain_order="left")
    return pl.concat(
        joined.select(
            pl.lit(SLOPES).alias("window"), pl.lit(target.name).alias("target"),
            "domain", "index", "sample_id", "tokens",
            *((pl.col(str(place)) * pl.col("tokens")).alias(name) for name in VALUES),
        )
        for place, target in enumerate(targets)
    )  # fmt: skip
