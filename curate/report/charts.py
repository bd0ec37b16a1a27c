"""Stand-alone pages of recipes: a title, a sentence, figures; self-contained like the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from curate.core.escape import plot_label
from curate.core.writing import atomic_write
from curate.report.figures import categories, finished, line, name_cell
from curate.report.page import fill
from curate.report.style import HELPED, QUIET
from curate.report.tables import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what stands below it.

    Attributes:
        heading: says what is seen.
        note: how to read it.
        key: glyph, colour and name of each kind of mark.
        plots: rows of (label, Plotly figure as JSON text); those of a row stand side by side where there is room.
        table: the numbers.
        folded: whether the table shows only when asked for.
    """

    heading: str
    note: str = ""
    key: Sequence[tuple[str, str, str]] = ()
    plots: Sequence[Sequence[tuple[str, str]]] = ()
    table: Table | None = None
    folded: bool = True


def write_page(path: Path, title: str, lede: str, figures: Mapping[str, str]) -> None:
    """Write an HTML page atomically.

    Args:
        path: the file.
        title: its heading.
        lede: what it shows, in a sentence or two.
        figures: heading -> Plotly figure as JSON text.
    """
    write_sections(
        path, title, [lede], [Section(heading=name, plots=[[(name, spec)]]) for name, spec in figures.items()]
    )


def write_sections(path: Path, title: str, sentences: Sequence[str], sections: Sequence[Section]) -> None:
    """Write an HTML page atomically.

    Args:
        path: the file.
        title: its heading.
        sentences: the finding first, then what else must be known before reading on.
        sections: figures and tables.
    """
    with atomic_write(path) as part:
        part.write_text(fill("charts.html", title=title, sentences=sentences, sections=sections), encoding="utf-8")


def fidelity_figure(summary: Sequence[Mapping[str, Any]]) -> str:
    """Rank agreement with retraining: a row of cells per training setting, a column per removal, a mark per method.

    Args:
        summary: rows with `method`, `epoch` (None: every epoch), `activation`, `lr`, `spearman`, `low` and `high`.
    """
    from plotly.subplots import make_subplots

    settings = list(dict.fromkeys((row["activation"], row["lr"]) for row in summary))
    removals = list(dict.fromkeys(row["epoch"] for row in summary))
    methods = list(dict.fromkeys(row["method"] for row in summary))
    figure = make_subplots(
        rows=len(settings),
        cols=len(removals),
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.02,
        # a share of the height of the whole figure: constant in pixels per row
        vertical_spacing=0.2 / len(settings),
    )
    for row, (activation, lr) in enumerate(settings, 1):
        for column, epoch in enumerate(removals, 1):
            wanted = (activation, lr, epoch)
            cell = [mark for mark in summary if (mark["activation"], mark["lr"], mark["epoch"]) == wanted]
            figure.add_trace(_marks(cell), row=row, col=column)
            removal = "every epoch" if epoch is None else f"epoch {epoch}"
            name_cell(figure, row, column, f"{removal}; {activation}, lr {lr:g}")
    # the same range in every cell, so that rows and columns compare at a glance
    figure.update_xaxes(range=[-0.45, 1.05], tickvals=[0, 0.5, 1], showgrid=True)
    figure.update_xaxes(title="Spearman", row=len(settings), col=1)
    # Plotly counts categories from below, a reader from above
    figure.update_yaxes(**categories(methods[::-1]), automargin=True, range=[-0.6, len(methods) - 0.4])
    return finished(figure, 70 + (30 + 22 * len(methods)) * len(settings), {"l": 8, "r": 8, "t": 24, "b": 44})


def _marks(rows: Sequence[Mapping[str, Any]]) -> Any:
    from plotly import graph_objects as go

    return go.Scatter(
        x=[row["spearman"] for row in rows],
        y=[plot_label(row["method"]) for row in rows],
        mode="markers",
        marker={"size": 8, "color": HELPED},
        hovertemplate="%{y}: %{x:.2f}<extra></extra>",
        error_x={
            "type": "data",
            "symmetric": False,
            "array": [row["high"] - row["spearman"] for row in rows],
            "arrayminus": [row["spearman"] - row["low"] for row in rows],
            "thickness": 1.4,
            "width": 0,
        },
    )


def phase_figure(curve: pl.DataFrame) -> str:
    """Values over the steps of a stage on logarithmic scales: as they are, per unit of lr, and the learning rate.

    Args:
        curve: columns `step`, `mean_abs`, `std`, `mean_abs_per_lr`, `std_per_lr` and `lr`.
    """
    from plotly.subplots import make_subplots

    panels = {
        "mean absolute value, nats": "mean_abs",
        "standard deviation of values, nats": "std",
        "mean absolute value per unit of lr": "mean_abs_per_lr",
        "standard deviation per unit of lr": "std_per_lr",
        "learning rate": "lr",
    }
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=0.05)
    for row, (name, column) in enumerate(panels.items(), 1):
        # a logarithmic axis has no place for zero, and values per lr are infinite where the lr is 0
        positive = curve.filter((pl.col(column) > 0) & pl.col(column).is_finite())
        colour = QUIET if column == "lr" else HELPED
        figure.add_trace(line(positive, column, colour, f"step %{{x}}<br>{name} %{{y:.3g}}"), row=row, col=1)
        name_cell(figure, row, 1, name)
    figure.update_yaxes(type="log", exponentformat="power", nticks=4)
    figure.update_xaxes(title="step", row=len(panels), col=1)
    return finished(figure, 120 * len(panels) + 60, {"l": 56, "r": 8, "t": 24, "b": 44})
