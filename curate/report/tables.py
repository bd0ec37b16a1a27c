"""The report's tables: frames in, rows of text out. Each figure has one, so that no number is only drawn."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from curate.report.figures import bound_name
from curate.report.style import Scale, count, decimal, duration, number, percent, signed, size

Cell = Callable[[Any], str]


@dataclass(frozen=True)
class Table:
    """Text in rows and columns; `numeric` columns are set right-aligned with figures of equal width."""

    headers: list[str]
    numeric: list[bool]
    rows: list[list[str]]


def table(frame: pl.DataFrame, columns: Mapping[str, tuple[str, Cell | None]]) -> Table:
    """Choose, name and format columns.

    Args:
        frame: the rows.
        columns: column -> (header, format); a format of None leaves text as it is.
    """
    formats = [_text if show is None else show for _, show in columns.values()]
    return Table(
        headers=[header for header, _ in columns.values()],
        numeric=[show is not None for _, show in columns.values()],
        rows=[
            [show(cell) for show, cell in zip(formats, row, strict=True)]
            for row in frame.select(list(columns)).iter_rows()
        ],
    )


def _text(value: Any) -> str:
    return "–" if value is None else str(value)


def domain_table(domains: pl.DataFrame, order: Sequence[str], sources: Sequence[str], scale: Scale) -> Table:
    """Scores, what they are made of, and the values per token behind them."""
    components = {"value_score": ("of values", signed), "ngram_ratio": ("of n-gram ratios", signed)}
    scaled = domains.with_columns(pl.col("value_per_token", "low", "high") * scale.factor)
    return table(
        _sorted(scaled, order, sources),
        {
            "domain": ("domain", None),
            "source": ("source", None),
            "score": ("score", signed),
            "score_low": ("low", signed),
            "score_high": ("high", signed),
            "shrunk": ("shrunk", signed),
            # without n-grams the score is the value score: nothing to take apart
            **(components if domains["ngram_ratio"].drop_nulls().len() else {}),
            "novel_share": ("novel n-grams", percent),
            "value_per_token": (f"value per token, {scale.unit}", number),
            "low": ("low", number),
            "high": ("high", number),
            "samples": ("measured samples", count),
            "predicted_tokens": ("their tokens", count),
        },
    )


def mixture_table(mixture: pl.DataFrame, order: Sequence[str], sources: Sequence[str], before: str) -> Table:
    """Old and new shares and what is delivered; `before` names what the old ones are of."""
    by_source = {f"by_{source}": (f"{source} alone", percent) for source in sources}
    named = mixture.with_columns(pl.col("binding").map_elements(bound_name, return_dtype=pl.String))
    return table(
        _sorted(named, order, ()),
        {
            "domain": ("domain", None),
            "prior": (before, percent),
            "weight": ("next stage", percent),
            "stored_tokens": ("tokens", count),
            "samples": ("samples", count),
            "epochs": ("epochs", decimal),
            "epochs_so_far": ("epochs so far", decimal),
            "binding": ("held by", None),
            "unconstrained": ("without bounds", percent),
            # with one source its weights are the mixture without bounds
            **({name: by_source[name] for name in by_source if name in mixture.columns} if len(by_source) > 1 else {}),
        },
    )


def sweep_table(sweep: pl.DataFrame, order: Sequence[str]) -> Table:
    """What other prior strengths would give."""
    return table(
        sweep.sort("prior_strength"),
        {
            "prior_strength": ("prior strength", number),
            "expected_score": ("expected score", signed),
            **(
                {"retained_score": ("score of the retained text", signed)}
                if sweep["retained_score"].drop_nulls().len()
                else {}
            ),
            "kl_to_prior": ("KL to prior", number),
            "effective_domains": ("domains in effect", decimal),
            **{f"share_{name}": (name, percent) for name in order if f"share_{name}" in sweep.columns},
        },
    )


def target_table(targets: pl.DataFrame, order: Sequence[str]) -> Table:
    """Scores for each target."""
    return table(
        _sorted(targets, order, ()),
        {
            "domain": ("domain", None),
            "target": ("target", None),
            # null marks the retention target, see `collect.target_table`
            "weight": ("weight", lambda weight: "retained" if weight is None else number(weight)),
            "score": ("score", signed),
            "score_low": ("low", signed),
            "score_high": ("high", signed),
            "shrunk": ("shrunk", signed),
        },
    )


def quality_table(quality: Sequence[Mapping[str, Any]]) -> Table:
    """How much of each domain was measured, and what predictions of the other samples are worth."""
    # what `influence.extrapolate` decided for the samples that were not measured
    names = {
        "predictor": "predicted",
        "domain mean": "mean of the domain",
        "measured": "none left",
        "too few": "too few to tell",
    }
    # only a choice by next-step influence measures promising samples on top
    also = ["by row", "promising, measured"] if quality[0]["also_measured"] is not None else []
    return Table(
        headers=["domain", "samples", "measured", "rank correlation", "low", "high", *also, "the others"],
        numeric=[False, *[True] * (5 + len(also)), False],
        rows=[
            [
                row["domain"],
                count(row["samples"]),
                count(row["measured"]),
                *(signed(row[name]) for name in ("spearman", "low", "high")),
                *([count(row["by_row"]), count(row["also_measured"])] if also else []),
                names[row["used"]] if _left(row) else "none left",
            ]
            for row in quality
        ],
    )


def _left(row: Mapping[str, Any]) -> int:
    """How many samples of a domain are neither measured nor valued by their rows."""
    valued: int = row["measured"] + (row["also_measured"] or 0) + (row["by_row"] or 0)
    return int(row["samples"]) - valued


def trust_table(trust: Sequence[Mapping[str, Any]]) -> Table:
    """How well rows of the value index give exact values in each domain, and whether they are used."""
    return Table(
        headers=[
            "domain",
            "samples",
            "held against exact values",
            "rank correlation",
            "low",
            "high",
            "held by rows",
            "rows are",
        ],
        numeric=[False, *[True] * 6, False],
        rows=[
            [
                row["domain"],
                count(row["samples"]),
                count(row["measured"]),
                *(signed(row[name]) for name in ("spearman", "low", "high")),
                "" if row["share_held"] is None else percent(max(row["share_held"], 0.0)),
                "used" if row["used"] else "not used",
            ]
            for row in trust
        ],
    )


def contamination_table(contamination: Sequence[Mapping[str, Any]]) -> Table:
    """Which samples share text with documents that must not be trained on."""
    return Table(
        headers=["domain", "held-out file", "samples", "documents", "largest share of a sample", "in the next stage"],
        numeric=[False, False, True, True, True, False],
        rows=[
            [
                row["domain"],
                row["file"],
                count(row["samples"]),
                count(row["documents"]),
                percent(row["of_sample"]),
                "left out" if row["removed"] else "still there",
            ]
            for row in contamination
        ],
    )


def phase_table(phases: Sequence[Mapping[str, Any]], order: Sequence[str]) -> Table:
    """The phases of the next stage: where each starts, its length, its blend, and each domain's share of samples."""
    return Table(
        headers=["from sample", "samples", "blend", *order],
        numeric=[True] * (3 + len(order)),
        rows=[
            [
                count(phase["start_sample"]),
                count(phase["samples"]),
                percent(phase["blend"], 0),
                *(percent(phase["domains"].get(domain, 0) / phase["samples"]) for domain in order),
            ]
            for phase in phases
        ],
    )


