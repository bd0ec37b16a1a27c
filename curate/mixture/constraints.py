"""What bounds a domain's weight: floors, ceilings, and how often its data may be repeated.

Tokens are stored tokens throughout (padding and masked tokens included): what a training step consumes and a budget
counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field

from curate.config import Config
from curate.errors import UserError

_ROUNDING = 1e-9


class MixtureConfig(Config):
    """How scores become the next stage's domain weights."""

    temperature: float = Field(default=1.0, gt=0)
    """How far the weights may leave the prior: they are prior * exp(score / temperature) between the bounds below; the
    unit is one standard deviation of a sample's value. High = close to the prior, low = concentrated."""
    window: str = "late"
    """The window whose scores set the weights; windows are never averaged."""
    min_share_of_prior: float = Field(default=0.1, ge=0, le=1)
    """Each domain keeps at least this share of its prior weight, so that nothing is forgotten (a replay floor)."""
    max_weight: float = Field(default=1.0, gt=0, le=1)
    """No domain gets more than this weight."""
    max_epochs: float = Field(default=4.0, gt=0)
    """No domain's data is used more often than this, what earlier stages consumed included."""
    floors: dict[str, float] = {}
    """Least weight of single domains, e.g. {"general": 0.2}; stands above min_share_of_prior."""
    ceilings: dict[str, float] = {}
    """Largest weight of single domains; stands beside max_weight, the smaller one holds."""


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


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """`lo <= weight <= hi`, and which setting `hi` comes from."""

    lo: float
    hi: float
    hi_from: Literal["ceiling", "max_epochs"]

    def binding(self, weight: float) -> Literal["floor", "ceiling", "max_epochs"] | None:
        """The constraint that holds the weight where it is, if one does."""
        if weight >= self.hi and self.hi < 1:
            return self.hi_from
        return "floor" if weight <= self.lo and self.lo > 0 else None


def caps(
    config: MixtureConfig, prior: Mapping[str, float], supply: Mapping[str, Supply], budget_tokens: int
) -> dict[str, Bounds]:
    """Bounds of every domain's weight at a budget.

        hi_d = min(max_weight, ceiling_d, (max_epochs tokens_d - consumed_d) / budget)
        lo_d = floor_d, else min_share_of_prior * prior_d, which gives way where hi_d is smaller

    Args:
        config: the constraints.
        prior: share of each domain in what was trained on; sums to 1.
        supply: what there is of the same domains.
        budget_tokens: tokens of the next stage.

    Returns:
        Feasible bounds: `lo <= hi`, `sum lo <= 1 <= sum hi`.

    Raises:
        UserError: no weights satisfy the constraints; the message names the domains that bind and the largest feasible
            budget or floor.
    """
    _check_names(config, prior, supply)
    _check_ceilings(config, prior)
    _check_floors(config, prior)
    _check_budget(config, supply, budget_tokens)
    return {domain: _bounds(config, domain, prior[domain], supply[domain], budget_tokens) for domain in sorted(prior)}


def _ceiling(config: MixtureConfig, domain: str) -> float:
    return min(config.max_weight, config.ceilings.get(domain, 1.0))


def _bounds(config: MixtureConfig, domain: str, prior: float, supply: Supply, budget_tokens: int) -> Bounds:
    ceiling, epochs = _ceiling(config, domain), supply.available_tokens(config.max_epochs) / budget_tokens
    hi = min(ceiling, epochs)
    lo = config.floors.get(domain, config.min_share_of_prior * prior)
    return Bounds(lo=min(lo, hi), hi=hi, hi_from="max_epochs" if epochs < ceiling else "ceiling")


def _check_names(config: MixtureConfig, prior: Mapping[str, float], supply: Mapping[str, Supply]) -> None:
    if set(prior) != set(supply):
        raise UserError(f"the run trained on {sorted(prior)}, the data has {sorted(supply)}; give the same domains")
    empty = sorted(domain for domain in supply if supply[domain].samples == 0)
    if empty:
        raise UserError(f"there are no samples of {', '.join(empty)}; leave the domain out or restore its data")
    for setting, limits in (("floors", config.floors), ("ceilings", config.ceilings)):
        unknown = sorted(set(limits) - set(prior))
        if unknown:
            raise UserError(f"mixture.{setting} names {', '.join(unknown)}; the domains are {', '.join(sorted(prior))}")
        outside = {domain: limit for domain, limit in limits.items() if not 0 <= limit <= 1}
        if outside:
            raise UserError(f"mixture.{setting} must be weights from 0 to 1, got {outside}")


def _check_ceilings(config: MixtureConfig, prior: Mapping[str, float]) -> None:
    ceilings = {domain: _ceiling(config, domain) for domain in sorted(prior)}
    if sum(ceilings.values()) < 1 - _ROUNDING:
        raise UserError(
            f"the ceilings {ceilings} add up to {sum(ceilings.values()):.3g}, less than 1: raise mixture.ceilings, or "
            f"mixture.max_weight to at least {1 / len(ceilings):.3g}"
        )
    for domain, floor in sorted(config.floors.items()):
        if floor > ceilings[domain]:
            raise UserError(
                f"mixture.floors.{domain} {floor} is above the ceiling {ceilings[domain]} of that domain; lower it"
            )


def _check_floors(config: MixtureConfig, prior: Mapping[str, float]) -> None:
    def total(share: float) -> float:
        relative = {domain: min(share * prior[domain], _ceiling(config, domain)) for domain in prior}
        return sum({**relative, **config.floors}.values())

    if sum(config.floors.values()) > 1 + _ROUNDING:
        named = ", ".join(f"{domain} {floor}" for domain, floor in sorted(config.floors.items()))
        raise UserError(f"mixture.floors add up to more than 1 ({named}); lower them to a sum of at most 1")
    if total(config.min_share_of_prior) > 1 + _ROUNDING:
        share = _largest(lambda share: total(share) <= 1, config.min_share_of_prior)
        raise UserError(
            f"the floors of {', '.join(sorted(config.floors))} and mixture.min_share_of_prior add up to more than 1; "
            f"with these floors min_share_of_prior can be at most {share:.3g}"
        )


def _check_budget(config: MixtureConfig, supply: Mapping[str, Supply], budget_tokens: int) -> None:
    available = {domain: supply[domain].available_tokens(config.max_epochs) for domain in sorted(supply)}

    def feasible(budget: float) -> bool:
        filled = sum(min(_ceiling(config, domain) * budget, tokens) for domain, tokens in available.items())
        floors = all(available[domain] >= floor * budget * (1 - _ROUNDING) for domain, floor in config.floors.items())
        return floors and filled >= budget * (1 - _ROUNDING)

    if feasible(budget_tokens):
        return
    largest = int(_largest(feasible, float(budget_tokens)))
    binding = [
        f"{domain} has {int(tokens):,} left"
        for domain, tokens in available.items()
        if tokens < max(_ceiling(config, domain), config.floors.get(domain, 0)) * budget_tokens
    ]
    raise UserError(
        f"budget_tokens {budget_tokens:,} is more than the data allows at mixture.max_epochs {config.max_epochs:g} "
        f"({', '.join(binding)}); the largest feasible budget_tokens is {largest:,}"
    )


def _largest(feasible: Callable[[float], bool], upper: float) -> float:
    """The largest number in [0, upper) that is feasible, by bisection; 0 is, `upper` is not."""
    lower = 0.0
    while lower < (middle := (lower + upper) / 2) < upper:
        lower, upper = (middle, upper) if feasible(middle) else (lower, middle)
    return lower
