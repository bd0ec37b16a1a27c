"""The page of the branch bench: target loss against general loss of every method, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from curate.core.escape import plot_label
from curate.report.charts import Section, write_sections
from curate.report.figures import finished
from curate.report.style import QUIET, colours, count, decimal, listed, percent, signed
from curate.report.tables import Cell as Format
from curate.report.tables import Table, table

Row = Mapping[str, Any]
_BASE = "proportional"
_BEST: dict[str, tuple[str, Format | None]] = {
    "case": ("case", None),
    "method": ("method", None),
    "temperature": ("strength", decimal),
    "kl_to_prior": ("KL from the prior", lambda value: decimal(value, 3)),
    "target": ("target loss", lambda value: signed(value, 4)),
    "width": ("±", lambda value: decimal(value, 4)),
    "general": ("general loss", lambda value: percent(value, 2)),
    "seeds": ("seeds", count),
    "apart": ("minus curate", lambda value: signed(value, 4)),
    "apart_width": ("±", lambda value: decimal(value, 4)),
    "oracle_share": ("of the oracle's gain", percent),
}
_ALONG = {name: column for name, column in _BEST.items() if name != "temperature"}
_EQUAL = {name: column for name, column in _ALONG.items() if not name.startswith(("apart", "oracle"))} | {
    "general": ("general loss", lambda value: signed(value, 4)),
}


def branches_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        result: `rows` (one per case, method, seed and strength, which is called `temperature`), `best`, `at_limit` and
            `equal_kl`.
    """
    rows = result["rows"]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    methods = sorted({row["method"] for row in rows} - {_BASE})
    write_sections(
        path,
        "What each method of selection buys",
        [best_sentence(result["best"]), _seeds_sentence(rows)],
        [
            Section(
                heading="Target loss against general loss",
                note="Differences from proportional at equal tokens, mean over seeds; a line joins the strengths of a "
                "method (prior strength; of dsir its temperature), low ones at its far end. Lower left is better. "
                "Right of the dotted line general loss is more than 1 % above proportional's.",
                key=[("●", colour, name) for name, colour in colours(methods).items()],
                plots=[[(f"Target loss against general loss, {case}", curves_figure(rows, case))] for case in cases],
            ),
            Section(
                heading="At the best strength within the limit on general loss",
                note="The strength is chosen on another split than the one reported here. Intervals are 95 % t "
                "intervals of paired differences over seeds.",
                table=_table(result["best"], _BEST, "general_share"),
                folded=False,
            ),
            Section(
                heading="At the limit on general loss",
                note="The same at the best point of each method's curve, between its strengths too, so that no grid of "
                "strengths decides.",
                table=_table(result["at_limit"], _ALONG, "general_share"),
                folded=False,
            ),
            Section(
                heading="At equal KL from the prior",
                note="At the KL that curate has at the default prior strength, along each method's curve.",
                table=_table(result["equal_kl"], _EQUAL, "general"),
                folded=False,
            ),
        ],
    )


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, Format | None]], general: str) -> Table:
    flat = [
        {
            **row, "target": row["target"]["mean"], "width": row["target"]["half_width"],
            "general": row[general]["mean"], "apart": row.get("minus_curate", {}).get("mean"),
            "apart_width": row.get("minus_curate", {}).get("half_width"),
        }
        for row in rows
    ]  # fmt: skip
    ordered = sorted(flat, key=lambda row: (row["case"], row["target"]))
    schema = {name: pl.String if show is None else pl.Float64 for name, (_, show) in columns.items()}
    return table(pl.DataFrame([{name: row.get(name) for name in columns} for row in ordered], schema=schema), columns)


def best_sentence(best: Sequence[Row]) -> str:
    """Which method lowers the target's loss most in each case."""
    said = []
    for case in dict.fromkeys(row["case"] for row in best):
        first = min((row for row in best if row["case"] == case), key=lambda row: row["target"]["mean"])
        width = first["target"]["half_width"]
        error = "" if width is None else f" ± {decimal(width, 4)}"
        said.append(f"{first['method']} in case {case} ({signed(first['target']['mean'], 4)}{error} nats per token)")
    return (
        f"Lowest target loss within the limit on general loss, minus proportional's: {listed(said)}."
        if said
        else "Nothing was run."
    )


def _seeds_sentence(rows: Sequence[Row]) -> str:
    seeds = {row["seed"] for row in rows}
    return f"{count(len(seeds))} seeds, {count(len(rows))} branches." if len(seeds) > 1 else "One seed: no intervals."


def curves_figure(rows: Sequence[Row], case: str) -> str:
    """Mean differences from proportional of one case: a line per method through its strengths, from proportional.

    Branches of other schedules than the constant one are not drawn.

    Args:
        rows: with `case`, `method`, `seed`, `temperature`, `schedule`, `kl_to_prior`, `target_loss`, `general_loss`.
        case: of the panel.
    """
    from plotly import graph_objects as go

    mine = [row for row in rows if row["case"] == case and row["schedule"] == "constant"]
    base = {row["seed"]: row for row in mine if row["method"] == _BASE}
    methods = sorted({row["method"] for row in rows} - {_BASE})
    figure = go.Figure()
    for method, colour in colours(methods).items():
        label = plot_label(method)
        points = _curve([row for row in mine if row["method"] == method], base)
        figure.add_trace(
            go.Scatter(
                x=[0.0, *(point["general"] for point in points)],
                y=[0.0, *(point["target"] for point in points)],
                customdata=[
                    ["proportional", 0.0],
                    *([f"strength {point['temperature']:g}", point["kl"]] for point in points),
                ],
                mode="lines+markers",
                line={"color": colour, "width": 1.6},
                marker={"size": 7},
                hovertemplate=f"{label}, %{{customdata[0]}}<br>KL %{{customdata[1]:.3f}}<br>target %{{y:+.4f}}, "
                "general %{x:+.4f}<extra></extra>",
            )
        )
        if points:
            figure.add_annotation(
                x=points[-1]["general"], y=points[-1]["target"], text=label, showarrow=False, xanchor="left",
                xshift=6, font={"size": 11, "color": colour},
            )  # fmt: skip
    if base:
        limit = 0.01 * sum(row["general_loss"] for row in base.values()) / len(base)
        figure.add_vline(x=limit, line={"color": QUIET, "width": 1, "dash": "dot"})
    figure.update_xaxes(
        title=f"general loss minus proportional's, nats per token; case {plot_label(case)}", showgrid=True
    )
    figure.update_yaxes(title="target loss minus proportional's")
    return finished(figure, 380, {"l": 64, "r": 80, "t": 16, "b": 46})


def _curve(rows: Sequence[Row], base: Mapping[int, Row]) -> list[dict[str, float]]:
    """Means over seeds at each strength, the nearest to proportional first."""
    points = []
    for temperature in sorted({row["temperature"] for row in rows}, reverse=True):
        same = [row for row in rows if row["temperature"] == temperature and row["seed"] in base]
        if same:
            points.append(
                {
                    "temperature": temperature,
                    "kl": sum(row["kl_to_prior"] for row in same) / len(same),
                    **{
                        name: sum(row[f"{name}_loss"] - base[row["seed"]][f"{name}_loss"] for row in same) / len(same)
                        for name in ("target", "general")
                    },
                }
            )
    return points
