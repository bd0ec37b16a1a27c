"""What bounds the weights: floors, ceilings, how often data may be repeated, and what domains must hold together.

Tokens are stored tokens throughout (padding and masked tokens included): what a training step consumes and a budget
counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from curate.config import Config
from curate.errors import UserError
from curate.mixture.weights import Floats, Problem, roomiest

Lower = Literal["floor", "max_change"]
Upper = Literal["ceiling", "max_epochs", "max_change"]
_ROUNDING = 1e-9


Share = Annotated[float, Field(ge=0, le=1)]


class MixtureConfig(Config):
    """How scores become the next stage's domain weights."""

    temperature: float = Field(default=0.35, gt=0)
    """How far the weights may leave the prior: they are prior * exp(score / temperature) between the bounds below; the
    unit is one standard deviation of a sample's value, which domains seldom differ by. High = close to the prior, low =
    concentrated."""
    likeness_share: float = Field(default=0.5, ge=0, le=1)
    """Share of n-gram likeness to the targets (and to the guard, in its own) in the scores of domains, beside their
    values; of method curate. 0: values alone."""
    guard_weight: float = Field(default=0.5, ge=0)
    """Weight of a guard's scores beside those of the targets, which have 1 together: where domains do alike for the
    targets, those that the guard needs get more. In the branch bench it took less of general text for as much of the
    target than the bound of `guard_drop` alone."""
    window: str = "auto"
    """The window whose scores set the weights; windows are never averaged: early, late, or next_step (what samples of
    every domain would do in the step after the run's last). auto: the last valued one, next_step where none is."""
    prior: dict[str, float] = {}
    """Share of each domain that the weights stay near; none: what the last stage trained on."""
    min_share_of_prior: float = Field(default=0.1, ge=0, le=1)
    """Each domain keeps at least this share of its prior weight, so that nothing is forgotten."""
    max_weight: float = Field(default=1.0, gt=0, le=1)
    """No domain gets more than this weight."""
    max_epochs: float = Field(default=4.0, gt=0)
    """No domain's data is used more often than this, what earlier stages consumed included."""
    decay_epochs: float = Field(default=15.4, gt=0, allow_inf_nan=True)
    """Data used for the e-th time is worth exp(-(e - 1) / decay_epochs) of new data (arXiv 2305.16264); .inf: as
    much."""
    floors: dict[str, Share] = {}
    """Least weight of single domains, e.g. {"general": 0.2}; stands above min_share_of_prior."""
    ceilings: dict[str, Share] = {}
    """Largest weight of single domains; stands beside max_weight, the smaller one holds."""
    replay_domains: tuple[str, ...] = ()
    """Domains of general data that keep at least replay_share together."""
    replay_share: float = Field(default=0.0, ge=0, le=1)
    """Least weight of the replay_domains together."""
    max_change: float | None = Field(default=None, ge=1)
    """No domain gets more than this many times its share of the last stage, nor less than one part in as many; none: no
    such bound."""
    guard_drop: float = Field(default=0.0, ge=0)
    """With a guard target: how far its expected score may fall below what the last stage's shares give, in standard
    deviations of a sample."""


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What there is of one domain.

    Args:
        samples: distinct samples that may be used.
        tokens: their stored tokens.
        consumed_tokens: how many tokens of them earlier stages used, repeats counted.
    """

    samples: int
    tokens: int
    consumed_tokens: int = 0

    @property
    def mean_length(self) -> float:
        """Stored tokens per sample."""
        return self.tokens / self.samples

    def available_tokens(self, max_epochs: float) -> float:
        """Tokens that may still be used, repeats counted."""
        return max(0.0, max_epochs * self.tokens - self.consumed_tokens)


def thinned(supply: Supply, drop_fraction: float) -> Supply:
    """What there is of a domain when a share of its samples is left out, whichever: at least one stays."""
    samples = max(supply.samples - int(supply.samples * drop_fraction + 1e-9), 1)
    tokens, consumed = (round(one * samples / supply.samples) for one in (supply.tokens, supply.consumed_tokens))
    return Supply(samples=samples, tokens=max(tokens, 1), consumed_tokens=consumed)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """`lo <= weight <= hi`, and which setting each comes from."""

    lo: float
    hi: float
    lo_from: Lower
    hi_from: Upper

    def binding(self, weight: float) -> Lower | Upper | None:
        """The constraint that holds the weight where it is, if one does."""
        if weight >= self.hi and self.hi < 1:
            return self.hi_from
        return self.lo_from if weight <= self.lo and self.lo > 0 else None


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the constraints are about, every mapping over the same domains.

    Args:
        prior: share that the weights stay near; sums to 1.
        previous: share of the last stage; sums to 1.
        supply: what there is.
        budget_tokens: stored tokens of the next stage.
        guard: score of each domain for the guard target; None without one.
    """

    prior: Mapping[str, float]
    previous: Mapping[str, float]
    supply: Mapping[str, Supply]
    budget_tokens: float
    guard: Mapping[str, float] | None = None

    @property
    def domains(self) -> list[str]:
        """In the order of names, which is the order of every array."""
        return sorted(self.prior)

    def array(self, values: Mapping[str, float]) -> Floats:
        """float64 [D] of a mapping over the domains."""
        return np.array([values[domain] for domain in self.domains], np.float64)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """A constraint on several domains together: `row w >= least`."""

    name: Literal["replay_share", "guard"]
    row: Floats
    least: float


