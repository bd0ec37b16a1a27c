"""How well estimated values agree with reruns: rank correlations with intervals, and what bounds them.

spearman                over all pairs; interval by bootstrap over steps
spearman_within_step    Pearson correlation of ranks centred within each step: what lr and gradient scale cannot fake
spearman_of_difference  of the value for the target minus that for the general one
group_lds               over groups, sum of values against the group's effect (linear datamodeling score)
noise_cap               mean Spearman of the reruns with themselves plus the noise seen between repeated reruns
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl

from curate.core.rng import generator
from curate.embeddings.anchors import GENERAL
from curate.stats.rank_correlation import spearman, spearman_interval, spearman_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

HorizonName = Literal["window_end", "stage_end"]
_DRAWS = 200  # of noise, that the cap is a mean over


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """What one estimator says of one window at one horizon.

    Attributes:
        estimator: its name.
        window: of the values.
        horizon: step whose state the targets are read at.
        values: target -> (step, position) -> value, for every sample of the window.
        cost_units_per_step: forward+backward passes per anchor or target and window step.
        bytes_per_sample: of an embedding row.
    """

    estimator: str
    window: str
    horizon: int
    values: Mapping[str, Mapping[tuple[int, int], float]]
    cost_units_per_step: float
    bytes_per_sample: float


def keyed(steps: Sequence[int], values: npt.NDArray[Any]) -> dict[tuple[int, int], float]:
    """Values of a window's rows (step order, then position) by (step, position)."""
    by_key: dict[tuple[int, int], float] = {}
    position, last = 0, -1
    for step, value in zip(steps, values.tolist(), strict=True):
        position = position + 1 if step == last else 0
        last = step
        by_key[step, position] = value
    return by_key


