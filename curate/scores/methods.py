"""The ways of choosing the next stage's data that `curate.select --method` knows.

All go through one line: domain scores -> weights under the mixture's constraints -> whole samples -> data. They differ
in where the scores come from:

- `curate`, `grad-dot`, `less`, `shapley`, `shuffled`: values of samples, by an estimator; see `scores.domain`.
- `random`, `dsir`: keys of samples, see `scores.importance`; a domain's weight is its share of the draw.
- `proportional`, `uniform`, `given`: the weights themselves.

A method that has weights w has the scores `T log(w / prior)`, T the mixture's temperature: the mixture is w wherever no
constraint binds. `dsir` draws its samples in proportion to their importance to the power `1 / importance_temperature`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import polars as pl

from curate.errors import UserError
from curate.rng import generator
from curate.scores.importance import drawn_shares, gumbel_keys, log_importance

if TYPE_CHECKING:
    from curate.target import Target
    from curate.trajectory.run import Run

Method = Literal[
    "curate", "proportional", "uniform", "random", "dsir", "grad-dot", "less", "shapley", "shuffled", "given"
]
VALUED = ("curate", "grad-dot", "less", "shapley", "shuffled")
_ESTIMATORS = ("grad-dot", "less", "shapley")  # methods that are estimators


def estimator_of(method: str, estimator: str) -> str:
    """The estimator that a method uses, given the one that is set ("adjoint" where none is).

    Raises:
        ValueError: the two contradict each other.
    """
    chosen = method if method in _ESTIMATORS and estimator == "adjoint" else estimator
    free = method in ("curate", "shuffled")
    if (chosen in _ESTIMATORS and chosen != method) or (chosen != "adjoint" and not free and chosen != method):
        raise ValueError(f"estimator {estimator} does not go with method {method}; set only the method")
    return chosen


def scores_without_values(
    method: Method,
    run: Run,
    target: Target,
    weights: Mapping[str, float],
    *,
    trained: Mapping[str, int],
    window: str,
    budget: int,
    temperature: float,
    importance_temperature: float,
    seed: int,
) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Domain scores of a method that values no samples; for `random` and `dsir`, the keys of the samples too.

    Args:
        method: one that is not in `VALUED`.
        run: supplies the pool: its streams.
        target: what `dsir` resembles.
        weights: of method given.
        trained: tokens of each domain that the weights are compared with.
        window: the mixture's window.
        budget: tokens of the next stage.
        temperature: of the mixture.
        importance_temperature: of `dsir`'s draw.
        seed: of the draw.

    Raises:
        UserError: `weights` are of other domains.
    """
    prior = {domain: float(tokens) for domain, tokens in trained.items()}
    if method in ("random", "dsir"):
        streams = {domain: run.streams[domain] for domain in prior}
        found = log_importance(streams, target.sequences()) if method == "dsir" else {}
        importance = {domain: log_weights / importance_temperature for domain, log_weights in found.items()}
        keys = gumbel_keys(run.catalogue.filter(pl.col("domain").is_in(list(prior))), importance or None, seed)
        return weight_scores(drawn_shares(keys, budget), prior, window, target.name, temperature), keys
    if method != "given":
        weights = prior if method == "proportional" else dict.fromkeys(prior, 1.0)
    return weight_scores(weights, prior, window, target.name, temperature), None


def weight_scores(
    weights: Mapping[str, float], prior: Mapping[str, float], window: str, target: str, temperature: float
) -> pl.DataFrame:
    """Domain scores of a method that has weights: one row per domain, columns as of `scores.domain.domain_scores`.

    Args:
        weights: of the domains of the prior; positive, need not sum to 1.
        prior: share of each domain in what was trained on; positive, need not sum to 1.
        window: the mixture's window.
        target: name of the target.
        temperature: of the mixture.

    Raises:
        UserError: the weights are of other domains, or one is not a positive number.
    """
    if set(weights) != set(prior):
        raise UserError(f"weights are needed for {sorted(prior)}, got {sorted(weights)}; set --weights")
    bad = {domain: weight for domain, weight in weights.items() if not 0 < weight < math.inf}
    if bad:
        raise UserError(f"a weight must be a positive number, got {bad}; a small one instead of 0, or a ceiling of 0")
    whole, all_weights = sum(prior.values()), sum(weights.values())
    rows = []
    for domain in sorted(prior):
        share = prior[domain] / whole
        score = temperature * math.log(weights[domain] / all_weights / share)
        rows.append({"domain": domain, "prior": share, "score": score, "shrunk": score})
    unknown = ("value_per_token", "se", "low", "high", "score_se", "score_low", "score_high")
    return pl.DataFrame(rows).select(
        pl.lit(window).alias("window"), pl.lit(target).alias("target"), "domain", "prior",
        pl.lit(1.0).alias("fresh"), pl.lit(0).cast(pl.Int64).alias("samples"), pl.lit(0).cast(pl.Int64).alias("tokens"),
        *(pl.lit(None, pl.Float64).alias(name) for name in unknown[:4]), "score",
        *(pl.lit(None, pl.Float64).alias(name) for name in unknown[4:]), "shrunk",
    )  # fmt: skip


def shuffled(values: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The values frame with the values per token dealt anew among the samples of each window: a null control.

    Per token, because a sample with more tokens has a larger value whatever it is worth. Samples without predicted
    tokens keep theirs.

    Args:
        values: columns `window`, `row`, `tokens`, `value`, `value_a` and `value_b`.
        seed: of the permutation.
    """
    names = ["value", "value_a", "value_b"]
    parts = []
    for (window,), frame in values.group_by("window", maintain_order=True):
        counted = frame.filter(pl.col("tokens") > 0)
        order = generator(seed, "shuffled values", str(window)).permutation(counted.height)
        per_token = counted.select(pl.col(name) / pl.col("tokens") for name in names)[order]
        dealt = counted.with_columns(per_token[name] * counted["tokens"] for name in names)
        parts.append(pl.concat([dealt, frame.filter(pl.col("tokens") == 0)]).sort("row"))
    return pl.concat(parts)
