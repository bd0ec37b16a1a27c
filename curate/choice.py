"""What the samples of the next stage are chosen by: their values, and their likeness to the targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import polars as pl

from curate.mixture.constraints import thinned
from curate.pools.draw import values_frame
from curate.pools.slopes import NEXT, predict_all, slope_units, value_all, value_next
from curate.scores.methods import VALUED
from curate.selection import looks_ahead, sample_weights, takes_slopes
from curate.shards.choose import standing
from curate.stock import left_of, pool_of, solve
from curate.trajectory.samples import trained_tokens, usable_samples

if TYPE_CHECKING:
    from curate.pools.slopes import NextStep, Slopes
    from curate.pools.values import PoolValues
    from curate.scores.likeness import Likeness
    from curate.selection import SelectConfig
    from curate.shards.choose import ShardsConfig
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
        predicted: how good predicted values are, see `shards.predict` and `pools.slopes.predict_all`.
        slopes: what some of them are, where samples have slopes of their own.
        slopes_seconds: that these took now.
    """

    values: pl.DataFrame
    likeness: pl.DataFrame | None = None
    predicted: pl.DataFrame | None = None
    slopes: Slopes | None = None
    slopes_seconds: float = 0.0


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
    return value_next(
        run, _samples_of(run, config, used), targets, config.probe,
        adjoint=config.adjoint, seed=config.seed, device=config.device, batch_size=config.target_batch_size,
        tolerance=config.tolerance,
    )  # fmt: skip


def _samples_of(run: Run, config: SelectConfig, used: pl.DataFrame) -> pl.DataFrame:
    """What the next step is asked about: the samples that the stage may take, all where none are left."""
    samples = usable_samples(run.places.filter(pl.col("domain").is_in(list(trained_tokens(run)))))
    left = _unused(samples, config, used)
    return samples if left.is_empty() else left  # that nothing is left is said where the mixture is made


def _unused(samples: pl.DataFrame, config: SelectConfig, used: pl.DataFrame) -> pl.DataFrame:
    """The samples that the stage may take."""
    if not config.shards.consume_once:
        return samples
    return samples.join(used, on="sample_id", how="anti", maintain_order="left")


def choice_of(
    stock: Stock, run: Run, targets: Sequence[Target], known: Known, like: Likeness | None, used: pl.DataFrame
) -> Choice:
    """Samples are chosen by what the next step asks for, by the values of a pool, or by those of the window.

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
    from curate.shards.predict import predict_rest

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
        return Choice(values=values, likeness=texts, predicted=_judged(judged, config.mixture.window))
    samples = _unused(samples, config, used)
    if not takes_slopes(config) or samples.is_empty():  # what is left is said where the mixture is made
        return Choice(values=values, likeness=texts)
    return _by_the_next_step(stock, run, aimed, known, samples, texts, used)


def _by_the_next_step(
    stock: Stock,
    run: Run,
    targets: Sequence[Target],
    known: Known,
    samples: pl.DataFrame,
    texts: pl.DataFrame | None,
    used: pl.DataFrame,
) -> Choice:
    """Every sample has what its n-grams predict, the most promising slopes of their own."""
    config, weights = stock.config, sample_weights(stock.config, targets[0])
    assert known.ahead is not None
    predicted, judged = predict_all(
        run, _samples_of(run, config, used), known.ahead, {target.name: weights[target.name] for target in targets},
        config.probe.min_rank_correlation, config.seed,
    )  # fmt: skip
    per_token = predicted.unique("sample_id", keep="first").select("sample_id", "value")
    told = samples.join(per_token, on="sample_id").with_columns(pl.col("value") * pl.col("tokens"))
    values, slopes, seconds = values_frame(told, NEXT, targets[0].name), None, 0.0
    likely = samples.clear()
    if min(config.shards.slopes_per_sample, config.shards.slopes_passes) > 0:
        wanted = _draft(stock, targets[0], known, used)
        per_sample = _slopes_per_sample(config.shards, run, sum(wanted.values()))
        likely = candidates(samples, values, texts, config.shards.likeness_share, wanted, per_sample)
    if len(likely):
        begin = perf_counter()
        slopes = value_all(
            run, stock.run, likely, known.ahead, targets, weights, config.probe, device=config.device,
            tolerance=config.tolerance,
        )  # fmt: skip
        seconds = perf_counter() - begin
        rest = values.join(slopes.values, on="sample_id", how="anti", maintain_order="left")
        values = pl.concat([slopes.values.select(values.columns), rest]).sort("domain", "sample_id")
    of = likely.join(predicted.select("sample_id", whole="domain"), on="sample_id").group_by(domain="whole")
    judged = judged.join(of.agg(slopes=pl.len().cast(pl.Int64)), on="domain", how="left", maintain_order="left")
    judged = _judged(judged.with_columns(pl.col("slopes").fill_null(0)), NEXT)
    return Choice(values=values, likeness=texts, predicted=judged, slopes=slopes, slopes_seconds=seconds)


def _slopes_per_sample(config: ShardsConfig, run: Run, taken: int) -> float:
    """How many samples have slopes of their own for each of those that a stage takes."""
    affordable = config.slopes_passes / slope_units(run, 1, 1)
    return min(config.slopes_per_sample, affordable / max(taken, 1))


def candidates(
    samples: pl.DataFrame,
    values: pl.DataFrame,
    texts: pl.DataFrame | None,
    share: float,
    wanted: Mapping[str, int],
    per_sample: float,
) -> pl.DataFrame:
    """The samples that have slopes of their own: the most promising of each domain, some for each that the stage takes.

    Args:
        samples: rows of `usable_samples`.
        values: the values frame that they would be chosen by otherwise.
        texts: see `scores.likeness.sample_likeness`; None: likeness has no share.
        share: of likeness.
        wanted: how many samples of each domain the stage takes.
        per_sample: how many for each of them.

    Returns:
        Those rows, in their order.
    """
    per_token = values.select("sample_id", value=pl.col("value") / pl.col("tokens")).unique("sample_id", keep="first")
    told = samples.join(per_token, on="sample_id", how="left", maintain_order="left")
    if texts is None:
        told, share = told.with_columns(likeness=pl.lit(None, pl.Float64)), 0.0
    else:
        told = told.join(texts, on=["domain", "sample_id"], how="left", maintain_order="left")
    most = pl.DataFrame(
        {"domain": list(wanted), "most": [math.floor(per_sample * count + 1e-9) for count in wanted.values()]},
        schema={"domain": pl.String, "most": pl.Int64},
    )
    told = told.join(most, on="domain", how="left", maintain_order="left")
    place = standing(share).rank("ordinal", descending=True).over("domain")
    return told.filter(place <= pl.col("most").fill_null(0)).select(samples.columns)


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


def _judged(judged: pl.DataFrame, window: str) -> pl.DataFrame:
    """Say how good predictions are, and what they are of."""
    for row in judged.iter_rows(named=True):
        told = "not defined" if row["spearman"] is None else f"{row['spearman']:.2f}"
        _log.info(
            "%s: %s of %s samples valued, rank correlation %s held out; the rest: %s",
            row["domain"], f"{row['probed']:,}", f"{row['samples']:,}", told, row["used"],
        )  # fmt: skip
    return judged.with_columns(window=pl.lit(window))
