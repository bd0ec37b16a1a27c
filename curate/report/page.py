"""One self-contained HTML file from a `ReportData`: equal data, equal bytes; nothing is loaded from anywhere."""

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import polars as pl

from curate.core.escape import page_text
from curate.core.writing import atomic_write
from curate.report import figures, tables
from curate.report.data import ReportData
from curate.report.sentences import checkpoint_name, facts, has_ngrams, headline, is_next_step, resampled, warnings
from curate.report.style import colours, count, number, percent, scale_of, signed, source_name
from curate.stats.sums import row_mean
from curate.training.source import CANDIDATES

# Points of a figure and rows of its table; longer stretches are shown in groups of consecutive steps.
MAX_WINDOW_STEPS = 150
MAX_STAGE_STEPS = 600
_SHOWN_EXAMPLES = 4  # of each kind; the others are folded away


def write_report(path: Path, data: ReportData) -> None:
    """Write the report atomically.

    Args:
        path: the HTML file.
        data: what it shows.
    """
    with atomic_write(path) as part:
        part.write_text(render(data), encoding="utf-8")


def render(data: ReportData) -> str:
    """The report as HTML text."""
    return fill("template.html", data=data, **_content(data))


def fill(template: str, **values: Any) -> str:
    """A page of this package's templates with the looks and scripts that all pages have; every text is escaped."""
    # both are heavy, and only writers of pages need them
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(
        # StrictUndefined: a name that a template spells wrong raises instead of leaving a gap in the page
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    environment.filters |= {"count": count, "percent": percent, "signed": signed, "number": number}
    # Plotly is put into the file (4 MB): the page opens without a network, and years later
    looks = {"style": resource("page.css"), "script": resource("page.js"), "plotly": get_plotlyjs()}
    return environment.from_string(resource(template)).render(**looks, **values)


def _shown(value: Any) -> Any:
    """Text as a page shows it; what is marked as HTML is our own."""
    # `type is`, not isinstance: Markup is a str too, and must not be escaped again
    return page_text(value) if type(value) is str else value


def resource(name: str) -> str:
    """Text of a file of this package."""
    return (files("curate.report") / name).read_text(encoding="utf-8")


def _content(data: ReportData) -> dict[str, Any]:
    """Everything the template needs besides the data itself."""
    sources, order = list(data.horizons), domain_order(data)
    colour = colours(order)
    # only windows have steps to be drawn over; current state and candidates have none
    windows = [source for source in sources if source in set(data.curve["source"])]
    before = "candidates" if data.mixture_source == CANDIDATES else "finished stage"
    return {
        "sources": sources,
        "windows": windows,
        "source_name": source_name,
        "checkpoint_name": checkpoint_name,
        "is_next_step": is_next_step,
        "mixture_source": data.mixture_source,
        "of_candidates": data.mixture_source == CANDIDATES,
        "colours": colour,
        "headline": headline(data),
        "warnings": warnings(data),
        "facts": facts(data),
        "score_figure": figures.score_figure(data.domains, sources=sources, order=order, colours=colour),
        "has_ngrams": has_ngrams(data),
        "resampled": resampled(sources),
        "mixture_figure": figures.mixture_figure(data.mixture, order=order, colours=colour, before=before),
        "also_measured": sum(row["also_measured"] or 0 for row in data.predicted),
        "chosen_by_next_step": any(row["also_measured"] is not None for row in data.predicted),
        "shown_examples": _SHOWN_EXAMPLES,
        "settings": json.dumps(dict(data.settings), indent=2),
        **_over_training(data, windows, order, colour),
        **_examples(data),
        **_tables(data, sources, order, before),
    }


def _over_training(
    data: ReportData, windows: Sequence[str], order: Sequence[str], colour: Mapping[str, str]
) -> dict[str, Any]:
    """Values and training over steps: figures and their tables."""
    curve, grouped = group_steps(data.curve, MAX_WINDOW_STEPS, "source", "domain")
    training, stage_grouped = group_steps(data.training, MAX_STAGE_STEPS)
    scale, per_lr = scale_of(curve["value"]), scale_of(curve["value_per_lr"])
    # a domain without a valued sample in any window would be an empty row
    drawn = [domain for domain in order if domain in set(curve["domain"])]
    looks: dict[str, Any] = {"windows": windows, "domains": drawn, "colours": colour}
    return {
        "grouped": grouped,
        "stage_grouped": stage_grouped,
        "curve_figure": figures.value_figure(curve, data.training, value="value", scale=scale, **looks),
        "curve_lr_figure": figures.value_figure(curve, data.training, value="value_per_lr", scale=per_lr, **looks),
        "curve_unit": scale.unit,
        "curve_lr_unit": per_lr.unit,
        "curve_table": tables.curve_table(curve, order, windows, scale, per_lr),
        "training_figure": figures.training_figure(
            training, {window: figures.window_range(data.curve, window) for window in windows}
        ),
        "training_table": tables.training_table(training),
    }


def _tables(data: ReportData, sources: Sequence[str], order: Sequence[str], before: str) -> dict[str, Any]:
    """The tables that belong to no figure over steps; None where there is nothing to show."""
    per_token = scale_of([*data.domains["value_per_token"], *data.domains["low"], *data.domains["high"]])
    # one target alone is what the table of scores shows already
    several_targets = data.targets["target"].n_unique() > 1
    return {
        "score_table": tables.domain_table(data.domains, order, sources, per_token),
        "mixture_table": tables.mixture_table(data.mixture, order, sources, before),
        "trust_table": tables.trust_table(data.trust) if data.trust else None,
        "predicted_table": tables.quality_table(data.predicted) if data.predicted else None,
        "phase_table": tables.phase_table(data.phases, order) if len(data.phases) > 1 else None,
        "sweep_table": tables.sweep_table(data.sweep, order),
        "target_table": tables.target_table(data.targets, order) if several_targets else None,
        "contamination_table": tables.contamination_table(data.contamination) if data.contamination else None,
        "shard_table": tables.shard_table(data.shards, order, sources) if data.shards.height else None,
        "reliability_table": tables.reliability_table(data.reliability, sources) if data.reliability.height else None,
        "cost_table": tables.cost_table(data.costs),
    }


def domain_order(data: ReportData) -> list[str]:
    """All domains, the highest score of the source that set the mixture first, ties by name."""
    scores = data.domains.filter(source=data.mixture_source).select("domain", "score")
    rank = dict(scores.iter_rows())
    everywhere = {domain for frame in (data.domains, data.mixture, data.curve) for domain in frame["domain"]}
    # a domain that only the mixture has counts as average (score 0)
    return sorted(everywhere, key=lambda domain: (-(rank.get(domain) or 0.0), domain))


def group_steps(frame: pl.DataFrame, most: int, *keys: str) -> tuple[pl.DataFrame, int]:
    """Average groups of consecutive steps where there are more than a figure can show.

    Args:
        frame: a column `step`, the `keys`, and numbers.
        most: steps that may remain.
        keys: columns that tell apart rows of one step; the first one also tells apart ranges of steps (sources).

    Returns:
        the frame, and how many steps one of its points stands for.
    """
    apart = keys[:1] or [pl.lit(0)]
    counts = frame.select(pl.col("step").n_unique().over(apart)).to_series().to_list()
    # division rounded up; one size for all ranges, so that their points compare
    size = -(-max(counts, default=1) // most)
    if size <= 1:
        return frame, 1
    # groups of each source count from its own first step
    start = pl.col("step").min().over(apart)
    grouped = (
        frame.with_columns(step=start + (pl.col("step") - start) // size * size)
        .group_by("step", *keys)
        # row_mean: the same bits whatever the order in which threads add
        .agg(row_mean(pl.all()))
    )
    return grouped.select(frame.columns).sort("step", *keys), size


def _examples(data: ReportData) -> dict[str, Any]:
    """Samples to read, most and least valuable, with values as text."""
    scale = scale_of(data.examples["value"])
    # values of two sources do not compare: those of the source that set the mixture stand first
    ordered = data.examples.sort(pl.col("source") != data.mixture_source, "source", "rank")
    rows = [{**row, "value": number(row["value"] * scale.factor)} for row in ordered.to_dicts()]
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in ("most", "least")}
    return {"examples": by_kind, "examples_unit": scale.unit}
