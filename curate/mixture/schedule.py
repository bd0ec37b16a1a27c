"""The mixture of a stage as a schedule of phases: solved weights where samples count most, the base mixture between.

Phases differ in how far they go from the base mixture b towards the solved one w: `a w + (1 - a) b` with the blend `a`
1 in an early or late part, 0 elsewhere (the stable phase). Floors, ceilings and epoch caps hold in the stage as a whole
and, because b is the prior within the same bounds, in each phase.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.mixture.apportion import apportion, sample_limits
from curate.mixture.constraints import (
    DECAY_EPOCHS,
    Inputs,
    MixtureConfig,
    Supply,
    bounds_of,
    chosen_prior,
    is_feasible,
    problem_of,
)
from curate.mixture.decide import Objectives, decide
from curate.mixture.record import Mixture, Phase, with_phases
from curate.mixture.weights import optimum

if TYPE_CHECKING:
    import dataframely as dy

    from curate.tables import DomainScores

_WHOLE = 1e-6  # samples; what rounding may take from a sum that is a whole number


@dataclass(frozen=True)
class Part:
    """One phase of a stage: its share of the tokens, and how far its weights go from base (0) to solved (1)."""

    share: float
    blend: float


def parts(config: MixtureConfig) -> list[Part]:
    """The phases in order; the shares sum to 1."""
    if config.schedule == "constant":
        return [Part(1.0, 1.0)]
    late = Part(config.late_share, 1.0)
    early = [Part(config.early_share, 1.0)] if config.schedule == "early-and-late" else []
    stable = 1 - math.fsum(part.share for part in [*early, late])
    return [*early, Part(max(stable, 0.0), 0.0), late]


def decide_stage(
    scores: dy.DataFrame[DomainScores],
    prior: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
    objectives: Objectives,
    source: str,
    *,
    decay_epochs: float = DECAY_EPOCHS,
) -> Mixture:
    """Solve the mixture (see `mixture.decide`) and lay it out over the phases of the stage.

    What the base mixture will take counts as seen when the weights are solved, so that the epoch caps hold for the
    stage. They always can: base weights are within the caps at the whole budget.

    Returns:
        The mixture of the whole stage; its `phases` have whole samples, in all exactly those of the domains.

    Raises:
        UserError: see `mixture.decide`.
    """
    phases = parts(config)
    inputs = _inputs(prior, supply, budget_tokens, config, decay_epochs)
    solve = partial(decide, scores, prior, supply, budget_tokens, config, objectives, source, decay_epochs=decay_epochs)
    limits = sample_limits(supply, budget_tokens, {name: bound.hi for name, bound in bounds_of(config, inputs).items()})
    if config.schedule == "constant":
        mixture = solve()
        return with_phases(mixture, lay_out(phases, [_weights(mixture)], budget_tokens, supply, limits))
    share = math.fsum(part.share * part.blend for part in phases)
    if share * budget_tokens < min(one.mean_length for one in supply.values()):
        raise UserError(
            f"the parts of mixture.schedule {config.schedule} are {share:.2g} of {budget_tokens:,} tokens, less than "
            "one sample: raise budget_tokens, mixture.early_share or late_share, or take schedule constant"
        )
    mixture = solve(restrict=partial(_blended_share, share))
    base = base_weights(config, inputs)
    solved = _weights(mixture)
    weights = [
        {domain: part.blend * solved[domain] + (1 - part.blend) * base[domain] for domain in sorted(base)}
        for part in phases
    ]
    laid = lay_out(phases, weights, budget_tokens, supply, limits)
    whole = {
        domain: math.fsum(part.share * of_phase[domain] for part, of_phase in zip(phases, weights, strict=True))
        for domain in sorted(base)
    }
    return with_phases(mixture, laid, weights=whole, budget_tokens=budget_tokens, supply=supply)


def _blended_share(share: float, config: MixtureConfig, inputs: Inputs) -> Inputs | None:
    """What the solved weights are for: a share of the stage's tokens, after what the base mixture takes of the rest."""
    # the base mixture has no target in view, so nothing is to be retained by it
    whole = replace(inputs, retained=None)
    if not is_feasible(config, whole):
        return None
    base = base_weights(config, whole)
    left = {
        domain: replace(before, seen_tokens=before.seen_tokens + int((1 - share) * inputs.budget_tokens * base[domain]))
        for domain, before in inputs.supply.items()
    }
    return replace(inputs, supply=left, budget_tokens=max(int(share * inputs.budget_tokens), 1))


def base_weights(config: MixtureConfig, inputs: Inputs) -> dict[str, float]:
    """The prior within the bounds of a whole stage, no target considered: share of the tokens by domain, sums to 1.

    Args:
        config: constraints that some weights satisfy.
        inputs: of the whole stage, without a retention target.
    """
    weights = optimum(problem_of(config, inputs, dict.fromkeys(inputs.domains, 0.0))).weights
    return dict(zip(inputs.domains, weights.tolist(), strict=True))


def _inputs(
    prior: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
    decay_epochs: float,
) -> Inputs:
    whole = math.fsum(prior.values())
    previous = {domain: prior[domain] / whole for domain in sorted(prior)}
    chosen = chosen_prior(config, previous)
    return Inputs(
        prior=chosen, previous=previous, supply=supply, budget_tokens=budget_tokens, decay_epochs=decay_epochs
    )


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
    # both run on from phase to phase: tokens due in samples, and whole samples given
    laid, start = [], 0
    for part, shares in zip(phases, weights, strict=True):
        for domain in due:
            due[domain] += part.share * shares[domain] * budget_tokens / supply[domain].mean_length
        wanted = {domain: max(due[domain] - given[domain], 0.0) for domain in due}
        left = {domain: limits[domain] - given[domain] for domain in due}
        # of all that is due up to here, not of this phase: what one phase rounds away comes in a later one
        total = math.floor(math.fsum(due.values()) + _WHOLE) - start
        # never more than the caps leave, and than the budget: the last phase may come out short
        total = min(total, sum(left[domain] for domain in due if wanted[domain] > 0))
        if total < 1:  # shorter than one sample
            continue
        samples = apportion(wanted, total, left)
        given = {domain: given[domain] + samples[domain] for domain in given}
        laid.append(Phase(start_sample=start, blend=part.blend, samples=total, domains=samples))
        start += total
    return laid


def _weights(mixture: Mixture) -> dict[str, float]:
    return {domain: part.weight for domain, part in mixture.domains.items()}
