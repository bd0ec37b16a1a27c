"""Rows of the bench, and the tables that are made of them: what a method reaches at equal KL, and at its best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Row = dict[str, Any]
BASE = "proportional"


def token_speedup(loss: float, along: Sequence[float]) -> float | str:
    """How many times the tokens proportional needs for a loss: linear between its readings.

    Args:
        loss: reached with the tokens of one branch.
        along: proportional's loss after 0, 1, 2, ... times those tokens.

    Returns:
        The first multiple at which proportional is as good; "> n" where it is not after all its tokens.
    """
    for at, (before, after) in enumerate(pairwise(along)):
        if before <= loss:
            return float(at)
        if after <= loss:
            return at + (before - loss) / (before - after)
    return f"> {len(along) - 1}x"


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean of values of several seeds, with the half width of its 95 % t interval (none for one seed)."""
    from scipy.stats import t

    n = len(values)
    width = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / n**0.5) if n > 1 else None
    return {"mean": float(np.mean(values)), "half_width": width}


def at_equal_kl(rows: Sequence[Row], reference: str = "curate") -> list[Row]:
    """Target and general loss of each method at the KL that the reference has by default, minus proportional's.

    A method's curve runs from proportional (KL 0) through its temperatures, linear in KL; where it ends below the
    reference's KL nothing is said.

    Returns:
        One row per case and method that reaches that KL in every seed that it was run with.
    """
    found = []
    rows = [row for row in rows if row["schedule"] == "constant"]
    for case in _names(rows, "case"):
        mine = [row for row in rows if row["case"] == case]
        for method in _names(mine, "method"):
            if method == BASE:
                continue
            pairs = [_at_kl(mine, method, reference, seed) for seed in _seeds(mine, method)]
            known = [pair for pair in pairs if pair is not None]
            if len(known) == len(pairs):
                kls, targets, generals = zip(*known, strict=True)
                found.append(
                    {"case": case, "method": method, "seeds": len(known), "kl_to_prior": float(np.mean(kls)),
                     "target": interval(targets), "general": interval(generals)}
                )  # fmt: skip
    return found


def against_constant(rows: Sequence[Row]) -> list[Row]:
    """What each schedule gains on the target, beside the same mixture held throughout; one row per case and schedule.

    Gains are proportional's loss minus that of the branch, paired by seed: positive = better.
    """
    found = []
    keys = dict.fromkeys((row["case"], row["method"], row["schedule"], row["temperature"]) for row in rows)
    for case, method, schedule, temperature in keys:
        if schedule == "constant":
            continue
        losses = {
            (row["schedule"] if row["method"] == method else BASE, row["seed"]): row["target_loss"]
            for row in rows
            if row["case"] == case
            and (row["method"] == BASE or (row["method"], row["temperature"]) == (method, temperature))
        }
        seeds = [seed for name, seed in losses if name == schedule]
        gain, whole = ([losses[BASE, seed] - losses[name, seed] for seed in seeds] for name in (schedule, "constant"))
        found.append(
            {"case": case, "method": method, "schedule": schedule, "temperature": temperature,
             "gain": interval(gain), "constant": interval(whole)}
        )  # fmt: skip
    return found


def _at_kl(rows: Sequence[Row], method: str, reference: str, seed: int) -> tuple[float, float, float] | None:
    """KL, and differences of target and general loss from proportional; None where the curve does not reach it."""
    mine = [row for row in rows if row["seed"] == seed]
    base = next((row for row in mine if row["method"] == BASE), None)
    default = next((row for row in mine if row["method"] == reference and row["is_default"]), None)
    if base is None or default is None:
        return None
    points = [(0.0, 0.0, 0.0)] + [
        (row["kl_to_prior"], row["target_loss"] - base["target_loss"], row["general_loss"] - base["general_loss"])
        for row in mine
        if row["method"] == method
    ]
    kls, targets, generals = (np.array(column) for column in zip(*sorted(points), strict=True))
    kl = default["kl_to_prior"]
    if kl > kls[-1]:
        return None
    return kl, float(np.interp(kl, kls, targets)), float(np.interp(kl, kls, generals))


def best_within_limit(rows: Sequence[Row], tuning: Sequence[Row], limit: float) -> list[Row]:
    """Each method at its best temperature: lowest target loss on the tuning split within the limit on general text.

    Args:
        rows: of the bench.
        tuning: the same rows with the losses of the tuning splits, in the same order.
        limit: largest general loss as a share of proportional's.

    Returns:
        One row per case and method: `temperature` (none where no temperature keeps the limit: proportional is used),
        differences from proportional on the reporting split, whether each seed's has the sign of the mean, and
        `minus_curate`: the target loss less that of curate's row, paired by seed; `oracle_share`: of the oracle's gain.
    """

    def best(target: Floats, general: Floats) -> float:
        kept = np.flatnonzero(general[1:] <= limit) + 1
        return float(kept[np.argmin(target[kept])]) if len(kept) else 0.0

    return _along_curves(rows, tuning, best)


