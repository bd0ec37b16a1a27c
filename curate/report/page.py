"""One self-contained HTML file from a `ReportData`: equal data, equal bytes; nothing is loaded from anywhere."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl

from curate.core.escape import page_text
from curate.core.writing import replacing
from curate.domains.reliability import LENGTH_BIAS
from curate.report import figures, tables
from curate.report.data import ReportData
from curate.report.style import colours, count, duration, listed, number, percent, scale_of, signed
from curate.stats.sums import row_mean
from curate.training.source import CANDIDATES, CURRENT

# Points of a figure and rows of its table; longer stretches are shown in groups of consecutive steps.
MAX_WINDOW_STEPS = 150
MAX_STAGE_STEPS = 600
_SHOWN_EXAMPLES = 4  # of each kind before the fold
_WEAK_RELIABILITY = 0.5
_WEAK_RESIDUAL = 0.5


def write_report(path: Path, data: ReportData) -> None:
    """Write the report atomically.

    Args:
        path: the HTML file.
        data: what it shows.
    """
    with replacing(path) as part:
        part.write_text(render(data), encoding="utf-8")


def render(data: ReportData) -> str:
    """The report as HTML text."""
    return fill("template.html", data=data, **_content(data))


def fill(template: str, **values: Any) -> str:
    """A page of this package's templates with the looks and scripts that all pages have; every text is escaped."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_shown
    )
    environment.filters |= {"count": count, "percent": percent, "signed": signed, "number": number}
    looks = {"style": resource("page.css"), "script": resource("page.js"), "plotly": get_plotlyjs()}
    return environment.from_string(resource(template)).render(**looks, **values)


def _shown(value: Any) -> Any:
    """Text as a page shows it; what is marked as HTML is our own."""
    return page_text(value) if type(value) is str else value


def resource(name: str) -> str:
    """Text of a file of this package."""
    return (files("curate.report") / name).read_text(encoding="utf-8")


def _content(data: ReportData) -> dict[str, Any]:
    """Everything the template needs besides the data itself."""
    windows = list(data.horizons)
    order = domain_order(data)
    colour = colours(order)
    curve, grouped = group_steps(data.curve, MAX_WINDOW_STEPS, "source", "domain")
    training, stage_grouped = group_steps(data.training, MAX_STAGE_STEPS)
    scale, per_lr = scale_of(curve["value"]), scale_of(curve["value_per_lr"])
    per_token = scale_of([*data.domains["value_per_token"], *data.domains["low"], *data.domains["high"]])
    sample_scale = scale_of(data.examples["value"])
    seen = [window for window in windows if window in set(data.curve["source"])]
    drawn = [domain for domain in order if domain in set(curve["domain"])]
    before = "candidates" if data.mixture_source == CANDIDATES else "finished stage"
    shared: dict[str, Any] = {"windows": seen, "domains": drawn, "colours": colour}
    return {
        "windows": windows,
        "seen": seen,
        "scored_by": window_name(data.mixture_source),
        "colours": colour,
        "headline": headline(data),
        "warnings": warnings(data),
        "facts": facts(data),
        "grouped": grouped,
        "stage_grouped": stage_grouped,
        "curve_figure": figures.value_figure(curve, data.training, value="value", scale=scale, **shared),
        "curve_lr_figure": figures.value_figure(curve, data.training, value="value_per_lr", scale=per_lr, **shared),
        "curve_unit": scale.unit,
        "curve_lr_unit": per_lr.unit,
        "curve_table": tables.curve_table(curve, order, windows, scale, per_lr),
        "training_figure": figures.training_figure(
            training, {window: figures.window_range(data.curve, window) for window in seen}
        ),
        "training_table": tables.training_table(training),
        "score_figure": figures.score_figure(data.domains, windows=windows, order=order, colours=colour),
        "mixed": data.domains["ngram_ratio"].drop_nulls().len() > 0,
        "score_table": tables.domain_table(data.domains, order, windows, per_token),
        "mixture_figure": figures.mixture_figure(data.mixture, order=order, colours=colour, before=before),
        "mixture_table": tables.mixture_table(data.mixture, order, before),
        "of_candidates": data.mixture_source == CANDIDATES,
        "by_slopes": any("also_measured" in row for row in data.predicted),
        "own_slopes": sum(row.get("also_measured", 0) for row in data.predicted),
        "predicted_table": tables.quality_table(data.predicted) if data.predicted else None,
        "phase_table": tables.phase_table(data.phases, order) if len(data.phases) > 1 else None,
        "sweep_table": tables.sweep_table(data.sweep, order),
        "target_table": tables.target_table(data.targets, order) if data.targets["target"].n_unique() > 1 else None,
        "examples": examples(data, sample_scale.factor),
        "examples_unit": sample_scale.unit,
        "shown_examples": _SHOWN_EXAMPLES,
        "contamination_table": tables.contamination_table(data.contamination) if data.contamination else None,
        "shard_table": tables.shard_table(data.shards, order, windows),
        "reliability_table": tables.reliability_table(data.reliability, windows),
        "cost_table": tables.cost_table(data.costs),
        "settings": json.dumps(dict(data.settings), indent=2),
    }


