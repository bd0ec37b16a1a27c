"""The figures of fidelity: estimates held against training that was run again. Rows in, Plotly figures as JSON out.

A row's numbers may be None: what is not known is not drawn. Panels are figures of their own, so that a page can set
them side by side or one below the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from curate.core.escape import plot_label
from curate.report.figures import categories, finished, name_cell
from curate.report.style import HELPED, HURT, QUIET, colours, number, power_of_ten

Row = Mapping[str, Any]
Cell = tuple[str, Any]  # window and horizon
# Names in the order of training; other names follow as they come.
_FIRST = ("early", "middle", "late", "window_end", "stage_end")
# Glyph of the key, and the Plotly symbol that looks like it: colour alone must not tell targets apart.
_MARKS = (("●", "circle"), ("▲", "triangle-up"), ("■", "square"), ("◆", "diamond"), ("▼", "triangle-down"))
_DECADES = 3  # of a signed logarithmic axis, on each side of zero
_HEIGHT, _TOP, _BOTTOM = 290, 24, 46  # of a panel, pixels
_LABEL_GAP = 14  # pixels between labels of points


def known(value: Any) -> bool:
    """Whether this is a number."""
    return value is not None and math.isfinite(value)


def ordered(names: Iterable[Any]) -> list[Any]:
    """Each once: early before late, steps ascending, the rest as they come."""
    unique = list(dict.fromkeys(names))
    if all(isinstance(name, int) for name in unique):
        return sorted(unique)
    return sorted(unique, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def grid(rows: Sequence[Row]) -> list[list[Cell]]:
    """The (window, horizon) that occur: a row per horizon, windows side by side."""
    present = {(row["window"], row["horizon"]) for row in rows}
    windows, horizons = (ordered(row[name] for row in rows) for name in ("window", "horizon"))
    return [[(window, horizon) for window in windows if (window, horizon) in present] for horizon in horizons]


def of_cell(rows: Iterable[Row], cell: Cell) -> list[Row]:
    """The rows of one window and horizon."""
    return [row for row in rows if (row["window"], row["horizon"]) == cell]


def horizon_name(horizon: Any) -> str:
    """A horizon in words."""
    return f"step {horizon}" if isinstance(horizon, int) else str(horizon).replace("_", " ")


def cell_name(cell: Cell) -> str:
    """A window and its horizon in words."""
    return f"{cell[0]} window, at {horizon_name(cell[1])}"


def key_of(targets: Iterable[str]) -> list[tuple[str, str, str]]:
    """Glyph, colour and name of each target's marks."""
    colour = colours(targets)
    return [(_MARKS[index % len(_MARKS)][0], colour[name], name) for index, name in enumerate(colour)]