def at_limit(rows: Sequence[Row], tuning: Sequence[Row], limit: float) -> list[Row]:
    """Each method at the best place of its curve within the limit, so that no grid of temperatures decides.

    A method's curve runs from proportional through its temperatures in the order of their KL, linear between them
    (where samples are chosen, its first part is of no temperature: the highest ones choose samples too). The place is
    chosen on the tuning split and read on the reporting split; arguments and rows as of `best_within_limit`,
    without `temperature` where the place is between two.
    """

    def best(target: Floats, general: Floats) -> float:
        places = [float(at) for at in np.flatnonzero(general <= limit)]
        for at, (before, after) in enumerate(pairwise(general)):
            if (before - limit) * (after - limit) < 0:
                places.append(at + (limit - before) / (after - before))
        return min(places, key=lambda at: np.interp(at, np.arange(len(target)), target))

    return _along_curves(rows, tuning, best)


def _along_curves(rows: Sequence[Row], tuning: Sequence[Row], choose: Callable[[Floats, Floats], float]) -> list[Row]:
    """A row per case and method at the place of its curve that is chosen.

    Args:
        rows: of the bench.
        tuning: the same with the losses that the place is chosen by.
        choose: gives the place from the tuning split's means over seeds at proportional and each temperature: target
            loss less proportional's, and general loss as a share of proportional's.
    """
    found = []
    for case in _names(rows, "case"):
        kept = [row["case"] == case and row["schedule"] == "constant" for row in rows]
        report, tune = ([row for row, own in zip(each, kept, strict=True) if own] for each in (rows, tuning))
        lines = {}
        for method in _names(report, "method"):
            temperatures, told, shown = _curve(report, method), _points(tune, method), _points(report, method)
            place = choose(told[0].mean(axis=1), told[1].mean(axis=1))
            low, high = int(np.floor(place)), int(np.ceil(place))
            target, general, kl = shown[:, low] + (place - low) * (shown[:, high] - shown[:, low])
            lines[method] = dict(zip(_seeds(report, method), target, strict=True))
            found.append(
                {"case": case, "method": method, "temperature": temperatures[low] if low == high else None,
                 "seeds": len(target), "kl_to_prior": float(kl.mean()), "target": interval(target.tolist()),
                 "general_share": interval((general - 1).tolist()), "same_sign": len(set(np.sign(target))) == 1}
            )  # fmt: skip
        for row in found:
            if row["case"] == case and "curate" in lines:
                own, curate = lines[row["method"]], lines["curate"]
                pairs = [own[seed] - curate[seed] for seed in own if seed in curate]
                row |= {"minus_curate": interval(pairs)} if pairs else {}
            if row["case"] == case and "oracle" in lines:
                row |= _of_oracle(lines[row["method"]], lines["oracle"])
    return found


def _of_oracle(own: Mapping[int, float], oracle: Mapping[int, float]) -> dict[str, float]:
    """Share of the oracle's gain, over the seeds that both were run with; nothing where it has none."""
    seeds = [seed for seed in own if seed in oracle]
    gain = math.fsum(oracle[seed] for seed in seeds)
    return {"oracle_share": math.fsum(own[seed] for seed in seeds) / gain} if gain < 0 else {}


def _curve(rows: Sequence[Row], method: str) -> list[float | None]:
    """Temperatures of a method in the order of their KL, after proportional (none)."""
    own = [row for row in rows if row["method"] == method]
    kl = {
        at: np.mean([row["kl_to_prior"] for row in own if row["temperature"] == at])
        for at in _names(own, "temperature")
    }
    return [None, *sorted(kl, key=lambda at: kl[at])]


def _seeds(rows: Sequence[Row], method: str) -> list[int]:
    """The seeds that a method was run with at every temperature."""
    own = [row for row in rows if row["method"] == method]
    runs = [{row["seed"] for row in own if row["temperature"] == at} for at in _names(own, "temperature")]
    return sorted(set.intersection(*runs))


def _points(rows: Sequence[Row], method: str) -> Floats:
    """Of a curve's P places and S seeds: target loss less proportional's, share of its general loss, KL; (3, P, S)."""
    base = {row["seed"]: row for row in rows if row["method"] == BASE}
    own = {(row["temperature"], row["seed"]): row for row in rows if row["method"] == method}
    seeds = _seeds(rows, method)
    places = [[base[seed] if at is None else own[at, seed] for seed in seeds] for at in _curve(rows, method)]
    return np.array([[_apart(row, base[row["seed"]]) for row in place] for place in places]).transpose(2, 0, 1)


def _apart(row: Row, zero: Row) -> tuple[float, float, float]:
    """Target loss less proportional's, share of its general loss, KL."""
    target, general = row["target_loss"] - zero["target_loss"], row["general_loss"] / zero["general_loss"]
    return target, general, row["kl_to_prior"]


def _names(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
