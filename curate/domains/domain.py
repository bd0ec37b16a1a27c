"""Domain scores: value per token of each domain, its interval, and the shrunk score that the mixture is made from.

Shape legend: S steps of the window, D domains, R resamples.
"""

from collections.abc import Mapping

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.errors import UserError
from curate.core.rng import generator
from curate.stats.bootstrap import MIN_STEPS, Floats, ratio, spread, step_sums, step_weights
from curate.stats.deviation import pooled_deviation
from curate.tables import MeasuredValues, ValueScores


def domain_scores(
    values: dy.DataFrame[MeasuredValues],
    prior: Mapping[str, float],
    *,
    seed: int,
    novel_shares: Mapping[str, float] | None = None,
    adjusted: pl.DataFrame | None = None,
    resamples: int = 1000,
) -> dy.DataFrame[ValueScores]:
    """Score every domain of the prior for every source and target of `values`; sources are never averaged.

    With `x_d = sum of values / sum of predicted tokens` of domain d, `x = sum_d prior_d x_d` over the domains seen and
    `sd` the pooled deviation of a sample's value per token around its own domain's mean, each sample counted by its
    tokens:

        score_d  = (x_d - x) / sd                     how many deviations of a sample the domain lies above average
        shrunk_d = score_d * max(0, 1 - score_se_d^2 / tau^2)

    Near-duplicates count once: what a text did for the target it does not do again when a near-identical one follows in
    the next stage, so a positive score is multiplied by the domain's share of novel n-grams; a negative one is not.

    The reference is the average, not a value of 0: Adam ignores the scale of the gradient, so values sum to about 0
    whatever the data is worth, and text without any gradient has the value of average text.

    Derivation of the factor: let `score_d = theta_d + e_d` with true scores of variance `sigma^2` between domains and
    errors of variance `score_se_d^2`. The posterior mean of theta_d is `score_d sigma^2 / (sigma^2 + se_d^2)`; the
    observed variance between domains, tau^2, estimates that denominator, so the factor is `(tau^2 - se_d^2) / tau^2`,
    cut at 0 (the positive-part James-Stein rule). The deviation between domains never scales a score: noise would get
    the size of signal.

    Intervals are 95 % percentiles of a bootstrap over the window's steps; `sd` is held fixed in it.

    Args:
        values: of measured samples.
        prior: share of each domain in what was trained on; need not sum to 1.
        novel_shares: share of novel n-grams in each domain (`ngrams.hashes`); None: 1 for all.
        adjusted: `source`, `target`, `domain`, `sample_id` and `value_adjusted_nats`: totals that means of domains are
            made from instead, where more is known of a domain than its measured samples; the scale stays theirs.
        seed: of the bootstrap; the same resamples serve every target of a source, so that their scores can be compared.
        resamples: R.

    Returns:
        One row per (source, target, domain), see `tables.ValueScores`. A domain without measured samples has `samples`
        0, null errors, and what is believed without a measurement: score 0 (the average) with an interval of 1.96 tau
        around it (null where tau is 0). One seen in a single step has its score with that interval, null errors and
        `shrunk` 0. Where no value differs from its domain's mean there is no scale, and every score is 0.

    Raises:
        UserError: a domain of `values` is not in the prior, or a prior is not positive.
    """
    shares = _shares(prior, values)
    novelty = np.array([1.0 if novel_shares is None else novel_shares[domain] for domain in shares])
    totals = _with_adjusted(values, adjusted)
    parts = [
        _score(group, shares, novelty, generator(seed, "bootstrap", str(source)), resamples).select(
            pl.lit(source).alias("source"), pl.lit(target).alias("target"), pl.all()
        )
        for (source, target), group in totals.group_by("source", "target")
    ]
    return ValueScores.validate(pl.concat(parts).sort("source", "target", "domain"))


def _with_adjusted(values: pl.DataFrame, adjusted: pl.DataFrame | None) -> pl.DataFrame:
    """The values with `value_adjusted_nats`, the measured total where nothing was adjusted."""
    if adjusted is None:
        return values.with_columns(value_adjusted_nats="value_total_nats")
    keys = ["source", "target", "domain", "sample_id"]
    joined = values.join(adjusted, on=keys, how="left", maintain_order="left")
    return joined.with_columns(value_adjusted_nats=pl.coalesce("value_adjusted_nats", "value_total_nats"))


def _shares(prior: Mapping[str, float], values: pl.DataFrame) -> dict[str, float]:
    """The prior in the order of domain names, summing to 1."""
    unknown = sorted(set(values["domain"].unique()) - set(prior))
    if unknown:
        raise UserError(f"values hold domains without a prior: {', '.join(unknown)}; give each a share of the prior")
    bad = {domain: share for domain, share in prior.items() if not 0 < share < np.inf}
    if bad:
        raise UserError(f"a prior must be a positive number, got {bad}; leave out domains that were not trained on")
    # in the order of names: sums of floats in another order differ in the last digit
    total = sum(prior[domain] for domain in sorted(prior))
    return {domain: prior[domain] / total for domain in sorted(prior)}


