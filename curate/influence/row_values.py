"""Values of samples from their rows: what a target asks for as a vector, held against exact values by domain.

The value of a sample z of n tokens for a target is `n <E_z, t>` with `t` the target's direction in the space of rows
(`space`), minus, and divided by the tokens and the lr of the added step (`target_vectors`). Rows leave out what the
space leaves out, so some samples of every domain are measured exactly too (`current.value_next_step`). In each domain a
line is fitted by weighted least squares,

    v_z / n_z ~ a + b <E_z, t>          (weights n_z)

whose mean over all samples is the regression estimator of the domain's value (Cochran, Sampling Techniques, 1977,
chapter 7): unbiased up to 1 / n whatever the space holds, with the variance of what rows leave open. Where ranks of
rows and exact values agree too little, rows are not used in that domain, and the table of trust says so.

N samples, n of them measured, D numbers of a row, T targets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.arrays import read_arrays
from curate.influence.current import DIRECTIONS, LR_SHARE, step_tokens
from curate.influence.space import DEFAULT, VERSION
from curate.stats.rank_correlation import spearman, spearman_interval
from curate.tables import RowTrust

if TYPE_CHECKING:
    from collections.abc import Mapping

    import dataframely as dy
    import numpy.typing as npt

    from curate.influence.current import NextStep
    from curate.influence.space import RowSpace
    from curate.training.replay import Replay
    from curate.training.run import Run

    Floats = npt.NDArray[np.floating[Any]]

MIN_RANK_CORRELATION = 0.5
"""Rank correlation with exact values from which a domain's rows are used, if it is certainly positive. Choosing by rows
gains about this share of what choosing by exact values would; below it the predictions from n-grams gain as much."""
ROWS = ("rows and n-grams, a plane by weighted least squares", VERSION, *asdict(DEFAULT).values())
"""How rows are read as values, part of the identity of what is made from them: who changes a rule changes it."""
_FEWEST = 8  # measured samples that a correlation is made from


@dataclass(frozen=True, kw_only=True)
class Line:
    """The line of one domain, a plane where there are two predictors.

    Attributes:
        intercept: a.
        slopes: (F,) b, one for each predictor.
        error: standard error of the domain's mean.
    """

    intercept: float
    slopes: Floats
    error: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How predictors of values are read as values.

    Attributes:
        trust: by domain; `used`: whether rows are.
        lines: domain -> its line, of the domains where rows are used.
    """

    trust: dy.DataFrame[RowTrust]
    lines: Mapping[str, Line]

    def values(self, domains: npt.NDArray[Any], predictors: Floats) -> Floats:
        """(N,) values per token from predictors (N, F); NaN in domains where rows are not used."""
        values = np.full(len(predictors), np.nan)
        for domain, line in self.lines.items():
            here, acts = domains == domain, line.slopes != 0
            values[here] = line.intercept + predictors[here][:, acts] @ line.slopes[acts]
        return values


def target_vectors(run: Run, replay: Replay, space: RowSpace, next_step: NextStep) -> npt.NDArray[np.float32]:
    """(T, D) `t` of each target, in the order of `current.target_positions`; their products are values per token."""
    import torch

    directions = torch.from_numpy(read_arrays(next_step.folder / DIRECTIONS)["directions"])
    # minus, and divided by the tokens and the lr of the step: see `current.linear_values`
    return -space.vectors(directions, replay) / np.float32(step_tokens(run) * LR_SHARE)


def calibrate(
    measured: pl.DataFrame,
    predictors: Floats,
    fitted: npt.NDArray[np.int64],
    samples: Mapping[str, int],
    names: Mapping[str, str],
    seed: int,
) -> Calibration:
    """Hold products, and what else predicts values, against exact values.

    One predictor is judged as it is, several by what fits to the other samples say of each.

    Args:
        measured: `domain`, `sample_id`, `predicted_tokens` and `value_per_token` of n samples.
        predictors: (n, F), first the products of their rows with the vector. Others must not have seen the sample's
            value (cross-validated); where one is not finite in a domain, products stand alone there.
        fitted: content ids of the samples that the space was fitted on; they say nothing of how good it is.
        samples: domain -> how many it has.
        names: `source`, `target` and `predictors` of the rows of `trust`.
        seed: of intervals.
    """
    held_out = ~measured["sample_id"].is_in(fitted.tolist()).to_numpy()
    rows, lines = [], {}
    for domain, count in samples.items():
        here = held_out & (measured["domain"] == domain).to_numpy()
        exact, tokens = (measured[name].to_numpy()[here] for name in ("value_per_token", "predicted_tokens"))
        known = np.asarray(predictors[here], np.float64)
        correlation, line = _held_against(exact, known, tokens, seed)
        used = line is not None
        if line is not None:
            lines[domain] = line
        counts = {"domain": domain, "samples": count, "measured": len(exact)}
        rows.append({**names, **counts, **correlation, "used": used})
    return Calibration(trust=RowTrust.validate(pl.DataFrame(rows, schema=RowTrust.create_empty().schema)), lines=lines)


def _held_against(
    exact: Floats, predictors: Floats, tokens: Floats, seed: int
) -> tuple[dict[str, float | None], Line | None]:
    """Rank correlation with its interval and the share that products hold, and the line where they are good enough."""
    facts: dict[str, float | None] = dict.fromkeys(("spearman", "low", "high", "share_held"))
    if len(exact) < _FEWEST:
        return facts, None
    whole = float(tokens @ exact**2)
    facts["share_held"] = 1 - float(tokens @ (exact - predictors[:, 0]) ** 2) / whole if whole else None
    usable = predictors if np.isfinite(predictors).all() else predictors[:, :1]
    if spearman(usable[:, 0], exact) is None:  # products or exact values do not differ
        return facts, None
    line, without = _line(exact, usable, tokens)
    judged = usable[:, 0] if usable.shape[1] == 1 else without
    facts["spearman"] = r = spearman(judged, exact)
    facts["low"], facts["high"] = low, _ = spearman_interval(judged, exact, np.arange(len(exact)), seed)
    used = r is not None and r >= MIN_RANK_CORRELATION and low is not None and low > 0
    unused = predictors.shape[1] - usable.shape[1]
    padded = Line(intercept=line.intercept, slopes=np.append(line.slopes, np.zeros(unused)), error=line.error)
    return facts, padded if used else None


def _line(exact: Floats, predictors: Floats, tokens: Floats) -> tuple[Line, Floats]:
    """Weighted least squares, and what the fits to the other samples say of each."""
    means, mean_exact = np.average(predictors, axis=0, weights=tokens), np.average(exact, weights=tokens)
    away = predictors - means
    # pinv: a predictor that is a multiple of another, or does not differ, adds nothing
    spread = np.linalg.pinv((tokens[:, None] * away).T @ away, rcond=1e-10, hermitian=True)
    slopes = spread @ ((tokens[:, None] * away).T @ (exact - mean_exact))
    # each sample's distance from the line of the others: its own line is drawn towards it, most where few lie about it,
    # and intervals from what is left covered 86 to 94 % instead of 95
    own_share = tokens / tokens.sum() + tokens * ((away @ spread) * away).sum(axis=1)
    left = (exact - mean_exact - away @ slopes) / np.maximum(1 - own_share, 1e-6)
    # of a ratio estimator; a degree of freedom is gone for the mean and for each slope
    count = len(exact)
    error = np.sqrt(count / (count - 1 - predictors.shape[1]) * ((tokens * left) @ (tokens * left))) / tokens.sum()
    line = Line(intercept=float(mean_exact - means @ slopes), slopes=slopes, error=float(error))
    return line, exact - left
