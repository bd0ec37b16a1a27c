"""The mixture as a record, and as `mixture.yaml`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

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
    """Solved share of the tokens."""
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
                tokens=round(samples[domain] * supply[domain].mean_length),
                samples=samples[domain],
                epochs=samples[domain] / supply[domain].samples,
                epochs_in_all=samples[domain] / supply[domain].samples
                + supply[domain].consumed_tokens / supply[domain].tokens,
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
    kept = ("target", "window", "temperature", "budget_tokens")
    return _with_totals(domains, {name: getattr(mixture, name) for name in kept})


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


def _with_totals(domains: dict[str, DomainMixture], facts: dict[str, str | float | int]) -> Mixture:
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
