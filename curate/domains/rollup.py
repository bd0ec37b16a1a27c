"""All roll-ups of measured values that a selection reads and keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import dataframely as dy
import polars as pl

from curate.domains.documents import document_values
from curate.domains.domain import domain_scores
from curate.domains.reliability import halves_reliability, length_bias
from curate.domains.shards import between_shards, shard_scores
from curate.tables import (
    DocumentValues,
    LengthBias,
    MeasuredValues,
    Reliability,
    ShardScores,
    ShardTests,
    ValueScores,
)


@dataclass(frozen=True, kw_only=True)
class RollUps:
    """Values rolled up: domains for every target, the others for the main one.

    Attributes:
        domains: scores from values alone.
        shards: value of each shard.
        documents: value of each document.
        between_shards: whether shards differ at all.
        reliability: of values, by the halves of the target.
        length_bias: of values.
    """

    domains: dy.DataFrame[ValueScores]
    shards: dy.DataFrame[ShardScores]
    documents: dy.DataFrame[DocumentValues]
    between_shards: dy.DataFrame[ShardTests]
    reliability: dy.DataFrame[Reliability]
    length_bias: dy.DataFrame[LengthBias]

    @property
    def of_main_target(self) -> dict[str, pl.DataFrame]:
        """Name of each table's file -> table, without the domains, which are of all targets."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "domains"}


def roll_up_values(
    values: dy.DataFrame[MeasuredValues],
    target: str,
    prior_tokens: Mapping[str, int],
    novel_shares: Mapping[str, float],
    seed: int,
    adjusted: pl.DataFrame | None = None,
) -> RollUps:
    """Roll values up to domains, shards and documents, and say how reliable they are.

    Args:
        values: of all targets.
        target: the main one.
        prior_tokens: stored tokens of each domain that stand for its prior.
        novel_shares: share of novel text, by domain.
        seed: of bootstrap intervals.
        adjusted: see `domain_scores`.
    """
    of_target = MeasuredValues.validate(values.filter(target=target))
    prior = {domain: float(tokens) for domain, tokens in prior_tokens.items()}
    return RollUps(
        domains=domain_scores(values, prior, seed=seed, novel_shares=novel_shares, adjusted=adjusted),
        shards=shard_scores(of_target),
        documents=document_values(of_target),
        between_shards=between_shards(of_target),
        reliability=halves_reliability(of_target, seed=seed),
        length_bias=length_bias(of_target, seed=seed),
    )
