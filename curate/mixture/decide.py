"""From domain scores to the next stage's mixture: constraints, weights, whole samples, diagnostics."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from curate.errors import UserError
from curate.mixture.apportion import allocate
from curate.mixture.conflicts import Narrow, check
from curate.mixture.constraints import (
    Facts,
    MixtureConfig,
    Supply,
    bounds_of,
    chosen_prior,
    is_feasible,
    problem_of,
    shared_of,
)
from curate.mixture.record import Asked, DomainMixture, Mixture, SharedLimit, SweepPoint, counts_of, with_totals
from curate.mixture.weights import Solution, divergence, effective_number, expected_gain, optimum

SWEEP = (0.25, 0.5, 1.0, 2.0, 4.0)  # temperatures of the sweep, as multiples of the one chosen
_MEANS = ("score", "score_low", "score_high", "shrunk")


@dataclass(frozen=True, kw_only=True)
class Aims:
    """What the mixture is for.

    Args:
        targets: name of each target -> weight of its scores, positive.
        guard: name of the target that must not lose; None: none.
    """

    targets: Mapping[str, float]
    guard: str | None = None


def decide(
    scores: pl.DataFrame,
    previous: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
    aims: Aims,
    narrow: Narrow = lambda _, facts: facts,
) -> Mixture:
    """Solve the mixture: bounds, weights, whole samples.

    Args:
        scores: rows of `scores.domain_scores`, one per valued window, target of the aims and domain.
        previous: share of each domain in what was trained on; need not sum to 1.
        supply: what there is of the same domains.
        budget_tokens: stored tokens of the next stage.
        config: temperature and constraints.
        aims: the targets and the guard.
        narrow: gives the part of the stage that the weights are for.

    Returns:
        The mixture with `tokens = samples * mean length`, exact where the samples of a domain have one length; else see
        `with_tokens`.

    Raises:
        UserError: no mixture satisfies the constraints, or the scores are not those of the window and the domains.
    """
    whole = sum(previous[domain] for domain in sorted(previous))
    previous = {domain: previous[domain] / whole for domain in sorted(previous)}
    windows = scores["window"].unique().sort().to_list()
    if config.window == "auto" and len(windows) == 1:
        config = config.model_copy(update={"window": windows[0]})
    if config.window not in windows:
        raise UserError(
            f"there are no scores for window {config.window!r} (there are {', '.join(windows)}); set mixture.window"
        )
    base = Facts(prior=chosen_prior(config, previous), previous=previous, supply=supply, budget_tokens=budget_tokens)
    parts = {window: _part(scores.filter(window=window), base, aims, config.guard_weight) for window in windows}
    check(config, parts[config.window].facts, narrow)
    parts = {window: replace(part, facts=_known_part(narrow(config, part.facts))) for window, part in parts.items()}
    asked = {
        window: Asked(
            shrunk=part.shrunk,
            weights=_weights(part, _solve(part, config)) if is_feasible(config, part.facts) else None,
        )
        for window, part in parts.items()
    }
    return _record(parts[config.window], config, aims, asked)


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One window: the scores that the targets give each domain together, and what the constraints are about."""

    rows: dict[str, dict[str, float]]
    facts: Facts

    @property
    def shrunk(self) -> dict[str, float]:
        return {domain: row["shrunk"] for domain, row in self.rows.items()}


def _known_part(facts: Facts | None) -> Facts:
    assert facts is not None  # the check has seen to it
    return facts


def _part(scores: pl.DataFrame, base: Facts, aims: Aims, guard_weight: float) -> _Part:
    """Weighted means over the targets, the guard among them with its weight for the others' 1.

    So are the ends of the interval, as if the targets' errors were one error.
    """
    whole = sum(aims.targets.values())
    weights = dict(aims.targets) | ({} if aims.guard is None else {aims.guard: guard_weight * whole})
    shares = {target: weight / sum(weights.values()) for target, weight in weights.items()}
    tables = {target: _rows(scores, target, base) for target in weights}
    first = next(iter(tables.values()))
    rows = {
        domain: {"samples": first[domain]["samples"]}
        | {name: _mean([(tables[target][domain][name], share) for target, share in shares.items()]) for name in _MEANS}
        for domain in base.domains
    }
    if aims.guard is None:
        return _Part(rows=rows, facts=base)
    guard = {domain: row["shrunk"] for domain, row in tables[aims.guard].items()}
    return _Part(rows=rows, facts=replace(base, guard=guard))


