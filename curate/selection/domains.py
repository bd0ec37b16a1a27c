"""Scores of domains from the values of their samples, with what their n-grams say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.domains.methods import scores_without_values
from curate.domains.ngram_scores import ngram_ratios, with_ratios
from curate.domains.rollup import RollUps, roll_up_values
from curate.evaluation.branch_record import check_tested, read_branch_test
from curate.evaluation.branches import tested_scores
from curate.tables import DomainScores, DrawKeys, Reliability

if TYPE_CHECKING:
    from curate.domains.ngram_scores import TargetRatios
    from curate.selection.resolve import Resolved
    from curate.selection.source import Source
    from curate.selection.values import Values
    from curate.training.target import Targets

_WITHOUT_HALVES = ("current", "candidates")  # derivatives along a direction know no halves of a target


@dataclass(frozen=True, kw_only=True)
class Domains:
    """What domains are worth.

    Attributes:
        table: scores by source, target and domain, see `domains.domain.domain_scores` and `domains.ngram_scores`.
        ratios: n-gram ratios of the targets; None: they have no share.
        roll_ups: of measured values to shards, documents and reliability; None: the method values nothing.
        keys: what `random` and `dsir` draw samples by; None: other methods.
    """

    table: dy.DataFrame[DomainScores]
    ratios: TargetRatios | None
    roll_ups: RollUps | None = None
    keys: dy.DataFrame[DrawKeys] | None = None


def score_domains(plan: Resolved, source: Source, targets: Targets, values: Values) -> Domains:
    """Roll values up to domains, or give the scores of a method that values nothing."""
    config = plan.config
    ratios = None
    if plan.ngram_share > 0:
        ratios = ngram_ratios(source.samples, targets.every, source.prior_tokens, config.seed)
    if not config.is_valued:
        table, keys = scores_without_values(
            config.method,
            source.samples,
            targets.main,
            name=plan.mixture_source,
            trained=source.prior_tokens,
            budget=plan.budget_tokens,
            prior_strength=plan.mixture.prior_strength,
            dsir_temperature=config.values.dsir_temperature,
            seed=config.seed,
        )
        # baselines are what was published: n-grams have no share in them
        return Domains(table=with_ratios(table, None, 0.0), ratios=None, keys=keys)
    rolled = roll_up_values(
        values.frame,
        targets.main.name,
        source.prior_tokens,
        source.samples.novel_shares,
        config.seed,
        None if values.rows is None else values.rows.adjusted(),
    )
    table = with_ratios(rolled.domains, ratios, plan.ngram_share)
    # only now: a branch test is of scores, which are not known before
    _check_branch_test(plan, targets, table)
    # both "halves" of these sources are the whole value: their agreement of 1 would say nothing
    halves = rolled.reliability.filter(~pl.col("source").is_in(_WITHOUT_HALVES))
    rolled = replace(rolled, reliability=Reliability.validate(halves))
    return Domains(table=table, ratios=ratios, roll_ups=rolled)


def _check_branch_test(plan: Resolved, targets: Targets, table: dy.DataFrame[DomainScores]) -> None:
    """Refuse a branch test of other scores than these.

    Raises:
        UserError: it is of another target, source or of other scores.
    """
    path = plan.config.mixture.branch_test
    if path is not None:
        test = read_branch_test(path, plan.run.fingerprint, targets.main.fingerprint)
        rows = DomainScores.validate(table.filter(source=plan.mixture_source, target=targets.main.name))
        check_tested(path, test, plan.mixture_source, tested_scores(rows))