def _symbols(targets: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Target -> symbol and colour of its marks."""
    glyphs = dict(_MARKS)
    return {name: (glyphs[glyph], colour) for glyph, colour, name in key_of(targets)}


def spearman_figure(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Spearman with intervals: a cell per window and horizon, a line per label; an upright tick is the noise cap.

    Args:
        rows: with `window`, `horizon`, `spearman`, `low`, `high`, `noise_cap` and `n`.
        labels: of the rows; the same label in each cell.
    """
    from plotly.subplots import make_subplots

    cells = [cell for line in grid(rows) for cell in line]
    names = list(dict.fromkeys(labels))
    height = 34 + 24 * len(names)
    figure = make_subplots(
        rows=max(1, len(cells)), cols=1, shared_xaxes=True, vertical_spacing=26 / (height * len(cells)) if cells else 0
    )
    for figure_row, cell in enumerate(cells, 1):
        pairs = [(row, label) for row, label in zip(rows, labels, strict=True) if of_cell([row], cell)]
        for trace in _spearman_traces(pairs):
            figure.add_trace(trace, row=figure_row, col=1)
        name_cell(figure, figure_row, 1, cell_name(cell))
    ends = [row[name] for row in rows for name in ("spearman", "low") if known(row[name])]
    # zero stays in sight: how far a Spearman is from no agreement
    lowest = min([0.0, *ends])
    figure.update_xaxes(range=[lowest - 0.04, 1.04], showgrid=True, nticks=8)
    figure.update_xaxes(title="Spearman of estimates and retraining", row=max(1, len(cells)), col=1)
    figure.update_yaxes(**categories(names[::-1]), automargin=True, range=[-0.6, len(names) - 0.4])
    return finished(figure, 72 + height * len(cells), {"l": 8, "r": 8, "t": 24, "b": 48})


def _spearman_traces(pairs: Sequence[tuple[Row, str]]) -> list[Any]:
    from plotly import graph_objects as go

    shown = [(row, label) for row, label in pairs if known(row["spearman"])]
    marks = go.Scatter(
        x=[row["spearman"] for row, _ in shown],
        y=[plot_label(label) for _, label in shown],
        customdata=[[number(row["low"]), number(row["high"]), number(row["n"], 4)] for row, _ in shown],
        mode="markers",
        marker={"size": 9, "color": HELPED},
        hovertemplate="%{y}: %{x:.3f}<br>interval %{customdata[0]} to %{customdata[1]}<br>"
        "%{customdata[2]} removals<extra></extra>",
        error_x=_error([(row["low"], row["spearman"], row["high"]) for row, _ in shown], HELPED),
    )
    capped = [(row, label) for row, label in pairs if known(row["noise_cap"])]
    caps = go.Scatter(
        x=[row["noise_cap"] for row, _ in capped],
        y=[plot_label(label) for _, label in capped],
        mode="markers",
        marker={"size": 15, "color": HURT, "symbol": "line-ns-open", "line": {"width": 2}},
        hovertemplate="%{y}: noise lets Spearman reach %{x:.3f}<extra></extra>",
    )
    return [marks, caps]


def _error(intervals: Sequence[tuple[Any, Any, Any]], colour: str) -> dict[str, Any]:
    """Bars from low to high; none where an end is not known."""
    return {
        "type": "data",
        "symmetric": False,
        # a bootstrap interval need not hold its own point: no negative bars
        "array": [max(0.0, high - middle) if known(high) else 0.0 for _, middle, high in intervals],
        "arrayminus": [max(0.0, middle - low) if known(low) else 0.0 for low, middle, _ in intervals],
        "thickness": 1.5,
        "width": 0,
        "color": colour,
    }


def scatter_figure(pairs: Sequence[Row], cell: Cell, targets: Sequence[str]) -> str:
    """Estimates against real values on signed logarithmic axes with equal scales; the line is where both are equal.

    Args:
        pairs: one row per removal, with `window`, `horizon`, `target`, `step`, `value` and `estimate`.
        cell: window and horizon of the panel.
        targets: all targets of the page.
    """
    from plotly import graph_objects as go

    shown = [row for row in of_cell(pairs, cell) if known(row["value"]) and known(row["estimate"])]
    # rounded up to a power of ten, so that the grid lines are powers of ten too
    top = _decade(max((abs(row[name]) for row in shown for name in ("value", "estimate")), default=1.0))
    limit = _DECADES + 0.4
    figure = go.Figure(_equal_line(limit))
    for target, (symbol, colour) in _symbols(targets).items():
        target_rows = [row for row in shown if row["target"] == target]
        figure.add_trace(
            go.Scatter(
                x=[_signed_log(row["value"], top) for row in target_rows],
                y=[_signed_log(row["estimate"], top) for row in target_rows],
                customdata=[[number(row["value"]), number(row["estimate"]), row["step"]] for row in target_rows],
                mode="markers",
                marker={"size": 8, "color": colour, "symbol": symbol, "opacity": 0.75},
                hovertemplate=f"{plot_label(target)}, step %{{customdata[2]}}<br>real %{{customdata[0]}}<br>"
                "estimate %{customdata[1]}<extra></extra>",
            )
        )
    _name_panel(figure, cell)
    # grid lines at factors of ten; only the ends and zero are named, more would run into each other
    decades = [math.log10(1 + 10.0**exponent) for exponent in range(_DECADES)]
    ticks = [-_DECADES, *(-tick for tick in decades[::-1]), 0.0, *decades, _DECADES]
    blank = [""] * _DECADES
    text = [f"−{power_of_ten(top)}", *blank, "0", *blank, power_of_ten(top)]
    axis = {"range": [-limit, limit], "tickvals": ticks, "ticktext": text, "showgrid": True}
    figure.update_xaxes(title="real value, nats per token", **axis)
    figure.update_yaxes(title="estimate, nats per token", tickangle=-90, **axis)
    figure.add_vline(x=0, line={"color": QUIET, "width": 1})
    return finished(figure, _HEIGHT, {"l": 40, "r": 8, "t": _TOP, "b": _BOTTOM})


def _equal_line(limit: float) -> Any:
    from plotly import graph_objects as go

    ends = [-limit, limit]
    return go.Scatter(x=ends, y=ends, mode="lines", line={"color": QUIET, "width": 1, "dash": "dot"}, hoverinfo="skip")


def _decade(largest: float) -> int:
    """The power of ten at or above a number."""
    return math.ceil(math.log10(largest)) if largest > 0 else 0


def _signed_log(value: float, top: int) -> float:
    """Place on an axis that is linear around zero and logarithmic up to 10**top."""
    # symlog, with the linear part below 10**(top - _DECADES)
    return math.copysign(math.log10(1 + abs(value) * 10.0 ** (_DECADES - top)), value)


def smoothness_figure(rows: Sequence[Row], cell: Cell, targets: Sequence[str]) -> str:
    """How far the slope of the loss differs when only a part of a sample's weight is removed, on logarithmic axes.

    Args:
        rows: with `window`, `horizon`, `target`, `part` and `relative_deviation`.
        cell: window and horizon of the panel.
        targets: all targets of the page.
    """
    from plotly import graph_objects as go

    # zero has no logarithm
    drawn = [row for row in rows if known(row["part"]) and (row["relative_deviation"] or 0) > 0]
    figure = go.Figure()
    for target, (symbol, colour) in _symbols(targets).items():
        target_rows = sorted(
            (row for row in of_cell(drawn, cell) if row["target"] == target), key=lambda row: row["part"]
        )
        figure.add_trace(
            go.Scatter(
                x=[row["part"] for row in target_rows],
                y=[row["relative_deviation"] for row in target_rows],
                mode="lines+markers",
                line={"color": colour, "width": 1.6},
                marker={"size": 8, "symbol": symbol},
                hovertemplate=f"{plot_label(target)}<br>%{{x:.0%}} of the weight removed<br>slope differs by %{{y:.3g}}"
                "<extra></extra>",
            )
        )
    _name_panel(figure, cell)
    parts = sorted({row["part"] for row in drawn if row["part"] > 0})
    sizes = [math.log10(row["relative_deviation"]) for row in drawn]
    ends = [min(sizes, default=-1) - 0.15, max([0.0, *sizes]) + 0.15]
    figure.update_xaxes(
        type="log",
        tickvals=parts,
        ticktext=[f"{part:.3g}" for part in parts],
        range=[math.log10(min(parts, default=0.1)) - 0.1, math.log10(max(parts, default=1)) + 0.1],
        title="part of the sample's weight removed",
        showgrid=True,
    )
    figure.update_yaxes(type="log", range=ends, dtick=1, exponentformat="power", title="deviation of slope")
    # a slope that is off by its own size
    figure.add_hline(y=1, line={"color": HURT, "width": 1, "dash": "dot"})
    return finished(figure, _HEIGHT - 50, {"l": 64, "r": 8, "t": _TOP, "b": _BOTTOM})


def _name_panel(figure: Any, cell: Cell) -> None:
    name = {"x": 0, "y": 1, "xref": "paper", "yref": "paper", "xanchor": "left", "yanchor": "bottom"}
    figure.add_annotation(**name, text=plot_label(cell_name(cell)), showarrow=False, font={"size": 12})


def pareto_figure(means: Sequence[Row], cell: Cell) -> str:
    """Agreement with retraining against cost, each estimator named; the steps join those that none beats at its cost.

    Args:
        means: one row per estimator, window and horizon: `spearman`, `lowest`, `highest` and `cost`.
        cell: window and horizon of the panel.
    """
    from plotly import graph_objects as go

    drawn = [row for row in means if drawable(row)]
    shown = sorted(of_cell(drawn, cell), key=lambda row: (row["cost"], -row["spearman"]))
    # shown is in order of cost, the better one first at equal cost, as `front` needs it
    best = front(shown)
    points = go.Scatter(
        x=[row["cost"] for row in shown],
        y=[row["spearman"] for row in shown],
        customdata=[[plot_label(row["estimator"]), number(row["lowest"]), number(row["highest"])] for row in shown],
        mode="markers",
        marker={"size": 9, "color": [HELPED if row in best else QUIET for row in shown]},
        hovertemplate="%{customdata[0]}<br>mean Spearman %{y:.3f}, %{customdata[1]} to %{customdata[2]}<br>"
        "%{x:.3g} passes per step<extra></extra>",
        error_y=_error([(row["lowest"], row["spearman"], row["highest"]) for row in shown], QUIET),
    )
    steps = go.Scatter(
        x=[row["cost"] for row in best],
        y=[row["spearman"] for row in best],
        mode="lines",
        line={"color": HELPED, "width": 1.4, "shape": "hv"},
        hoverinfo="skip",
    )
    figure = go.Figure([steps, points])
    costs = [math.log10(row["cost"]) for row in drawn] or [0.0]
    margin = 0.08 * (max(costs) - min(costs)) + 0.04
    sides = (min(costs) - margin, max(costs) + margin)
    low, high = min([0.0, *(row["lowest"] for row in drawn)]) - 0.05, 1.05
    # names stand in a column right of the panel, and a thin line leads to each point: beside the points they would
    # overlap
    for row, height in zip(shown, _apart([row["spearman"] for row in shown], low, high), strict=True):
        _label(figure, row, (sides[1], height))
    _name_panel(figure, cell)
    figure.update_xaxes(type="log", range=list(sides), title="cost, passes per step", showgrid=True)
    figure.update_xaxes(tickvals=_round_numbers(*sides), tickformat="~g")
    figure.update_yaxes(range=[low, high], title="mean Spearman", tickvals=[-0.5, 0, 0.5, 1])
    longest = max((len(str(row["estimator"])) for row in means), default=0)
    # 6 pixels a letter at size 11; on a phone long names may be cut
    return finished(figure, _HEIGHT, {"l": 46, "r": 12 + min(160, 6 * longest), "t": _TOP, "b": _BOTTOM})


def drawable(row: Row) -> bool:
    """Whether an estimator has a place on logarithmic cost."""
    return known(row["spearman"]) and known(row["cost"]) and row["cost"] > 0


def front(rows: Sequence[Row]) -> list[Row]:
    """Of rows in order of cost, those with a higher Spearman than every cheaper one."""
    unbeaten: list[Row] = []
    for row in rows:
        if not unbeaten or row["spearman"] > unbeaten[-1]["spearman"]:
            unbeaten.append(row)
    return unbeaten


def _round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two powers."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    return [digit * 10.0**decade for decade in decades for digit in (1, 2, 5)]


def _apart(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Places beside a panel for a label per height, in their order, moved until no two overlap."""
    # pixels to units of the axis
    gap = _LABEL_GAP * (high - low) / (_HEIGHT - _TOP - _BOTTOM)
    placed, ceiling = [0.0] * len(heights), high
    # from the top down: each label as high as its point if the labels above and below leave room
    for placed_labels, index in enumerate(sorted(range(len(heights)), key=lambda index: -heights[index])):
        floor = low + gap * (len(heights) - 1 - placed_labels)  # room for the labels that follow
        placed[index] = min(ceiling, max(heights[index], floor))
        ceiling = placed[index] - gap
    return placed


def _label(figure: Any, row: Row, label_at: tuple[float, float]) -> None:
    """Name a point at a place beside the panel."""
    figure.add_annotation(
        # annotations on a logarithmic axis are placed by exponents, traces by values
        x=math.log10(row["cost"]),
        y=row["spearman"],
        axref="x",
        ayref="y",
        ax=label_at[0],
        ay=label_at[1],
        text=plot_label(row["estimator"]),
        xanchor="left",
        yanchor="middle",
        arrowhead=0,
        arrowwidth=0.7,
        arrowcolor=QUIET,
        standoff=5,
        font={"size": 11},
    )


def bars_figure(means: Sequence[Row], cells: Sequence[Cell], estimators: Sequence[str]) -> str:
    """Agreement within steps (blue) and of groups (grey): windows side by side, two bars per estimator.

    Args:
        means: one row per estimator, window and horizon: `within` and `group_lds`.
        cells: windows of one horizon.
        estimators: from the top.
    """
    from plotly.subplots import make_subplots

    values = [row[name] for row in means for name in ("within", "group_lds") if known(row[name])]
    figure = make_subplots(rows=1, cols=len(cells), shared_yaxes=True, horizontal_spacing=0.06)
    for column, cell in enumerate(cells, 1):
        for trace in _bars({row["estimator"]: row for row in of_cell(means, cell)}, estimators):
            figure.add_trace(trace, row=1, col=column)
        name_cell(figure, 1, column, cell[0])
        figure.add_vline(x=0, line={"color": QUIET, "width": 1}, row=1, col=column)
    figure.update_xaxes(range=[min([0.0, *values]) - 0.02, 1.05], showgrid=True, tickvals=[-0.5, 0, 0.5, 1])
    figure.update_xaxes(
        title=f"Spearman, at {plot_label(horizon_name(cells[0][1]))}", row=1, col=1 + (len(cells) - 1) // 2
    )
    figure.update_yaxes(
        **categories(list(estimators)[::-1]),
        automargin=True,
        range=[-0.6, len(estimators) - 0.4],
        showgrid=False,
    )
    height = _TOP + _BOTTOM + 20 + 26 * len(estimators)
    return finished(figure, height, {"l": 8, "r": 8, "t": _TOP, "b": _BOTTOM}, barmode="group", bargap=0.3)


def _bars(rows: Mapping[str, Row], estimators: Sequence[str]) -> list[Any]:
    from plotly import graph_objects as go

    # groups first: of two bars of a name the first trace is the lower one
    traces = []
    for name, what, colour in (("group_lds", "of groups", QUIET), ("within", "within steps", HELPED)):
        shown = [estimator for estimator in estimators if known(rows.get(estimator, {}).get(name))]
        traces.append(
            go.Bar(
                y=[plot_label(estimator) for estimator in shown],
                x=[rows[estimator][name] for estimator in shown],
                orientation="h",
                marker={"color": colour},
                hovertemplate=f"%{{y}}<br>Spearman {what} %{{x:.3f}}<extra></extra>",
            )
        )
    return traces
