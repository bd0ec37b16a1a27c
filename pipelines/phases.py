"""`python -m pipelines.phases --run RUN --target FILE`: how large the values of samples are over the course of a stage.

Every step of a recorded run is valued for the target at the end of the stage; the curve is the mean absolute value of a
step's samples and their standard deviation, as they are and per unit of lr. The published curve of a language model is
high at the start, low in a basin, and rises at the end.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from curate.core.artifacts import SIGN, write_hashed
from curate.core.config import Config, parse_command, run_command
from curate.core.escape import name_of
from curate.core.progress import say, start_logging
from curate.embeddings.estimators import AdjointConfig, DvembAdamConfig, DvembConfig, make_estimator
from curate.stats.sums import row_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    import polars as pl

    from curate.embeddings.store import Embedding
    from curate.training.run import Run

_log = logging.getLogger(__name__)
SMOOTHED = 24  # the running mean is as long as one of so many equal parts of the stage
CLEAR = 1.5  # a level that is so many times another one counts as higher


class PhasesConfig(Config):
    """Which run, for which target."""

    run: Path
    """Recorded run; its embeddings are kept in it."""
    target: Path
    """Target documents (JSONL)."""
    out: Path | None = None
    """Folder for phases.json and phases.html; none: `phases-ESTIMATOR` in the run."""
    estimator: Literal["dvemb", "adjoint"] = "dvemb"
    """dvemb: as published. adjoint: exact first-order values."""
    every: int = Field(default=1, ge=1)
    """Show every n-th step; all are valued."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of the target."""
    target_batch_size: int = Field(default=16, ge=1)
    """Sequences per pass over the target."""
    device: str = "cpu"
    """Device of replay and estimator."""
    tolerance: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Largest relative difference between recorded and replayed losses."""
    adjoint: AdjointConfig = AdjointConfig()
    """Settings of adjoint."""
    dvemb: DvembConfig = DvembConfig()
    """Settings of dvemb."""


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The phases of a curve, read off its running mean.

    Attributes:
        start: its first level.
        start_ends: first step at or below the geometric mean of `start` and `basin`.
        basin: lowest level.
        basin_step: where it is.
        end: last level.
        end_begins: first step from which on it stays above the geometric mean of `end` and `basin`.
        highest: highest level.
        highest_step: where it is.
        line: the same in words.
    """

    start: float
    start_ends: int
    basin: float
    basin_step: int
    end: float
    end_begins: int
    highest: float
    highest_step: int
    line: str


def measure(config: PhasesConfig) -> dict[str, Any]:
    """Value every step of the run, and describe the curve.

    Returns:
        What is written to `phases.json`.

    Raises:
        UserError: bad run, target or settings.
    """
    from curate.report.charts import phase_figure, write_page
    from curate.training.run import Run

    run = Run(config.run, config.streams)
    # every step is valued anyway: the walk back passes them all
    curve = value_curve(run, *_embedded(config, run)).gather_every(config.every)
    steps = curve["step"].to_list()
    described = {name: describe(steps, curve[name].to_list()) for name in ("mean_abs", "mean_abs_per_lr")}
    result = {
        "sign": SIGN,
        "run": run.fingerprint,
        "estimator": config.estimator,
        "horizon": "stage_end",
        "target": config.target.name,
        "phases": {name: asdict(phases) for name, phases in described.items()},
        "curve": curve.to_dicts(),
    }
    out = _out(config)
    write_hashed(out / "phases.json", result)
    lede = (
        f"Values of the samples of each step of {run.folder.name} for {name_of(config.target)} at the stage's end, by "
        f"{config.estimator}. As they are: {described['mean_abs'].line}. "
        f"Per unit of lr: {described['mean_abs_per_lr'].line}."
    )
    write_page(out / "phases.html", "Value over the stage", lede, {"Values of a step's samples": phase_figure(curve)})
    return result


def _out(config: PhasesConfig) -> Path:
    return config.out or config.run / f"phases-{config.estimator}"


def _embedded(config: PhasesConfig, run: Run) -> tuple[Embedding, tuple[float, float]]:
    """Embeddings of the whole stage, and the weights of the target's halves."""
    from curate.embeddings.estimator import WindowJob
    from curate.embeddings.store import embed_window
    from curate.training.replay import Replay
    from curate.training.target import check_vocabulary, load_target

    target = load_target(config.target, run.spec, config.min_target_tokens)
    replay = Replay(run, config.device, config.tolerance)
    check_vocabulary(target, replay.task)
    estimator = make_estimator(config.estimator, config.adjoint, config.dvemb, DvembAdamConfig())
    steps = run.spec.steps
    job = WindowJob(
        replay=replay, start=0, stop=steps, horizon=steps, target=target, batch_size=config.target_batch_size
    )
    _log.info(
        "%s: the whole stage will cost about %.0f forward+backward passes, the stage itself took %d",
        config.estimator,
        estimator.passes(job),
        steps,
    )
    return embed_window(job, "stage", "stage_end", estimator), target.half_weights