def curve_table(
    curve: pl.DataFrame, order: Sequence[str], windows: Sequence[str], scale: Scale, per_lr: Scale
) -> Table:
    """Value per token of each domain at each step."""
    scaled = curve.with_columns(pl.col("value") * scale.factor, pl.col("value_per_lr") * per_lr.factor)
    return table(
        _sorted(scaled, order, windows, "step"),
        {
            "domain": ("domain", None),
            "source": ("source", None),
            "step": ("step", count),
            "value": (f"value per token, {scale.unit}", number),
            "value_per_lr": (f"per unit of learning rate, {per_lr.unit}", number),
        },
    )


def training_table(training: pl.DataFrame) -> Table:
    """The training curve."""
    return table(
        training.sort("step"),
        {
            "step": ("step", count),
            "loss": ("loss, nats per token", lambda value: number(value, 5)),
            "lr": ("learning rate", number),
            "grad_norm": ("gradient norm", number),
        },
    )


def shard_table(shards: pl.DataFrame, order: Sequence[str], sources: Sequence[str]) -> Table:
    """Do shards differ in value?"""
    return table(
        _sorted(shards, order, sources),
        {
            "domain": ("domain", None),
            "source": ("source", None),
            "shards": ("shards", count),
            "samples": ("samples", count),
            "share_between": ("variance between shards", percent),
            "p_value": ("p", number),
            "verdict": ("verdict", None),
        },
    )


def reliability_table(reliability: pl.DataFrame, sources: Sequence[str]) -> Table:
    """Would another half of the target have ranked the samples the same way?"""
    named = reliability.with_columns(pl.col("ranking").str.replace("_", " "))
    return table(
        _sorted(named, (), sources),
        {
            "source": ("source", None),
            "ranking": ("ranking", None),
            "samples": ("samples", count),
            "spearman": ("Spearman of the halves", signed),
            "reliability": ("reliability", signed),
            "reliability_low": ("low", signed),
            "reliability_high": ("high", signed),
        },
    )


def cost_table(costs: pl.DataFrame) -> Table:
    """What each phase cost."""
    return table(
        costs,
        {
            "phase": ("phase", None),
            # "0" where no passes were run, an en dash where nobody counted them; number() would write 0.000
            "passes": ("passes", lambda value: number(value, 4) if value else count(value)),
            "seconds": ("time", duration),
            "bytes": ("written", size),
            "note": ("note", None),
        },
    )


def _sorted(frame: pl.DataFrame, domains: Sequence[str], sources: Sequence[str], *then: str) -> pl.DataFrame:
    """Rows in the order of the figures: domains, then sources, then what is named; the rest at the end."""
    orders = {"domain": domains, "source": sources}
    keys = [
        # names that an order lacks go to the end instead of raising
        pl.col(column).replace_strict({name: index for index, name in enumerate(order)}, default=len(order))
        for column, order in orders.items()
        if column in frame.columns and order
    ]
    return frame.sort([*keys, *then], maintain_order=True) if keys or then else frame
