"""The unit of values: how far one sample lies from the mean of its domain."""

from collections.abc import Mapping

import dataframely as dy
import numpy as np
import polars as pl

from curate.tables import MeasuredValues, SampleValues

EQUAL = 1e-9
"""A deviation below this share of the largest value is rounding error: all values are equal."""


def pooled_deviation(group: pl.DataFrame) -> float:
    """Pooled standard deviation of a sample's value per token around its domain's mean, weighted by tokens.

    Args:
        group: values of one source and target; `domain`, `predicted_tokens` and `value_total_nats` are read.

    Returns:
        nats per token and token; exactly 0 where all values of each domain are equal up to rounding.
    """
    per_token = pl.col("value_total_nats") / pl.col("predicted_tokens")
    domain_mean = pl.col("value_total_nats").sum().over("domain") / pl.col("predicted_tokens").sum().over("domain")
    squares, tokens, largest = (
        group.filter(pl.col("predicted_tokens") > 0)
        .select(
            squares=(pl.col("predicted_tokens") * (per_token - domain_mean) ** 2).sum(),
            tokens=pl.col("predicted_tokens").sum(),
            largest=per_token.abs().max(),
        )
        .row(0)
    )
    # exactly 0 for rounding error: divided by it, equal values would become scores of any size
    deviation = float(np.sqrt(squares / tokens)) if tokens else 0.0
    return deviation if tokens and deviation > EQUAL * largest else 0.0


def target_shares(values: dy.DataFrame[MeasuredValues], weights: Mapping[str, float]) -> dict[str, float]:
    """What each of several targets' values is multiplied by in their mean, each in its own standard deviations.

    Args:
        values: of one source, one target after the other.
        weights: target -> weight.

    Returns:
        target -> factor; 1 for a single target, which keeps its unit, and 0 where no value differs.
    """
    if len(weights) == 1:
        return dict.fromkeys(weights, 1.0)
    scales = {target: pooled_deviation(values.filter(target=target)) for target in weights}
    whole = sum(weights.values())
    return {target: weight / whole / scales[target] if scales[target] else 0.0 for target, weight in weights.items()}


def combined_values(values: dy.DataFrame[MeasuredValues], weights: Mapping[str, float]) -> dy.DataFrame[SampleValues]:
    """One value per row for several targets, see `target_shares`.

    Args:
        values: of one source, one target after the other, each with the same rows in the same order.
        weights: target -> weight.

    Returns:
        The first target's rows with the combined `value_total` (nats for one target, in deviations for several);
        `value_half_a` and `value_half_b` are its own.
    """
    first = values.filter(target=next(iter(weights)))
    total = np.zeros(len(first))
    for target, share in target_shares(values, weights).items():
        total += share * values.filter(target=target)["value_total_nats"].to_numpy()
    named = first.rename({"value_half_a_nats": "value_half_a", "value_half_b_nats": "value_half_b"})
    return SampleValues.validate(named.with_columns(value_total=pl.Series(total, dtype=pl.Float64)))
