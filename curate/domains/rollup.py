"""The roll-ups of one source's or several sources' values that a selection reads and keeps."""

from collections.abc import Mapping

import polars as pl

from curate.domains.documents import document_values
from curate.domains.domain import domain_scores
from curate.domains.reliability import halves_reliability, length_bias
from curate.domains.shards import between_shards, shard_scores


def roll_ups(
    every: pl.DataFrame,
    target: str,
    trained: Mapping[str, int],
    fresh: Mapping[str, float],
    seed: int,
) -> dict[str, pl.DataFrame]:
    """Tables by name: domains for every target, the others for one.

    Args:
        every: values frames of all targets, see `curate.domains.values.value_frame`.
        target: the one.
        trained: tokens that the run trained on, by domain.
        fresh: share of new text, by domain.
        seed: of bootstrap intervals.
    """
    values = every.filter(target=target)
    prior = {domain: float(tokens) for domain, tokens in trained.items()}
    return {
        "domains": domain_scores(every, prior, seed=seed, fresh=fresh),
        "shards": shard_scores(values),
        "documents": document_values(values),
        "between_shards": between_shards(values),
        "reliability": halves_reliability(values, seed=seed),
        "length_bias": length_bias(values, seed=seed),
    }
