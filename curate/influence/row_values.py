"""Values of samples from their rows: what a target asks for as a vector, held against exact values by domain.

The value of a sample z of n tokens for a target is `n <E_z, t>` with `t` the target's direction in the space of rows
(`space`), in the unit of `direction`. Rows leave out what the space leaves out, so some samples of every domain are
measured exactly too (`current.value_next_step`). In each domain a line is fitted by weighted least squares,

    v_z / n_z ~ a + b <E_z, t>          (weights n_z)

whose mean over all samples is the regression estimator of the domain's value (Cochran, Sampling Techniques, 1977,
chapter 7): unbiased up to 1 / n whatever the space holds, with the variance of what rows leave open. Where ranks of
rows and exact values agree too little, rows are not used in that domain, and the table of trust says so.

N samples, n of them measured, D numbers of a row, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.arrays import read_arrays
from curate.influence.current import DIRECTIONS, LR_SHARE, step_tokens
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
_FEWEST = 8  # measured samples that a correlation is made from


@dataclass(frozen=True, kw_only=True)
class Line:
    """The line of one domain.

    Attributes:
        intercept: a.
        slope: b.
        error: standard error of the domain's mean.
    """

    intercept: float
    slope: float
    error: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How products with one vector are read as values.

    Attributes:
        trust: by domain; `used`: whether rows are.
        lines: domain -> its line, of the domains where rows are used.
    """

    trust: dy.DataFrame[RowTrust]
    lines: Mapping[str, Line]

    def values(self, domains: npt.NDArray[Any], products: Floats) -> Floats:
        """(N,) values per token; NaN in domains where rows are not used."""
        values = np.full(len(products), np.nan)
        for domain, line in self.lines.items():
            here = domains == domain
            values[here] = line.intercept + line.slope * products[here]
        return values


def target_vectors(run: Run, replay: Replay, space: RowSpace, next_step: NextStep) -> npt.NDArray[np.float32]:
    """(T, D) `t` of each target, in the order of `current.target_positions`; their products are values per token."""
    import torch

    directions = torch.from_numpy(read_arrays(next_step.folder / DIRECTIONS)["directions"])
    # minus, and divided by the tokens and the lr of the step: see `current.linear_values`
    return -space.vectors(directions, replay) / np.float32(step_tokens(run) * LR_SHARE)


def calibrate(
    measured: pl.DataFrame,
    products: Floats,
    fitted: npt.NDArray[np.int64],
    samples: Mapping[str, int],
    names: Mapping[str, str],
    seed: int,
) -> Calibration:
    """Hold products against exact values.

    Args:
        measured: `domain`, `sample_id`, `predicted_tokens` and `value_per_token` of n samples.
        products: (n,) of their rows with the vector.
        fitted: content ids of the samples that the space was fitted on; they say nothing of how good it is.
        samples: domain -> how many it has.
        names: `source` and `target` of the rows of `trust`.
        seed: of intervals.
    """
    table = measured.with_columns(product=pl.Series(np.asarray(products, np.float64)))
    table = table.filter(~pl.col("sample_id").is_in(fitted.tolist()))
    rows, lines = [], {}
    for domain, count in samples.items():
        known = table.filter(domain=domain)
        exact, product, tokens = (known[name].to_numpy() for name in ("value_per_token", "product", "predicted_tokens"))
        r = low = high = share = None
        if len(known) >= _FEWEST:
            r = spearman(product, exact)
            whole = float(tokens @ exact**2)
            share = 1 - float(tokens @ (exact - product) ** 2) / whole if whole else None
        if r is not None:
            low, high = spearman_interval(product, exact, np.arange(len(known)), seed)
        used = r is not None and r >= MIN_RANK_CORRELATION and low is not None and low > 0
        if used:
            lines[domain] = _line(exact, product, tokens)
        correlation = {"spearman": r, "low": low, "high": high, "share_held": share}
        counts = {"domain": domain, "samples": count, "measured": len(known)}
        rows.append({**names, **counts, **correlation, "used": used})
    return Calibration(trust=RowTrust.validate(pl.DataFrame(rows, schema=RowTrust.create_empty().schema)), lines=lines)


def _line(exact: Floats, products: Floats, tokens: Floats) -> Line:
    mean_product, mean_exact = np.average(products, weights=tokens), np.average(exact, weights=tokens)
    away = products - mean_product
    spread = (tokens * away) @ away
    slope = float((tokens * away) @ (exact - mean_exact) / spread)
    # each sample's distance from the line of the others: its own line is drawn towards it, most where few lie about it,
    # and intervals from what is left covered 86 to 94 % instead of 95
    own_share = tokens / tokens.sum() + tokens * away**2 / spread
    left = tokens * (exact - mean_exact - slope * away) / np.maximum(1 - own_share, 1e-6)
    # of a ratio estimator, two degrees of freedom gone
    count = len(exact)
    error = float(np.sqrt(count / (count - 2) * (left @ left)) / tokens.sum())
    return Line(intercept=float(mean_exact - slope * mean_product), slope=slope, error=error)
