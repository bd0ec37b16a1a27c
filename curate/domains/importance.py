"""Importance resampling over hashed n-grams (DSIR: Xie et al., arXiv 2302.03169, section 3): `dsir` and `random`.

Target and pool are hashed counts of unigrams and bigrams with multinomial distributions p and q. The importance of a
sample is

    log w_z = sum over its n-grams j of log p_j - log q_j

and a stage of k samples is drawn without replacement by the k largest of `log w_z + Gumbel noise` (section 3.3). With
log w = 0 this is a draw of samples at random.

V buckets, see `ngrams.counts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.progress import progress
from curate.core.rng import generator
from curate.ngrams.counts import Floats, Sequence, buckets_of, ngram_counts
from curate.tables import DrawKeys

if TYPE_CHECKING:
    from curate.data.mds import MdsStream

_SMOOTHING = 1e-8  # added to probabilities, as in the authors' program


def log_ratio(target: Floats, pool: Floats) -> Floats:
    """`log p_j - log q_j` of every bucket from how often it occurs, smoothed; float64 (V,)."""
    # at least 1: an empty target or pool has the smoothing alone, instead of a division by 0
    p, q = target / max(target.sum(), 1.0), pool / max(pool.sum(), 1.0)
    return np.asarray(np.log(p + _SMOOTHING) - np.log(q + _SMOOTHING))


def log_importance(streams: Mapping[str, MdsStream], target: Iterable[Sequence]) -> dict[str, Floats]:
    """`log w_z` of every sample of some streams, by domain, in the order of each stream.

    Reads every stream twice: for the distribution of the pool, and for the weights. Memory: one number a sample.

    Args:
        streams: the pool.
        target: sequences of the target.
    """
    # the pool is all of what is drawn from, as published: domains count by their size on disk
    pool = ngram_counts(sequence for stream in streams.values() for sequence in _sequences(stream, "n-grams"))
    ratio = log_ratio(ngram_counts(target), pool)
    return {
        domain: np.array([ratio[buckets_of(*sequence)].sum() for sequence in _sequences(stream, "importance")])
        for domain, stream in streams.items()
    }


def _sequences(stream: MdsStream, what: str) -> Iterator[Sequence]:
    samples = (stream[index] for index in range(len(stream)))
    for sample in progress(samples, total=len(stream), what=f"{what} of {stream.folder.name}", unit="sample"):
        yield sample.tokens, sample.loss_mask


def gumbel_keys(pool: pl.DataFrame, log_weights: Mapping[str, Floats] | None, seed: int) -> dy.DataFrame[DrawKeys]:
    """Every sample's key: the k samples of largest key are a draw of k without replacement, in proportion to w.

    The noise belongs to a sample's content, so re-sharding changes nothing.

    Args:
        pool: `domain`, `index`, `sample_id`, `stored_tokens`.
        log_weights: log w of each domain's samples by `index`; None: all equal.
        seed: of the noise.

    Returns:
        `domain`, `index`, `sample_id`, `stored_tokens` and `key`, largest key first.
    """
    table = pool.sort("sample_id", "domain", "index")  # by content first: noise goes with the text, not the shard
    noise = generator(seed, "gumbel").gumbel(size=table.height)
    keyed = table.with_columns(key=pl.Series(noise))
    if log_weights is not None:
        weights = pl.concat(
            pl.DataFrame({"index": np.arange(len(logs)), "log_weight": logs}).with_columns(domain=pl.lit(domain))
            for domain, logs in sorted(log_weights.items())
        )
        keyed = keyed.join(weights, on=["domain", "index"], how="left", maintain_order="left")
        keyed = keyed.with_columns(pl.col("key") + pl.col("log_weight")).drop("log_weight")
    chosen = keyed.select("domain", "index", "sample_id", "stored_tokens", "key")
    return DrawKeys.validate(chosen.sort("key", "sample_id", "domain", "index", descending=[True, False, False, False]))


def drawn_shares(keys: dy.DataFrame[DrawKeys], budget_tokens: int) -> dict[str, float]:
    """Domain -> share of the tokens in the draw that fills a budget, by name; sums to 1.

    A domain that is not drawn counts as half a mean sample of it, so that its weight has a logarithm.

    Args:
        keys: see `gumbel_keys`.
        budget_tokens: of the next stage; one larger than the pool draws all of it.
    """
    # largest key first: a sample is drawn where the ones before it leave some of the budget
    taken = keys.with_columns(before=pl.col("stored_tokens").cum_sum() - pl.col("stored_tokens"))
    sums = taken.group_by("domain").agg(
        drawn=pl.col("stored_tokens").filter(pl.col("before") < budget_tokens).sum(),
        least=pl.col("stored_tokens").mean() / 2,
    )
    tokens = {domain: max(float(drawn), least) for domain, drawn, least in sums.sort("domain").iter_rows()}
    return {domain: drawn / sum(tokens.values()) for domain, drawn in tokens.items()}
