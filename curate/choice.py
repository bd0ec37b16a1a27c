"""What the samples of the next stage are chosen by: their values, and their likeness to the targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from curate.pools.slopes import value_all
from curate.scores.methods import VALUED
from curate.selection import sample_weights
from curate.trajectory.samples import usable_samples

if TYPE_CHECKING:
    from curate.embeddings.store import Embedding
    from curate.pools.slopes import Slopes
    from curate.pools.values import PoolValues
    from curate.scores.likeness import Likeness
    from curate.stock import Stock
    from curate.target import Target
    from curate.trajectory.run import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What samples are chosen by.

    Attributes:
        values: a values frame, for all targets together; samples that are not in it stand for the mean of their domain.
        likeness: see `scores.likeness.sample_likeness`; None: it has no share.
        predicted: how good predicted values are, or how far slopes agree; see `shards.predict`.
        slopes: what `values` are of, where they are slopes.
    """

    values: pl.DataFrame
    likeness: pl.DataFrame | None = None
    predicted: pl.DataFrame | None = None
    slopes: Slopes | None = None


def likeness_of(stock: Stock, targets: Sequence[Target]) -> Likeness | None:
    """What n-grams say of the targets, where they have a share in anything."""
    from curate.scores.likeness import find_likeness

    config = stock.config
    choosing = config.mode != "reweight" and config.shards.likeness_share > 0
    if not choosing and config.mixture.likeness_share == 0:
        return None
    return find_likeness(stock.run, targets, stock.trained, config.seed)


def choice_of(
    stock: Stock,
    run: Run,
    targets: Sequence[Target],
    every: pl.DataFrame,
    found: dict[str, Embedding] | PoolValues,
    like: Likeness | None,
    used: pl.DataFrame,
) -> Choice:
    """Samples are chosen by slopes, by the values of a pool, or by those of the window and what they predict.

    Args:
        stock: what the stage draws from.
        run: whose last state is the current one.
        targets: of the selection, the guard last.
        every: values of what was valued.
        found: the windows, or the pool.
        like: what n-grams say, where they have a share.
        used: what was trained on, see `trajectory.ledger.consumed`.
    """
    from curate.scores.likeness import sample_likeness
    from curate.scores.values import combined_values
    from curate.shards.predict import compare_slopes, predict_rest

    config, weights = stock.config, sample_weights(stock.config, targets[0])
    aimed = [target for target in targets if target.name in weights]
    values = every if isinstance(found, dict) else found.chosen_by(weights)
    values = combined_values(values.filter(window=config.mixture.window), weights)
    if config.mode == "reweight":
        return Choice(values=values)
    share, drawn_from = config.shards.likeness_share, pl.col("domain").is_in(list(stock.trained))
    samples = usable_samples(stock.run.places.filter(drawn_from))
    texts = None if like is None or share == 0 else sample_likeness(stock.run, samples, like, weights)
    known = config.method not in VALUED or stock.pool is not None or share == 1
    if known or config.shards.unvalued in ("keep", "drop"):
        return Choice(values=values, likeness=texts)
    if config.shards.unvalued == "predict":
        values, judged = predict_rest(stock.run, values, aimed, config.probe.min_rank_correlation, config.seed)
        _say_judged(judged)
        return Choice(values=values, likeness=texts, predicted=judged)
    if config.shards.consume_once:
        samples = samples.join(used, on="sample_id", how="anti", maintain_order="left")
    likeliest = likely(samples, texts, config.shards.slopes_share)
    if likeliest.is_empty():  # what is left is said where the mixture is made
        return Choice(values=values, likeness=texts)
    slopes = value_all(
        run, stock.run, likeliest, aimed, weights, config.probe,
        adjoint=config.adjoint, seed=config.seed, device=config.device,
        batch_size=config.target_batch_size, tolerance=config.tolerance,
    )  # fmt: skip
    judged = compare_slopes(samples, values, slopes.values, config.seed)
    _say_judged(judged)
    return Choice(values=slopes.values, likeness=texts, predicted=judged, slopes=slopes)


def likely(samples: pl.DataFrame, texts: pl.DataFrame | None, share: float) -> pl.DataFrame:
    """The share of each domain that is most like the targets; all, where that is not known."""
    if texts is None:
        return samples
    told = samples.join(texts, on=["domain", "sample_id"], maintain_order="left")
    place = pl.col("likeness").rank("ordinal", descending=True).over("domain")
    return told.filter(place <= (pl.len().over("domain") * share - 1e-9).ceil()).drop("likeness")


def _say_judged(judged: pl.DataFrame) -> None:
    for row in judged.iter_rows(named=True):
        told = "not defined" if row["spearman"] is None else f"{row['spearman']:.2f}"
        both, how = "", f"held out; the rest: {row['used']}"
        if row["used"] == "slopes":
            both, how = " and with slopes", "of the two"
        _log.info(
            "%s: %s of %s samples valued in the window%s, rank correlation %s %s",
            row["domain"], f"{row['probed']:,}", f"{row['samples']:,}", both, told, how,
        )  # fmt: skip
