"""What a report says in words: the finding, what to know before believing it, what identifies the selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from curate.mixture.decide import NOTHING_RETAINED
from curate.report.data import ReportData
from curate.report.style import count, duration, listed, number, percent, signed, source_name
from curate.stats.rank_correlation import LENGTH_BIAS
from curate.training.source import CANDIDATES, CURRENT

_WEAK_RELIABILITY = 0.5
_WEAK_RESIDUAL = 0.5
_CHECKPOINTS = {
    "window_end": "the end of the window",
    "stage_end": "the end of the stage",
    "1_steps_on": "one more step",
}
_LIMITS = {"replay_share": "replayed domains", "retain": "retained text"}


def where(source: str) -> str:
    """Where a source's samples are, to follow a verb."""
    if source == CANDIDATES:
        return "among the candidates"
    return f"{'at' if source == CURRENT else 'in'} the {source_name(source)}"


def checkpoint_name(horizon: str) -> str:
    """The state that the target's loss is read at, in words."""
    return _CHECKPOINTS.get(horizon, horizon.replace("_", " "))


def is_next_step(source: str) -> bool:
    """Whether values are about one more step; the others are about steps that were taken."""
    return source in (CURRENT, CANDIDATES)


def resampled(sources: Sequence[str]) -> str:
    """What intervals are made from by resampling."""
    next_step = [source_name(source) for source in sources if is_next_step(source)]
    steps, groups = "training steps", "groups of measured samples"
    if next_step and len(next_step) < len(sources):
        return f"{steps} (windows) and {groups} ({listed(next_step)})"
    return groups if next_step else steps


def has_ngrams(data: ReportData) -> bool:
    """Whether n-gram log-likelihood ratios are part of the scores."""
    return data.domains["ngram_ratio"].drop_nulls().len() > 0


def headline(data: ReportData) -> str:
    """The finding in two sentences, with its numbers."""
    source = data.mixture_source
    # by the values alone: what helped is a matter of values, not of n-grams
    measured = data.domains.filter((pl.col("source") == source) & (pl.col("samples") > 0)).sort(
        "value_score", "domain", descending=[True, False]
    )
    shares = {row["domain"]: row for row in data.mixture.to_dicts()}
    if measured.is_empty():
        return f"No sample was measured {where(source)}."
    best, worst = measured.row(0, named=True), measured.row(-1, named=True)
    changes = [
        f"{row['domain']} from {percent(shares[row['domain']]['prior'])} to {percent(shares[row['domain']]['weight'])}"
        for row in (best, worst)
        if row["domain"] in shares
    ]
    place = where(source)
    helps = "would help" if is_next_step(source) else "helped"
    finding = f"{place[0].upper()}{place[1:]}, {best['domain']} {helps} the target most and {worst['domain']} least."
    # a score has n-grams in it too: a share may fall where the values alone would raise it
    by = "Their shares of the tokens" + (", set by values and n-grams" if has_ngrams(data) else "")
    return f"{finding} {by}: {listed(changes)}." if changes else finding


def warnings(data: ReportData) -> list[str]:
    """What a reader must know before believing the numbers."""
    return [
        *_about_retention(data),
        *_about_ranking(data),
        *_about_residuals(data),
        *_about_length(data),
        *_about_predictions(data),
        *_about_contamination(data),
        *_about_unmeasured(data),
    ]


def _about_retention(data: ReportData) -> list[str]:
    return [] if data.retain else [f"{NOTHING_RETAINED[0].upper()}{NOTHING_RETAINED[1:]}."]


def _about_ranking(data: ReportData) -> list[str]:
    weak = data.reliability.filter((pl.col("ranking") == "within_step") & (pl.col("reliability") < _WEAK_RELIABILITY))
    return [
        f"Another half of the target would have ranked the samples {where(row['source'])} differently (reliability "
        f"{signed(row['reliability'])}): judge no single sample by its value, or give a larger target."
        for row in weak.to_dicts()
    ]


def _about_residuals(data: ReportData) -> list[str]:
    return [
        f"Values of the {source_name(source)} are approximate: the anchors leave {percent(residual)} of the target's "
        "gradient unexplained. The estimator adjoint, with the target as an anchor, values exactly."
        for source, residual in data.residuals.items()
        if residual > _WEAK_RESIDUAL
    ]


def _about_length(data: ReportData) -> list[str]:
    return [
        f"Inside domains, a sample's value {where(source)} goes with its length (rank correlation {signed(bias)}): "
        "choosing by value also chooses by length."
        for source, bias in data.length_bias.items()
        if abs(bias) > LENGTH_BIAS
    ]


def _about_predictions(data: ReportData) -> list[str]:
    weak = {row["domain"] for row in data.predicted if row["used"] == "domain mean" and row["spearman"] is not None}
    if not weak:
        return []
    said = (
        f"Predictions do not rank the measured samples of {listed(sorted(weak))} well enough. The other samples there "
    )
    return [said + "count with the mean of their domain: only measured ones are chosen by value."]


def _about_contamination(data: ReportData) -> list[str]:
    left = sum(row["samples"] for row in data.contamination if not row["removed"])
    if not left:
        return []
    said = f"{count(left)} samples of the next stage's data share text with held-out documents and are still in it: "
    return [said + "select with --mode samples to leave them out, or expect losses there that are too good."]


def _about_unmeasured(data: ReportData) -> list[str]:
    nothing = data.domains.filter(pl.col("samples") == 0)
    return [
        f"Nothing was measured of {listed(sorted(domains))} {where(source)}: a score of 0 there is the average, not a "
        "measurement."
        for source in data.horizons
        if (domains := nothing.filter(source=source)["domain"].unique().to_list())
    ]


def facts(data: ReportData) -> list[tuple[str, str]]:
    """Name and value of what identifies the selection."""
    checkpoints = [f"{source_name(source)}: {checkpoint_name(horizon)}" for source, horizon in data.horizons.items()]
    delivered = int(data.mixture["stored_tokens"].sum())
    weights = data.mixture.filter(pl.col("weight") > 0)["weight"]
    entropy = float(-(weights * weights.log()).sum())
    pooled = data.reliability.filter((pl.col("ranking") == "pooled") & (pl.col("source") == data.mixture_source))
    reliability = pooled["reliability"].to_list()
    unexplained = [f"{source_name(source)} {percent(residual)}" for source, residual in data.residuals.items()]
    return [
        ("run", data.run),
        ("target", f"{data.target} ({count(data.target_documents)} documents, {count(data.target_tokens)} tokens)"),
        ("retained text", data.retain or "none"),
        *([("split-half reliability", signed(reliability[0]))] if reliability else []),
        ("estimator", data.estimator),
        *([("unexplained by the anchors", "; ".join(unexplained))] if unexplained else []),
        ("evaluation checkpoint", "; ".join(checkpoints)),
        ("next stage", f"{count(delivered)} tokens of {count(data.budget_tokens)} asked for"),
        ("domains in effect", f"{number(2.718281828459045**entropy)} of {data.mixture.height}"),
        *[(f"limit on {_LIMITS.get(name, name)}", _limit_said(limit)) for name, limit in data.group_limits.items()],
        ("values and selection took", duration(float(data.costs["seconds"].sum()))),
    ]


def _limit_said(limit: Mapping[str, float]) -> str:
    binds = f"shadow price {number(limit['price'])}" if limit["price"] else "does not bind"
    return f"{signed(limit['reached'])}, at least {signed(limit['least'])}; {binds}"
