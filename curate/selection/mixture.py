"""From scores to the mixture: which samples are good enough, how many of each domain the stage takes, and which.

A dropped sample gets its reason in one of three places: `make_pool` (seen), `filter_pool` (contamination,
near_duplicate, low_value) and `top_k` (not_sampled: good enough, but the stage needs fewer). `make_plan` lists them in
`SamplePlan.dropped`, which is written as `dropped.parquet`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.core.errors import UserError
from curate.filter.choose import length_correlation, top_k, with_keys
from curate.filter.pipeline import filter_pool
from curate.mixture.record import with_tokens
from curate.mixture.schedule import decide_stage
from curate.output.plan import make_plan, make_pool, supply_of
from curate.stats.rank_correlation import LENGTH_BIAS
from curate.tables import Contamination, DomainScores, RankedPool, SamplePool

if TYPE_CHECKING:
    from curate.mixture.constraints import MixtureConfig, Supply
    from curate.mixture.record import Mixture
    from curate.output.plan import SamplePlan
    from curate.selection.domains import Domains
    from curate.selection.resolve import Resolved
    from curate.selection.samples import SampleScores
    from curate.selection.source import Source

_log = logging.getLogger(__name__)
_UNEVEN = 0.05  # of the budget that samples of uneven length may miss it by in silence


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Every sample that the stage can draw, each that is not good enough with its reason.

    Attributes:
        pool: see `output.plan.make_pool` and `filter.choose`.
        contamination: samples that hold held-out text, see `filter.pipeline.filter_pool`.
    """

    pool: dy.DataFrame[SamplePool] | dy.DataFrame[RankedPool]
    contamination: dy.DataFrame[Contamination]


def filter_samples(plan: Resolved, source: Source, samples: SampleScores) -> Kept:
    """Leave out what was seen, contamination, near-duplicates and samples of low value."""
    config = plan.config
    pool = make_pool(
        source.catalogue, samples.values, plan.seen, ngram_ratios=samples.ngram_ratios, unseen_only=plan.unseen_only
    )
    texts = samples.texts
    pool, contamination = filter_pool(
        pool,
        texts.overlaps,
        texts.held,
        config.filter,
        leave_out=config.takes_samples,
        ngram_share=plan.ngram_share,
        seed=config.seed,
    )
    # `dsir` and `random` draw by keys of their own; what is left out is left out for every method alike
    if config.takes_samples and samples.keys is not None:
        pool = with_keys(RankedPool.validate(pool), samples.keys)
    return Kept(pool=pool, contamination=contamination)


def solve_mixture(plan: Resolved, source: Source, domains: Domains, kept: Kept) -> tuple[Mixture, SamplePlan]:
    """Solve the weights, and take whole samples.

    Raises:
        UserError: no mixture satisfies the constraints, or nothing is left of what must be there.
    """
    prior, supply, constraints = _without_spent_domains(plan, source, SamplePool.validate(kept.pool))
    # the solver needs one row for each domain that it has, and for no other
    scores = DomainScores.validate(domains.table.filter(pl.col("domain").is_in(list(prior))))
    mixture = decide_stage(
        scores,
        prior,
        supply,
        plan.budget_tokens,
        constraints,
        plan.objectives,
        plan.mixture_source,
        decay_epochs=plan.decay_epochs,
    )
    counts = dict.fromkeys(source.prior_tokens, 0)  # a domain of which nothing is left delivers nothing
    counts |= {domain: share.samples for domain, share in mixture.domains.items()}
    pool = SamplePool.validate(kept.pool)
    if plan.config.takes_samples:
        ranked = RankedPool.validate(kept.pool)
        _warn_of_length(ranked)
        pool = SamplePool.validate(top_k(ranked, counts))
    chosen = make_plan(pool, counts, plan.config.seed)
    delivered = chosen.tokens()
    _warn_of_budget(sum(delivered.values()), plan.budget_tokens)
    # samples differ in length: the mixture says what was chosen, not what was asked for
    return with_tokens(mixture, {**dict.fromkeys(mixture.domains, 0), **delivered}), chosen


def _warn_of_length(pool: dy.DataFrame[RankedPool]) -> None:
    bias = length_correlation(pool)
    if bias is not None and abs(bias) > LENGTH_BIAS:
        _log.warning("inside domains the choice goes with length too (rank correlation %+.2f)", bias)


def _warn_of_budget(delivered: int, budget_tokens: int) -> None:
    if abs(delivered / budget_tokens - 1) > _UNEVEN:
        _log.warning(
            "samples differ in length, and those chosen have %s tokens, not %s: pack samples to one length, or change "
            "budget_tokens by as much",
            f"{delivered:,}",
            f"{budget_tokens:,}",
        )


def _without_spent_domains(
    plan: Resolved, source: Source, pool: dy.DataFrame[SamplePool]
) -> tuple[Mapping[str, float], Mapping[str, Supply], MixtureConfig]:
    """What a mixture can be made of: domains of which no sample is left have no weight, and a warning says why.

    The share of such a domain goes to all others.

    Returns:
        Stored tokens that stand for each domain's prior, what there is of it, and the constraints without the others.

    Raises:
        UserError: nothing is left at all, or nothing of a domain that has a floor.
    """
    supply, constraints = supply_of(pool), plan.mixture
    spent = sorted(domain for domain, left in supply.items() if not left.samples)
    prior = {domain: float(tokens) for domain, tokens in source.prior_tokens.items()}
    if not spent:
        return prior, supply, constraints
    reasons = "; ".join(f"{domain} ({_reasons(pool, domain)})" for domain in spent)
    floored = [domain for domain in spent if constraints.floors.get(domain, 0) > 0]
    if len(spent) == len(supply) or floored:
        raise UserError(
            f"nothing is left of {reasons}; give more data, loosen what leaves samples out (contamination: "
            "filter.contamination_overlap, seen: filter.unseen_only, others: filter)"
            + (f", or lower mixture.floors of {', '.join(floored)}" if floored else "")
        )
    _log.warning("nothing is left of %s: no weight, others have the share", reasons)
    # the constraints must not name domains that the solver does not have
    remaining = {
        "replay_domains": tuple(domain for domain in constraints.replay_domains if domain not in spent),
        **{
            name: {domain: share for domain, share in getattr(constraints, name).items() if domain not in spent}
            for name in ("prior", "floors", "ceilings")
        },
    }
    kept = {domain: tokens for domain, tokens in prior.items() if domain not in spent}
    return kept, {domain: supply[domain] for domain in kept}, constraints.model_copy(update=remaining)


def _reasons(pool: pl.DataFrame, domain: str) -> str:
    counts = pool.filter(domain=domain)["reason"].value_counts().sort("count", "reason", descending=[True, False])
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.iter_rows())
