"""Bootstrap over optimizer steps.

Samples of one step share a learning rate, a batch gradient and a point of the trajectory, so they are not independent;
steps are what is resampled. Every statistic here is a function of sums per step, so a resample is one row of a matrix
product and its cost does not depend on the number of samples.

Shape legend: S steps of the window, D domains, R resamples.
"""

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.stats.sums import row_sum

Floats = npt.NDArray[np.float64]

INTERVAL = (0.025, 0.975)
MIN_STEPS = 2  # one step alone says nothing about the spread between steps


def step_weights(steps: int, resamples: int, generator: np.random.Generator) -> Floats:
    """How often each step is drawn in each resample, float64 [R, S]; every row sums to S."""
    # S draws with replacement, counted: the only thing about a resample that sums per step depend on
    return generator.multinomial(steps, np.full(steps, 1 / steps), size=resamples).astype(np.float64)


def step_sums(frame: pl.DataFrame, domains: list[str], column: str) -> Floats:
    """Sums of a numeric column per step and domain.

    Args:
        frame: columns `step`, `domain` and `column`; every domain of it is one of `domains`.
        domains: order of the result's columns.
        column: what is summed.

    Returns:
        float64 [S, D], steps ascending, 0 where a domain has no sample in a step.
    """
    sums = frame.group_by("step", "domain").agg(row_sum(pl.col(column)).cast(pl.Float64))
    steps = sums["step"].unique().sort()
    dense = np.zeros((len(steps), len(domains)))
    column_of = {domain: position for position, domain in enumerate(domains)}
    columns = sums["domain"].replace_strict(column_of, return_dtype=pl.Int64).to_numpy()
    dense[steps.search_sorted(sums["step"]).to_numpy(), columns] = sums[column].to_numpy()
    return dense


def spread(estimates: Floats) -> tuple[Floats, Floats, Floats]:
    """Standard error and 95 % percentile interval of each column of bootstrap estimates.

    Args:
        estimates: float64 [R, D]; NaN where a resample says nothing about a column.

    Returns:
        se, low, high: float64 [D]; NaN for columns with fewer than two finite estimates.
    """
    se, low, high = np.full((3, estimates.shape[1]), np.nan)
    known = np.isfinite(estimates).sum(axis=0) >= MIN_STEPS
    if known.any():
        se[known] = np.nanstd(estimates[:, known], axis=0, ddof=1)
        low[known], high[known] = np.nanquantile(estimates[:, known], INTERVAL, axis=0)
    return se, low, high


def ratio(numerator: Floats, denominator: Floats) -> Floats:
    """Element-wise quotient, NaN where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.full_like(numerator, np.nan), where=denominator != 0)
