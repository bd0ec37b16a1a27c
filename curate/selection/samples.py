"""What the samples of the next stage are chosen by: their values, and their n-gram ratios for the targets."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.domains.ngram_scores import combined_ratios
from curate.filter.choose import combined_z
from curate.influence.current import forward_passes, measure_samples
from curate.influence.draw import as_sample_values
from curate.influence.predict_next_step import MIN_RANK_CORRELATION, fit_predictor
from curate.influence.predict_window import predict_unmeasured
from curate.mixture.decide import tilted_prior
from curate.selection.texts import Texts, read_texts
from curate.stats.deviation import combined_values
from curate.tables import DomainScores, DrawKeys, NgramRatios, Predicted, RowTrust, Samples, SampleValues

if TYPE_CHECKING:
    from curate.influence.current import MeasuredSamples
    from curate.influence.predict_next_step import NextStepPredictor
    from curate.selection.domains import Domains
    from curate.selection.resolve import Resolved
    from curate.selection.source import Source
    from curate.selection.values import Values
    from curate.training.target import Targets

_log = logging.getLogger(__name__)
MEASURED_PER_SAMPLE = 1.25
"""How many samples are measured for each one that the stage takes, as far as `values.measured_passes` allows."""


@dataclass(frozen=True, kw_only=True)
class SampleScores:
    """What samples are chosen by.

    Attributes:
        values: for all targets together; samples that are not in it stand for the mean of their domain.
        texts: what one reading of all texts says.
        ngram_ratios: for all targets together; None: they have no share.
        quality: how good predicted values are, see `influence.predict_next_step` and `influence.predict_window`.
        trust: how well rows of the value index give exact values; None: there are none.
        measured: the most promising samples, measured beside the part of every domain; None: none were.
        keys: what `random` and `dsir` draw samples by; they replace the values.
        measuring_seconds: that measuring took in this call.
    """

    values: dy.DataFrame[SampleValues]
    texts: Texts
    ngram_ratios: dy.DataFrame[NgramRatios] | None = None
    quality: dy.DataFrame[Predicted] | None = None
    trust: dy.DataFrame[RowTrust] | None = None
    measured: MeasuredSamples | None = None
    keys: dy.DataFrame[DrawKeys] | None = None
    measuring_seconds: float = 0.0


def score_samples(plan: Resolved, source: Source, targets: Targets, values: Values, domains: Domains) -> SampleScores:
    """Score samples by what the next step asks for, by a window's values, or by n-grams alone."""
    weights = plan.sample_weights
    combined = combined_values(values.of(plan.mixture_source), weights)
    # streams are weighted as they are: texts are read for the report of contamination only
    if not plan.config.takes_samples:
        return SampleScores(values=combined, texts=read_texts(plan, source, None, None))
    # fitted before the texts are read, so that one reading serves predictions, ratios and overlaps
    predictor = None
    if plan.measures_samples and values.next_step is not None:
        predictor = fit_predictor(source.samples, values.next_step, weights, plan.config.seed)
    texts = read_texts(plan, source, domains.ratios, predictor)
    ratios = None
    if domains.ratios is not None and texts.ratios is not None:
        ratios = combined_ratios(source.usable, texts.ratios, domains.ratios, weights)
    if predictor is not None:
        return _by_next_step(plan, source, targets, values, domains, texts, ratios, predictor)
    if plan.predicts_samples:
        weighted = [target for target in targets.every if target.name in weights]
        predicted, quality = predict_unmeasured(
            source.samples, combined, weighted, MIN_RANK_CORRELATION, plan.config.seed
        )
        # a window's values are measured in one go: no samples besides
        nothing = pl.lit(None, pl.Int64)
        quality_table = _log_quality(quality.with_columns(also_measured=nothing, by_row=nothing), plan.mixture_source)
        return SampleScores(values=predicted, texts=texts, ngram_ratios=ratios, quality=quality_table)
    return SampleScores(values=combined, texts=texts, ngram_ratios=ratios, keys=domains.keys)


def _by_next_step(
    plan: Resolved,
    source: Source,
    targets: Targets,
    values: Values,
    domains: Domains,
    texts: Texts,
    ratios: dy.DataFrame[NgramRatios] | None,
    predictor: NextStepPredictor,
) -> SampleScores:
    """Predict every sample's value from its n-grams, and its row where there are rows; measure the most promising ones.

    A prediction costs no pass through the model, a measurement about half of one forward+backward pass of the sample:
    so the budget of passes goes where the stage is likely to take samples.
    """
    next_step, weights, samples = values.next_step, plan.sample_weights, source.usable
    assert next_step is not None
    assert texts.predicted is not None
    predicted, quality = predictor.with_fallback(samples, texts.predicted)
    # a text that two domains hold has one value: that of the first by name
    per_token = predicted.unique("sample_id", keep="first").select("sample_id", "value_per_token")
    by_rows, trust = pl.DataFrame(schema=per_token.schema), None
    if values.rows is not None:
        by_rows, trust = values.rows.valued(weights, texts.predicted, predictor.cross_validated)
        per_token = per_token.update(by_rows, on="sample_id")
    value_total = pl.col("value_per_token") * pl.col("predicted_tokens")
    predicted_samples = samples.join(per_token, on="sample_id").with_columns(value_total=value_total)
    every = as_sample_values(predicted_samples, next_step.name, targets.main.name)
    promising = _promising(plan, source, every, domains, ratios)
    # those of the measured part have their values, and cost nothing again
    besides = promising.join(next_step.values, on="sample_id", how="anti")
    measured, begin = None, perf_counter()
    if len(besides):
        measured = measure_samples(
            plan.run, source.samples, promising, next_step, targets.every, weights, plan.next_step
        )
        # a measured value stands above what was predicted of the same sample
        rest = every.join(measured.values, on="sample_id", how="anti", maintain_order="left")
        every = SampleValues.validate(pl.concat([measured.values, rest]).sort("domain", "sample_id"))
    measuring_seconds = perf_counter() - begin
    by_row = by_rows.join(besides, on="sample_id", how="anti")
    counted = _counted(quality, samples, {"also_measured": besides, "by_row": by_row})
    return SampleScores(
        values=every,
        texts=texts,
        ngram_ratios=ratios,
        quality=_log_quality(counted, next_step.name),
        trust=trust,
        measured=measured,
        measuring_seconds=measuring_seconds,
    )


