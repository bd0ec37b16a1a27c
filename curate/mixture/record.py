"""The mixture as a record, and as `mixture.yaml`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from curate.core.artifacts import SIGN, checked
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.reading import dump_yaml, read_yaml
from curate.core.validation import first_problem
from curate.core.writing import atomic_write
from curate.mixture.constraints import Supply
from curate.mixture.weights import divergence, effective_number

_TOTALS = {"stored_tokens", "samples", "effective_domains", "kl_to_prior", "domains"}  # they follow from the domains


class DomainMixture(Config):
    """One domain of the next stage."""

    weight: float
    """Solved share of the tokens, over the whole stage."""
    delivered_weight: float
    """Share of the tokens after rounding to whole samples."""
    unconstrained_weight: float
    """What the weight would be without floors, ceilings, epoch caps and constraints on several domains together."""
    prior: float
    """Share that the weights stay near: that in what was trained on, or mixture.prior."""
    stored_tokens: int
    """Stored tokens delivered."""
    samples: int
    """Samples delivered, repeats counted."""
    epochs: float
    """How often the domain's data is used in the next stage."""
    epochs_in_all: float
    """The same with what earlier stages saw; above max_epochs only where they already went beyond it."""
    score: float
    """How far the domain's value per token lies above average, in standard deviations of a sample, and how far its
    n-gram log-likelihood ratio does, by `values.ngram_share`; of several targets the weighted mean."""
    score_low: float | None
    """Lower end of the score's 95 % interval; null where it is not known."""
    score_high: float | None
    """Upper end."""
    shrunk: float
    """The score shrunk by its standard error: what the weight was solved from."""
    measured_samples: int
    """Distinct samples that the score was measured on; 0: nothing was measured, the score is the average's."""
    binding: Literal["floor", "ceiling", "max_epochs", "max_change"] | None
    """The constraint that holds the weight where it is."""


class Phase(Config):
    """A part of the next stage with weights of its own."""

    start_sample: int
    """Where it starts, in samples from the stage's beginning; it ends where the next one starts."""
    blend: float
    """How far its weights go from the base mixture (0) to the curated one (1)."""
    samples: int
    """Samples delivered, repeats counted."""
    domains: dict[str, int]
    """The same by domain."""


class GroupLimit(Config):
    """A constraint on several domains together."""

    least: float
    """What must be reached: a share of the tokens (replay_share), an expected score (retain)."""
    reached: float
    """What the solved weights reach."""
    price: float
    """Shadow price: what the expected score gains per unit that the constraint is loosened; 0: it does not bind."""


class SweepPoint(Config):
    """The mixture that another prior strength would give, under the same constraints."""

    prior_strength: float
    expected_score: float
    """Expected score of a token, repetition discounted."""
    kl_to_prior: float
    effective_domains: float
    retained_score: float | None
    """Expected score of a token for the retention target; null without one."""
    weights: dict[str, float]


class SourceWeights(Config):
    """What one source's scores ask for, under the same constraints; sources are never averaged."""

    shrunk: dict[str, float]
    """Shrunk score of each domain."""
    weights: dict[str, float] | None
    """Solved weights; null where the source's scores of the retention target leave no mixture."""


class Mixture(Config):
    """What the next stage trains on."""

    target: str
    """Name of the target; of several, joined by a plus."""
    targets: dict[str, float]
    """Weight of each target's scores."""
    retain: str | None
    """Name of the retention target."""
    source: str
    """Where the scores come from: early, late, current or candidates."""
    sign: str = SIGN
    prior_strength: float
    budget_tokens: int
    """What was asked for."""
    stored_tokens: int
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
    """Certificate of the solution: no weights reach an objective (expected score less prior strength times divergence)
    that is higher by more than this."""
    domains: dict[str, DomainMixture]
    group_limits: dict[str, GroupLimit]
    """Constraints on several domains together."""
    sweep: list[SweepPoint]
    """Other prior strengths."""
    by_source: dict[str, SourceWeights]
    """Each source on its own."""
    phases: tuple[Phase, ...] = ()
    """The stage in order: one phase, or one for each part of a schedule (`mixture.schedule`)."""


def with_tokens(mixture: Mixture, tokens: Mapping[str, int]) -> Mixture:
    """The mixture with the tokens that the chosen samples really have; a domain without an entry delivers none."""
    domains = {
        name: domain.model_copy(update={"stored_tokens": tokens.get(name, 0)})
        for name, domain in mixture.domains.items()
    }
    return with_totals(domains, _fields(mixture))


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
        mixture: as decided, for the phases of blend 1.
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
    # phases and domains are two views of the same samples; a difference here would be written as data
    assert all(domains[name].samples == totals[name] for name in domains)
    fields = {**_fields(mixture), "phases": list(phases), "budget_tokens": budget_tokens or mixture.budget_tokens}
    return with_totals(domains, fields)


def counts_of(samples: int, supply: Supply) -> dict[str, Any]:
    """Samples, tokens and epochs of a domain, as fields of `DomainMixture`."""
    epochs = samples / supply.samples
    return {
        "samples": samples,
        "stored_tokens": round(samples * supply.mean_length),
        "epochs": epochs,
        "epochs_in_all": epochs + supply.seen_tokens / supply.tokens,
    }


def _fields(mixture: Mixture) -> dict[str, Any]:
    return {name: getattr(mixture, name) for name in Mixture.model_fields if name not in _TOTALS}


def write_mixture(path: Path, mixture: Mixture) -> None:
    """Write `mixture.yaml` atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(dump_yaml(mixture.model_dump(mode="json")), encoding="utf-8")


def read_mixture(path: Path) -> Mixture:
    """Read `mixture.yaml`.

    Raises:
        UserError: it is missing, not YAML, or a field is missing, unknown or of another type.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; `python -m curate.select` writes it")
    try:
        # held against its hash first: a cut file may still be YAML, of fewer domains
        return Mixture.model_validate(read_yaml(checked(path)))
    except ValidationError as error:
        raise UserError(f"{path} is not a mixture ({first_problem(error)}); select again") from None


def with_totals(domains: Mapping[str, DomainMixture], fields: Mapping[str, Any]) -> Mixture:
    """The record with everything that follows from the domains' tokens and samples.

    Args:
        domains: every field but `delivered_weight` is right.
        fields: the other fields of `Mixture`.
    """
    tokens = sum(domain.stored_tokens for domain in domains.values())
    delivered = {name: domain.stored_tokens / tokens for name, domain in domains.items()}
    weights = np.array(list(delivered.values()))
    return Mixture.model_validate(
        {
            **fields,
            "stored_tokens": tokens,
            "samples": sum(domain.samples for domain in domains.values()),
            "effective_domains": effective_number(weights),
            "kl_to_prior": divergence(weights, np.array([domain.prior for domain in domains.values()])),
            "domains": {
                name: domain.model_copy(update={"delivered_weight": delivered[name]})
                for name, domain in domains.items()
            },
        }
    )