def domain_order(data: ReportData) -> list[str]:
    """All domains, the highest score of the window that set the mixture first, ties by name."""
    scores = data.domains.filter(source=data.mixture_source).select("domain", "score")
    rank = dict(scores.iter_rows())
    everywhere = {domain for frame in (data.domains, data.mixture, data.curve) for domain in frame["domain"]}
    return sorted(everywhere, key=lambda domain: (-(rank.get(domain) or 0.0), domain))


def group_steps(frame: pl.DataFrame, most: int, *keys: str) -> tuple[pl.DataFrame, int]:
    """Average groups of consecutive steps where there are more than a figure can show.

    Args:
        frame: a column `step`, the `keys`, and numbers.
        most: steps that may remain.
        keys: columns that tell apart rows of one step; the first one also tells apart ranges of steps (windows).

    Returns:
        the frame, and how many steps one of its points stands for.
    """
    apart = keys[:1] or [pl.lit(0)]
    counts = frame.select(pl.col("step").n_unique().over(apart)).to_series().to_list()
    size = -(-max(counts, default=1) // most)
    if size <= 1:
        return frame, 1
    start = pl.col("step").min().over(apart)
    grouped = (
        frame.with_columns(step=start + (pl.col("step") - start) // size * size)
        .group_by("step", *keys)
        .agg(row_mean(pl.all()))
    )
    return grouped.select(frame.columns).sort("step", *keys), size


def window_name(window: str) -> str:
    """A window in words; the next step is none."""
    return "next step" if window == CURRENT else f"{window} window"


def headline(data: ReportData) -> str:
    """The finding in two sentences, with its numbers."""
    scores = data.domains.filter((pl.col("source") == data.mixture_source) & (pl.col("samples") > 0)).sort(
        "value_score", "domain", descending=[True, False]
    )
    shares = {row["domain"]: row for row in data.mixture.to_dicts()}
    if scores.is_empty():
        return f"No sample of the {window_name(data.mixture_source)} was valued."
    best, worst = scores.row(0, named=True), scores.row(-1, named=True)
    changes = [
        f"{row['domain']} from {percent(shares[row['domain']]['prior'])} to {percent(shares[row['domain']]['weight'])}"
        for row in (best, worst)
        if row["domain"] in shares
    ]
    helped = "would help" if data.mixture_source == CURRENT else "helped"
    found = f"In the {window_name(data.mixture_source)} {best['domain']} {helped} the target most and "
    found += f"{worst['domain']} least."
    return f"{found} Their shares of the tokens: {listed(changes)}." if changes else found


def warnings(data: ReportData) -> list[str]:
    """What a reader must know before believing the numbers."""
    weak = data.reliability.filter((pl.col("ranking") == "within_step") & (pl.col("reliability") < _WEAK_RELIABILITY))
    found = [
        f"Another half of the target would have ranked the samples of the {row['source']} window differently "
        f"(reliability {signed(row['reliability'])}): judge no single sample by its value, or give a larger target."
        for row in weak.to_dicts()
    ]
    found += [
        f"Values of the {window} window are approximate: the anchors leave {percent(residual)} of the "
        "gradient of the target unexplained. The estimator adjoint, with the target as an anchor, values exactly."
        for window, residual in data.residuals.items()
        if residual > _WEAK_RESIDUAL
    ]
    found += [
        f"Inside domains, a sample's value in the {window_name(window)} goes with its length (rank correlation "
        f"{signed(bias)}): choosing by value also chooses by length."
        for window, bias in data.length_bias.items()
        if abs(bias) > LENGTH_BIAS
    ]
    weak_domains = sorted(
        {row["domain"] for row in data.predicted if row["used"] == "domain mean" and row["spearman"] is not None}
    )
    if weak_domains:
        found.append(
            f"What the rest of {listed(weak_domains)} is valued by does not rank its probes well enough: the mean of "
            "the domain stands for its other samples, and only probed ones are chosen by value."
        )
    left = sum(row["samples"] for row in data.contamination if not row["removed"])
    if left:
        found.append(
            f"{count(left)} samples of the next stage's data share text with held-out documents and are still in it: "
            "select with --mode filter to leave them out, or expect losses on those documents that are too good."
        )
    unseen = sorted(set(data.domains.filter(pl.col("samples") == 0)["domain"]))
    if unseen:
        found.append(
            f"A window has no sample of {listed(unseen)}; the score of 0 there is the average, not a measurement."
        )
    return found


def facts(data: ReportData) -> list[tuple[str, str]]:
    """Name and value of what identifies the selection."""
    horizons = [f"{window} at {horizon}".replace("_", " ") for window, horizon in data.horizons.items()]
    delivered = int(data.mixture["stored_tokens"].sum())
    weights = data.mixture.filter(pl.col("weight") > 0)["weight"]
    entropy = float(-(weights * weights.log()).sum())
    reliability = data.reliability.filter((pl.col("ranking") == "pooled") & (pl.col("source") == data.mixture_source))
    measured = reliability["reliability"].to_list()
    unexplained = [f"{window} {percent(residual)}" for window, residual in data.residuals.items()]
    return [
        ("run", data.run),
        ("target", f"{data.target} ({count(data.target_documents)} documents, {count(data.target_tokens)} tokens)"),
        ("split-half reliability", signed(measured[0]) if measured else "–"),
        ("estimator", data.estimator),
        *([("unexplained by the anchors", "; ".join(unexplained))] if unexplained else []),
        ("horizon", "; ".join(horizons)),
        ("next stage", f"{count(delivered)} tokens of {count(data.budget_tokens)} asked for"),
        ("domains in effect", f"{number(2.718281828459045**entropy)} of {data.mixture.height}"),
        *[
            (
                name.replace("_", " "),
                f"{signed(one['reached'])}, at least {signed(one['least'])}; price {number(one['price'])}",
            )
            for name, one in data.group_limits.items()
        ],
        ("embedding and selection took", duration(float(data.costs["seconds"].sum()))),
    ]


def examples(data: ReportData, factor: float) -> dict[str, list[dict[str, Any]]]:
    """Samples to read, most and least valuable, with values as text."""
    rows = data.examples.sort("kind", "rank").to_dicts()
    shown = [{**row, "value": number(row["value"] * factor), "colour_key": row["domain"]} for row in rows]
    return {kind: [row for row in shown if row["kind"] == kind] for kind in ("most", "least")}
