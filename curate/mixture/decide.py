"""From domain scores to the next stage's mixture: constraints, weights, whole samples, diagnostics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.errors import UserError
from curate.mixture.apportion import allocate
from curate.mixture.conflicts import Restrict, check
from curate.mixture.constraints import (
    DECAY_EPOCHS,
    Inputs,
    MixtureConfig,
    Supply,
    bounds_of,
    chosen_prior,
    group_constraints,
    is_feasible,
    problem_of,
)
from curate.mixture.record import DomainMixture, GroupLimit, Mixture, SourceWeights, SweepPoint, counts_of, with_totals
from curate.mixture.weights import Solution, divergence, effective_number, expected_gain, optimum
from curate.tables import DomainScores

SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)  # prior strengths of the sweep, as multiples of the one chosen
RETAIN_WEIGHT = 0.5
"""Weight of the retention target's scores beside those of the targets, which have 1 together: where domains do alike
for the targets, those that it needs get more. In the branch bench that took less of general text for as much of the
target than the bound alone."""
NOTHING_RETAINED = (
    "nothing is retained, so that text unlike the target may be lost (measured in the demo: a general loss 3.9 % above "
    "that of the proportional mixture)"
)
"""What is said where no retention target is given."""
_MEANS = ("score", "score_low", "score_high", "shrunk")


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """What the mixture is for.

    Args:
        targets: name of each target -> weight of its scores, positive.
        retain: name of the target that must not lose; None: none.
    """

    targets: Mapping[str, float]
    retain: str | None = None

    def weights(self, retain_weight: float) -> dict[str, float]:
        """Weight of each target's values, the retention target's last, with its weight for the others' 1."""
        whole = sum(self.targets.values())
        return dict(self.targets) | ({} if self.retain is None else {self.retain: retain_weight * whole})


def decide(
    scores: dy.DataFrame[DomainScores],
    previous: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
    objectives: Objectives,
    source: str,
    *,
    restrict: Restrict = lambda _, inputs: inputs,
    decay_epochs: float = DECAY_EPOCHS,
) -> Mixture:
    """Solve the mixture: bounds, weights, whole samples.

    Args:
        scores: rows of `domains.domain_scores`, one per source, target of the objectives and domain.
        previous: share of each domain in what was trained on; need not sum to 1.
        supply: what there is of the same domains.
        budget_tokens: stored tokens of the next stage.
        config: prior strength and constraints.
        objectives: the targets, and what must be retained.
        source: name of the source whose scores set the weights: early, late, current or candidates.
        restrict: gives the part of the stage that the weights are for.
        decay_epochs: how fast repeated data loses its worth.

    Returns:
        The mixture with `tokens = samples * mean length`, exact where the samples of a domain have one length; else see
        `with_tokens`.

    Raises:
        UserError: no mixture satisfies the constraints, or there are no scores of the source.
    """
    # in the order of names, here and below: a mixture must not depend on the order of a mapping
    whole = sum(previous[domain] for domain in sorted(previous))
    previous = {domain: previous[domain] / whole for domain in sorted(previous)}
    sources = scores["source"].unique().sort().to_list()
    if source not in sources:
        raise UserError(f"there are no scores of {source} (there are of {', '.join(sources)}); set values.sources")
    base = Inputs(
        prior=chosen_prior(config, previous),
        previous=previous,
        supply=supply,
        budget_tokens=budget_tokens,
        decay_epochs=decay_epochs,
    )
    scored = {name: _scored(scores.filter(source=name), base, objectives) for name in sources}
    # of the source that sets the weights only: the others are shown, and may have no mixture
    check(config, scored[source].inputs, restrict)
    scored = {name: replace(one, inputs=_restricted(restrict(config, one.inputs))) for name, one in scored.items()}
    by_source = {
        name: SourceWeights(
            shrunk=one.shrunk,
            weights=_weights(one, _solve(one, config)) if is_feasible(config, one.inputs) else None,
        )
        for name, one in scored.items()
    }
    return _record(scored[source], config, objectives, source, by_source)


