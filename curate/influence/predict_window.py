"""Values of samples outside of a measured window, predicted from those inside.

A window holds a small part of what the next stage chooses among. What is not measured is predicted from its text, and
only in domains where held-out samples are ranked well enough. The baselines that value a window choose by this.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.core.rng import generator
from curate.influence.extrapolate import FeatureReader, extrapolate, with_fallback
from curate.ngrams.counts import ngram_counts
from curate.ngrams.ratios import log_ratios
from curate.stats.sums import row_sum
from curate.tables import VALUES_PER_TOKEN, VALUES_TOTAL, PredictionQuality, SampleValues
from curate.training.samples import usable_samples

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from curate.data.mds import Sample
    from curate.training.source import SampleSource
    from curate.training.target import Target

_LEAST = 20  # valued samples of a domain from which a rank correlation says something
_MOST = 10_000  # valued samples that the fit is made from, or a few more: 4,096 features of each are held at once
_BATCH = 64  # samples read at a time
_QUALITY = ("domain", "samples", "measured", "spearman", "low", "high", "used")


def predict_unmeasured(
    source: SampleSource, values: dy.DataFrame[SampleValues], targets: Sequence[Target], least: float, seed: int
) -> tuple[dy.DataFrame[SampleValues], dy.DataFrame[PredictionQuality]]:
    """Predict the values of the samples of a source that have none.

    Features are n-grams and their ratios for the targets; no pass through the model.

    Args:
        source: the streams.
        values: of one source.
        targets: what the values are for.
        least: held-out rank correlation from which a domain's predictions are used, if it is certainly positive.
        seed: of folds and intervals.

    Returns:
        The values, and below them those that were predicted.
        How good predictions are in each domain; `used`: "predictor" or "domain mean", or "too few" to say anything.
    """
    measured_values = _per_token(values)
    samples = usable_samples(source.unique_samples)
    valued = samples.join(measured_values, on=["domain", "sample_id"], maintain_order="left")
    enough = valued.filter(pl.len().over("domain") >= _LEAST)
    sizes = samples.group_by("domain").agg(samples=pl.len().cast(pl.Int64))
    few = _too_few(sizes, valued, enough)
    # too few samples to judge a prediction by: better the domain's mean, which is what a missing value stands for
    if enough.is_empty():
        return values, PredictionQuality.validate(few)
    measured = _fitted(enough, seed)

    read = partial(source.read_batches, size=_BATCH)
    reader = FeatureReader(samples, read, _ratios_of(targets, read(measured)))
    every, quality = with_fallback(
        *extrapolate(samples, measured, measured.select(VALUES_PER_TOKEN).to_numpy(), reader, seed, least), least
    )
    rest = every.filter(origin="predicted").join(
        measured_values, on=["domain", "sample_id"], how="anti", maintain_order="left"
    )
    located = rest.join(samples, on=["domain", "sample_id"], maintain_order="left")
    predicted = located.with_columns(
        *(
            (pl.col(name) * pl.col("predicted_tokens")).alias(total)
            for name, total in zip(VALUES_PER_TOKEN, VALUES_TOTAL, strict=True)
        ),
        *(pl.lit(values[name][0]).alias(name) for name in ("source", "target")),
    )
    table = pl.concat([quality.select(_QUALITY), few]).sort("domain")
    both = pl.concat([values, SampleValues.validate(predicted)])
    return SampleValues.validate(both), PredictionQuality.validate(table)


def _per_token(values: pl.DataFrame) -> pl.DataFrame:
    """`domain`, `sample_id` and the values per token over all uses."""
    sums = (
        (row_sum(pl.col(total)) / pl.col("predicted_tokens").sum()).alias(name)
        for name, total in zip(VALUES_PER_TOKEN, VALUES_TOTAL, strict=True)
    )
    return values.filter(pl.col("predicted_tokens") > 0).group_by("domain", "sample_id").agg(*sums)


def _fitted(valued: pl.DataFrame, seed: int) -> pl.DataFrame:
    """The samples that the fit is made from: of each domain its share of the most that there may be, not too few."""
    share = min(1.0, _MOST / len(valued))
    order = valued.with_columns(
        draw=pl.Series(generator(seed, "fitted").random(len(valued))),
        row=pl.int_range(pl.len()),
        wanted=pl.max_horizontal((pl.len().over("domain") * share).ceil(), pl.lit(_LEAST)),
    )
    # a random part of each domain, in the old order: a fit on rows in another order has other last digits
    chosen = order.filter(pl.col("draw").rank("ordinal").over("domain") <= pl.col("wanted"))
    return chosen.sort("row").drop("draw", "row", "wanted")


def _too_few(sizes: pl.DataFrame, valued: pl.DataFrame, enough: pl.DataFrame) -> pl.DataFrame:
    """Rows of the domains that have not enough valued samples."""
    counts = valued.group_by("domain").agg(measured=pl.len().cast(pl.Int64))
    table = sizes.join(enough, on="domain", how="anti").join(counts, on="domain", how="left")
    unknown = (pl.lit(None, pl.Float64).alias(name) for name in ("spearman", "low", "high"))
    rows = table.with_columns(pl.col("measured").fill_null(0), *unknown, used=pl.lit("too few"))
    return rows.select(_QUALITY).sort("domain")


def _ratios_of(targets: Sequence[Target], batches: Iterable[list[Sample]]) -> npt.NDArray[np.float64]:
    """N-gram log-likelihood ratios (T, V) of some targets; the samples of `batches` stand for the pool."""
    pool = ngram_counts((sample.tokens, sample.loss_mask) for samples in batches for sample in samples)
    return log_ratios([ngram_counts(target.sequences()) for target in targets], pool)
