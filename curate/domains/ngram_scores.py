"""N-gram log-likelihood ratios of samples and domains, as a second source of evidence beside their values.

Values know what the model learned from a sample, but are measured on few samples, with noise. N-grams are counted in
every sample, with next to none, but know nothing of the model. With a share s of n-grams,

    score_d = (1 - s) score_d of values + s (r_d - r) / sd

where `r_d` is the mean ratio of a domain's samples (`ngrams.ratios.log_ratios`), `r` its mean over domains
weighted by the prior and `sd` the standard deviation of a sample's ratio over all domains, so that one domain that is
like nothing else cannot have a score of many deviations.

Shape legend: T targets, V buckets of `ngrams.counts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.progress import progress
from curate.core.rng import generator
from curate.ngrams.counts import BUCKETS, Floats, ngram_counts
from curate.ngrams.ratios import log_ratios, mean_log_ratios
from curate.tables import Catalogue, DomainScores, NgramRatios, Samples, ValueScores
from curate.training.samples import usable_samples

if TYPE_CHECKING:
    from curate.training.source import SampleSource
    from curate.training.target import Target

_DRAWN = 2_000  # samples of each domain that its distribution of n-grams is read from
_BATCH = 64  # samples read at a time
_COUNTED = 1e6  # n-grams that the pool counts as: one more of each is as little as the smoothing of a large pool
_SCORES = ("score", "score_low", "score_high", "shrunk")


@dataclass(frozen=True, kw_only=True)
class TargetRatios:
    """What n-grams say of a pool.

    Attributes:
        targets: T names.
        ratios: (T, V) of the targets, see `ngrams.ratios.log_ratios`.
        deviations: (T,) of a sample's ratio over all domains; 0 where it does not vary.
        domains: `target`, `domain`, `ngram_ratio`: how many deviations each domain lies above average.
    """

    targets: Sequence[str]
    ratios: Floats
    deviations: Floats
    domains: pl.DataFrame


def ngram_ratios(
    source: SampleSource, targets: Sequence[Target], prior: Mapping[str, float], seed: int
) -> TargetRatios:
    """Read some samples of every domain.

    The pool's distribution of n-grams is that of its domains, weighted by the prior: no domain counts for more because
    there is more of it on disk.

    Args:
        source: of the samples.
        targets: T targets.
        prior: share of each domain; need not sum to 1.
        seed: of the draw, which goes by content ids.
    """
    drawn = {domain: _drawn(source, domain, seed) for domain in sorted(prior)}
    shares = np.array([prior[domain] for domain in drawn]) / sum(prior[domain] for domain in drawn)
    pool = np.zeros(BUCKETS)
    shown = progress(drawn.values(), total=len(drawn), what="n-grams", unit="domain")
    for share, samples in zip(shares, shown, strict=True):
        counts = ngram_counts(
            (sample.tokens, sample.loss_mask) for batch in source.read_batches(samples, _BATCH) for sample in batch
        )
        pool += share * counts / max(counts.sum(), 1.0)
    ratios = log_ratios([ngram_counts(target.sequences()) for target in targets], pool * _COUNTED)
    by_domain = [_sample_ratios(source, samples, ratios) for samples in drawn.values()]
    means = np.stack([rows.mean(axis=0) if len(rows) else np.full(len(targets), np.nan) for rows in by_domain])
    # a domain without usable samples has no mean, and no part in the average
    seen = np.isfinite(means[:, 0])
    weights = shares * seen / (shares * seen).sum()
    centre = weights @ np.nan_to_num(means)
    # around the mean of all domains, not of each one: see the module
    squares = [((rows - centre) ** 2).mean(axis=0) if len(rows) else centre * 0 for rows in by_domain]
    deviations = np.sqrt(weights @ np.stack(squares))
    scores = np.nan_to_num((means - centre) / np.where(deviations > 0, deviations, np.inf))
    names = [target.name for target in targets]
    rows = [
        (name, domain, float(scores[row, column]))
        for column, name in enumerate(names)
        for row, domain in enumerate(drawn)
    ]
    table = pl.DataFrame(
        rows, schema={"target": pl.String, "domain": pl.String, "ngram_ratio": pl.Float64}, orient="row"
    )
    return TargetRatios(targets=names, ratios=ratios, deviations=deviations, domains=table)


def with_ratios(
    domains: dy.DataFrame[ValueScores], ratios: TargetRatios | None, share: float
) -> dy.DataFrame[DomainScores]:
    """Domain scores that n-grams have a share in.

    Args:
        domains: see `domains.domain.domain_scores`.
        ratios: of the same targets and domains; None: scores stay as they are.
        share: s.

    Returns:
        The scores with `value_score` (of values alone) and `ngram_ratio` (null where it is not known). The ends of the
        interval move with the score: n-gram ratios have no error that would count.
    """
    if ratios is None:
        return DomainScores.validate(domains.with_columns(value_score="score", ngram_ratio=pl.lit(None, pl.Float64)))
    joined = domains.join(ratios.domains, on=["target", "domain"], how="left", maintain_order="left")
    mixed = (pl.col(name) * (1 - share) + pl.col("ngram_ratio") * share for name in _SCORES)
    return DomainScores.validate(joined.with_columns(pl.col("score").alias("value_score"), *mixed))


def combined_ratios(
    samples: dy.DataFrame[Samples], means: Floats, ratios: TargetRatios, weights: Mapping[str, float]
) -> dy.DataFrame[NgramRatios]:
    """Ratios of samples for all targets together: the weighted mean, each target in its own deviations.

    Args:
        samples: N samples.
        means: (N, T) of them, see `ngrams.ratios.mean_log_ratios`.
        ratios: of the targets.
        weights: target -> weight.
    """
    shares = np.array([weights.get(name, 0.0) for name in ratios.targets]) / sum(weights.values())
    # a target whose ratio does not vary says nothing of samples
    factors = np.divide(shares, ratios.deviations, out=np.zeros_like(shares), where=ratios.deviations > 0)
    return NgramRatios.validate(samples.with_columns(ngram_ratio=pl.Series(means @ factors, dtype=pl.Float64)))


def _sample_ratios(source: SampleSource, samples: pl.DataFrame, ratios: Floats) -> Floats:
    """(N, T) of the samples of a table."""
    batches = source.read_batches(samples, _BATCH)
    shown = progress(batches, total=-(-len(samples) // _BATCH), what="n-gram ratios", unit="batch")
    means = [mean_log_ratios(batch, ratios) for batch in shown]
    return np.concatenate(means).astype(np.float64) if means else np.zeros((0, len(ratios)))


def _drawn(source: SampleSource, domain: str, seed: int) -> dy.DataFrame[Samples]:
    """Samples of a domain, all of them where there are not too many, in the order of their content."""
    samples = usable_samples(Catalogue.validate(source.unique_samples.filter(domain=domain)))
    if len(samples) <= _DRAWN:
        return samples
    # "likeness": a purpose of the generator is part of the draw, renaming it draws other samples
    chosen = generator(seed, "likeness", domain).choice(len(samples), _DRAWN, replace=False)
    return Samples.validate(samples.filter(pl.int_range(pl.len()).is_in(chosen.tolist())))
