"""Domain scores: value per token of each domain, its interval, and the shrunk score that the mixture is made from.

Shape legend: S steps of the window, D domains, R resamples.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import polars as pl

from curate.errors import UserError
from curate.rng import generator
from curate.scores.bootstrap import MIN_STEPS, Floats, ratio, spread, step_sums, step_weights

# A pooled deviation below this share of the largest value per token is rounding error: all values are equal.
_EQUAL = 1e-9


def domain_scores(
    values: pl.DataFrame,
    prior: Mapping[str, float],
    *,
    seed: int,
    fresh: Mapping[str, float] | None = None,
    parents: Mapping[str, str] | None = None,
    resamples: int = 1000,
) -> pl.DataFrame:
    """Score every domain of the prior for every window and target of `values`; windows are never averaged.

    With `x_d = sum of values / sum of predicted tokens` of domain d, `x = sum_d prior_d x_d` over the domains seen and
    `sd` the pooled deviation of a sample's value per token around its own domain's mean, each sample counted by its
    tokens:

        score_d  = (x_d - x) / sd                     how many deviations of a sample the domain lies above average
        shrunk_d = score_d * max(0, 1 - score_se_d^2 / tau^2)

    Near-duplicates count once: what a text did for the target it does not do again when a near-identical one follows in
    the next stage, so a positive score is multiplied by the domain's share of new text, `fresh_d`; a negative one is
    not. (The reference is the average, not a value of 0: Adam ignores the scale of the gradient, so values sum to about
    0 whatever the data is worth, and text without any gradient has the value of average text.)

    Derivation of the factor: let `score_d = theta_d + e_d` with true scores of variance `sigma^2` between domains and
    errors of variance `score_se_d^2`. The posterior mean of theta_d is `score_d sigma^2 / (sigma^2 + se_d^2)`; the
    observed variance between domains, tau^2, estimates that denominator, so the factor is `(tau^2 - se_d^2) / tau^2`,
    cut at 0 (the positive-part James-Stein rule). The deviation between domains never scales a score: noise would get
    the size of signal.

    Where the domains are parts of larger ones (`parents`), a part is shrunk towards its parent, which has more samples:

        shrunk_d = shrunk_p + (score_d - score_p) * max(0, 1 - se_d^2 / tau^2)      p the parent of d

    with error and tau those of the difference. A part without samples has its parent's score.

    Intervals are 95 % percentiles of a bootstrap over the window's steps; `sd` is held fixed in it.

    Args:
        values: columns `window`, `target`, `step`, `domain`, `sample_id`, `tokens` (predicted), `value` (positive = the
            sample helped the target; nats per token of the target).
        prior: share of each domain in what was trained on; need not sum to 1.
        fresh: share of new text in each domain (`curate.formats.ngrams`); None: 1 for all.
        seed: of the bootstrap; the same resamples serve every target of a window, so that their scores can be compared.
        parents: the larger domain of each one; None: there are none.
        resamples: R.

    Returns:
        One row per (window, target, domain): `prior`, `fresh`, `samples` (distinct), `tokens` (predicted, each use
        counted), `value_per_token` with `se`, `low`, `high`; `score` with `score_se`, `score_low`, `score_high`;
        `shrunk`. A domain without samples in the window has `samples` 0, null errors, and what is believed without a
        measurement: score 0 (the average) with an interval of 1.96 tau around it (null where tau is 0); one seen in a
        single step has its score with that interval, null errors and `shrunk` 0. Where no value differs from its
        domain's mean there is no scale, and every score is 0.

    Raises:
        UserError: a domain of `values` is not in the prior, or a prior is not positive.
    """
    shares = _shares(prior, values)
    new = np.array([1.0 if fresh is None else fresh[domain] for domain in shares])
    names = sorted(set((parents or {}).values()))
    kin = np.array([[parents[domain] == name for name in names] for domain in shares], float) if parents else None
    parts = [
        _score(group, shares, new, kin, generator(seed, "bootstrap", str(window)), resamples).select(
            pl.lit(window).alias("window"), pl.lit(target).alias("target"), pl.all()
        )
        for (window, target), group in values.group_by("window", "target")
    ]
    return pl.concat(parts).sort("window", "target", "domain")


def _shares(prior: Mapping[str, float], values: pl.DataFrame) -> dict[str, float]:
    """The prior in the order of domain names, summing to 1."""
    unknown = sorted(set(values["domain"].unique()) - set(prior))
    if unknown:
        raise UserError(f"values hold domains without a prior: {', '.join(unknown)}; give each a share of the prior")
    bad = {domain: share for domain, share in prior.items() if not 0 < share < np.inf}
    if bad:
        raise UserError(f"a prior must be a positive number, got {bad}; leave out domains that were not trained on")
    total = sum(prior[domain] for domain in sorted(prior))
    return {domain: prior[domain] / total for domain in sorted(prior)}


def _score(
    group: pl.DataFrame,
    prior: dict[str, float],
    fresh: Floats,
    kin: Floats | None,
    random: np.random.Generator,
    resamples: int,
) -> pl.DataFrame:
    """Scores of one window and target; `kin` [D, P] is 1 where a domain is part of a parent."""
    sums = (step_sums(group, list(prior), "value"), step_sums(group, list(prior), "tokens"))
    shares, scale = np.array(list(prior.values())), pooled_deviation(group)
    weights = step_weights(len(sums[0]), resamples, random)
    own = _level(*sums, weights, shares, scale, fresh)
    believed, shrunk = np.zeros(len(shares)), shrink(own.score, spread(own.drawn)[0])
    if kin is not None:
        whole = shares @ kin
        above = _level(sums[0] @ kin, sums[1] @ kin, weights, whole, scale, (fresh * shares) @ kin / whole)
        believed = np.nan_to_num(above.score) @ kin.T
        apart, apart_se = own.score - believed, spread(own.drawn - above.drawn @ kin.T)[0]
        shrunk = shrink(above.score, spread(above.drawn)[0]) @ kin.T + shrink(apart, apart_se)
    se, low, high = spread(own.drawn_mean)
    score_se, score_low, score_high = spread(own.drawn)
    score = np.where(np.isfinite(own.score), own.score, believed)
    unmeasured, width = ~np.isfinite(score_low), 1.96 * np.sqrt(between(own.score) or np.nan)
    score_low[unmeasured] = (score - width)[unmeasured]
    score_high[unmeasured] = (score + width)[unmeasured]
    scored = pl.DataFrame(
        {
            "domain": list(prior),
            "prior": shares,
            "fresh": fresh,
            "tokens": sums[1].sum(axis=0).astype(np.int64),
            "value_per_token": own.mean,
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
    samples = group.group_by("domain").agg(pl.col("sample_id").n_unique().cast(pl.Int64).alias("samples"))
    return (
        scored.with_columns(pl.selectors.float().fill_nan(None))
        .join(samples, on="domain", how="left")
        .select(
            "domain",
            "prior",
            "fresh",
            pl.col("samples").fill_null(0),
            pl.exclude("domain", "prior", "fresh", "samples"),
        )
    )


@dataclass(frozen=True)
class _Level:
    """What is known of domains, or of their parents: means [D] and scores [D], and as drawn by the bootstrap [R, D]."""

    mean: Floats
    drawn_mean: Floats
    score: Floats
    drawn: Floats


def _level(value: Floats, tokens: Floats, weights: Floats, shares: Floats, scale: float, fresh: Floats) -> _Level:
    """From sums [S, D] per step and the steps drawn [R, S]."""
    mean, drawn = ratio(value.sum(axis=0), tokens.sum(axis=0)), ratio(weights @ value, weights @ tokens)
    drawn[:, (tokens > 0).sum(axis=0) < MIN_STEPS] = np.nan
    score, drawn_score = (_discounted(_centred(means, shares, scale), fresh) for means in (mean[None], drawn))
    return _Level(mean, drawn, score[0], drawn_score)


def _discounted(score: Floats, fresh: Floats) -> Floats:
    """Scores [R, D]: benefits count for new text only, harm in full."""
    return np.where(score > 0, score * fresh, score)


def _centred(mean: Floats, prior: Floats, scale: float) -> Floats:
    """Means per domain [R, D] -> scores [R, D]: distance to the prior-weighted mean, in units of `scale`."""
    seen = np.isfinite(mean)
    if scale == 0:
        return np.where(seen, 0.0, np.nan)
    total = (seen * prior).sum(axis=1, keepdims=True)
    centre = ratio((np.nan_to_num(mean) * prior).sum(axis=1, keepdims=True), total)
    return np.asarray((mean - centre) / scale)


def pooled_deviation(group: pl.DataFrame) -> float:
    """Pooled standard deviation of a sample's value per token around its domain's mean, weighted by tokens.

    Returns:
        nats per token and token; exactly 0 where all values of each domain are equal up to rounding.
    """
    per_token = pl.col("value") / pl.col("tokens")
    domain_mean = pl.col("value").sum().over("domain") / pl.col("tokens").sum().over("domain")
    squares, tokens, largest = (
        group.filter(pl.col("tokens") > 0)
        .select(
            squares=(pl.col("tokens") * (per_token - domain_mean) ** 2).sum(),
            tokens=pl.col("tokens").sum(),
            largest=per_token.abs().max(),
        )
        .row(0)
    )
    deviation = float(np.sqrt(squares / tokens)) if tokens else 0.0
    return deviation if tokens and deviation > _EQUAL * largest else 0.0


def shrink(score: Floats, se: Floats) -> Floats:
    """`score * max(0, 1 - se^2 / tau^2)`, tau^2 the observed variance of the finite scores (see `domain_scores`).

    Args:
        score: float64 [D]; NaN for a domain not seen.
        se: float64 [D]; NaN where unknown.

    Returns:
        float64 [D], finite: 0 where the score or its error is not known.
    """
    variance = between(score)
    if variance == 0:
        return np.zeros_like(score)
    return np.asarray(np.nan_to_num(score) * np.nan_to_num(np.maximum(0.0, 1 - se**2 / variance)))


def between(score: Floats) -> float:
    """Observed variance between the domains of finite score, tau^2; 0 where fewer than two are known."""
    seen = np.isfinite(score)
    return float(score[seen].var(ddof=1)) if seen.sum() > 1 else 0.0
