"""The figures: frames in, Plotly figures as JSON text out. Sources stand side by side, domains one below the other.

Every domain has a row of its own, so that no figure needs a legend and none is read by colour alone.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from curate.core.escape import plot_label, script_json
from curate.report.style import HELPED, HURT, QUIET, Scale, percent, source_name

# Half transparent: one grid for the light and the dark background of the page.
_GRID = "rgba(128,128,128,0.22)"
_FONT = {
    "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
    "size": 12,
    "color": "#44484d",
}
_SHADE = "rgba(0,114,178,0.13)"


def value_figure(
    curve: pl.DataFrame,
    training: pl.DataFrame,
    *,
    value: str,
    windows: Sequence[str],
    domains: Sequence[str],
    colours: Mapping[str, str],
    scale: Scale,
) -> str:
    """Value over training steps: a row per domain and a column per window, the learning rate below.

    Bars are steps; the line is the mean of neighbouring steps. All rows of a window share their scale.

    Args:
        curve: columns `source`, `step`, `domain` and the one named by `value`; what is not finite is not drawn.
        training: columns `step` and `lr`.
        value: the column of `curve` that is drawn.
        windows: columns of the figure.
        domains: rows of the figure.
        colours: domain -> colour of its line.
        scale: of the values.
    """
    from plotly.subplots import make_subplots

    # one more for the learning rate
    rows = len(domains) + 1
    # values per lr are infinite at a step of lr 0 (the first one of a warm-up)
    drawn = curve.filter(pl.col(value).is_finite())
    figure = make_subplots(
        rows=rows,
        cols=max(1, len(windows)),
        shared_xaxes="columns",
        horizontal_spacing=0.09,
        # a share of the whole height: constant in pixels per row
        vertical_spacing=0.3 / rows,
    )
    for column, window in enumerate(windows, 1):
        inside = drawn.filter(source=window).sort("step")
        for row, domain in enumerate(domains, 1):
            cell = inside.filter(domain=domain).with_columns(pl.col(value) * scale.factor)
            for trace in _value_traces(cell, value, domain, colours[domain], scale):
                figure.add_trace(trace, row=row, col=column)
            name_cell(figure, row, column, domain)
        first, last = _range(inside)
        rates = training.filter(pl.col("step").is_between(first, last)).sort("step")
        figure.add_trace(line(rates, "lr", QUIET, "learning rate %{y:.3g}"), row=rows, col=column)
        name_cell(figure, rows, column, "learning rate")
        # by hand instead of `shared_yaxes`: the row of the learning rate must not share the range
        limits = _limits(inside[value] * scale.factor)
        figure.update_yaxes(range=limits, tickvals=_ticks(limits), col=column)
        # after the line above, which set the range of all rows of the column, this one too
        figure.update_yaxes(range=None, tickvals=None, rangemode="tozero", nticks=3, row=rows, col=column)
        # bars are 1 step wide: half of the outer ones and a little air
        figure.update_xaxes(range=[first - 0.7, last + 0.7], col=column)
        figure.update_xaxes(title=f"step ({plot_label(source_name(window))})", row=rows, col=column)
    figure.update_yaxes(tickfont={"size": 10}, exponentformat="power")
    return finished(figure, 44 + 62 * rows, {"l": 40, "r": 8, "t": 18, "b": 44}, bargap=0.25)


def _value_traces(cell: pl.DataFrame, value: str, domain: str, colour: str, scale: Scale) -> list[Any]:
    from plotly import graph_objects as go

    domain = plot_label(domain)
    bars = go.Bar(
        x=cell["step"].to_list(),
        y=cell[value].to_list(),
        marker={"color": [HELPED if number >= 0 else HURT for number in cell[value]], "line": {"width": 0}},
        # faint: single steps are noisy, the line over the bars is what to read
        opacity=0.42,
        hovertemplate=f"{domain}, step %{{x}}<br>%{{y:.3g}} {scale.unit}<extra></extra>",
    )
    smooth = cell.with_columns(pl.col(value).rolling_mean(_span(cell.height), center=True, min_samples=1))
    return [bars, line(smooth, value, colour, f"{domain}, around step %{{x}}<br>mean %{{y:.3g}} {scale.unit}")]


def _span(steps: int) -> int:
    """Steps in the running mean of a figure: a sixth of the window, odd."""
    # odd: centred on the step, without a shift of half a step
    return max(1, steps // 6) | 1


def score_figure(
    domains: pl.DataFrame, *, sources: Sequence[str], order: Sequence[str], colours: Mapping[str, str]
) -> str:
    """Domain scores with 95 % intervals, sources side by side on one scale; an upright tick marks the shrunk score.

    Args:
        domains: columns `source`, `domain`, `score`, `score_low`, `score_high` and `shrunk`.
        sources: columns of the figure.
        order: rows of the figure.
        colours: domain -> colour.
    """
    from plotly.subplots import make_subplots

    figure = make_subplots(
        rows=1,
        cols=len(sources),
        shared_yaxes=True,
        horizontal_spacing=0.04,
        subplot_titles=[plot_label(source_name(source)) for source in sources],
    )
    for column, source in enumerate(sources, 1):
        rows = {row["domain"]: row for row in domains.filter(source=source).to_dicts()}
        for domain in order:
            for trace in _score_traces(rows[domain], colours[domain]) if domain in rows else ():
                figure.add_trace(trace, row=1, col=column)
        figure.add_vline(x=0, line={"color": QUIET, "width": 1}, row=1, col=column)
    # one range for all sources, so that their columns compare at a glance
    low, high = (domains.select("score", "shrunk", bound).to_numpy() for bound in ("score_low", "score_high"))
    limits = _limits(pl.Series([*low.ravel().tolist(), *high.ravel().tolist()], dtype=pl.Float64))
    figure.update_xaxes(range=limits, nticks=6, title="score", showgrid=True)
    # Plotly counts categories from below, a reader from above
    figure.update_yaxes(**categories(list(reversed(order))), automargin=True, range=[-0.6, len(order) - 0.4])
    return finished(figure, 96 + 30 * len(order), {"l": 8, "r": 8, "t": 28, "b": 48})


def _score_traces(row: Mapping[str, Any], colour: str) -> list[Any]:
    from plotly import graph_objects as go

    has_interval, domain = row["score_low"] is not None, plot_label(row["domain"])
    interval = (
        f"<br>95 % interval {row['score_low']:+.3f} to {row['score_high']:+.3f}"
        if has_interval
        else "<br>interval not known"
    )
    mark = go.Scatter(
        x=[row["score"]],
        y=[domain],
        mode="markers",
        marker={"size": 9, "color": colour, "symbol": "circle" if has_interval else "circle-open"},
        hovertemplate=f"{domain}<br>score %{{x:+.3f}}{interval}<extra></extra>",
        error_x={
            "type": "data",
            "symmetric": False,
            # Plotly takes distances from the point, not the ends
            "array": [row["score_high"] - row["score"]] if has_interval else [0],
            "arrayminus": [row["score"] - row["score_low"]] if has_interval else [0],
            "thickness": 1.6,
            "width": 0,
            "color": colour,
        },
    )
    shrunk = go.Scatter(
        x=[row["shrunk"]],
        y=[domain],
        mode="markers",
        marker={"size": 13, "color": colour, "symbol": "line-ns-open", "line": {"width": 2}},
        hovertemplate=f"{domain}<br>shrunk score %{{x:+.3f}}<extra></extra>",
    )
    return [mark, shrunk]


def mixture_figure(mixture: pl.DataFrame, *, order: Sequence[str], colours: Mapping[str, str], before: str) -> str:
    """Shares before (grey) and in the next stage (coloured); a bound that holds a share is named beside it.

    Args:
        mixture: columns `domain`, `prior`, `weight` and `binding`.
        order: rows of the figure.
        colours: domain -> colour.
        before: what the grey shares are of.
    """
    from plotly import graph_objects as go

    rows = {row["domain"]: row for row in mixture.to_dicts()}
    shown = [rows[domain] for domain in order if domain in rows]
    names = [row["domain"] for row in shown]
    labels = [plot_label(name) for name in names]
    old = go.Bar(
        y=labels,
        x=[row["prior"] for row in shown],
        orientation="h",
        marker={"color": QUIET},
        opacity=0.55,
        hovertemplate=f"%{{y}}, {before}: %{{x:.2%}}<extra></extra>",
    )
    notes = [
        percent(row["weight"]) + (f"  {plot_label(bound_name(row['binding']))}" if row["binding"] else "")
        for row in shown
    ]
    new = go.Bar(
        y=labels,
        x=[row["weight"] for row in shown],
        orientation="h",
        marker={"color": [colours[name] for name in names]},
        text=notes,
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}, next stage: %{x:.2%}<extra></extra>",
    )
    # of two bars of a name the first trace is the lower one: before above, after below
    figure = go.Figure([new, old])
    # texts outside bars do not widen an axis by themselves
    largest = max((max(row["prior"] * 1.05, row["weight"] * _room(row["binding"])) for row in shown), default=1.0)
    figure.update_xaxes(range=[0, largest], tickformat=".0%", title="share of tokens", showgrid=True)
    figure.update_yaxes(**categories(list(reversed(names))), automargin=True, showgrid=False)
    return finished(figure, 72 + 40 * len(shown), {"l": 8, "r": 8, "t": 8, "b": 48}, barmode="group", bargap=0.3)


def _room(binding: str | None) -> float:
    """Width of a bar with its note, as a multiple of the bar, that fits a phone too."""
    # a guess: the width of a text is known only when a browser draws it
    return 1.75 if binding else 1.3


def bound_name(binding: str) -> str:
    """A binding constraint in words."""
    return {"max_epochs": "epoch cap", "max_change": "change bound"}.get(binding, binding)


def training_figure(training: pl.DataFrame, windows: Mapping[str, tuple[int, int]]) -> str:
    """Loss, learning rate and gradient norm of the stage, the valued windows shaded.

    Args:
        training: columns `step`, `loss`, `lr` and `grad_norm`.
        windows: name -> first and last step.
    """
    from plotly.subplots import make_subplots

    names = [("loss", "loss"), ("lr", "learning rate"), ("grad_norm", "gradient norm")]
    # a run recorded without gradient norms has nulls there alone
    shown = [(column, label) for column, label in names if training[column].drop_nulls().len()]
    heights = [3.0 if column == "loss" else 1.0 for column, _ in shown]
    figure = make_subplots(rows=len(shown), cols=1, shared_xaxes=True, vertical_spacing=0.08, row_heights=heights)
    ordered = training.sort("step")
    for row, (column, label) in enumerate(shown, 1):
        trace = line(ordered, column, HELPED if column == "loss" else QUIET, f"step %{{x}}<br>{label} %{{y:.4g}}")
        figure.add_trace(trace, row=row, col=1)
        name_cell(figure, row, 1, label)
    for window, (first, last) in windows.items():
        # half a step on each side: a window of one step is seen too
        shade = {"x0": first - 0.5, "x1": last + 0.5, "fillcolor": _SHADE, "line_width": 0, "layer": "below"}
        figure.add_vrect(**shade, row="all", col=1)
        figure.add_annotation(
            x=(first + last) / 2,
            y=1,
            yref="paper",
            yanchor="bottom",
            text=plot_label(source_name(window)),
            showarrow=False,
            font={"size": 11},
            yshift=14,
        )
    figure.update_xaxes(title="step", row=len(shown), col=1)
    figure.update_yaxes(nticks=4)
    return finished(figure, 140 + 100 * len(shown), {"l": 48, "r": 8, "t": 40, "b": 44})


def window_range(curve: pl.DataFrame, window: str) -> tuple[int, int]:
    """First and last valued step of a window."""
    return _range(curve.filter(source=window))


def _range(frame: pl.DataFrame) -> tuple[int, int]:
    low, high = frame.select(pl.col("step").min(), last=pl.col("step").max()).row(0)
    return (0, 0) if low is None else (int(low), int(high))


def categories(names: Sequence[str]) -> dict[str, Any]:
    """An axis of names in this order; without its type, names like 2024 would become numbers or dates."""
    return {"type": "category", "categoryorder": "array", "categoryarray": [plot_label(name) for name in names]}


def line(frame: pl.DataFrame, column: str, colour: str, hover: str) -> Any:
    """One column over `step`."""
    from plotly import graph_objects as go

    return go.Scatter(
        x=frame["step"].to_list(),
        y=frame[column].to_list(),
        mode="lines",
        line={"color": colour, "width": 1.8},
        hovertemplate=f"{hover}<extra></extra>",
    )


def name_cell(figure: Any, row: int, column: int, text: str) -> None:
    """Name a cell at its upper left corner."""
    figure.add_annotation(
        row=row,
        col=column,
        x=0,
        y=1,
        xref="x domain",
        yref="y domain",
        xanchor="left",
        yanchor="bottom",
        text=plot_label(text),
        showarrow=False,
        font={"size": 11},
    )


def _limits(values: pl.Series) -> list[float]:
    """An axis range around all values and zero."""
    finite = values.drop_nulls().drop_nans().to_list()
    low, high = min([0.0, *finite]), max([0.0, *finite])
    # all zero: any range will do, but an empty one breaks the axis
    margin = 0.06 * (high - low) or 1.0
    return [low - margin, high + margin]


def _ticks(limits: list[float]) -> list[float]:
    """Zero and one round number on the longer side."""
    longer = max(limits, key=abs)
    # the range is never empty, see `_limits`: the logarithm exists
    power = 10.0 ** math.floor(math.log10(abs(longer)))
    size = max(step for step in (1.0, 2.0, 5.0) if step * power <= abs(longer)) * power
    return sorted([0.0, math.copysign(size, longer)])


def finished(figure: Any, height: int, margin: dict[str, int], **layout: Any) -> str:
    """Common looks; then JSON text that cannot close the script element that holds it."""
    # template none: the default one adds several kB to every figure, and colours that the page has already
    figure.update_layout(
        template="none",
        height=height,
        margin=margin,
        font=_FONT,
        showlegend=False,
        # a finger that scrolls the page must not zoom a figure
        dragmode=False,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"font": {"size": 12}},
        **layout,
    )
    axis = {"gridcolor": _GRID, "linecolor": _GRID, "zerolinecolor": QUIET, "zerolinewidth": 1, "fixedrange": True}
    # None leaves what the figure has set before
    figure.update_xaxes(showgrid=None, zeroline=False, **axis)
    figure.update_yaxes(zeroline=True, **axis)
    # by default Plotly takes orjson where it is installed: the bytes would depend on that
    return script_json(figure.to_json(engine="json"))
