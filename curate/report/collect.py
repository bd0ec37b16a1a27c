"""Collect what a report shows from a selection's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import polars as pl

from curate.formats.documents import load_tokenizer

if TYPE_CHECKING:
    from curate.mixture.record import Mixture
    from curate.trajectory.run import Run

EXAMPLES = 12  # most and least valuable samples of each window


def training_curve(run: Run) -> pl.DataFrame:
    """One row per step: loss, lr of the first parameter group, gradient norm."""
    first = run.steps.unique("step", keep="first", maintain_order=True)
    return first.select("step", "loss", lr=pl.col("groups").list.first().struct.field("lr"), grad_norm="grad_norm")


def value_curve(values: pl.DataFrame, training: pl.DataFrame) -> pl.DataFrame:
    """Mean value per predicted token of each (window, step, domain), raw and divided by the step's lr."""
    sums = values.group_by("window", "step", "domain").agg(value=pl.col("value").sum() / pl.col("tokens").sum())
    joined = sums.join(training.select("step", "lr"), on="step", how="left").sort("window", "step", "domain")
    return joined.select("window", "step", "domain", "value", value_per_lr=pl.col("value") / pl.col("lr"))


def mixture_table(mixture: Mixture) -> pl.DataFrame:
    """The mixture, one row per domain; `weight` is what is delivered."""
    rows = [
        {
            "domain": name, "prior": domain.prior, "weight": domain.delivered_weight, "tokens": domain.tokens,
            "samples": domain.samples, "epochs": domain.epochs, "binding": domain.binding,
        }
        for name, domain in mixture.domains.items()
    ]  # fmt: skip
    return pl.DataFrame(rows, schema_overrides={"binding": pl.String})


def example_table(run: Run, values: pl.DataFrame, found: Mapping[tuple[str, str], Sequence[int]]) -> pl.DataFrame:
    """Samples to read.

    Args:
        run: supplies tokens and tokenizer; without a tokenizer the token ids are shown.
        values: the values frame.
        found: (window, "most" or "least") -> row numbers within that window, best match first.
    """
    tokenizer = load_tokenizer(run.spec.tokenizer) if run.spec.tokenizer else None
    rows = []
    for (window, kind), places in found.items():
        frame = values.filter(window=window)
        for rank, place in enumerate(places, start=1):
            row = frame.row(int(place), named=True)
            tokens = run.streams[row["domain"]][row["index"]].tokens.tolist()
            text = tokenizer.decode(tokens, skip_special_tokens=False) if tokenizer else " ".join(map(str, tokens))
            chosen = {name: row[name] for name in ("window", "step", "domain", "sample_id", "value")}
            rows.append({"kind": kind, "rank": rank, **chosen, "text": text})
    return pl.DataFrame(rows)
