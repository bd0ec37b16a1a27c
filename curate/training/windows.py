"""Early and late window by evidence: where the curves of a finished stage change.

The curves are loss and log gradient norm, or the log of the value curve where the stage has one. Each is cut into
cells, and the medians of the cells, which ignore spikes, are fitted by a line with two knots, one in each half of the
stage. A knot counts where it explains more than noise. With warm restarts of the lr, the early change is looked for
before the first restart and the late one after the last. Nothing is random.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from curate.core.artifacts import read_hashed
from curate.core.errors import UserError
from curate.training.declared import default_windows

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt

    from curate.training.run import Run

    Curve = npt.NDArray[np.float64]

# cells that a stage is cut into at least, and less than twice as many: the fit tries every pair of knots
_CELLS = 80
# cells that a fit needs
_MIN_CELLS = 12
# by how much a knot must reduce the squared residuals, in variances of the noise per curve: five standard deviations
_CLEAR = 25.0
# how many times as steep the beginning must be as the middle
_FASTER = 2.0


@dataclass(frozen=True, kw_only=True)
class PhaseWindow:
    """A window, and the evidence for it.

    Attributes:
        start: first step.
        stop: step after the last.
        changes: step where the curves change: end of the early phase, begin of the late one; None where none was found.
        line: window and evidence, for the log.
    """

    start: int
    stop: int
    changes: int | None
    line: str


def run_windows(run: Run, value_curve: Path | None = None) -> dict[str, PhaseWindow]:
    """Windows `early` and `late` of a finished run, from its step records, or from a value curve.

    Args:
        run: the run.
        value_curve: `phases.json` of `python -m pipelines.phases`; None: loss and gradient norm are looked at.

    Raises:
        UserError: the value curve is missing, damaged, or of another run.
    """
    rates = pl.col("groups").list.first().struct.field("lr")
    steps = run.steps.unique("step", keep="first").sort("step").select("step", "loss", "grad_norm", lr=rates)
    curves = {"loss": steps["loss"]}
    # norms fall by factors, hence the log; clipped, because a step of padding only has norm 0
    if steps["grad_norm"].null_count() == 0:
        curves["gradient norm"] = (steps["grad_norm"].clip(1e-30)).log()
    # alone: it measures what the windows are for, and loss and norm only stand in for it
    if value_curve is not None:
        value = _read_value_curve(run, value_curve)
        curves = {"value": steps.join(value, on="step", how="left")["value"].clip(1e-30).log()}
    return find_windows({name: curve.to_numpy() for name, curve in curves.items()}, steps["lr"].to_numpy())


def find_windows(curves: dict[str, Curve], lr: Curve, longest: int | None = None) -> dict[str, PhaseWindow]:
    """Early and late window of a stage of S steps.

    Args:
        curves: by name, (S,) each; NaN where nothing is known of a step.
        lr: (S,), of the first parameter group.
        longest: steps of a window at most; None: as many as a declared one has by default (`default_windows`). A
            window has at least half of the default: a few steps cannot score a domain.
    """
    steps = len(lr)
    usual = default_windows(steps)["early"][1]
    longest, shortest = longest or usual, max(usual // 2, 1)
    restarts = lr_restarts(lr)
    first_restart, last_restart = (restarts[0], restarts[-1]) if restarts else (steps, 0)
    early = early_change(curves, first_restart)
    # the early window begins where the warm-up has reached half of the peak: values are lr times something, so 0 before
    peak = float(lr[:first_restart].max())
    half_warm = int(np.argmax(lr[:first_restart] >= peak / 2))
    start = half_warm if half_warm < (steps // 2 if early is None else early) else 0
    stop = min(max(min(start + longest, first_restart if early is None else early), start + shortest), steps)
    # the late window ends with the stage; without a change of the curves it begins where the lr falls
    late = late_change(curves, last_restart)
    knee = _lr_knee(lr, last_restart)
    begins = knee if late is None else late
    late_start = max(steps - longest, min(0 if begins is None else begins, steps - shortest))
    names = " and ".join(curves)
    why_early = "no clear change in the first half" if early is None else f"{names} change at step {early}"
    why_late = f"{names} change at step {late}" if late is not None else "no clear change in the second half"
    if late is None and knee is not None:
        why_late = f"lr falls from step {knee}"
    if restarts:
        why_late += f", after the last warm restart at step {last_restart}"
    if start:
        why_early += f", lr is half its peak from step {half_warm}"
    return {
        "early": _phase_window("early", start, stop, early, why_early, longest),
        "late": _phase_window("late", late_start, steps, begins, why_late, longest),
    }


def _phase_window(name: str, start: int, stop: int, changes: int | None, why: str, longest: int) -> PhaseWindow:
    """A window with its line for the log."""
    limit = f"; at most {longest} steps" if stop - start == longest else ""
    line = f"{name} window: steps {start} to {stop} ({why}{limit})"
    return PhaseWindow(start=start, stop=stop, changes=changes, line=line)


def lr_restarts(lr: Curve) -> list[int]:
    """Steps from which the lr rises again by a quarter after it had fallen by a fifth."""
    # two thresholds, so that small waves of a schedule are no restarts
    restarts, top, low, low_step, falling = [], 0.0, 0.0, 0, False
    for step, rate in enumerate(lr.tolist()):
        if falling and rate <= low:
            low, low_step = rate, step
        elif falling and rate > 1.25 * low:
            # it rises from its lowest step on, not from where the rise became clear
            restarts.append(low_step + 1)
            falling, top = False, rate
        elif not falling and rate < 0.8 * top:
            falling, low, low_step = True, rate, step
        top = max(top, rate)
    return restarts


def _lr_knee(lr: Curve, first: int) -> int | None:
    """The step where the last decay of the lr begins: after it the lr stays more than a tenth below its level.

    None where the lr does not fall below half of its level until the end.
    """
    last_cycle = lr[first:]
    if last_cycle[-1] > last_cycle.max() / 2:
        return None
    return first + int(np.flatnonzero(last_cycle >= 0.9 * last_cycle.max())[-1]) + 1


def early_change(curves: dict[str, Curve], stop: int) -> int | None:
    """Step where a fast beginning ends, among steps 0 to `stop`; None where there is none.

    The first curve (the loss, or values) must move `_FASTER` times as fast before it as after.
    """
    fit = _fit(curves, 0, stop)
    if fit is None or fit.gains[0] < _CLEAR * len(curves):
        return None
    before, after, _ = fit.slopes
    return fit.steps[0] if abs(before) >= _FASTER * abs(after) else None


def late_change(curves: dict[str, Curve], start: int) -> int | None:
    """Step where the curves change once more, among those from `start` on; None where there is none."""
    length = len(next(iter(curves.values())))
    fit = _fit(curves, start, length)
    if fit is None or fit.gains[1] < _CLEAR * len(curves):
        return None
    return fit.steps[1]


@dataclass(frozen=True, kw_only=True)
class _Fit:
    """A line with two knots.

    Attributes:
        steps: of the knots.
        gains: by how much the squared residuals grow without each knot, in variances of the noise.
        slopes: of the first curve before, between and after the knots, per step.
    """

    steps: tuple[int, int]
    gains: tuple[float, float]
    slopes: tuple[float, float, float]


def _fit(curves: dict[str, Curve], start: int, stop: int) -> _Fit | None:
    """The two knots with the smallest squared residuals over all curves; None where there are too few steps."""
    medians = [_medians(curve[start:stop]) for curve in curves.values()]
    # a cell counts where every curve is known, so that all are fitted at the same steps
    complete = np.isfinite(np.stack([values for _, values, _ in medians])).all(0)
    middles = medians[0][0][complete]
    count = len(middles)
    if count < _MIN_CELLS:
        return None
    # in units of their noise, curves of different scale count alike, and residuals are variances of the noise
    scaled = np.stack([values[complete] / noise for _, values, noise in medians], axis=1)  # (cells, curves)
    # no knot near an end: two cells would fit any line
    margin = max(2, count // 20)
    firsts, seconds = range(margin, count // 2), range(count // 2, count - margin)
    residuals = {(i, j): _residual(middles, scaled, (i, j)) for i in firsts for j in seconds}
    i, j = min(residuals, key=lambda pair: residuals[pair])
    best = residuals[i, j]
    # a knot is worth what the best fit without it, with the other one free, lacks
    without_first = min(_residual(middles, scaled, (k,)) for k in seconds)
    without_second = min(_residual(middles, scaled, (k,)) for k in firsts)
    # slopes in the curve's own unit; each hinge adds its coefficient to the slope before it
    design = _design(middles, (i, j))
    _, slope, second_bend, third_bend = np.linalg.lstsq(design, medians[0][1][complete], rcond=None)[0]
    return _Fit(
        steps=(start + round(middles[i]), start + round(middles[j])),
        gains=(without_first - best, without_second - best),
        slopes=(float(slope), float(slope + second_bend), float(slope + second_bend + third_bend)),
    )


def _medians(curve: Curve) -> tuple[Curve, Curve, float]:
    """Cut a curve into equal cells.

    Returns:
        Middle step of each cell; median of each cell, or of five neighbouring ones where cells are short; standard
        deviation of the noise of a cell's median.
    """
    size = max(1, len(curve) // _CELLS)
    cells = len(curve) // size
    # the rest after the last whole cell, less than one cell, is left out
    values = np.asarray(curve[: cells * size], np.float64).reshape(cells, size)
    middles = np.arange(cells) * size + (size - 1) / 2
    with warnings.catch_warnings():
        # nanmedian warns of a cell without a known step; its NaN is what is wanted
        warnings.simplefilter("ignore", RuntimeWarning)
        medians = np.nanmedian(values, axis=1)
    noise = _noise(medians[np.isfinite(medians)])
    # the median of fewer than five steps still shows spikes; after `_noise`, because smoothed neighbours are alike
    if size < 5:
        medians = pl.Series(medians).rolling_median(5, center=True, min_samples=1).to_numpy()
    return middles, medians, noise


def _noise(values: Curve) -> float:
    """Standard deviation of the noise of a curve, from its second differences, which are 0 on a line."""
    second_differences = np.abs(np.diff(values, 2))
    if not len(second_differences):
        return 1.0
    # .6745 sigma is the median of |N(0, sigma^2)|, and x - 2 y + z has variance 1 + 4 + 1 = 6; the floors keep a curve
    # without noise (a constant, or a stub) from making every bend significant
    return max(float(np.median(second_differences)) / 0.6745 / 6**0.5, 1e-4 * float(np.ptp(values)), 1e-12)


def _design(middles: Curve, knots: Sequence[int]) -> Curve:
    """(cells, 2 + knots): constant, slope, and a hinge that is 0 up to each knot."""
    hinges = [np.maximum(middles - middles[knot], 0) for knot in knots]
    return np.stack([np.ones_like(middles), middles, *hinges], axis=1)


def _residual(middles: Curve, scaled: Curve, knots: Sequence[int]) -> float:
    """Sum of squared residuals of all curves (cells, curves), fitted with these knots."""
    design = _design(middles, knots)
    solution = np.linalg.lstsq(design, scaled, rcond=None)[0]
    return float(np.square(scaled - design @ solution).sum())


def _read_value_curve(run: Run, path: Path) -> pl.DataFrame:
    """step, value (mean absolute value of its samples)."""
    phases = read_hashed(path)
    if phases.get("run") != run.fingerprint:
        raise UserError(
            f"{path} is no value curve of run {run.folder}: make one with python -m pipelines.phases, or leave "
            "value_curve out"
        )
    curve = pl.DataFrame([{"step": row["step"], "value": row["mean_abs"]} for row in phases["curve"]])
    # skipped steps have value 0, and no log
    return curve.filter(pl.col("value") > 0)
