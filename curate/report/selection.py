"""The report of a selection, collected from its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import polars as pl

from curate.artifacts import SIGN
from curate.escape import visible, visible_json
from curate.pools.slopes import NEXT
from curate.pools.values import POOL
from curate.report.collect import (
    example_table,
    leak_table,
    mixture_table,
    sweep_table,
    target_table,
    training_curve,
    value_curve,
)
from curate.report.data import ReportData
from curate.shards.write import loader_line

if TYPE_CHECKING:
    from pathlib import Path

    from curate.mixture.record import Mixture
    from curate.target import Target
    from curate.trajectory.run import Run


def selection_report(
    run: Run,
    target: Target,
    mixture: Mixture,
    tables: Mapping[str, pl.DataFrame],
    *,
    values: pl.DataFrame,
    found: Mapping[tuple[str, str], Sequence[int]],
    costs: pl.DataFrame,
    data: Mapping[str, Path],
    estimator: str,
    horizons: Mapping[str, str],
    residuals: Mapping[str, float],
    settings: Mapping[str, Any],
) -> ReportData:
    """Everything that the report of a selection shows.

    Args:
        run: the streams that the next stage draws from, and the training.
        target: of the selection.
        mixture: as delivered.
        tables: of `scores.rollup.roll_ups`, `ledger`, `leaks`, for a pool `pool`, and `predicted` where
            samples outside the window are.
        values: the values frames of the target.
        found: (window, "most" or "least") -> rows of that window to read, best match first.
        costs: see `report.collect.cost_table`.
        data: form -> the file or folder that a loader opens.
        estimator: what estimated the values.
        horizons: window -> the state that the target's loss is read at.
        residuals: window -> relative residual, where the target was solved into anchors.
        settings: of the selection (JSON values).
    """
    training = training_curve(run)
    return ReportData(
        run=visible(run.folder.name), target=target.name,
        target_documents=target.documents, target_tokens=target.tokens,
        estimator=estimator, horizons=horizons, mixture_window=mixture.window, sign=SIGN,
        budget_tokens=mixture.budget_tokens,
        loader="\n".join(loader_line(kind, path) for kind, path in data.items()),
        settings=visible_json(settings), reliability=tables["reliability"],
        curve=value_curve(values.filter(~pl.col("window").is_in([POOL, NEXT])), training), training=training,
        domains=tables["domains"].filter(target=target.name),
        mixture=mixture_table(mixture, tables["ledger"]), examples=example_table(run, values, found),
        shards=tables["between_shards"], costs=costs, residuals=residuals,
        length_bias=dict(tables["length_bias"].drop_nulls().select("window", "spearman").iter_rows()),
        phases=[phase.model_dump(mode="json") for phase in mixture.phases],
        sweep=sweep_table(mixture), targets=target_table(tables["domains"], mixture),
        shared={name: one.model_dump() for name, one in mixture.shared.items()},
        pool=tables["pool"].to_dicts() if "pool" in tables else (),
        predicted=tables["predicted"].to_dicts() if "predicted" in tables else (),
        leaks=leak_table(tables["leaks"]).to_dicts(),
    )  # fmt: skip