def bounds_of(config: MixtureConfig, facts: Facts) -> dict[str, Bounds]:
    """Bounds of every domain's weight at a budget, not yet known to be feasible.

    hi_d = min(max_weight, ceiling_d, (max_epochs tokens_d - consumed_d) / budget, max_change previous_d)
    lo_d = floor_d, else max(min_share_of_prior prior_d, previous_d / max_change), which gives way to hi_d
    """
    return {domain: _bounds(config, facts, domain) for domain in facts.domains}


def _bounds(config: MixtureConfig, facts: Facts, domain: str) -> Bounds:
    change, previous = config.max_change, facts.previous[domain]
    above: list[tuple[float, Upper]] = [
        (min(config.max_weight, config.ceilings.get(domain, 1.0)), "ceiling"),
        (facts.supply[domain].available_tokens(config.max_epochs) / facts.budget_tokens, "max_epochs"),
    ]
    below: list[tuple[float, Lower]] = [(config.min_share_of_prior * facts.prior[domain], "floor")]
    if change is not None:
        above.append((previous * change, "max_change"))
        below.append((previous / change, "max_change"))
    hi, hi_from = min(above, key=lambda bound: bound[0])
    lo, lo_from = max(below, key=lambda bound: bound[0])
    lo = min(lo, hi)
    if domain in config.floors:
        lo, lo_from = config.floors[domain], "floor"
        lo = min(lo, hi) if lo <= hi * (1 + _ROUNDING) else lo
    return Bounds(lo=lo, hi=hi, lo_from=lo_from, hi_from=hi_from)


def shared_of(config: MixtureConfig, facts: Facts) -> list[Shared]:
    """The constraints on several domains together."""
    found = []
    if config.replay_share > 0:
        row = facts.array({domain: float(domain in config.replay_domains) for domain in facts.domains})
        found.append(Shared(name="replay_share", row=row, least=config.replay_share))
    if facts.guard is not None:
        row = facts.array(facts.guard)
        least = float(row @ facts.array(facts.previous)) - config.guard_drop
        found.append(Shared(name="guard", row=row, least=least))
    return found


def problem_of(config: MixtureConfig, facts: Facts, scores: Mapping[str, float]) -> Problem:
    """The problem that the weights are solved from; see `conflicts.check` for what makes it feasible."""
    bounds, shared = bounds_of(config, facts), shared_of(config, facts)
    supply = facts.supply
    return Problem(
        prior=facts.array(facts.prior),
        scores=facts.array(scores),
        temperature=config.temperature,
        lo=facts.array({domain: bound.lo for domain, bound in bounds.items()}),
        hi=facts.array({domain: bound.hi for domain, bound in bounds.items()}),
        used=facts.array({domain: part.consumed_tokens / part.tokens for domain, part in supply.items()}),
        epochs=facts.array({domain: facts.budget_tokens / part.tokens for domain, part in supply.items()}),
        decay_epochs=config.decay_epochs,
        rows=np.array([one.row for one in shared]) if shared else None,
        least=np.array([one.least for one in shared]) if shared else None,
    )


def is_feasible(config: MixtureConfig, facts: Facts) -> bool:
    """Whether some weights satisfy every constraint."""
    bounds = bounds_of(config, facts).values()
    lo, hi = (np.array([getattr(bound, side) for bound in bounds]) for side in ("lo", "hi"))
    if (lo > hi).any() or lo.sum() > 1 + _ROUNDING or hi.sum() < 1 - _ROUNDING:
        return False
    shared = shared_of(config, facts)
    if not shared:
        return True
    rows, least = np.array([one.row for one in shared]), np.array([one.least for one in shared])
    return roomiest(rows, least, lo, hi)[1] >= -_ROUNDING


def check_names(config: MixtureConfig, facts: Facts) -> None:
    """Refuse names that are no domains and numbers that are no weights.

    Raises:
        UserError: names them, and what would work.
    """
    prior, supply = facts.prior, facts.supply
    if set(prior) != set(supply):
        raise UserError(f"the run trained on {sorted(prior)}, the data has {sorted(supply)}; give the same domains")
    empty = sorted(domain for domain in supply if supply[domain].samples == 0)
    if empty:
        raise UserError(f"there are no samples of {', '.join(empty)}; leave the domain out or restore its data")
    named = {"floors": config.floors, "ceilings": config.ceilings, "replay_domains": config.replay_domains}
    for setting, names in named.items():
        unknown = sorted(set(names) - set(prior))
        if unknown:
            raise UserError(f"mixture.{setting} names {', '.join(unknown)}; the domains are {', '.join(sorted(prior))}")
    if config.replay_share > 0 and not config.replay_domains:
        raise UserError("mixture.replay_share needs mixture.replay_domains: the domains of general data")


def chosen_prior(config: MixtureConfig, previous: Mapping[str, float]) -> dict[str, float]:
    """The prior, summing to 1: `config.prior`, or where it is empty what the last stage trained on.

    Raises:
        UserError: it names other domains than the run, or a share is not positive.
    """
    prior = config.prior or previous
    unknown, missing = sorted(set(prior) - set(previous)), sorted(set(previous) - set(prior))
    if unknown or missing:
        wrong = [f"names {', '.join(unknown)}"] if unknown else []
        wrong += [f"lacks {', '.join(missing)}"] if missing else []
        raise UserError(f"mixture.prior {' and '.join(wrong)}; the domains are {', '.join(sorted(previous))}")
    bad = {domain: share for domain, share in prior.items() if not 0 < share < np.inf}
    if bad:
        raise UserError(
            f"mixture.prior must be positive numbers, got {bad}; use mixture.ceilings to leave a domain out"
        )
    total = sum(prior[domain] for domain in sorted(prior))
    return {domain: prior[domain] / total for domain in sorted(prior)}