def _rows(scores: pl.DataFrame, target: str, base: Facts) -> dict[str, dict[str, float]]:
    """The row of each domain for one target."""
    chosen = scores.filter(pl.col("target") == target)
    rows = {row["domain"]: row for row in chosen.iter_rows(named=True)}
    if sorted(rows) != base.domains or len(rows) != chosen.height:
        raise ValueError(f"scores of {target} for the domains {base.domains} are needed, got {chosen.height} rows")
    return rows


def _mean(terms: list[tuple[float | None, float]]) -> float:
    """Weighted mean; NaN where a term is not known."""
    return math.fsum(math.nan if value is None else value * share for value, share in terms)


def _solve(part: _Part, config: MixtureConfig) -> Solution:
    return optimum(problem_of(config, part.facts, part.shrunk))


def _weights(part: _Part, solution: Solution) -> dict[str, float]:
    return dict(zip(part.facts.domains, solution.weights.tolist(), strict=True))


def _record(part: _Part, config: MixtureConfig, aims: Aims, asked: dict[str, Asked]) -> Mixture:
    """Solve, round to whole samples, and say what holds what."""
    facts, supply = part.facts, part.facts.supply
    problem = problem_of(config, facts, part.shrunk)
    solution, free = optimum(problem), optimum(problem.freed())
    bounds, weights = bounds_of(config, facts), _weights(part, solution)
    unconstrained = _weights(part, free)
    samples = allocate(weights, int(facts.budget_tokens), supply, {name: bound.hi for name, bound in bounds.items()})
    domains = {
        name: DomainMixture(
            weight=weights[name],
            delivered_weight=0.0,
            unconstrained_weight=unconstrained[name],
            prior=facts.prior[name],
            **counts_of(samples[name], supply[name]),
            score=row["score"],
            low=_known(row["score_low"]),
            high=_known(row["score_high"]),
            shrunk=row["shrunk"],
            valued=int(row["samples"]),
            binding=bounds[name].binding(weights[name]),
        )
        for name, row in part.rows.items()
    }
    shared = {
        one.name: SharedLimit(least=one.least, reached=float(one.row @ solution.weights), price=float(price))
        for one, price in zip(shared_of(config, facts), solution.prices, strict=True)
    }
    return with_totals(
        domains,
        {
            "target": "+".join(aims.targets), "targets": dict(aims.targets), "guard": aims.guard,
            "window": config.window, "temperature": config.temperature, "budget_tokens": int(facts.budget_tokens),
            "unconstrained_effective_domains": effective_number(free.weights),
            "expected_score": expected_gain(problem, solution.weights), "gap": solution.gap,
            "shared": shared, "sweep": _sweep(part, config), "asked": asked,
        },
    )  # fmt: skip


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def _sweep(part: _Part, config: MixtureConfig) -> list[SweepPoint]:
    """The same problem at other temperatures."""
    prior = part.facts.array(part.facts.prior)
    guard = None if part.facts.guard is None else part.facts.array(part.facts.guard)
    points = []
    for factor in SWEEP:
        temperature = config.temperature * factor
        problem = replace(problem_of(config, part.facts, part.shrunk), temperature=temperature)
        weights = optimum(problem).weights
        points.append(
            SweepPoint(
                temperature=temperature,
                expected_score=expected_gain(problem, weights),
                kl_to_prior=divergence(weights, prior),
                effective_domains=effective_number(weights),
                guard_score=None if guard is None else float(np.dot(guard, weights)),
                weights=dict(zip(part.facts.domains, weights.tolist(), strict=True)),
            )
        )
    return points