def tilted_prior(
    scores: dy.DataFrame[DomainScores], previous: Mapping[str, float], config: MixtureConfig, objectives: Objectives
) -> dict[str, float]:
    """About which shares a mixture will have, bounds and repetition left aside: w_d ~ prior_d exp(score_d / T).

    Args:
        scores: of one source, see `decide`.
        previous: share of each domain in what was trained on; need not sum to 1.
        config: prior strength T.
        objectives: the targets, and what must be retained.

    Returns:
        Domain -> share; sums to 1.
    """
    whole = sum(previous[domain] for domain in sorted(previous))
    previous = {domain: previous[domain] / whole for domain in sorted(previous)}
    base = Inputs(prior=chosen_prior(config, previous), previous=previous, supply={}, budget_tokens=1)
    shrunk = base.array(_scored(scores, base, objectives).shrunk) / config.prior_strength
    # less the largest: exp of a score over a small prior strength would overflow, and only proportions count
    weights = base.array(base.prior) * np.exp(shrunk - shrunk.max())
    return dict(zip(base.domains, (weights / weights.sum()).tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """One source: the scores that the targets give each domain together, and what the constraints are about."""

    rows: dict[str, dict[str, float]]
    inputs: Inputs

    @property
    def shrunk(self) -> dict[str, float]:
        return {domain: row["shrunk"] for domain, row in self.rows.items()}


def _restricted(inputs: Inputs | None) -> Inputs:
    assert inputs is not None  # the check has seen to it
    return inputs


def _scored(scores: pl.DataFrame, base: Inputs, objectives: Objectives) -> _Scored:
    """Weighted means over the targets, the retention target among them.

    The ends of the interval are weighted means too, as if the targets' errors were one error.
    """
    weights = objectives.weights(RETAIN_WEIGHT)
    shares = {target: weight / sum(weights.values()) for target, weight in weights.items()}
    tables = {target: _rows(scores, target, base) for target in weights}
    first = next(iter(tables.values()))
    rows = {
        domain: {"samples": first[domain]["samples"]}
        | {name: _mean([(tables[target][domain][name], share) for target, share in shares.items()]) for name in _MEANS}
        for domain in base.domains
    }
    if objectives.retain is None:
        return _Scored(rows=rows, inputs=base)
    # shrunk, as the scores are: a bound on noise would forbid mixtures for nothing
    retained = {domain: row["shrunk"] for domain, row in tables[objectives.retain].items()}
    return _Scored(rows=rows, inputs=replace(base, retained=retained))


def _rows(scores: pl.DataFrame, target: str, base: Inputs) -> dict[str, dict[str, float]]:
    """The row of each domain for one target."""
    chosen = scores.filter(pl.col("target") == target)
    rows = {row["domain"]: row for row in chosen.iter_rows(named=True)}
    if sorted(rows) != base.domains or len(rows) != chosen.height:
        raise ValueError(f"scores of {target} for the domains {base.domains} are needed, got {chosen.height} rows")
    return rows


def _mean(terms: list[tuple[float | None, float]]) -> float:
    """Weighted mean; NaN where a term is not known."""
    return math.fsum(math.nan if value is None else value * share for value, share in terms)


def _solve(scored: _Scored, config: MixtureConfig) -> Solution:
    return optimum(problem_of(config, scored.inputs, scored.shrunk))


def _weights(scored: _Scored, solution: Solution) -> dict[str, float]:
    return dict(zip(scored.inputs.domains, solution.weights.tolist(), strict=True))


def _record(
    scored: _Scored, config: MixtureConfig, objectives: Objectives, source: str, by_source: dict[str, SourceWeights]
) -> Mixture:
    """Solve, round to whole samples, and say what holds what."""
    inputs, supply = scored.inputs, scored.inputs.supply
    problem = problem_of(config, inputs, scored.shrunk)
    solution, free = optimum(problem), optimum(problem.unconstrained())
    bounds, weights = bounds_of(config, inputs), _weights(scored, solution)
    unconstrained = _weights(scored, free)
    # upper bounds hold for whole samples too; a lower one may be missed by less than a sample
    samples = allocate(weights, int(inputs.budget_tokens), supply, {name: bound.hi for name, bound in bounds.items()})
    domains = {
        name: DomainMixture(
            weight=weights[name],
            delivered_weight=0.0,  # by `with_totals`, when whole samples are known
            unconstrained_weight=unconstrained[name],
            prior=inputs.prior[name],
            **counts_of(samples[name], supply[name]),
            score=row["score"],
            score_low=_known(row["score_low"]),
            score_high=_known(row["score_high"]),
            shrunk=row["shrunk"],
            measured_samples=int(row["samples"]),
            binding=bounds[name].binding(weights[name]),
        )
        for name, row in scored.rows.items()
    }
    limits = {
        constraint.name: GroupLimit(
            least=constraint.least, reached=float(constraint.row @ solution.weights), price=float(price)
        )
        for constraint, price in zip(group_constraints(config, inputs), solution.prices, strict=True)
    }
    return with_totals(
        domains,
        {
            "target": "+".join(objectives.targets),
            "targets": dict(objectives.targets),
            "retain": objectives.retain,
            "source": source,
            "prior_strength": config.prior_strength,
            "budget_tokens": int(inputs.budget_tokens),
            "unconstrained_effective_domains": effective_number(free.weights),
            "expected_score": expected_gain(problem, solution.weights),
            "gap": solution.gap,
            "group_limits": limits,
            "sweep": _sweep(scored, config),
            "by_source": by_source,
        },
    )


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _sweep(scored: _Scored, config: MixtureConfig) -> list[SweepPoint]:
    """The same problem at other prior strengths."""
    prior = scored.inputs.array(scored.inputs.prior)
    retained = None if scored.inputs.retained is None else scored.inputs.array(scored.inputs.retained)
    points = []
    for factor in SWEEP:
        strength = config.prior_strength * factor
        problem = replace(problem_of(config, scored.inputs, scored.shrunk), prior_strength=strength)
        weights = optimum(problem).weights
        points.append(
            SweepPoint(
                prior_strength=strength,
                expected_score=expected_gain(problem, weights),
                kl_to_prior=divergence(weights, prior),
                effective_domains=effective_number(weights),
                retained_score=None if retained is None else float(np.dot(retained, weights)),
                weights=dict(zip(scored.inputs.domains, weights.tolist(), strict=True)),
            )
        )
    return points
