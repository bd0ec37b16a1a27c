"""The oracle of a plain pool: what small branches of random mixtures say about the domains (a regression).

Not a method that anyone would pay for: it trains on many mixtures and looks at the target's loss after each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from curate.core.rng import generator
from curate.training.samples import trained_tokens
from pipelines.branches.branch import case_losses, run_branch

if TYPE_CHECKING:
    from pipelines.branches.branch import Arena

Floats = npt.NDArray[np.float64]
_CONCENTRATION = 6.0  # of the Dirichlet distribution around the prior that mixtures are drawn from
_RIDGE = 1e-3  # of the regression, as a share of the weights' variance


def oracle_weights(arena: Arena, temperature: float) -> dict[str, float]:
    """`prior exp(score / temperature)`, the scores from the swarm's regression of the target's loss.

    Scores are slopes with the sign that a loss falls, in units of their deviation between domains.
    """
    prior = {domain: float(tokens) for domain, tokens in trained_tokens(arena.run).items()}
    domains = sorted(prior)
    shares = np.array([prior[domain] for domain in domains]) / sum(prior.values())
    tried, losses = [], []
    for member in range(arena.config.swarm):
        given = dict(zip(domains, draw_mixture(shares, arena.seed, member).tolist(), strict=True))
        found = run_branch(arena, arena.shared / f"swarm-{member}", "proportional", weights=given)
        tried.append([found["weights"][domain] for domain in domains])
        losses.append(case_losses(arena, found)["target_select"])
    scores = slopes(np.array(tried), np.array(losses))
    return tempered(dict(zip(domains, shares.tolist(), strict=True)), scores, temperature)


def draw_mixture(shares: Floats, seed: int, member: int) -> Floats:
    """A mixture around the prior, every weight positive."""
    drawn = generator(seed, "swarm", member).dirichlet(_CONCENTRATION * shares) + 1e-4
    return np.asarray(drawn / drawn.sum())


def slopes(weights: Floats, losses: Floats) -> Floats:
    """How much the loss falls with each domain's weight (N mixtures, D domains), standardised; (D,).

    Ridge regression on centred weights; weights sum to 1, so that only differences between slopes mean something.
    """
    centred = weights - weights.mean(axis=0)
    gram = centred.T @ centred
    gram += _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram))
    found = -np.linalg.solve(gram, centred.T @ (losses - losses.mean()))
    deviation = found.std()
    return np.asarray((found - found.mean()) / deviation) if deviation > 0 else np.zeros_like(found)


def tempered(prior: Mapping[str, float], scores: Floats, temperature: float) -> dict[str, float]:
    """`prior exp(score / temperature)`, summing to 1."""
    tilt = np.array(list(prior.values())) * np.exp((scores - scores.max()) / temperature)
    return dict(zip(prior, (tilt / tilt.sum()).tolist(), strict=True))