def value_curve(run: Run, embedding: Embedding, half_weights: tuple[float, float]) -> pl.DataFrame:
    """One row per step: samples, mean, mean_abs and std of their values, the first group's lr, and both per lr."""
    import polars as pl

    from curate.embeddings.values import value_frame

    assert embedding.targets is not None
    values = value_frame(embedding.rows, embedding.vectors, embedding.targets, half_weights, "target")
    # the first group stands for the schedule, as in the report
    lr = pl.col("groups").list.first().struct.field("lr").alias("lr")
    rates = run.steps.select("step", lr).unique("step", keep="first")
    value = pl.col("value_total_nats")
    grouped = values.group_by("step").agg(
        pl.len().alias("samples"),
        row_mean(value).alias("mean"),
        row_mean(value.abs()).alias("mean_abs"),
        # implode, then the list's own: a group's std is added up in an order that depends on threads (`stats.sums`)
        value.implode().list.std(ddof=0).alias("std"),
    )
    per_lr = [(pl.col(name) / pl.col("lr")).alias(f"{name}_per_lr") for name in ("mean_abs", "std")]
    return grouped.join(rates, on="step").sort("step").with_columns(per_lr)


def smooth(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Running mean over a 24th of the curve, shorter at its ends."""
    import polars as pl

    # odd: centred, without a shift by half a step
    window = max(1, len(values) // SMOOTHED) | 1
    smoothed: npt.NDArray[np.float64] = (
        pl.Series(values, dtype=pl.Float64).rolling_mean(window, center=True, min_samples=1).to_numpy()
    )
    return smoothed


def describe(steps: Sequence[int], values: Sequence[float]) -> Phases:
    """Find the phases of a curve of positive values.

    Args:
        steps: of the curve, ascending.
        values: level at each of them; a value that is not finite (a step at lr 0) is left out.
    """
    import numpy as np

    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    finite_steps, level = [step for step, _ in finite], smooth([value for _, value in finite])
    lowest, highest = int(level.argmin()), int(level.argmax())
    # levels are compared by ratios: the border between two is their geometric mean
    start, basin, end = float(level[0]), float(level[lowest]), float(level[-1])
    # argmax of booleans is the first True; the basin itself is one
    below = int(np.argmax(level <= math.sqrt(start * basin)))
    # one after the last step that is still low
    above = int(np.flatnonzero(level <= math.sqrt(end * basin))[-1]) + 1
    phases = Phases(
        start=start,
        start_ends=finite_steps[below],
        basin=basin,
        basin_step=finite_steps[lowest],
        end=end,
        end_begins=finite_steps[min(above, len(finite_steps) - 1)],
        highest=float(level[highest]),
        highest_step=finite_steps[highest],
        line="",
    )
    return replace(phases, line=_line(phases))


def _line(phases: Phases) -> str:
    low = phases.basin
    high = f"starts high ({_times(phases.start, low)} the lowest level) until step {phases.start_ends}"
    rise = f"ends high ({_times(phases.end, low)} the lowest level) from step {phases.end_begins}"
    clauses = [
        high if phases.start >= CLEAR * low else "does not start high",
        f"lowest around step {phases.basin_step} ({low:.2g})",
        rise if phases.end >= CLEAR * low else "does not end high",
    ]
    if phases.highest >= CLEAR * max(phases.start, phases.end):
        clauses.append(
            f"highest in between, around step {phases.highest_step} ({_times(phases.highest, low)} the lowest)"
        )
    return ", ".join(clauses)


def _times(level: float, basin: float) -> str:
    # a lowest level of exactly 0 has no ratio
    return f"{level / basin:.1f} times" if basin > 0 else "many times"


def main() -> None:
    """Entry point."""
    config = parse_command(
        PhasesConfig, "python -m pipelines.phases", "The value of samples over the course of a stage."
    )
    start_logging()
    for name, phases in measure(config)["phases"].items():
        say(f"{name}: {phases['line']}")
    say(f"wrote {_out(config) / 'phases.json'} and {_out(config) / 'phases.html'}")


if __name__ == "__main__":
    run_command(main)
