"""The outcomes of reruns as a table that survives interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import polars as pl

from curate.core.arrays import read_table, write_table
from curate.core.progress import progress

if TYPE_CHECKING:
    from curate.evaluation.draw import Removal
    from curate.evaluation.reruns import Reruns, Truth

_SAVE_SECONDS = 30.0  # what an interruption may lose of reruns
TRUTH = pl.Schema(
    [
        ("removal", pl.String()),  # identity of the rerun
        ("kind", pl.String()),  # pair, group, repeat or part
        ("window", pl.String()),
        ("samples", pl.List(pl.List(pl.Int64))),  # (step, position) of each removed sample
        ("part", pl.Float64()),  # share of their weight that was removed
        ("horizon", pl.Int64()),  # step whose state the target was read at
        ("target", pl.String()),
        ("value", pl.Float64()),  # l_q without the samples - l_q, nats per token
    ]
)


def collect(
    path: Path,
    reruns: Reruns,
    removals: Sequence[Removal],
    horizons: Mapping[str, Sequence[int]],
    targets: Sequence[str],
) -> pl.DataFrame:
    """Run every removal that the table at `path` does not hold yet.

    Args:
        path: parquet file; saved every half minute and at the end.
        reruns: runs them.
        removals: all that are wanted.
        horizons: window -> steps that the targets are read at.
        targets: names of the targets of `reruns`.

    Returns:
        One row per (removal, horizon, target), see `TRUTH`.
    """
    table = read_table(path) if path.exists() else pl.DataFrame(schema=TRUTH)
    done = set(table["removal"])  # by name, which says all of a removal: other draws add to the same table
    missing = [removal for removal in removals if removal.name not in done]
    saved = monotonic()
    outcomes = progress(
        reruns.run(missing, horizons), total=len(removals), what="rerun", done=len(removals) - len(missing), unit="run"
    )
    for truth in outcomes:
        table = table.vstack(_rows(truth, targets))
        if monotonic() - saved > _SAVE_SECONDS:
            write_table(path, table)
            saved = monotonic()
    write_table(path, table)
    return table.filter(pl.col("removal").is_in([removal.name for removal in removals]))


def _rows(truth: Truth, targets: Sequence[str]) -> pl.DataFrame:
    removal = truth.removal
    of_removal = {
        "removal": removal.name,
        "kind": removal.kind,
        "window": removal.window,
        "samples": [list(sample) for sample in removal.samples],
        "part": removal.part,
    }
    rows = [
        {**of_removal, "horizon": horizon, "target": target, "value": float(value)}
        for horizon, values in truth.values.items()
        for target, value in zip(targets, values, strict=True)
    ]
    return pl.DataFrame(rows, schema=TRUTH)
