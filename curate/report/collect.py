"""Collect what a report shows from a selection's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl

from curate.stats.sums import row_sum
from curate.training.samples import sample_texts

if TYPE_CHECKING:
    from pathlib import Path

    from curate.mixture.record import Mixture
    from curate.training.run import Run
    from curate.training.source import SampleSource

# The most and the least valuable samples of each source: enough to see a pattern, few enough to read.
EXAMPLES = 12


def training_curve(run: Run) -> pl.DataFrame:
    """One row per step: loss, lr of the first parameter group, gradient norm."""
    # a row per rank and micro-batch: loss, lr and gradient norm are those of the whole step in each
    first = run.steps.unique("step", keep="first", maintain_order=True)
    return first.select("step", "loss", lr=pl.col("groups").list.first().struct.field("lr"), grad_norm="grad_norm")


def value_curve(values: pl.DataFrame, training: pl.DataFrame) -> pl.DataFrame:
    """Mean value per predicted token (nats) of each (source, step, domain), raw and divided by the step's lr."""
    sums = values.group_by("source", "step", "domain").agg(
        # row_sum: the same bits whatever the number of threads; a mean of ratios would favour short samples
        value=row_sum(pl.col("value_total_nats")) / pl.col("predicted_tokens").sum()
    )
    # left join: the current state is no step of the stage and has no lr
    joined = sums.join(training.select("step", "lr"), on="step", how="left").sort("source", "step", "domain")
    return joined.select("source", "step", "domain", "value", value_per_lr=pl.col("value") / pl.col("lr"))


def mixture_table(mixture: Mixture, seen: pl.DataFrame) -> pl.DataFrame:
    """The mixture, one row per domain; `weight` is what is delivered, `epochs_so_far` all stages together."""
    so_far = dict(seen.select("domain", "epochs").iter_rows())
    rows = [
        {
            "domain": name,
            "prior": domain.prior,
            "weight": domain.delivered_weight,
            "stored_tokens": domain.stored_tokens,
            "samples": domain.samples,
            "epochs": domain.epochs,
            "epochs_so_far": so_far.get(name, 0.0),
            "binding": domain.binding,
            "unconstrained": domain.unconstrained_weight,
            **{
                f"by_{source}": None if asked.weights is None else asked.weights[name]
                for source, asked in mixture.by_source.items()
            },
        }
        for name, domain in mixture.domains.items()
    ]
    # nulls alone would leave the column without a type
    return pl.DataFrame(rows, schema_overrides={"binding": pl.String})


def sweep_table(mixture: Mixture) -> pl.DataFrame:
    """One row per prior strength of the sweep."""
    rows = [
        point.model_dump(exclude={"weights"}) | {f"share_{name}": share for name, share in point.weights.items()}
        for point in mixture.sweep
    ]
    # null in every row where nothing is retained
    return pl.DataFrame(rows, schema_overrides={"retained_score": pl.Float64})


def target_table(domains: pl.DataFrame, mixture: Mixture) -> pl.DataFrame:
    """Domain scores of every target, the retention target with weight null, of the source that set the mixture."""
    weights: dict[str, float | None] = {**mixture.targets}
    # the retention target constrains the mixture and has no weight in its aim
    if mixture.retain is not None:
        weights[mixture.retain] = None
    order = pl.DataFrame(
        {"target": list(weights), "weight": list(weights.values())}, schema_overrides={"weight": pl.Float64}
    )
    # without maintain_order a join gives rows in any order
    rows = order.join(domains.filter(source=mixture.source), on="target", maintain_order="left_right")
    return rows.select("target", "weight", "domain", "score", "score_low", "score_high", "shrunk")


def contamination_table(contamination: pl.DataFrame) -> pl.DataFrame:
    """The overlap with held-out text, by domain and file, most samples first; see `ReportData.contamination`."""
    # a sample may share text with several documents of a file: it counts once
    by_file = contamination.group_by("domain", "file").agg(
        samples=pl.col("sample_id").n_unique(),
        documents=pl.col("id").n_unique(),
        of_sample=pl.col("of_sample").max(),
        removed=pl.col("removed").all(),
    )
    return by_file.sort("samples", "domain", "file", descending=[True, False, False])


def example_table(
    source: SampleSource,
    tokenizer_file: Path | None,
    values: pl.DataFrame,
    rows_of: Mapping[tuple[str, str], Sequence[int]],
) -> pl.DataFrame:
    """Samples to read.

    Args:
        source: of the samples.
        tokenizer_file: that made the tokens; None: the token ids are shown.
        values: the values frames of one target.
        rows_of: (source, "most" or "least") -> row numbers within that source, best match first.
    """
    rows = []
    for (name, kind), source_rows in rows_of.items():
        frame = values.filter(source=name)
        found = [frame.row(int(row), named=True) for row in source_rows]
        texts = sample_texts(source, tokenizer_file, [row["sample_id"] for row in found])
        for rank, (row, text) in enumerate(zip(found, texts, strict=True), start=1):
            chosen = {column: row[column] for column in ("source", "step", "domain", "sample_id")}
            chosen["value"] = row["value_total_nats"]
            rows.append({"kind": kind, "rank": rank, **chosen, "text": text})
    return pl.DataFrame(rows)