def compare(
    truth: pl.DataFrame, estimates: Iterable[Estimates], horizons: Mapping[str, Mapping[HorizonName, int]], seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Hold estimates against reruns.

    Args:
        truth: of `curate.evaluation.truth`.
        estimates: of any estimators, windows and horizons.
        horizons: window -> what each of its horizons is called -> step; two names may stand for one step.
        seed: of the run; also of the bootstrap.

    Returns:
        rows (`fidelity_rows`), pairs (each removed sample with value and estimate), smoothness (`smoothness_rows`) and
        noise (`noise_rows`).
    """
    rows: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    names = {(window, step): name for window, steps in horizons.items() for name, step in steps.items()}
    for one in estimates:
        general = GENERAL if GENERAL in one.values else None
        for name, step in horizons[one.window].items():
            if step == one.horizon:
                rows += fidelity_rows(truth, one, name, seed, general)
        for row in truth.filter(kind="pair", window=one.window, horizon=one.horizon).iter_rows(named=True):
            step, position = row["samples"][0]
            pairs.append(
                {
                    "window": one.window,
                    "horizon": names[one.window, one.horizon],
                    "target": row["target"],
                    "step": step,
                    "value": row["value"],
                    "estimate": one.values[row["target"]][step, position],
                }
            )
    return {
        "rows": rows,
        "pairs": pairs,
        "smoothness": smoothness_rows(truth, names),
        "noise": noise_rows(truth, names),
    }


def fidelity_rows(
    truth: pl.DataFrame, estimates: Estimates, horizon: str, seed: int, general: str | None
) -> list[dict[str, Any]]:
    """One row per target of the estimates.

    Args:
        truth: of `curate.evaluation.truth`.
        estimates: for one window.
        horizon: what the horizon is called.
        seed: of the run; also of the bootstrap.
        general: target that differences are taken to, or None.
    """
    window = truth.filter(window=estimates.window, horizon=estimates.horizon)
    rows = []
    for target, values in estimates.values.items():
        pairs = _table(window, "pair", target)
        groups = _table(window, "group", target)
        # a group's value is the sum of its samples': what an additive estimator says of removing all of them
        estimated = np.asarray([values[key] for (key,) in pairs["samples"]])
        sums = np.asarray([sum(values[key] for key in group) for group in groups["samples"]])
        steps = np.asarray([key[0] for (key,) in pairs["samples"]])
        low, high = spearman_interval(estimated, pairs["value"], steps, seed)
        difference = None
        if general is not None and target != general:
            other = np.asarray([estimates.values[general][key] for (key,) in pairs["samples"]])
            difference = spearman(estimated - other, pairs["value"] - _table(window, "pair", general)["value"])
        rows.append(
            {
                "estimator": estimates.estimator,
                "window": estimates.window,
                "horizon": horizon,
                "target": target,
                "seed": seed,
                "n": len(estimated),
                "spearman": spearman(estimated, pairs["value"]),
                "low": low,
                "high": high,
                "spearman_within_step": within_step(estimated, pairs["value"], steps),
                "spearman_of_difference": difference,
                "group_lds": spearman(sums, groups["value"]) if len(sums) > 2 else None,
                "noise_cap": noise_cap(pairs["value"], rerun_noise(window, target), seed),
                "cost_units_per_step": estimates.cost_units_per_step,
                "bytes_per_sample": estimates.bytes_per_sample,
            }
        )
    return rows


def within_step(a: Floats, b: Floats, steps: npt.NDArray[np.int64]) -> float | None:
    """Correlation of ranks within each step, centred there and pooled over steps; None where no step has two."""
    from scipy.stats import rankdata

    left, right = np.zeros(len(a)), np.zeros(len(a))
    for step in np.unique(steps):
        of_step = steps == step
        left[of_step] = rankdata(a[of_step]) - (of_step.sum() + 1) / 2
        right[of_step] = rankdata(b[of_step]) - (of_step.sum() + 1) / 2
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale else None


def rerun_noise(window: pl.DataFrame, target: str) -> float | None:
    """Standard deviation of one rerun's value, from pairs that were run twice; None without repeats."""
    repeats = window.filter(kind="repeat", target=target)
    both = repeats.join(window.filter(kind="pair", target=target), on="samples", suffix="_pair")
    if both.is_empty():
        return None
    difference = both["value"].to_numpy() - both["value_pair"].to_numpy()
    return float(np.sqrt((difference**2).mean() / 2))  # of a difference of two: each has half of its variance


def noise_cap(values: Floats, noise: float | None, seed: int) -> float | None:
    """The Spearman that exact values could reach: of the reruns with themselves plus one more rerun's noise."""
    if noise is None:
        return None
    random = generator(seed, "fidelity noise cap")
    # truth plus one more rerun's noise: even exact values would agree with a rerun no better than that
    noisy = values + noise * random.standard_normal((_DRAWS, len(values)))
    draws = spearman_rows(np.broadcast_to(values, noisy.shape), noisy)
    return None if len(values) <= 2 or np.isnan(draws).all() else float(np.nanmean(draws))


def smoothness_rows(truth: pl.DataFrame, names: Mapping[tuple[str, int], str]) -> list[dict[str, Any]]:
    """How the effect of removing a part of a sample compares with removing all of it.

    `relative_deviation` is the root mean square of `value(part) / part - value(1)` over that of `value(1)`: 0 where
    training is linear in its data weights. Where it is large for small parts too, no derivative can be trusted.

    Args:
        truth: of `curate.evaluation.truth`.
        names: (window, horizon step) -> what the horizon is called.
    """
    parts = truth.filter(kind="part")
    both = parts.join(truth.filter(kind="pair"), on=["window", "samples", "horizon", "target"], suffix="_whole")
    rows = []
    for key, table in both.sort("part").group_by("window", "horizon", "target", "part", maintain_order=True):
        window, horizon, target, part = key
        whole = table["value_whole"].to_numpy()
        per_weight = table["value"].to_numpy() / float(part)
        scale = float(np.sqrt((whole**2).mean()))
        rows.append(
            {
                "window": window,
                "horizon": names[str(window), int(horizon)],
                "target": target,
                "part": part,
                "relative_deviation": float(np.sqrt(((per_weight - whole) ** 2).mean())) / scale if scale else None,
                "spearman": spearman(per_weight, whole),
                "n": len(table),
            }
        )
    return rows


def noise_rows(truth: pl.DataFrame, names: Mapping[tuple[str, int], str]) -> list[dict[str, Any]]:
    """Noise of a rerun beside the spread of the values."""
    rows = []
    for key, table in truth.group_by("window", "horizon", "target", maintain_order=True):
        window, horizon, target = key
        values = table.filter(kind="pair")["value"].to_numpy()
        rows.append(
            {
                "window": window,
                "horizon": names[str(window), int(horizon)],
                "target": target,
                "noise": rerun_noise(table, str(target)),
                "signal": float(values.std()),
            }
        )
    return rows


def _table(window: pl.DataFrame, kind: str, target: str) -> dict[str, Any]:
    """Samples as tuples, and values, of one kind of rerun."""
    table = window.filter(kind=kind, target=target)
    samples = [[(step, position) for step, position in row] for row in table["samples"].to_list()]
    return {"samples": samples, "value": table["value"].to_numpy()}
