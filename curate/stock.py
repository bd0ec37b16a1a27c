"""What the next stage draws from: the run's own data, parts of its domains, or a pool."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.errors import UserError
from curate.mixture.conflicts import check_settings
from curate.mixture.schedule import decide_stage
from curate.pools.open import leaves_out_old, open_pool
from curate.pools.values import POOL
from curate.scores.methods import VALUED
from curate.selection import aims_of, unvalued_of, window_of
from curate.shards.grain import divide, mixture_of_parts
from curate.shards.plan import make_pool, supply_of
from curate.shards.write import columns_of
from curate.trajectory.samples import trained_tokens

if TYPE_CHECKING:
    from curate.mixture.constraints import MixtureConfig, Supply
    from curate.mixture.record import Mixture
    from curate.pools.open import Pool
    from curate.selection import SelectConfig
    from curate.shards.grain import Grain
    from curate.target import Target
    from curate.trajectory.run import Run

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Stock:
    """What the next stage draws from: the run's own data, parts of its domains, or a pool.

    Attributes:
        config: the settings, with what the others imply.
        run: the run as if it had these streams.
        trained: stored tokens of each of its domains.
    """

    config: SelectConfig
    run: Run
    trained: Mapping[str, int]
    pool: Pool | None = None
    grain: Grain | None = None


def open_stock(config: SelectConfig, run: Run, used: pl.DataFrame) -> Stock:
    """Open what the next stage draws from.

    Raises:
        UserError: settings that do not go together, or a bad pool.
    """
    from curate.shards.sift import check_reweighted

    if config.pool is None:
        config = with_mixture(config, window=window_of(config))
    if config.mode != "filter":
        check_reweighted(config.shards)
    trained = trained_tokens(run)
    config = config.model_copy(update={"budget_tokens": budget_of(config, trained)})
    if config.method not in VALUED:  # weights are no gains: they hold as they are
        config = with_mixture(config, decay_epochs=math.inf)
    if config.method != "curate":  # baselines are what was published
        config = with_mixture(with_shards(config, likeness_share=0.0), likeness_share=0.0)
    config = with_shards(config, unvalued=unvalued_of(config))
    if config.pool is not None:
        pool = open_pool(config.pool, run, used, config.probe.overlap)
        once = leaves_out_old(pool, config.probe.overlap, filtered=config.mode == "filter")
        once = once or config.shards.consume_once
        config = with_mixture(with_shards(config, consume_once=once), window=POOL)
        stock = Stock(config=config, run=pool.stock, trained=pool.tokens, pool=pool)
    elif config.grain.by == "domains":
        stock = Stock(config=config, run=run, trained=trained)
    else:
        grain = divide(run, trained, config.grain, config.seed)
        config = config.model_copy(update={"mixture": mixture_of_parts(config.mixture, grain)})
        stock = Stock(config=config, run=grain.stock, trained=grain.trained, grain=grain)
    check_settings(stock.config.mixture, stock.trained)
    for stream in stock.run.streams.values() if config.mode != "reweight" else ():
        columns_of(stream)  # refuses, before anything is valued, what could not be written after it
    return stock


def pool_of(
    stock: Stock, values: pl.DataFrame, used: pl.DataFrame, likeness: pl.DataFrame | None = None
) -> pl.DataFrame:
    """Every sample that the stage can draw, see `shards.plan.make_pool`.

    Args:
        stock: what the stage draws from.
        values: that samples are chosen by.
        used: what was trained on, see `trajectory.ledger.consumed`.
        likeness: see `scores.likeness.sample_likeness`.
    """
    catalogues = {str(domain): table for (domain,), table in stock.run.catalogue.group_by("domain")}
    known = {domain: catalogues[domain] for domain in stock.trained}
    return make_pool(known, values, used, likeness=likeness, consume_once=stock.config.shards.consume_once)


def solve(
    stock: Stock,
    domains: pl.DataFrame,
    target: Target,
    left: tuple[Mapping[str, float], Mapping[str, Supply], MixtureConfig],
) -> Mixture:
    """The mixture of the stage, see `mixture.schedule.decide_stage`.

    Args:
        stock: what the stage draws from.
        domains: scores of its domains.
        target: of the selection.
        left: see `left_of`.
    """
    config, (prior, supply, mixing) = stock.config, left
    scores = domains.filter(pl.col("domain").is_in(list(prior)))
    budget = budget_of(config, stock.trained)
    return decide_stage(scores, prior, supply, budget, mixing, config.schedule, aims_of(config, target))


def left_of(
    stock: Stock, pool: pl.DataFrame, *, say: bool = True
) -> tuple[dict[str, float], dict[str, Supply], MixtureConfig]:
    """What a mixture can be made of: domains of which no sample is left have no weight, and a warning says why.

    The share of a part goes to the other parts of its domain, that of a domain to all others.

    Args:
        stock: what the stage draws from.
        pool: its samples, see `shards.sift.sift`.
        say: whether to warn.

    Returns:
        Stored tokens that each domain was trained on, what there is of it, and the constraints without the others.

    Raises:
        UserError: nothing is left at all, or nothing of a domain that has a floor.
    """
    supply, mixing, grain = supply_of(pool), stock.config.mixture, stock.grain
    spent = sorted(domain for domain, own in supply.items() if not own.samples)
    prior = {domain: float(tokens) for domain, tokens in stock.trained.items()}
    if not spent:
        return prior, supply, mixing
    told = "; ".join(f"{domain} ({_reasons(pool, domain)})" for domain in spent)
    floored = [domain for domain in spent if mixing.floors.get(domain, 0) > 0]
    if len(spent) == len(supply) or floored:
        raise UserError(
            f"nothing is left of {told}; give more data, loosen what leaves samples out (dropped for: leak "
            "shards.screen, consumed shards.consume_once, others shards)"
            + (f", or lower mixture.floors of {', '.join(floored)}" if floored else "")
        )
    if say:
        _log.warning("nothing is left of %s: no weight, others have the share", told)

    def without(shares: Mapping[str, float]) -> dict[str, float]:
        kept = {domain: share for domain, share in shares.items() if domain not in spent}
        return kept if grain is None else grain.without(spent, shares)

    left = {
        "prior": without(mixing.prior),
        "replay_domains": tuple(domain for domain in mixing.replay_domains if domain not in spent),
        **{name: {k: v for k, v in getattr(mixing, name).items() if k not in spent} for name in ("floors", "ceilings")},
    }
    prior = without(prior)
    return prior, {domain: supply[domain] for domain in prior}, mixing.model_copy(update=left)


def _reasons(pool: pl.DataFrame, domain: str) -> str:
    counts = pool.filter(domain=domain)["reason"].value_counts().sort("count", "reason", descending=[True, False])
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.iter_rows())


def with_mixture(config: SelectConfig, **settings: Any) -> SelectConfig:
    """The same with other settings of the mixture."""
    return config.model_copy(update={"mixture": config.mixture.model_copy(update=settings)})


def with_shards(config: SelectConfig, **settings: Any) -> SelectConfig:
    """The same with other settings of what is written."""
    return config.model_copy(update={"shards": config.shards.model_copy(update=settings)})


def budget_of(config: SelectConfig, trained: Mapping[str, int]) -> int:
    """Stored tokens of the next stage: as many as the last one trained on, where nothing is set."""
    return sum(trained.values()) if config.budget_tokens is None else int(config.budget_tokens)
