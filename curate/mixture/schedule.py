"""The mixture of a stage as a schedule of phases: curated weights where samples count most, the base mixture between.

Phases differ in how far they go from the base mixture b towards the curated one w: `a w + (1 - a) b` with `a` 1 in a
curated part, 0 in the basin, and in equal steps from one to the other in a transition. Floors, ceilings and epoch caps
hold in the stage as a whole and, because b is the prior within the same bounds, in each phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from curate.config import Config
from curate.mixture.apportion import apportion, sample_limits
from curate.mixture.constraints import Facts, MixtureConfig, Supply, bounds_of, chosen_prior, is_feasible, problem_of
from curate.mixture.decide import Aims, decide
from curate.mixture.record import Mixture, Phase, with_phases
from curate.mixture.weights import optimum

if TYPE_CHECKING:
    import polars as pl

Kind = Literal["throughout", "early-late", "late"]
_WHOLE = 1e-6  # samples; what rounding may take from a sum that is a whole number


class StageSchedule(Config):
    """Where in the next stage the curated weights hold; elsewhere what was trained on does, within the same bounds."""

    kind: Kind = "throughout"
    """throughout: one mixture. early-late: the curated weights in the stage's early and late part. late: in its late
    part only."""
    early_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the stage's tokens in its early part (early-late)."""
    late_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the stage's tokens in its late part (early-late, late)."""
    transition_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the stage's tokens that each transition takes from the basin; 0: the weights change at once."""
    transition_steps: int = Field(default=4, ge=1)
    """Steps of equal length that a transition has."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        taken = {
            "throughout": 0.0,
            "early-late": self.early_share + self.late_share + 2 * self.transition_share,
            "late": self.late_share + self.transition_share,
        }[self.kind]
        if taken > 1:
            raise ValueError(
                f"the parts of schedule {self.kind} add up to {taken:g} of the stage; lower early_share, late_share or "
                "transition_share to a sum of at most 1"
            )
        return self


@dataclass(frozen=True)
class Part:
    """One phase of a stage: its share of the tokens, and how far its weights go from base (0) to curated (1)."""

    share: float
    curated: float


def parts(schedule: StageSchedule) -> list[Part]:
    """The phases in order; the shares sum to 1."""
    if schedule.kind == "throughout":
        return [Part(1.0, 1.0)]
    steps = schedule.transition_steps if schedule.transition_share else 0
    rise = [Part(schedule.transition_share / steps, step / (steps + 1)) for step in range(1, steps + 1)]
    late = [*rise, Part(schedule.late_share, 1.0)]
    early = [Part(schedule.early_share, 1.0), *reversed(rise)] if schedule.kind == "early-late" else []
    basin = 1 - math.fsum(part.share for part in [*early, *late])
    return [*early, Part(max(basin, 0.0), 0.0), *late]


def decide_stage(
    scores: pl.DataFrame,
    prior: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
    schedule: StageSchedule,
    aims: Aims,
) -> Mixture:
    """Solve the mixture (see `mixture.decide`) and lay it out over the phases of the stage.

    What the base mixture will consume counts as consumed when the curated weights are solved, so that the epoch caps
    hold for the stage. They always can: base weights are within the caps at the whole budget.

    Returns:
        The mixture of the whole stage; its `phases` have whole samples, in all exactly those of the domains.

    Raises:
        UserError: see `mixture.decide`.
    """
    phases = parts(schedule)
    facts = _facts(prior, supply, budget_tokens, config)
    limits = sample_limits(supply, budget_tokens, {name: one.hi for name, one in bounds_of(config, facts).items()})
    if schedule.kind == "throughout":
        mixture = decide(scores, prior, supply, budget_tokens, config, aims)
        return with_phases(mixture, lay_out(phases, [_weights(mixture)], budget_tokens, supply, limits))
    share = math.fsum(part.share * part.curated for part in phases)
    mixture = decide(scores, prior, supply, budget_tokens, config, aims, partial(_curated, share))
    base = base_weights(config, facts)
    curated = _weights(mixture)
    weights = [
        {domain: part.curated * curated[domain] + (1 - part.curated) * base[domain] for domain in sorted(base)}
        for part in phases
    ]
    laid = lay_out(phases, weights, budget_tokens, supply, limits)
    whole = {
        domain: math.fsum(part.share * each[domain] for part, each in zip(phases, weights, strict=True))
        for domain in sorted(base)
    }
    return with_phases(mixture, laid, weights=whole, budget_tokens=budget_tokens, supply=supply)


def _curated(share: float, config: MixtureConfig, facts: Facts) -> Facts | None:
    """What curated weights are about: a share of the stage's tokens, after what the base mixture takes in the rest."""
    whole = replace(facts, guard=None)
    if not is_feasible(config, whole):
        return None
    base = base_weights(config, whole)
    left = {
        domain: replace(
            one, consumed_tokens=one.consumed_tokens + int((1 - share) * facts.budget_tokens * base[domain])
        )
        for domain, one in facts.supply.items()
    }
    return replace(facts, supply=left, budget_tokens=max(int(share * facts.budget_tokens), 1))


