"""Early and late window by evidence: where the curves of a finished stage change.

The curves (loss and log gradient norm; where the stage was valued, the log of its value curve) are cut into medians, so
that spikes do not count, and fitted by lines with two knots, one in each half of the stage. A knot counts where it
explains more than noise. With warm restarts of the lr, the early change is looked for before the first of them and the
late one after the last. Deterministic.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from curate.core.artifacts import read_hashed
from curate.training.declared import default_windows

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.training.run import Run

    Curve = npt.NDArray[np.float64]

_CELLS = 80  # medians that a stage is cut into, at most
_FEWEST = 12  # medians that a fit needs
_CLEAR = 25.0  # reduction of squared residuals, in variances of the noise, that a knot must bring per curve
_FASTER = 2.0  # times that the early slope must exceed the middle one


@dataclass(frozen=True, kw_only=True)
class Found:
    """A window, and why it is this one.

    Attributes:
        start: first step.
        stop: step after the last.
        changes: step where the curves change: end of the early phase, begin of the late one; None where none was found.
        line: in words.
    """

    start: int
    stop: int
    changes: int | None
    line: str


def run_windows(run: Run) -> dict[str, Found]:
    """Windows `early` and `late` of a finished run, from what it recorded and the newest value curve in its folder."""
    rates = pl.col("groups").list.first().struct.field("lr")
    steps = run.steps.unique("step", keep="first").sort("step").select("step", "loss", "grad_norm", lr=rates)
    curves = {"loss": steps["loss"]}
    if steps["grad_norm"].null_count() == 0:
        curves["gradient norm"] = (steps["grad_norm"].clip(1e-30)).log()
    value = _value_curve(run)
    if value is not None:
        curves = {"value": steps.join(value, on="step", how="left")["value"].clip(1e-30).log()}
    return find_windows({name: curve.to_numpy() for name, curve in curves.items()}, steps["lr"].to_numpy())


def find_windows(curves: dict[str, Curve], lr: Curve, longest: int | None = None) -> dict[str, Found]:
    """Early and late window of a stage of S steps.

    Args:
        curves: by name, (S,) each; NaN where nothing is known of a step.
        lr: (S,), of the first parameter group.
        longest: steps of a window at most; none: as many as a declared one by default (`default_windows`). Half of
            those it has at least: domains are not scored on a few steps.
    """
    steps = len(lr)
    usual = default_windows(steps)["early"][1]
    longest, shortest = longest or usual, max(usual // 2, 1)
    restarts = lr_restarts(lr)
    first, last = (restarts[0], restarts[-1]) if restarts else (steps, 0)
    early = early_change(curves, first)
    top = float(lr[:first].max())
    warm = int(np.argmax(lr[:first] >= top / 2))
    start = warm if warm < (steps // 2 if early is None else early) else 0
    stop = min(max(min(start + longest, first if early is None else early), start + shortest), steps)
    late = late_change(curves, last)
    knee = _lr_knee(lr, last)
    begins = knee if late is None else late
    after = max(steps - longest, min(0 if begins is None else begins, steps - shortest))
    names = " and ".join(curves)
    why_early = "no clear change in the first half" if early is None else f"{names} change at step {early}"
    why_late = f"{names} change at step {late}" if late is not None else "no clear change in the second half"
    if late is None and knee is not None:
        why_late = f"lr falls from step {knee}"
    if restarts:
        why_late += f", after the last warm restart at step {last}"
    if start:
        why_early += f", lr is half its peak from step {warm}"
    return {
        "early": Found(start=start, stop=stop, changes=early, line=_line("early", start, stop, why_early, longest)),
        "late": Found(start=after, stop=steps, changes=begins, line=_line("late", after, steps, why_late, longest)),
    }


def _line(name: str, start: int, stop: int, why: str, longest: int) -> str:
    limit = f"; at most {longest} steps" if stop - start == longest else ""
    return f"{name} window: steps {start} to {stop} ({why}{limit})"


def lr_restarts(lr: Curve) -> list[int]:
    """Steps from which the lr rises again by a quarter after it had fallen by a fifth."""
    found, top, low, at, falling = [], 0.0, 0.0, 0, False
    for step, rate in enumerate(lr.tolist()):
        if falling and rate <= low:
            low, at = rate, step
        elif falling and rate > 1.25 * low:
            found.append(at + 1)
            falling, top = False, rate
        elif not falling and rate < 0.8 * top:
            falling, low, at = True, rate, step
        top = max(top, rate)
    return found


def _lr_knee(lr: Curve, first: int) -> int | None:
    """The step after which the lr falls for good from a tenth below its level to less than half of it."""
    part = lr[first:]
    if part[-1] > part.max() / 2:
        return None
    return first + int(np.flatnonzero(part >= 0.9 * part.max())[-1]) + 1


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
    """Two knots.

    Attributes:
        steps: where they are.
        gains: by how much the squared residuals grow without each of them, in variances of the noise.
        slopes: of the first curve before, between and after them, per step.
    """

    steps: tuple[int, int]
    gains: tuple[float, float]
    slopes: tuple[float, float, float]


def _fit(curves: dict[str, Curve], start: int, stop: int) -> _Fit | None:
    """The two knots with the smallest squared residuals over all curves; None where there are too few steps."""
    medians = [_medians(curve[start:stop]) for curve in curves.values()]
    kept = np.isfinite(np.stack([values for _, values, _ in medians])).all(0)
    places = medians[0][0][kept]
    count = len(places)
    if count < _FEWEST:
        return None
    scaled = np.stack([values[kept] / noise for _, values, noise in medians], axis=1)  # (cells, curves)
    margin = max(2, count // 20)
    firsts, seconds = range(margin, count // 2), range(count // 2, count - margin)
    whole = {(i, j): _residual(places, scaled, (i, j)) for i in firsts for j in seconds}
    i, j = min(whole, key=lambda pair: whole[pair])
    best = whole[i, j]
    # a knot is worth what the best fit without it, with the other one free, lacks
    without_first = min(_residual(places, scaled, (k,)) for k in seconds)
    without_second = min(_residual(places, scaled, (k,)) for k in firsts)
    design = _design(places, (i, j))
    _, first, second, third = np.linalg.lstsq(design, medians[0][1][kept], rcond=None)[0]
    return _Fit(
        steps=(start + round(places[i]), start + round(places[j])),
        gains=(without_first - best, without_second - best),
        slopes=(float(first), float(first + second), float(first + second + third)),
    )


def _medians(curve: Curve) -> tuple[Curve, Curve, float]:
    """Middle steps and medians of equal cells, over five cells where those are short; the noise of a cell's median."""
    size = max(1, len(curve) // _CELLS)
    cells = len(curve) // size
    values = np.asarray(curve[: cells * size], np.float64).reshape(cells, size)
    places = np.arange(cells) * size + (size - 1) / 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a cell of unknown steps is unknown
        medians = np.nanmedian(values, axis=1)
    noise = _noise(medians[np.isfinite(medians)])
    if size < 5:
        medians = pl.Series(medians).rolling_median(5, center=True, min_samples=1).to_numpy()
    return places, medians, noise


def _noise(values: Curve) -> float:
    """Standard deviation of the noise: from second differences, which a line has none of."""
    second = np.abs(np.diff(values, 2))
    if not len(second):
        return 1.0
    return max(float(np.median(second)) / 0.6745 / 6**0.5, 1e-4 * float(np.ptp(values)), 1e-12)


def _design(places: Curve, knots: Sequence[int]) -> Curve:
    hinges = [np.maximum(places - places[knot], 0) for knot in knots]
    return np.stack([np.ones_like(places), places, *hinges], axis=1)


def _residual(places: Curve, scaled: Curve, knots: Sequence[int]) -> float:
    design = _design(places, knots)
    solution = np.linalg.lstsq(design, scaled, rcond=None)[0]
    return float(np.square(scaled - design @ solution).sum())


def _value_curve(run: Run) -> pl.DataFrame | None:
    """step, value (mean absolute value of its samples) of the first value curve of this very run, by name."""
    for path in sorted(run.folder.glob("phases-*/phases.json")):
        found = read_hashed(path)
        if found.get("run") == run.fingerprint:
            curve = pl.DataFrame([{"step": row["step"], "value": row["mean_abs"]} for row in found["curve"]])
            return curve.filter(pl.col("value") > 0)
    return None