def _score(
    group: pl.DataFrame,
    prior: dict[str, float],
    novelty: Floats,
    random: np.random.Generator,
    resamples: int,
) -> pl.DataFrame:
    """Scores of one source and target."""
    sums = step_sums(group, list(prior), "value_adjusted_nats"), step_sums(group, list(prior), "predicted_tokens")
    shares, scale = np.array(list(prior.values())), pooled_deviation(group)
    weights = step_weights(len(sums[0]), resamples, random)
    means = _means(*sums, weights)
    score, drawn = _scores(means, _centres(means, shares), scale, novelty)
    shrunk = shrink(score, spread(drawn)[0], between(score))
    se, low, high = spread(means[1])
    score_se, score_low, score_high = spread(drawn)
    # what is not measured is believed to lie as the others do: average, within 1.96 tau; no tau, no interval
    width = 1.96 * np.sqrt(between(score) or np.nan)
    score = np.nan_to_num(score)  # unmeasured: the average
    unmeasured = ~np.isfinite(score_low)
    score_low[unmeasured] = (score - width)[unmeasured]
    score_high[unmeasured] = (score + width)[unmeasured]
    scored = pl.DataFrame(
        {
            "domain": list(prior),
            "prior": shares,
            "novel_share": novelty,
            "predicted_tokens": sums[1].sum(axis=0).astype(np.int64),
            "value_per_token": means[0][0],
            "se": se,
            "low": low,
            "high": high,
            "score": score,
            "score_se": score_se,
            "score_low": score_low,
            "score_high": score_high,
            "shrunk": shrunk,
        }
    )
    # distinct ones: a window may train on a sample several times
    samples = group.group_by("domain").agg(pl.col("sample_id").n_unique().cast(pl.Int64).alias("samples"))
    return (
        scored.with_columns(pl.selectors.float().fill_nan(None))
        .join(samples, on="domain", how="left")
        .select(
            "domain",
            "prior",
            "novel_share",
            pl.col("samples").fill_null(0),
            pl.exclude("domain", "prior", "novel_share", "samples"),
        )
    )


def _means(value: Floats, tokens: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Values per token, observed [1, D] and drawn [R, D], from sums [S, D] per step and the steps drawn [R, S]."""
    drawn = ratio(weights @ value, weights @ tokens)
    # a domain of one step is drawn always with the same value, or not at all: that is no interval
    drawn[:, (tokens > 0).sum(axis=0) < MIN_STEPS] = np.nan
    return ratio(value.sum(axis=0), tokens.sum(axis=0))[None], drawn


def _centres(means: tuple[Floats, Floats], prior: Floats) -> list[Floats]:
    """The prior-weighted mean over the domains seen, observed [1, 1] and drawn [R, 1]."""
    centres = []
    for mean in means:
        # a resample may miss a domain: the prior of those that it has stands for all
        total = (np.isfinite(mean) * prior).sum(axis=1, keepdims=True)
        centres.append(ratio((np.nan_to_num(mean) * prior).sum(axis=1, keepdims=True), total))
    return centres


def _scores(
    means: tuple[Floats, Floats], centres: list[Floats], scale: float, novelty: Floats
) -> tuple[Floats, Floats]:
    """Distances to the centre in units of `scale`, observed [D] and drawn [R, D]; NaN where a domain is not seen."""
    distances = []
    for mean, centre in zip(means, centres, strict=True):
        score = np.asarray((mean - centre) / scale) if scale else np.where(np.isfinite(mean), 0.0, np.nan)
        distances.append(_discounted(score, novelty))
    return distances[0][0], distances[1]


def _discounted(score: Floats, novelty: Floats) -> Floats:
    """Scores [R, D]: what is above average counts for novel text only."""
    return np.where(score > 0, score * novelty, score)


def shrink(score: Floats, se: Floats, variance: float) -> Floats:
    """`score * max(0, 1 - se^2 / tau^2)` (see `domain_scores`).

    Args:
        score: float64 [D]; NaN for a domain not seen.
        se: float64 [D]; NaN where unknown.
        variance: tau^2, the observed variance of the scores.

    Returns:
        float64 [D], finite: 0 where the score or its error is not known.
    """
    if variance == 0:
        return np.zeros_like(score)
    return np.asarray(np.nan_to_num(score) * np.nan_to_num(np.maximum(0.0, 1 - se**2 / variance)))


def between(score: Floats) -> float:
    """Observed variance between the domains of finite score, tau^2; 0 where fewer than two are known."""
    seen = np.isfinite(score)
    return float(score[seen].var(ddof=1)) if seen.sum() > 1 else 0.0
