"""The ways of choosing the next stage's data that `curate.select --method` knows.

All go through one line: domain scores -> weights under the mixture's constraints -> whole samples -> data. They differ
in where the scores come from:

- `curate`, `grad-dot`, `less`, `shapley`, `shuffled`: values of samples, by an estimator; see `domains.domain`.
- `random`, `dsir`: keys of samples, see `domains.importance`; a domain's weight is its share of the draw.
- `proportional`, `uniform`: the weights themselves.

A method that has weights w has the scores `T log(w / prior)`, T the mixture's prior strength: the mixture is w wherever
no constraint binds. `dsir` draws its samples in proportion to their importance to the power `1 / dsir_temperature`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import dataframely as dy
import polars as pl

from curate.core.rng import generator
from curate.domains.importance import drawn_shares, gumbel_keys, log_importance
from curate.tables import VALUES_NATS, DrawKeys, MeasuredValues, ValueScores

if TYPE_CHECKING:
    from curate.training.source import SampleSource
    from curate.training.target import Target

Method = Literal["curate", "proportional", "uniform", "random", "dsir", "grad-dot", "less", "shapley", "shuffled"]
VALUED = ("curate", "grad-dot", "less", "shapley", "shuffled")
ESTIMATORS = ("grad-dot", "less", "shapley")
"""Methods that are estimators."""
PREDICTING = (*ESTIMATORS, "shuffled")
"""Methods that choose samples outside the valued window by predictions of its values."""


def scores_without_values(
    method: Method,
    source: SampleSource,
    target: Target,
    *,
    name: str,
    trained: Mapping[str, int],
    budget: int,
    prior_strength: float,
    dsir_temperature: float,
    seed: int,
) -> tuple[dy.DataFrame[ValueScores], dy.DataFrame[DrawKeys] | None]:
    """Domain scores of a method that values no samples; for `random` and `dsir`, the keys of the samples too.

    Args:
        method: one that is not in `VALUED`.
        source: what is drawn from.
        target: what `dsir` resembles.
        name: of the source.
        trained: tokens of each domain that the weights are compared with.
        budget: tokens of the next stage.
        prior_strength: of the mixture.
        dsir_temperature: of `dsir`'s draw.
        seed: of the draw.
    """
    prior = {domain: float(tokens) for domain, tokens in trained.items()}
    if method in ("random", "dsir"):
        streams = {domain: source.streams[domain] for domain in prior}
        logs = log_importance(streams, target.sequences()) if method == "dsir" else {}
        importance = {domain: log_weights / dsir_temperature for domain, log_weights in logs.items()}
        keys = gumbel_keys(source.catalogue.filter(pl.col("domain").is_in(list(prior))), importance or None, seed)
        return weight_scores(drawn_shares(keys, budget), prior, name, target.name, prior_strength), keys
    weights = prior if method == "proportional" else dict.fromkeys(prior, 1.0)
    return weight_scores(weights, prior, name, target.name, prior_strength), None


def weight_scores(
    weights: Mapping[str, float], prior: Mapping[str, float], source: str, target: str, prior_strength: float
) -> dy.DataFrame[ValueScores]:
    """Domain scores of a method that has weights: one row per domain, columns as of `domains.domain.domain_scores`.

    Args:
        weights: of the domains of the prior; positive, need not sum to 1.
        prior: share of each domain in what was trained on; positive, need not sum to 1.
        source: its name.
        target: name of the target.
        prior_strength: of the mixture.
    """
    whole, all_weights = sum(prior.values()), sum(weights.values())
    rows = []
    for domain in sorted(prior):
        share = prior[domain] / whole
        # the inverse of the tilted prior w = prior exp(score / T)
        score = prior_strength * math.log(weights[domain] / all_weights / share)
        rows.append({"domain": domain, "prior": share, "score": score, "shrunk": score})
    unknown = ("value_per_token", "se", "low", "high", "score_se", "score_low", "score_high")
    nothing = pl.lit(0, pl.Int64)
    table = pl.DataFrame(rows).with_columns(
        *(pl.lit(None, pl.Float64).alias(name) for name in unknown),
        source=pl.lit(source),
        target=pl.lit(target),
        novel_share=pl.lit(1.0),
        samples=nothing,
        predicted_tokens=nothing,
    )
    return ValueScores.validate(table)


def shuffled(values: dy.DataFrame[MeasuredValues], seed: int) -> dy.DataFrame[MeasuredValues]:
    """Values per token dealt anew among the samples of each source: a null control.

    Per token, because a sample with more tokens has a larger value whatever it is worth. Samples without predicted
    tokens keep theirs.

    Args:
        values: of any sources.
        seed: of the permutation.
    """
    shuffled_sources = []
    for (source,), frame in values.group_by("source", maintain_order=True):
        counted = frame.filter(pl.col("predicted_tokens") > 0)
        # one permutation for the whole value and both halves, which must stay of one sample
        order = generator(seed, "shuffled values", str(source)).permutation(counted.height)
        per_token = counted.select(pl.col(name) / pl.col("predicted_tokens") for name in VALUES_NATS)[order]
        dealt = counted.with_columns(per_token[name] * counted["predicted_tokens"] for name in VALUES_NATS)
        shuffled_sources.append(pl.concat([dealt, frame.filter(pl.col("predicted_tokens") == 0)]).sort("row"))
    return MeasuredValues.validate(pl.concat(shuffled_sources))
