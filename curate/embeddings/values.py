"""The values frame: one row per (sample, step) of a window with its value for one target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import dataframely as dy
import numpy as np
import numpy.typing as npt
import polars as pl

from curate.tables import MeasuredValues, WindowRows

if TYPE_CHECKING:
    from curate.embeddings.store import Embedding
    from curate.training.target import Target

_CHUNK = 1 << 16  # rows multiplied at once: vectors are memory-mapped, and their float64 copy must stay small


def value_frame(
    rows: dy.DataFrame[WindowRows],
    vectors: npt.NDArray[np.float32],
    halves: npt.NDArray[np.float32],
    half_weights: Sequence[float],
    target: str,
) -> dy.DataFrame[MeasuredValues]:
    """Values of all rows for a target and for each half of it.

        value = <E[z], t>,    t = sum_h half_weights[h] t_h

    Args:
        rows: N rows of a window (`curate.training.samples.window_rows`).
        vectors: (N, D) embeddings, usually memory-mapped; read in chunks.
        halves: (2, D), t of each half of the target.
        half_weights: each half's share of the target.
        target: its name.

    Returns:
        `rows` with `target`, `value_total_nats`, `value_half_a_nats` and `value_half_b_nats`: nats per token of the
        target; positive = the sample helped.
    """
    # float64: a value is a sum of D products of both signs, and may be far smaller than they are.
    products = np.empty((len(rows), len(halves)))
    for start in range(0, len(rows), _CHUNK):
        products[start : start + _CHUNK] = vectors[start : start + _CHUNK].astype(np.float64) @ halves.T
    valued = rows.with_columns(
        pl.lit(target).alias("target"),
        pl.Series("value_total_nats", products @ np.asarray(half_weights)),
        pl.Series("value_half_a_nats", products[:, 0]),
        pl.Series("value_half_b_nats", products[:, 1]),
    )
    return MeasuredValues.validate(valued)


def embedded_values(embedding: Embedding, target: Target) -> dy.DataFrame[MeasuredValues]:
    """The values frame of a window.

    Args:
        embedding: the window's, opened for the target.
        target: the target.
    """
    assert embedding.targets is not None
    return value_frame(embedding.rows, embedding.vectors, embedding.targets, target.half_weights, target.name)
