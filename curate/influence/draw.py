"""Which samples are measured at the current state, and the tables of their values. Tables in, tables out."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.rng import generator
from curate.tables import DOCUMENTS, VALUES_NATS, VALUES_TOTAL, DrawnSamples, MeasuredValues, Samples, SampleValues

if TYPE_CHECKING:
    from curate.data.mds import Sample

HORIZON = "1_steps_on"
"""The state that the targets are read at: the one after the step that a sample is added to."""


def draw_measured(samples: dy.DataFrame[Samples], per_domain: int, batch: int, seed: int) -> dy.DataFrame[DrawnSamples]:
    """Draw the samples of every domain that are measured, spread evenly over the lengths of its samples.

    A systematic sample: every k-th one of a domain in the order of length, ties in random order, from a random start.
    Nothing depends on the order of the samples in shards.

    Args:
        samples: `domain`, `sample_id` and `predicted_tokens`, by domain and content id.
        per_domain: so many of each domain, or all where it has fewer.
        batch: samples in a group.
        seed: of the draw.

    Returns:
        Their rows, in the order of `samples`, with `step`: the group that a sample is dealt to. Groups stand for the
        steps of a window, whose samples are compared with each other and resampled together; at least eight where
        there are as many samples.
    """
    parts = []
    for (domain,), table in samples.group_by("domain", maintain_order=True):
        # the purposes of generators ("probes") are part of the draw: renaming one draws other samples
        random = generator(seed, "probes", str(domain))
        wanted = min(len(table), per_domain)
        noise = pl.Series(random.random(len(table)))
        ordered = table.with_columns(noise=noise).sort("predicted_tokens", "noise").drop("noise")
        rows = np.floor((np.arange(wanted) + random.random()) * len(table) / wanted).astype(np.int64)
        parts.append(ordered[rows])
    drawn: pl.DataFrame = pl.concat(parts).sort("domain", "sample_id")
    size = max(1, min(batch, len(drawn) // 8))  # at least eight groups, or a bootstrap over them says little
    groups = generator(seed, "probe groups").permutation(len(drawn)) // size
    return DrawnSamples.validate(drawn.with_columns(step=pl.Series(groups, dtype=pl.Int64)))


def as_measured_values(
    measured: pl.DataFrame,
    source: str,
    step_tokens: float,
    read: Callable[[pl.DataFrame], Iterable[list[Sample]]],
) -> dy.DataFrame[MeasuredValues]:
    """The table of measured values.

    Args:
        measured: `target`, the columns of `draw_measured` and `value_total_nats`, every target with the same samples
            in the same order. Derivatives know no halves of a target: those have the whole value.
        source: where the values come from: current or candidates.
        step_tokens: predicted tokens of a training step: a sample's weight is its share of them.
        read: gives the samples of a table in its order, some at a time.
    """
    # documents are read once, not once for each target
    first = measured.filter(target=measured["target"][0])
    documents = [sample.document_tokens() for samples in read(first) for sample in samples]
    rows = first.select(
        "domain",
        "sample_id",
        row=pl.int_range(pl.len()).cast(pl.Int64),
        documents=pl.Series(documents, dtype=DOCUMENTS),
    )
    joined = measured.join(rows, on=["domain", "sample_id"], maintain_order="left")
    values = joined.with_columns(
        (pl.col("predicted_tokens") / step_tokens).cast(pl.Float32).alias("weight"),
        *(pl.col("value_total_nats").alias(name) for name in VALUES_NATS),
        source=pl.lit(source),
        horizon=pl.lit(HORIZON),
    )
    return MeasuredValues.validate(values)


def as_sample_values(samples: pl.DataFrame, source: str, target: str) -> dy.DataFrame[SampleValues]:
    """The table that samples are chosen by; both halves of the target have the whole value.

    Args:
        samples: rows of `Samples`, with `value_total` of all their tokens.
        source: where the values come from.
        target: whose name the values have.
    """
    values = samples.sort("domain", "sample_id").with_columns(
        *(pl.col("value_total").alias(name) for name in VALUES_TOTAL), source=pl.lit(source), target=pl.lit(target)
    )
    return SampleValues.validate(values)
