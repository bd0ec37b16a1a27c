"""What bounds the weights: floors, ceilings, how often data may be repeated, and what domains must hold together.

Tokens are stored tokens throughout (padding and masked tokens included): what a training step sees and a budget
counts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from curate.core.config import Config
from curate.core.errors import UserError
from curate.mixture.weights import Floats, Problem, max_slack

Lower = Literal["floor", "max_change"]
Upper = Literal["ceiling", "max_epochs", "max_change"]
Schedule = Literal["constant", "early-and-late", "anneal"]
_ROUNDING = 1e-9
DECAY_EPOCHS = 15.4
"""Data used for the e-th time is worth exp(-(e - 1) / 15.4) of new data (arXiv 2305.16264)."""


Share = Annotated[float, Field(ge=0, le=1)]


class MixtureConfig(Config):
    """How scores become the next stage's domain weights."""

    prior_strength: float = Field(default=0.35, gt=0)
    """How strongly the weights stay near the prior: they are prior * exp(score / prior_strength) between the bounds
    below; the unit is one standard deviation of a sample's value, which domains seldom differ by. High: close to the
    prior. Low: concentrated."""
    branch_test: Path | None = None
    """What `python -m curate.branch_test` found: its prior strength holds instead, so that scores which do not predict
    the next stage move less."""
    prior: dict[str, float] = {}
    """Share of each domain that the weights stay near; none: what the last stage trained on. With method proportional
    these are the weights."""
    min_share_of_prior: float = Field(default=0.1, ge=0, le=1)
    """Each domain keeps at least this share of its prior weight, so that nothing is forgotten."""
    max_weight: float = Field(default=1.0, gt=0, le=1)
    """No domain gets more than this weight."""
    max_epochs: float = Field(default=4.0, gt=0)
    """No domain's data is used more often than this, what earlier stages saw included."""
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
    max_regression: float = Field(default=0.0, ge=0)
    """How far the expected score of the retention target (`retain`) may fall below what the last stage's shares give,
    in standard deviations of a sample."""
    schedule: Schedule = "constant"
    """Where in the next stage these weights hold; elsewhere what was trained on does, within the same bounds. constant:
    throughout. early-and-late: in its early and its late part. anneal: in its late part only. Either has a
    `schedule.yaml` instead of `streams.yaml` or beside the folders."""
    early_share: float = Field(default=0.1, gt=0, lt=1)
    """Share of the stage's tokens in its early part."""
    late_share: float = Field(default=0.2, gt=0, lt=1)
    """Share of the stage's tokens in its late part."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.schedule == "early-and-late" and self.early_share + self.late_share > 1:
            raise ValueError(
                f"early_share {self.early_share:g} and late_share {self.late_share:g} are more than the stage; lower "
                "them to a sum of at most 1"
            )
        return self


@dataclass(frozen=True, kw_only=True)
class Supply:
    """What there is of one domain.

    Args:
        samples: distinct samples that may be used.
        tokens: their stored tokens.
        seen_tokens: how many tokens of them were trained on, repeats counted.
    """

    samples: int
    tokens: int
    seen_tokens: int = 0

    @property
    def mean_length(self) -> float:
        """Stored tokens per sample."""
        return self.tokens / self.samples

    def available_tokens(self, max_epochs: float) -> float:
        """Tokens that may still be used, repeats counted."""
        return max(0.0, max_epochs * self.tokens - self.seen_tokens)


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
class Inputs:
    """What the constraints are about, every mapping over the same domains.

    Args:
        prior: share that the weights stay near; sums to 1.
        previous: share of the last stage; sums to 1.
        supply: what there is.
        budget_tokens: stored tokens of the next stage.
        retained: score of each domain for the retention target; None without one.
        decay_epochs: how fast repeated data loses its worth, see `DECAY_EPOCHS`; inf: never.
    """

    prior: Mapping[str, float]
    previous: Mapping[str, float]
    supply: Mapping[str, Supply]
    budget_tokens: float
    retained: Mapping[str, float] | None = None
    decay_epochs: float = DECAY_EPOCHS

    @property
    def domains(self) -> list[str]:
        """In the order of names, which is the order of every array."""
        return sorted(self.prior)

    def array(self, values: Mapping[str, float]) -> Floats:
        """float64 [D] of a mapping over the domains."""
        return np.array([values[domain] for domain in self.domains], np.float64)


@dataclass(frozen=True, kw_only=True)
class GroupConstraint:
    """A constraint on several domains together: `row w >= least`."""

    name: Literal["replay_share", "retain"]
    row: Floats
    least: float


def bounds_of(config: MixtureConfig, inputs: Inputs) -> dict[str, Bounds]:
    """Bounds of every domain's weight at a budget, not yet known to be feasible.

    hi_d = min(max_weight, ceiling_d, (max_epochs tokens_d - seen_d) / budget, max_change previous_d)
    lo_d = floor_d, else max(min_share_of_prior prior_d, previous_d / max_change), which gives way to hi_d
    """
    return {domain: _bounds(config, inputs, domain) for domain in inputs.domains}


def _bounds(config: MixtureConfig, inputs: Inputs, domain: str) -> Bounds:
    change, previous = config.max_change, inputs.previous[domain]
    above: list[tuple[float, Upper]] = [
        (min(config.max_weight, config.ceilings.get(domain, 1.0)), "ceiling"),
        (inputs.supply[domain].available_tokens(config.max_epochs) / inputs.budget_tokens, "max_epochs"),
    ]
    below: list[tuple[float, Lower]] = [(config.min_share_of_prior * inputs.prior[domain], "floor")]
    if change is not None:
        above.append((previous * change, "max_change"))
        below.append((previous / change, "max_change"))
    # of equal bounds the first named holds, and is what is shown as binding
    hi, hi_from = min(above, key=lambda bound: bound[0])
    lo, lo_from = max(below, key=lambda bound: bound[0])
    # a default lower bound gives way to scarce data; a floor that the user named conflicts with it, and is refused
    lo = min(lo, hi)
    if domain in config.floors:
        lo, lo_from = config.floors[domain], "floor"
        lo = min(lo, hi) if lo <= hi * (1 + _ROUNDING) else lo
    return Bounds(lo=lo, hi=hi, lo_from=lo_from, hi_from=hi_from)


def group_constraints(config: MixtureConfig, inputs: Inputs) -> list[GroupConstraint]:
    """The constraints on several domains together."""
    constraints = []
    if config.replay_share > 0:
        row = inputs.array({domain: float(domain in config.replay_domains) for domain in inputs.domains})
        constraints.append(GroupConstraint(name="replay_share", row=row, least=config.replay_share))
    if inputs.retained is not None:
        # against the last stage's shares, not the prior: what was kept so far is the measure of what is lost
        row = inputs.array(inputs.retained)
        least = float(row @ inputs.array(inputs.previous)) - config.max_regression
        constraints.append(GroupConstraint(name="retain", row=row, least=least))
    return constraints


def problem_of(config: MixtureConfig, inputs: Inputs, scores: Mapping[str, float]) -> Problem:
    """The problem that the weights are solved from; see `conflicts.check` for what makes it feasible."""
    bounds, shared = bounds_of(config, inputs), group_constraints(config, inputs)
    # every array in the order of `inputs.domains`
    supply = inputs.supply
    return Problem(
        prior=inputs.array(inputs.prior),
        scores=inputs.array(scores),
        prior_strength=config.prior_strength,
        lo=inputs.array({domain: bound.lo for domain, bound in bounds.items()}),
        hi=inputs.array({domain: bound.hi for domain, bound in bounds.items()}),
        used=inputs.array({domain: left.seen_tokens / left.tokens for domain, left in supply.items()}),
        epochs=inputs.array({domain: inputs.budget_tokens / left.tokens for domain, left in supply.items()}),
        decay_epochs=inputs.decay_epochs,
        rows=np.array([constraint.row for constraint in shared]) if shared else None,
        least=np.array([constraint.least for constraint in shared]) if shared else None,
    )


def is_feasible(config: MixtureConfig, inputs: Inputs) -> bool:
    """Whether some weights satisfy every constraint."""
    bounds = bounds_of(config, inputs).values()
    lo, hi = (np.array([getattr(bound, side) for bound in bounds]) for side in ("lo", "hi"))
    # bounds alone first: the linear program is for constraints on several domains
    if (lo > hi).any() or lo.sum() > 1 + _ROUNDING or hi.sum() < 1 - _ROUNDING:
        return False
    shared = group_constraints(config, inputs)
    if not shared:
        return True
    rows = np.array([constraint.row for constraint in shared])
    least = np.array([constraint.least for constraint in shared])
    return max_slack(rows, least, lo, hi)[1] >= -_ROUNDING


def check_names(config: MixtureConfig, inputs: Inputs) -> None:
    """Refuse names that are no domains and numbers that are no weights.

    Raises:
        UserError: names them, and what would work.
    """
    prior, supply = inputs.prior, inputs.supply
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
    # in the order of names: sums of floats in another order differ in the last digit
    total = sum(prior[domain] for domain in sorted(prior))
    return {domain: prior[domain] / total for domain in sorted(prior)}
