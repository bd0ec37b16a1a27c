"""What the samples of the next stage are chosen by: their values, and their likeness to the targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import polars as pl

from curate.mixture.constraints import thinned
from curate.pools.slopes import value_all, value_next
from curate.scores.methods import VALUED
from curate.selection import looks_ahead, sample_weights, takes_slopes
from curate.stock import left_of, pool_of, solve
from curate.trajectory.samples import trained_tokens, usable_samples

if TYPE_CHECKING:
    from curate.pools.slopes import NextStep, Slopes
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


@dataclass(frozen=True, kw_only=True)
class Known:
    """What is known before samples are chosen.

    Attributes:
        every: the values frame of what was valued, for every target.
        domains: what the mixture is made from, see `scores.domain`.
        pool: values of a pool.
        ahead: what the targets ask of the next step.
    """

    every: pl.DataFrame
    domains: pl.DataFrame
    pool: PoolValues | None = None
    ahead: NextStep | None = None


def likeness_of(stock: Stock, targets: Sequence[Target]) -> Likeness | None:
    """What n-grams say of the targets, where they have a share in anything."""
    from curate.scores.likeness import find_likeness

    config = stock.config
    choosing = config.mode != "reweight" and config.shards.likeness_share > 0
    if not choosing and config.mixture.likeness_share == 0:
        return None
    return find_likeness(stock.run, targets, stock.trained, config.seed)


def next_step_of(stock: Stock, run: Run, targets: Sequence[Target], used: pl.DataFrame) -> NextStep | None:
    """What the targets ask of the next step, where anything depends on it.

    Args:
        stock: what the stage draws from.
        run: whose last state is the current one.
        targets: of the selection, the guard last.
        used: what was trained on, see `trajectory.ledger.consumed`.
    """
    config = stock.config
    if not looks_ahead(config):
        return None
    samples = usable_samples(run.places.filter(pl.col("domain").is_in(list(trained_tokens(run)))))
    if config.shards.consume_once:
        left = samples.join(used, on="sample_id", how="anti", maintain_order="left")
        samples = samples if left.is_empty() else left  # that nothing is left is said where the mixture is made
    return value_next(
        run, samples, targets, config.probe,
        adjoint=config.adjoint, seed=config.seed, device=config.device, batch_size=config.target_batch_size,
        tolerance=config.tolerance,
    )  # fmt: skip


def choice_of(
    stock: Stock, run: Run, targets: Sequence[Target], known: Known, like: Likeness | None, used: pl.DataFrame
) -> Choice:
    """Samples are chosen by slopes, by the values of a pool, or by those of the window and what they predict.

    Args:
        stock: what the stage draws from.
        run: whose last state is the current one.
        targets: of the selection, the guard last.
        known: what is known of domains and some samples.
        like: what n-grams say, where they have a share.
        used: what was trained on, see `trajectory.ledger.consumed`.
    """
    from curate.deviation import combined_values
    from curate.scores.likeness import sample_likeness
    from curate.shards.predict import compare_slopes, predict_rest

    config, weights = stock.config, sample_weights(stock.config, targets[0])
    aimed = [target for target in targets if target.name in weights]
    every = known.every if known.pool is None else known.pool.chosen_by(weights)
    values = combined_values(every.filter(window=config.mixture.window), weights)
    if config.mode == "reweight":
        return Choice(values=values)
    share, drawn_from = config.shards.likeness_share, pl.col("domain").is_in(list(stock.trained))
    samples = usable_samples(stock.run.places.filter(drawn_from))
    texts = None if like is None or share == 0 else sample_likeness(stock.run, samples, like, weights)
    if config.method not in VALUED or stock.pool is not None or share == 1:
        return Choice(values=values, likeness=texts)
    if config.shards.unvalued == "predict":
        values, judged = predict_rest(stock.run, values, aimed, config.probe.min_rank_correlation, config.seed)
        _say_judged(judged)
        return Choice(values=values, likeness=texts, predicted=judged)
    if not takes_slopes(config):
        return Choice(values=values, likeness=texts)
    assert known.ahead is not None
    if config.shards.consume_once:
        samples = samples.join(used, on="sample_id", how="anti", maintain_order="left")
    if samples.is_empty():  # what is left is said where the mixture is made
        return Choice(values=values, likeness=texts)
    wanted = _draft(stock, targets[0], known, used)
    also = known.ahead.values.select("sample_id").unique()
    slopes = value_all(
        run, stock.run, candidates(samples, texts, wanted, config.shards.slopes_per_sample, also), known.ahead, aimed,
        weights, config.probe, device=config.device, tolerance=config.tolerance,
    )  # fmt: skip
    valued = every.filter(window=config.window_names[-1]) if config.window_names else every.clear()
    judged = compare_slopes(samples, combined_values(valued, weights), slopes.values, config.seed)
    if config.window_names:
        _say_judged(judged)
    return Choice(values=slopes.values, likeness=texts, predicted=judged, slopes=slopes)


def candidates(
    samples: pl.DataFrame, texts: pl.DataFrame | None, wanted: Mapping[str, int], per_sample: float, also: pl.DataFrame
) -> pl.DataFrame:
    """The samples that are chosen among: the likeliest of each domain, some for each one that the stage takes.

    Args:
        samples: rows of `usable_samples`.
        texts: see `scores.likeness.sample_likeness`; None: nothing tells which are likely, all are.
        wanted: how many samples of each domain the stage takes.
        per_sample: how many for each of them.
        also: `sample_id` of others.

    Returns:
        Those rows, in their order.
    """
    if texts is None:
        return samples
    most = pl.DataFrame(
        {"domain": list(wanted), "most": [math.ceil(per_sample * count - 1e-9) for count in wanted.values()]},
        schema={"domain": pl.String, "most": pl.Int64},
    )
    told = samples.join(texts, on=["domain", "sample_id"], maintain_order="left")
    told = told.join(most, on="domain", how="left", maintain_order="left")
    place = pl.col("likeness").rank("ordinal", descending=True).over("domain")
    return told.filter(
        (place <= pl.col("most").fill_null(0)) | pl.col("sample_id").is_in(also["sample_id"].implode())
    ).drop("likeness", "most")


def _draft(stock: Stock, target: Target, known: Known, used: pl.DataFrame) -> dict[str, int]:
    """About how many samples of each domain the stage takes: the mixture as if no text were held out or doubled.

    Raises:
        UserError: the constraints conflict; they would when it is known which samples are left out.
    """
    pool = pool_of(stock, known.every.clear(), used)  # what they are worth decides nothing here
    prior, supply, mixing = left_of(stock, pool, say=False)
    kept = {domain: thinned(own, stock.config.shards.drop_fraction or 0.0) for domain, own in supply.items()}
    mixture = solve(stock, known.domains, target, (prior, kept, mixing))
    return {domain: min(part.samples, kept[domain].samples) for domain, part in mixture.domains.items()}


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
