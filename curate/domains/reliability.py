"""Whether a ranking of samples is one by value: split-half reliability, and how far it is one by length.

Shape legend: S steps of the window, R resamples.
"""

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.rng import generator
from curate.stats.bootstrap import Floats, spread, step_weights
from curate.stats.sums import row_sum
from curate.tables import LengthBias, MeasuredValues, Reliability

_STEP = ["source", "target", "step"]
_SOURCE = ["source", "target"]


def halves_reliability(
    values: dy.DataFrame[MeasuredValues], *, seed: int, resamples: int = 1000
) -> dy.DataFrame[Reliability]:
    """Rank correlation of the values for the two halves of the target, and what it implies for the whole target.

        reliability = 2 r / (1 + r)      Spearman-Brown: the whole target is twice as long as a half; 0 where r <= 0

    Pooled over all samples the correlation partly measures that lr and gradient scale differ between steps, so it is
    given within steps as well (ranks among the samples of a step). Intervals are 95 % percentiles of a bootstrap over
    steps with the ranks held fixed.

    Args:
        values: of measured samples.
        seed: of the bootstrap.
        resamples: R.

    Returns:
        Two rows per (source, target): `ranking` ("pooled", "within_step"), `samples`, `spearman`, `low`, `high`, and
        `reliability`, `reliability_low`, `reliability_high`; null where a half gives every sample the same value.
    """
    ranked = values.select(
        *_STEP,
        pooled_a=_rank("value_half_a_nats", _SOURCE),
        pooled_b=_rank("value_half_b_nats", _SOURCE),
        within_step_a=_rank("value_half_a_nats", _STEP),
        within_step_b=_rank("value_half_b_nats", _STEP),
    )
    rows = []
    for (source, target), group in ranked.group_by(_SOURCE):
        for ranking in ("pooled", "within_step"):
            # a correlation is a function of six sums per step: a resample adds up those of the steps drawn
            moments = _moments(group, f"{ranking}_a", f"{ranking}_b")
            weights = step_weights(len(moments), resamples, generator(seed, "halves", str(source)))
            r = correlation(moments.sum(axis=0)[None])
            _, low, high = spread(correlation(weights @ moments)[:, None])
            # with one step every resample is the same one: an interval of width 0 would pass for certainty
            if len(moments) == 1:
                low = high = np.array([np.nan])
            interval = np.concatenate([r, low, high])
            rows.append((source, target, ranking, group.height, *interval.tolist(), *spearman_brown(interval).tolist()))
    names = ["spearman", "low", "high", "reliability", "reliability_low", "reliability_high"]
    schema = {
        "source": pl.String,
        "target": pl.String,
        "ranking": pl.String,
        "samples": pl.Int64,
        **dict.fromkeys(names, pl.Float64),
    }
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return Reliability.validate(frame.with_columns(pl.col(names).fill_nan(None)).sort(*_SOURCE, "ranking"))


def length_bias(values: dy.DataFrame[MeasuredValues], *, seed: int, resamples: int = 1000) -> dy.DataFrame[LengthBias]:
    """Rank correlation of a sample's value with its predicted tokens inside its domain.

    Far from 0, choosing samples by value also chooses them by length. Intervals as in `halves_reliability`.

    Args:
        values: of measured samples.
        seed: of the bootstrap.
        resamples: R.

    Returns:
        One row per (source, target): `samples`, `spearman`, `low`, `high`; null where the samples of each domain are
        of one length.
    """
    # ranks within domains: that one domain has longer and better samples is no bias of the choice inside of domains
    ranked = values.select(
        *_STEP,
        value_rank=_rank("value_total_nats", [*_SOURCE, "domain"]),
        length_rank=_rank("predicted_tokens", [*_SOURCE, "domain"]),
    )
    rows = []
    for (source, target), group in ranked.group_by(_SOURCE):
        moments = _moments(group, "value_rank", "length_rank")
        weights = step_weights(len(moments), resamples, generator(seed, "length", str(source)))
        r = correlation(moments.sum(axis=0)[None])
        _, low, high = spread(correlation(weights @ moments)[:, None])
        rows.append((source, target, group.height, *np.concatenate([r, low, high]).tolist()))
    numbers = dict.fromkeys(("spearman", "low", "high"), pl.Float64)
    schema = {"source": pl.String, "target": pl.String, "samples": pl.Int64, **numbers}
    frame = pl.DataFrame(rows, schema=schema, orient="row")
    return LengthBias.validate(frame.with_columns(pl.col(list(numbers)).fill_nan(None)).sort(*_SOURCE))


def _rank(column: str, group: list[str]) -> pl.Expr:
    """Ranks inside each group, scaled to (-1/2, 1/2) and centred."""
    return pl.col(column).rank().over(group) / (pl.len().over(group) + 1) - 0.5


def _moments(frame: pl.DataFrame, a: str, b: str) -> Floats:
    """Per step: n, sum a, sum b, sum a^2, sum b^2, sum ab; float64 [S, 6], steps ascending."""
    x, y = pl.col(a), pl.col(b)
    sums = frame.group_by("step").agg(
        n=pl.len().cast(pl.Float64), x=row_sum(x), y=row_sum(y), xx=row_sum(x * x), yy=row_sum(y * y), xy=row_sum(x * y)
    )
    return sums.sort("step").drop("step").to_numpy()


def correlation(moments: Floats) -> Floats:
    """Pearson correlation from moments [R, 6] (see `_moments`) -> [R]; NaN where a side does not vary."""
    n, x, y, xx, yy, xy = moments.T
    # ranks lie in (-1/2, 1/2), so that a product of variances below 1e-18 n^4 is rounding: a side does not vary
    variance = np.maximum(0.0, (n * xx - x * x) * (n * yy - y * y))
    r: Floats = np.divide(n * xy - x * y, np.sqrt(variance), out=np.full_like(n, np.nan), where=variance > 1e-18 * n**4)
    return r


def spearman_brown(r: Floats) -> Floats:
    """Reliability of a whole from the correlation of its halves; 0 where that is negative, NaN stays NaN."""
    positive = np.maximum(r, 0.0)
    return np.asarray(2 * positive / (1 + positive))
