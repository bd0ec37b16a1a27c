"""The report of a selection, collected from its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import dataframely as dy
import polars as pl

from curate.core.artifacts import SIGN, folder_bytes
from curate.core.escape import visible, visible_json
from curate.output.write import loader_line
from curate.report.collect import (
    EXAMPLES,
    contamination_table,
    example_table,
    mixture_table,
    sweep_table,
    target_table,
    training_curve,
    value_curve,
)
from curate.report.data import ReportData
from curate.tables import Costs

if TYPE_CHECKING:
    from pathlib import Path

    from curate.mixture.record import Mixture
    from curate.selection.resolve import Resolved
    from curate.selection.source import Source
    from curate.selection.values import Cost, Values
    from curate.training.run import Run
    from curate.training.target import Target


def selection_report(
    plan: Resolved,
    source: Source,
    target: Target,
    values: Values,
    mixture: Mixture,
    tables: Mapping[str, pl.DataFrame],
    data: Mapping[str, Path],
) -> ReportData:
    """Everything that the report of a selection shows.

    Args:
        plan: of the selection.
        source: what the next stage draws from.
        target: the main one.
        values: what was measured.
        mixture: as written.
        tables: by name, see `selection.pipeline`, with `costs`.
        data: form -> the file or folder that a loader opens.
    """
    training = training_curve(plan.run)
    # of the main target: a page of every target would be a page for each
    measured = values.frame.filter(target=target.name)
    examples = {
        (name, kind): rows
        for name, source_values in values.by_source.items()
        for kind, rows in source_values.extremes(target, EXAMPLES).items()
    }
    predicted = tables.get("predicted")
    return ReportData(
        run=visible(plan.run.folder.name),
        target=target.name,
        target_documents=target.documents,
        target_tokens=target.tokens,
        retain=mixture.retain,
        estimator=_estimator(plan),
        horizons={name: source_values.horizon for name, source_values in values.by_source.items()},
        mixture_source=mixture.source,
        sign=SIGN,
        budget_tokens=mixture.budget_tokens,
        loader="\n".join(loader_line(kind, path) for kind, path in data.items()),
        settings=visible_json(plan.config.model_dump(mode="json")),
        reliability=tables["reliability"],
        curve=value_curve(measured.filter(pl.col("source").is_in(plan.windows)), training),
        training=training,
        domains=tables["domains"].filter(target=target.name),
        mixture=mixture_table(mixture, tables["seen"]),
        examples=example_table(source.samples, plan.run.spec.tokenizer, measured, examples),
        shards=tables["between_shards"],
        costs=tables["costs"],
        residuals=values.residuals,
        length_bias=dict(tables["length_bias"].drop_nulls().select("source", "spearman").iter_rows()),
        phases=[phase.model_dump(mode="json") for phase in mixture.phases],
        sweep=sweep_table(mixture),
        targets=target_table(tables["domains"], mixture),
        group_limits={name: limit.model_dump() for name, limit in mixture.group_limits.items()},
        predicted=() if predicted is None else predicted.to_dicts(),
        trust=_trust(tables.get("trust"), target.name),
        contamination=contamination_table(tables["contamination"]).to_dicts(),
    )


def _trust(trust: pl.DataFrame | None, target: str) -> Sequence[Mapping[str, object]]:
    """How far rows are trusted: in the choice of samples, which comes last, or else in the main target's scores."""
    return () if trust is None else trust.filter(predictors=trust["predictors"][-1], target=target).to_dicts()


def _estimator(plan: Resolved) -> str:
    """What estimated the values of all sources."""
    windows = [plan.embedding.estimator] if plan.windows else []
    return " and ".join([*windows, *(["next-step influence"] if plan.asks_next_step else [])])


def cost_table(run: Run, phases: Sequence[Cost], out: Path, seconds: float) -> dy.DataFrame[Costs]:
    """What each phase cost, the stage's training for comparison.

    Args:
        run: of the stage.
        phases: what was measured, in order.
        out: folder of the selection.
        seconds: that selecting took.
    """
    rows: list[dict[str, object]] = [{"phase": "training", "passes": float(run.spec.steps), "note": "one per step"}]
    for cost in phases:
        note = f"{100 * cost.passes / run.spec.steps:.1f} % of the stage"
        # "*.*": files only, a scratch folder has no ending
        size = sum(path.stat().st_size for path in cost.folder.glob("*.*"))
        rows.append({"phase": cost.phase, "passes": cost.passes, "seconds": cost.seconds, "bytes": size, "note": note})
    written = folder_bytes(out)
    rows.append({"phase": "select", "passes": 0.0, "seconds": seconds, "bytes": written, "note": "no passes"})
    return Costs.validate(pl.DataFrame(rows, schema_overrides={"seconds": pl.Float64, "bytes": pl.Int64}))
