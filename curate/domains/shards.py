"""Shard scores, and the test whether shards differ at all.

Re-weighting whole shards does nothing where samples were shuffled into shards when the data was written, so the
variance between shards is tested first.
"""

import dataframely as dy
import polars as pl

from curate.stats.sums import row_mean, row_sum
from curate.tables import MeasuredValues, ShardScores, ShardTests

_KEYS = ["source", "target", "domain"]
_ALPHA = 0.01
_WORTH_IT = 0.05  # share of variance below which shard weights cannot do much, however significant


def shard_scores(values: dy.DataFrame[MeasuredValues]) -> dy.DataFrame[ShardScores]:
    """Value of each shard.

    Args:
        values: of measured samples.

    Returns:
        One row per (source, target, domain, shard), sorted so, see `tables.ShardScores`; `value_per_token` is null
        without predicted tokens.
    """
    rolled = (
        values.group_by(*_KEYS, "shard")
        .agg(
            samples=pl.col("sample_id").n_unique().cast(pl.Int64),
            predicted_tokens=pl.col("predicted_tokens").sum(),
            value_total_nats=row_sum(pl.col("value_total_nats")),
        )
        .with_columns(
            value_per_token=pl.when(pl.col("predicted_tokens") > 0).then(
                pl.col("value_total_nats") / pl.col("predicted_tokens")
            )
        )
        .sort(*_KEYS, "shard")
    )
    return ShardScores.validate(rolled)


def between_shards(values: dy.DataFrame[MeasuredValues]) -> dy.DataFrame[ShardTests]:
    """Test per domain whether shards differ in value (Kruskal-Wallis on ranks within each step).

    A sample's value per token is ranked among all samples of its step, which takes out what differs between steps (lr,
    gradient scale, the order in which shards are read); a sample seen at several steps counts once, with its mean rank.

        H = (N - 1) SS_between / SS_total ~ chi^2 with K - 1 degrees of freedom    N samples in K shards
        share = max(0, 1 - (SS_within / (N - K)) / (SS_total / (N - 1)))           variance between shards beyond chance

    Args:
        values: of measured samples.

    Returns:
        One row per (source, target, domain), sorted so: `shards`, `samples`, `share_between`, `p_value` (both null
        where there is one shard only, one sample per shard or no variance) and `verdict`, a sentence.
    """
    per_token = pl.col("value_total_nats") / pl.col("predicted_tokens")
    step = ["source", "target", "step"]
    ranks = (
        values.filter(pl.col("predicted_tokens") > 0)
        # + 1: ranks of a step lie inside (0, 1), however many samples it has
        .with_columns(rank=per_token.rank().over(step) / (pl.len().over(step) + 1))
        .group_by(*_KEYS, "shard", "index", maintain_order=True)
        .agg(row_mean(pl.col("rank")))
        # around the domain's mean, so that sums of squares are small numbers and keep their digits
        .with_columns(pl.col("rank") - pl.col("rank").mean().over(_KEYS))
    )
    by_shard = ranks.group_by(*_KEYS, "shard", maintain_order=True).agg(
        n=pl.len().cast(pl.Float64), total=row_sum(pl.col("rank")), squares=row_sum(pl.col("rank") ** 2)
    )
    sums = (
        by_shard.group_by(_KEYS, maintain_order=True)
        .agg(
            shards=pl.len().cast(pl.Int64),
            samples=pl.col("n").sum().cast(pl.Int64),
            between=row_sum(pl.col("total") ** 2 / pl.col("n")),
            around=row_sum(pl.col("squares")),
        )
        .sort(_KEYS)
    )
    tests = [_kruskal(*row) for row in sums.select("shards", "samples", "between", "around").iter_rows()]
    tested = sums.select(
        *_KEYS,
        "shards",
        "samples",
        pl.Series("share_between", [share for share, _ in tests], dtype=pl.Float64),
        pl.Series("p_value", [p for _, p in tests], dtype=pl.Float64),
        pl.Series("verdict", [_verdict(*test) for test in tests], dtype=pl.String),
    )
    return ShardTests.validate(tested)


def _kruskal(shards: int, samples: int, between: float, around: float) -> tuple[float | None, float | None]:
    """Adjusted share of variance between shards and p value; (None, None) where nothing can be tested."""
    from scipy.special import chdtrc

    # 1e-12 of ranks below 1: all ranks are equal up to rounding
    if shards < 2 or samples <= shards or around <= 1e-12 * samples:
        return None, None
    within = max(0.0, around - between)
    share = max(0.0, 1 - within / (samples - shards) * (samples - 1) / around)
    return share, float(chdtrc(shards - 1, (samples - 1) * between / around))


def _verdict(share: float | None, p_value: float | None) -> str:
    if share is None or p_value is None:
        return "cannot be tested (one shard, one sample per shard, or equal values); sample-level selection is used"
    if p_value > _ALPHA or share < _WORTH_IT:
        return "shard weights would do nothing here: samples were shuffled into shards; sample-level selection is used"
    return f"shards differ: {share:.0%} of the variance lies between them; sample-level selection keeps that difference"
