"""The mixture as a record, and as `mixture.yaml`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import yaml
from pydantic import ValidationError

from curate.artifacts import SIGN, replacing
from curate.config import Config, first_problem
from curate.errors import UserError
from curate.mixture.apportion import allocate
from curate.mixture.constraints import MixtureConfig, Supply, caps
from curate.mixture.weights import divergence, effective_number, solve


class DomainMixture(Config):
    """One domain of the next stage."""

    weight: float
    """Solved share of the tokens, over the whole stage."""
    delivered_weight: float
    """Share of the tokens after rounding to whole samples: tokens / total tokens."""
    unconstrained_weight: float
    """What the weight would be without floors, ceilings and epoch caps."""
    prior: float
    """Share in what was trained on."""
    tokens: int
    """Stored tokens delivered."""
    samples: int
    """Samples delivered, repeats counted."""
    epochs: float
    """How often the domain's data is used in the next stage."""
    epochs_in_all: float
    """The same with what earlier stages consumed; above max_epochs only where they already went beyond it."""
    score: float
    """How far the domain's value per token lies above average, in standard deviations of a sample."""
    low: float | None
    """Lower end of the score's 95 % interval; null where it is not known."""
    high: float | None
    """Upper end."""
    shrunk: float
    """The score shrunk by its standard error: what the weight was solved from."""
    binding: Literal["floor", "ceiling", "max_epochs"] | None
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


class Mixture(Config):
    """What the next stage trains on."""

    target: str
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
    kl_to_prior: float
    """KL(delivered weights || prior) in nats."""
    domains: dict[str, DomainMixture]
    phases: tuple[Phase, ...] = ()
    """The stage in order: one phase, or one for each part of a schedule (`mixture.schedule`)."""


def decide(
    scores: pl.DataFrame,
    prior: Mapping[str, float],
    supply: Mapping[str, Supply],
    budget_tokens: int,
    config: MixtureConfig,
) -> Mixture:
    """Solve the mixture for one target: bounds, weights, whole samples.

    Args:
        scores: rows of `scores.domain_scores` for one target and `config.window`, one per domain of the prior.
        prior: share of each domain in what was trained on; need not sum to 1.
        supply: what there is of the same domains.
        budget_tokens: stored tokens of the next stage.
        config: temperature and constraints.

    Returns:
        The mixture with `tokens = samples * mean length`, exact where the samples of a domain have one length; else see
        `with_tokens`.

    Raises:
        UserError: no mixture satisfies the constraints, or the scores are not those of the window and the domains.
    """
    target, rows = _rows(scores, prior, config.window)
    domains = sorted(prior)
    whole = sum(prior[domain] for domain in domains)
    prior = {domain: prior[domain] / whole for domain in domains}
    bounds = caps(config, prior, supply, budget_tokens)
    p = np.array([prior[domain] for domain in domains])
    s = np.array([rows[domain]["shrunk"] for domain in domains])
    lo, hi = (np.array([getattr(bounds[domain], side) for domain in domains]) for side in ("lo", "hi"))
    weights = dict(zip(domains, solve(p, s, config.temperature, lo, hi).tolist(), strict=True))
    free = solve(p, s, config.temperature, np.zeros_like(p), np.ones_like(p)).tolist()
    samples = allocate(weights, budget_tokens, supply, config.max_epochs)
    return _with_totals(
        {
            domain: DomainMixture(
                weight=weights[domain],
                delivered_weight=0.0,
                unconstrained_weight=unconstrained,
                prior=prior[domain],
                **_counts(samples[domain], supply[domain]),
                score=rows[domain]["score"],
                low=rows[domain]["score_low"],
                high=rows[domain]["score_high"],
                shrunk=rows[domain]["shrunk"],
                binding=bounds[domain].binding(weights[domain]),
            )
            for domain, unconstrained in zip(domains, free, strict=True)
        },
        {"target": target, "window": config.window, "temperature": config.temperature, "budget_tokens": budget_tokens},
    )


def with_tokens(mixture: Mixture, tokens: Mapping[str, int]) -> Mixture:
    """The mixture with the tokens that the chosen samples really have; a domain without an entry delivers none."""
    domains = {
        name: domain.model_copy(update={"tokens": tokens.get(name, 0)}) for name, domain in mixture.domains.items()
    }
    return _with_totals(domains, _facts(mixture))


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
        else domain.model_copy(update={"weight": weights[name], **_counts(totals[name], supply[name])})
        for name, domain in mixture.domains.items()
    }
    assert all(domains[name].samples == totals[name] for name in domains)
    facts = {**_facts(mixture), "phases": list(phases), "budget_tokens": budget_tokens or mixture.budget_tokens}
    return _with_totals(domains, facts)


def _counts(samples: int, supply: Supply) -> dict[str, Any]:
    epochs = samples / supply.samples
    return {
        "samples": samples,
        "tokens": round(samples * supply.mean_length),
        "epochs": epochs,
        "epochs_in_all": epochs + supply.consumed_tokens / supply.tokens,
    }


def _facts(mixture: Mixture) -> dict[str, Any]:
    kept = ("target", "window", "temperature", "budget_tokens", "phases")
    return {name: getattr(mixture, name) for name in kept}


def write_mixture(path: Path, mixture: Mixture) -> None:
    """Write `mixture.yaml` atomically."""
    with replacing(path) as part:
        part.write_text(yaml.safe_dump(mixture.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def read_mixture(path: Path) -> Mixture:
    """Read `mixture.yaml`.

    Raises:
        UserError: it is missing, not YAML, or a field is missing, unknown or of another type.
    """
    try:
        return Mixture(**yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `python -m curate.select` writes it") from None
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} is not a mixture ({' '.join(str(error).split())}); select again") from None


def _rows(scores: pl.DataFrame, prior: Mapping[str, float], window: str) -> tuple[str, dict[str, dict[str, float]]]:
    """The target's name and the row of each domain."""
    chosen = scores.filter(pl.col("window") == window)
    if chosen.is_empty():
        windows = ", ".join(scores["window"].unique().sort())
        raise UserError(f"there are no scores for window {window!r} (there are {windows}); set mixture.window")
    rows = {row["domain"]: row for row in chosen.iter_rows(named=True)}
    if sorted(rows) != sorted(prior) or len(rows) != chosen.height:
        raise ValueError(f"scores of one target for the domains {sorted(prior)} are needed, got {chosen.height} rows")
    return str(chosen["target"][0]), rows


def _with_totals(domains: dict[str, DomainMixture], facts: dict[str, Any]) -> Mixture:
    """The record with everything that follows from the domains' tokens and samples."""
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
