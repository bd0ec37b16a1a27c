"""The mixture as a record, and as `mixture.yaml`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from curate.artifacts import SIGN, checked
from curate.config import Config
from curate.errors import UserError
from curate.mixture.constraints import Supply
from curate.mixture.weights import divergence, effective_number
from curate.reading import dump_yaml, read_yaml
from curate.validation import first_problem
from curate.writing import replacing

_TOTALS = {"tokens", "samples", "effective_domains", "kl_to_prior", "domains"}  # they follow from the domains


class DomainMixture(Config):
    """One domain of the next stage."""

    weight: float
    """Solved share of the tokens, over the whole stage."""
    delivered_weight: float
    """Share of the tokens after rounding to whole samples: tokens / total tokens."""
    unconstrained_weight: float
    """What the weight would be without floors, ceilings, epoch caps and constraints on several domains together."""
    prior: float
    """Share that the weights stay near: that in what was trained on, or mixture.prior."""
    tokens: int
    """Stored tokens delivered."""
    samples: int
    """Samples delivered, repeats counted."""
    epochs: float
    """How often the domain's data is used in the next stage."""
    epochs_in_all: float
    """The same with what earlier stages consumed; above max_epochs only where they already went beyond it."""
    score: float
    """How far the domain's value per token lies above average, in standard deviations of a sample, and how far its
    likeness does, by `mixture.likeness_share`; of several targets, and the guard, the weighted mean."""
    low: float | None
    """Lower end of the score's 95 % interval; null where it is not known."""
    high: float | None
    """Upper end."""
    shrunk: float
    """The score shrunk by its standard error: what the weight was solved from."""
    valued: int
    """Distinct samples that the score was measured on; 0: nothing was measured, the score is the average's."""
    binding: Literal["floor", "ceiling", "max_epochs", "max_change"] | None
    """The constraint that holds the weight where it is."""


class Phase(Config):
    """A part of the next stage with weights of its own."""

    start_step: int
    """Where it starts, in samples from the stage's beginning; it ends where the next one starts."""
    curated: float
    """How far its weights go from the base mixture (0) to the curated one (1)."""
    samples: int
    """Samples delivered, repeats counted."""
    domains: dict[str, int]
    """The same by domain."""


class SharedLimit(Config):
    """A constraint on several domains together."""

    least: float
    """What must be reached: a share of the tokens (replay_share), an expected score (guard)."""
    reached: float
    """What the solved weights reach."""
    price: float
    """What the expected score gains per unit that the constraint is loosened; 0: it does not bind."""


class SweepPoint(Config):
    """The mixture that another temperature would give, under the same constraints."""

    temperature: float
    expected_score: float
    """Expected score of a token, repetition discounted."""
    kl_to_prior: float
    effective_domains: float
    guard_score: float | None
    """Expected score of a token for the guard; null without one."""
    weights: dict[str, float]


class Asked(Config):
    """What one window's scores ask for, under the same constraints; windows are never averaged."""

    shrunk: dict[str, float]
    """Shrunk score of each domain."""
    weights: dict[str, float] | None
    """Solved weights; null where the window's guard scores leave no mixture."""


class Mixture(Config):
    """What the next stage trains on."""

    target: str
    """Name of the target; of several, joined by a plus."""
    targets: dict[str, float]
    """Weight of each target's scores."""
    guard: str | None
    """Name of the guard's target."""
    window: str
    """Where the scores come from."""
    sign: str = SIGN
    temperature: float
    budget_tokens: int
    """What was asked for."""
    tokens: int
    """What whole samples and caps make of it."""
    samples: int
    effective_domains: float
    """exp(entropy) of the delivered weights."""
    unconstrained_effective_domains: float
    """The same of the unconstrained weights."""
    kl_to_prior: float
    """KL(delivered weights || prior) in nats."""
    expected_score: float
    """Expected score of a token under the solved weights, repetition discounted."""
    gap: float
    """Certificate of the solution: no weights reach an objective (expected score less temperature times divergence)
    that is higher by more than this."""
    domains: dict[str, DomainMixture]
    shared: dict[str, SharedLimit]
    """Constraints on several domains together."""
    sweep: list[SweepPoint]
    """Other temperatures."""
    asked: dict[str, Asked]
    """Each valued window on its own."""
    phases: tuple[Phase, ...] = ()
    """The stage in order: one phase, or one for each part of a schedule (`mixture.schedule`)."""


