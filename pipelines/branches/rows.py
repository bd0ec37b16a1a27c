"""Rows of the bench, and the tables that are made of them: what a method reaches at equal KL, and at its best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

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
        One row per case and method that reaches that KL in every seed.
    """
    found = []
    rows = [row for row in rows if row["schedule"] == "throughout"]
    for case in _names(rows, "case"):
        mine = [row for row in rows if row["case"] == case]
        for method in _names(mine, "method"):
            if method == BASE:
                continue
            pairs = [_at_kl(mine, method, reference, seed) for seed in _names(mine, "seed")]
            known = [pair for pair in pairs if pair is not None]
            if len(known) == len(pairs):
                kls, targets, generals = zip(*known, strict=True)
                found.append(
                    {"case": case, "method": method, "seeds": len(known), "kl_to_prior": float(np.mean(kls)),
                     "target": interval(targets), "general": interval(generals)}
                )  # fmt: skip
    return found


def against_throughout(rows: Sequence[Row]) -> list[Row]:
    """What each schedule gains on the target, beside the same mixture throughout; one row per case and schedule.

    Gains are proportional's loss minus that of the branch, paired by seed: positive = better.
    """
    found = []
    keys = dict.fromkeys((row["case"], row["method"], row["schedule"], row["temperature"]) for row in rows)
    for case, method, schedule, temperature in keys:
        if schedule == "throughout":
            continue
        losses = {
            (row["schedule"] if row["method"] == method else BASE, row["seed"]): row["target_loss"]
            for row in rows
            if row["case"] == case
            and (row["method"] == BASE or (row["method"], row["temperature"]) == (method, temperature))
        }
        seeds = [seed for name, seed in losses if name == schedule]
        gain, whole = ([losses[BASE, seed] - losses[name, seed] for seed in seeds] for name in (schedule, "throughout"))
        found.append(
            {"case": case, "method": method, "schedule": schedule, "temperature": temperature,
             "gain": interval(gain), "throughout": interval(whole)}
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


def best_within_guard(rows: Sequence[Row], tuning: Sequence[Row], guard: float) -> list[Row]:
    """Each method at its best temperature: lowest target loss on the tuning split within the guard on general text.

    Args:
        rows: of the bench.
        tuning: the same rows with the losses of the tuning splits, in the same order.
        guard: largest general loss as a share of proportional's.

    Returns:
        One row per case and method: `temperature` (none where no temperature keeps the guard: proportional is used),
        differences from proportional on the reporting split, and whether each seed's has the sign of the mean.
    """
    found = []
    for case in _names(rows, "case"):
        places = [place for place, row in enumerate(rows) if row["case"] == case and row["schedule"] == "throughout"]
        base = {rows[place]["seed"]: place for place in places if rows[place]["method"] == BASE}
        for method in _names([rows[place] for place in places], "method"):
            own = [place for place in places if rows[place]["method"] == method]
            temperature = _best(own, rows, tuning, base, guard)
            chosen = [place for place in own if rows[place]["temperature"] == temperature]
            pairs = [(rows[place], rows[base[rows[place]["seed"]]]) for place in chosen]
            targets = [row["target_loss"] - at["target_loss"] for row, at in pairs] or [0.0]
            generals = [row["general_loss"] / at["general_loss"] - 1 for row, at in pairs] or [0.0]
            found.append(
                {"case": case, "method": method, "temperature": temperature, "seeds": len(pairs),
                 "kl_to_prior": float(np.mean([row["kl_to_prior"] for row, _ in pairs] or [0.0])),
                 "target": interval(targets), "general_share": interval(generals),
                 "same_sign": len({np.sign(one) for one in targets}) == 1}
            )  # fmt: skip
    return found


def _best(
    places: Sequence[int], rows: Sequence[Row], tuning: Sequence[Row], base: dict[int, int], guard: float
) -> float | None:
    means = {}
    for temperature in _names([rows[place] for place in places], "temperature"):
        own = [place for place in places if rows[place]["temperature"] == temperature]
        general = [tuning[place]["general_loss"] / tuning[base[rows[place]["seed"]]]["general_loss"] for place in own]
        if np.mean(general) <= guard:
            means[temperature] = float(np.mean([tuning[place]["target_loss"] for place in own]))
    return min(means, key=lambda temperature: means[temperature]) if means else None


def _names(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))
