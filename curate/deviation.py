"""The unit of values: how far one sample lies from the mean of its domain."""

from collections.abc import Mapping

import numpy as np
import polars as pl

EQUAL = 1e-9
"""A deviation below this share of the largest value is rounding error: all values are equal."""


def pooled_deviation(group: pl.DataFrame) -> float:
    """Pooled standard deviation of a sample's value per token around its domain's mean, weighted by tokens.

    Args:
        group: columns `domain`, `tokens` (predicted), `value` (nats per token of the target, for all of these tokens).

    Returns:
        nats per token and token; exactly 0 where all values of each domain are equal up to rounding.
    """
    per_token = pl.col("value") / pl.col("tokens")
    domain_mean = pl.col("value").sum().over("domain") / pl.col("tokens").sum().over("domain")
    squares, tokens, largest = (
        group.filter(pl.col("tokens") > 0)
        .select(
            squares=(pl.col("tokens") * (per_token - domain_mean) ** 2).sum(),
            tokens=pl.col("tokens").sum(),
            largest=per_token.abs().max(),
        )
        .row(0)
    )
    deviation = float(np.sqrt(squares / tokens)) if tokens else 0.0
    return deviation if tokens and deviation > EQUAL * largest else 0.0


def combined_values(values: pl.DataFrame, weights: Mapping[str, float]) -> pl.DataFrame:
    """One value per row for several targets: the weighted mean of their values, each in its own standard deviations.

    Args:
        values: the values frames of one window, one target after the other, each with the same rows in the same order.
        weights: target -> weight.

    Returns:
        The first target's frame with the combined `value` (without unit, where there is more than one target);
        `value_a` and `value_b` stay its own.
    """
    first, *rest = weights
    frame = values.filter(target=first)
    if not rest:
        return frame
    total = np.zeros(len(frame))
    for target, weight in weights.items():
        part = values.filter(target=target)
        scale = pooled_deviation(part)
        if scale > 0:
            total += weight / sum(weights.values()) * part["value"].to_numpy() / scale
    return frame.with_columns(value=pl.Series(total))