def _counted(quality: pl.DataFrame, samples: pl.DataFrame, valued: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The table with the number of samples in each domain that are in other tables, by the name of the column."""
    for name, table in valued.items():
        counts = (
            samples.join(table, on="sample_id", how="semi").group_by("domain").agg(pl.len().cast(pl.Int64).alias(name))
        )
        quality = quality.join(counts, on="domain", how="left", maintain_order="left")
    return quality.with_columns(pl.col(*valued).fill_null(0))


def _promising(
    plan: Resolved,
    source: Source,
    values: dy.DataFrame[SampleValues],
    domains: Domains,
    ratios: dy.DataFrame[NgramRatios] | None,
) -> dy.DataFrame[Samples]:
    """The samples to measure: `MEASURED_PER_SAMPLE` for each one that the stage is about to take of a domain."""
    if plan.config.values.measured_passes == 0:
        return Samples.create_empty()
    # weights are shares of tokens, a choice is one of samples
    lengths = source.usable.group_by("domain").agg(pl.col("stored_tokens").mean())
    mean_length = dict(lengths.iter_rows())
    scores = DomainScores.validate(domains.table.filter(source=plan.mixture_source))
    # the solved mixture needs the filtered samples, which need these values: the closed form is near enough for a count
    shares = tilted_prior(scores, source.prior_tokens, plan.mixture, plan.objectives)
    wanted = {
        domain: share * plan.budget_tokens / mean_length[domain]
        for domain, share in shares.items()
        if domain in mean_length
    }
    # a limit in passes, in samples: one forward pass at the state, one a move along the direction
    affordable = plan.config.values.measured_passes / forward_passes(plan.run, 1, 1)
    per_sample = min(MEASURED_PER_SAMPLE, affordable / max(sum(wanted.values()), 1))
    return most_promising(source.usable, values, ratios, plan.ngram_share, wanted, per_sample)


def most_promising(
    samples: dy.DataFrame[Samples],
    values: dy.DataFrame[SampleValues],
    ratios: dy.DataFrame[NgramRatios] | None,
    ngram_share: float,
    wanted: Mapping[str, float],
    per_sample: float,
) -> dy.DataFrame[Samples]:
    """The best samples of each domain by what is known of every one: predicted values and n-gram ratios.

    Args:
        samples: all that may be taken.
        values: that they would be chosen by otherwise.
        ratios: of n-grams; None: n-grams have no share.
        ngram_share: of n-gram ratios.
        wanted: how many samples of each domain the stage takes.
        per_sample: how many for each of them.

    Returns:
        Those rows, in their order.
    """
    per_token = values.select("sample_id", value_per_token=pl.col("value_total") / pl.col("predicted_tokens"))
    per_token = per_token.unique("sample_id", keep="first")
    scored = samples.join(per_token, on="sample_id", how="left", maintain_order="left")
    if ratios is None:
        scored, ngram_share = scored.with_columns(ngram_ratio=pl.lit(None, pl.Float64)), 0.0
    else:
        scored = scored.join(ratios, on=["domain", "sample_id"], how="left", maintain_order="left")
    # 1e-9: a product such as 1.25 x 4 must not fall below its whole number by rounding
    most = pl.DataFrame(
        {"domain": list(wanted), "most": [math.floor(per_sample * count + 1e-9) for count in wanted.values()]},
        schema={"domain": pl.String, "most": pl.Int64},
    )
    scored = scored.join(most, on="domain", how="left", maintain_order="left")
    standing = combined_z(ngram_share).rank("ordinal", descending=True).over("domain")
    return Samples.validate(scored.filter(standing <= pl.col("most").fill_null(0)))


def _log_quality(quality: pl.DataFrame, source: str) -> dy.DataFrame[Predicted]:
    """Log how good predictions are in each domain; returns the table with the name of their source."""
    for row in quality.iter_rows(named=True):
        correlation = "not defined" if row["spearman"] is None else f"{row['spearman']:.2f}"
        _log.info(
            "%s: %s of %s samples measured, %s valued by rows; n-grams: rank correlation %s held out; the rest: %s",
            row["domain"],
            f"{row['measured']:,}",
            f"{row['samples']:,}",
            f"{row['by_row'] or 0:,}",
            correlation,
            row["used"],
        )
    return Predicted.validate(quality.with_columns(source=pl.lit(source)))