def base_weights(config: MixtureConfig, facts: Facts) -> dict[str, float]:
    """The prior within the bounds of a whole stage, no target considered: share of the tokens by domain, sums to 1.

    Args:
        config: constraints that some weights satisfy.
        facts: of the whole stage, without a guard.
    """
    weights = optimum(problem_of(config, facts, dict.fromkeys(facts.domains, 0.0))).weights
    return dict(zip(facts.domains, weights.tolist(), strict=True))


def _facts(
    prior: Mapping[str, float], supply: Mapping[str, Supply], budget_tokens: int, config: MixtureConfig
) -> Facts:
    whole = math.fsum(prior.values())
    previous = {domain: prior[domain] / whole for domain in sorted(prior)}
    chosen = chosen_prior(config, previous)
    return Facts(prior=chosen, previous=previous, supply=supply, budget_tokens=budget_tokens)


def lay_out(
    phases: Sequence[Part],
    weights: Sequence[Mapping[str, float]],
    budget_tokens: int,
    supply: Mapping[str, Supply],
    limits: Mapping[str, int],
) -> list[Phase]:
    """Whole samples of each domain in each phase.

    A phase gets what the stage should have given up to its end, less what was given: rounding is carried on, so that
    a domain's samples up to any phase are within one of its exact share wherever no cap binds.

    Args:
        phases: see `parts`.
        weights: share of the tokens by domain, one mapping per phase.
        budget_tokens: stored tokens of the stage.
        supply: what there is of the domains.
        limits: no domain gets more samples than this in all, see `apportion.sample_limits`.

    Returns:
        The phases that have samples; each starts where the one before it ends.
    """
    due, given = dict.fromkeys(sorted(supply), 0.0), dict.fromkeys(sorted(supply), 0)
    laid, start = [], 0
    for part, shares in zip(phases, weights, strict=True):
        for domain in due:
            due[domain] += part.share * shares[domain] * budget_tokens / supply[domain].mean_length
        wanted = {domain: max(due[domain] - given[domain], 0.0) for domain in due}
        left = {domain: limits[domain] - given[domain] for domain in due}
        total = math.floor(math.fsum(due.values()) + _WHOLE) - start
        total = min(total, sum(left[domain] for domain in due if wanted[domain] > 0))
        if total < 1:
            continue
        samples = apportion(wanted, total, left)
        given = {domain: given[domain] + samples[domain] for domain in given}
        laid.append(Phase(start_step=start, curated=part.curated, samples=total, domains=samples))
        start += total
    return laid


def _weights(mixture: Mixture) -> dict[str, float]:
    return {domain: part.weight for domain, part in mixture.domains.items()}
