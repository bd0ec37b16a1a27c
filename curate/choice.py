"""What the samples of the next stage are chosen by: their values, and their likeness to the targets."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.pools.slopes import value_all
from curate.scores.methods import VALUED
from curate.selection import sample_weights

if TYPE_CHECKING:
    import polars as pl

    from curate.embeddings.store import Embedding
    from curate.pools.slopes import Slopes
    from curate.pools.values import PoolValues
    from curate.scores.likeness import Likeness
    from curate.stock import Stock
    from curate.target import Target
    from curate.trajectory.run import Run

_log = logging.getLogger(__name__)


def likeness_of(stock: Stock, targets: Sequence[Target]) -> Likeness | None:
    """What n-grams say of the targets, where they have a share in anything."""
    from curate.scores.likeness import find_likeness

    config = stock.config
    choosing = config.mode != "reweight" and config.shards.likeness_share > 0
    if not choosing and config.mixture.likeness_share == 0:
        return None
    return find_likeness(stock.run, targets, stock.trained, config.seed)


def slopes_of(stock: Stock, run: Run, targets: Sequence[Target]) -> Slopes | None:
    """What one more use of each sample would do now, where samples are chosen by it."""
    config = stock.config
    if config.mode == "reweight" or stock.pool is not None or config.shards.unvalued != "slopes":
        return None
    aimed = [target for target in targets if target.name in sample_weights(config, targets[0])]
    return value_all(
        run, stock.run, aimed, config.probe,
        adjoint=config.adjoint, device=config.device, batch_size=config.target_batch_size, tolerance=config.tolerance,
    )  # fmt: skip


def chosen_by(
    stock: Stock,
    targets: Sequence[Target],
    every: pl.DataFrame,
    found: dict[str, Embedding] | PoolValues,
    like: Likeness | None,
    slopes: Slopes | None,
) -> tuple[pl.DataFrame, pl.DataFrame | None, dict[str, pl.DataFrame]]:
    """What samples are chosen by: their values for all targets together, with predicted ones, and their likeness.

    Returns:
        Values, likeness, and a table of how good predictions are, where any are made.
    """
    from curate.scores.likeness import sample_likeness
    from curate.scores.values import combined_values

    config, weights = stock.config, sample_weights(stock.config, targets[0])
    if slopes is not None:
        values = slopes.values
    else:
        values = every if isinstance(found, dict) else found.chosen_by(weights)
        values = values.filter(window=config.mixture.window)
    values = combined_values(values, weights)
    if config.mode == "reweight":
        return values, None, {}
    asked = like if config.shards.likeness_share > 0 else None
    texts = None if asked is None else sample_likeness(stock.run, asked, weights)
    if config.method not in VALUED or stock.pool is not None or config.shards.unvalued != "predict":
        return values, texts, {}
    aimed = [one for one in targets if one.name in weights]
    values, judged = _predicted(stock, values, aimed)
    return values, texts, {"predicted": judged}


def _predicted(stock: Stock, values: pl.DataFrame, targets: Sequence[Target]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The values with predicted ones of samples outside the window, and how good these are."""
    from curate.shards.predict import predict_rest

    config = stock.config
    found, judged = predict_rest(stock.run, values, targets, config.probe.min_rank_correlation, config.seed)
    for row in judged.iter_rows(named=True):
        told = "not defined" if row["spearman"] is None else f"{row['spearman']:.2f}"
        _log.info(
            "%s: %s of %s samples valued, held-out rank correlation %s; the rest: %s",
            row["domain"], f"{row['probed']:,}", f"{row['samples']:,}", told, row["used"],
        )  # fmt: skip
    return found, judged