def with_tokens(mixture: Mixture, tokens: Mapping[str, int]) -> Mixture:
    """The mixture with the tokens that the chosen samples really have; a domain without an entry delivers none."""
    domains = {
        name: domain.model_copy(update={"tokens": tokens.get(name, 0)}) for name, domain in mixture.domains.items()
    }
    return with_totals(domains, _facts(mixture))


def with_phases(
    mixture: Mixture,
    phases: Sequence[Phase],
    *,
    weights: Mapping[str, float] | None = None,
    budget_tokens: int | None = None,
    supply: Mapping[str, Supply] | None = None,
) -> Mixture:
    """The mixture laid out over phases.

    Args:
        mixture: as decided, for its curated parts.
        phases: with whole samples.
        weights: share of the tokens over the whole stage; none: the mixture's.
        budget_tokens: of the whole stage; none: the mixture's.
        supply: what there is of the domains; none: the mixture was decided for the whole stage, so that its samples
            are those of the phases.
    """
    totals = {name: sum(phase.domains[name] for phase in phases) for name in mixture.domains}
    domains = {
        name: domain
        if supply is None or weights is None
        else domain.model_copy(update={"weight": weights[name], **counts_of(totals[name], supply[name])})
        for name, domain in mixture.domains.items()
    }
    assert all(domains[name].samples == totals[name] for name in domains)
    facts = {**_facts(mixture), "phases": list(phases), "budget_tokens": budget_tokens or mixture.budget_tokens}
    return with_totals(domains, facts)


def counts_of(samples: int, supply: Supply) -> dict[str, Any]:
    """Samples, tokens and epochs of a domain, as fields of `DomainMixture`."""
    epochs = samples / supply.samples
    return {
        "samples": samples,
        "tokens": round(samples * supply.mean_length),
        "epochs": epochs,
        "epochs_in_all": epochs + supply.consumed_tokens / supply.tokens,
    }


def _facts(mixture: Mixture) -> dict[str, Any]:
    return {name: getattr(mixture, name) for name in Mixture.model_fields if name not in _TOTALS}


def write_mixture(path: Path, mixture: Mixture) -> None:
    """Write `mixture.yaml` atomically."""
    with replacing(path) as part:
        part.write_text(dump_yaml(mixture.model_dump(mode="json")), encoding="utf-8")


def read_mixture(path: Path) -> Mixture:
    """Read `mixture.yaml`.

    Raises:
        UserError: it is missing, not YAML, or a field is missing, unknown or of another type.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; `python -m curate.select` writes it")
    try:
        return Mixture.model_validate(read_yaml(checked(path)))
    except ValidationError as error:
        raise UserError(f"{path} is not a mixture ({first_problem(error)}); select again") from None


def with_totals(domains: Mapping[str, DomainMixture], facts: Mapping[str, Any]) -> Mixture:
    """The record with everything that follows from the domains' tokens and samples.

    Args:
        domains: every field but `delivered_weight` is right.
        facts: the other fields of `Mixture`.
    """
    tokens = sum(domain.tokens for domain in domains.values())
    delivered = {name: domain.tokens / tokens for name, domain in domains.items()}
    weights = np.array(list(delivered.values()))
    return Mixture.model_validate(
        {
            **facts,
            "tokens": tokens,
            "samples": sum(domain.samples for domain in domains.values()),
            "effective_domains": effective_number(weights),
            "kl_to_prior": divergence(weights, np.array([domain.prior for domain in domains.values()])),
            "domains": {
                name: domain.model_copy(update={"delivered_weight": delivered[name]})
                for name, domain in domains.items()
            },
        }
    )
