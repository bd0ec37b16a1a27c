"""What the next stage draws from: the run's own data, parts of its domains, or a pool."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curate.errors import UserError
from curate.pools.open import leaves_out_old, open_pool
from curate.pools.values import POOL
from curate.scores.methods import VALUED
from curate.selection import unvalued_of
from curate.shards.grain import divide, mixture_of_parts
from curate.trajectory.samples import trained_tokens

if TYPE_CHECKING:
    import polars as pl

    from curate.pools.open import Pool
    from curate.selection import SelectConfig
    from curate.shards.grain import Grain
    from curate.trajectory.run import Run


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

    if config.pool is None and config.mixture.window not in config.window_names:
        raise UserError(
            f"mixture.window {config.mixture.window!r} is not among the valued windows {config.window_names}; "
            "set window or mixture.window"
        )
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
        config = with_mixture(with_shards(config, consume_once=once), window=POOL)
        return Stock(config=config, run=pool.stock, trained=pool.tokens, pool=pool)
    if config.grain.by == "domains":
        return Stock(config=config, run=run, trained=trained)
    grain = divide(run, trained, config.grain, config.seed)
    config = config.model_copy(update={"mixture": mixture_of_parts(config.mixture, grain)})
    return Stock(config=config, run=grain.stock, trained=grain.trained, grain=grain)


def with_mixture(config: SelectConfig, **settings: Any) -> SelectConfig:
    """The same with other settings of the mixture."""
    return config.model_copy(update={"mixture": config.mixture.model_copy(update=settings)})


def with_shards(config: SelectConfig, **settings: Any) -> SelectConfig:
    """The same with other settings of what is written."""
    return config.model_copy(update={"shards": config.shards.model_copy(update=settings)})


def budget_of(config: SelectConfig, trained: Mapping[str, int]) -> int:
    """Stored tokens of the next stage: as many as the last one trained on, where nothing is set."""
    return sum(trained.values()) if config.budget_tokens is None else int(config.budget_tokens)
