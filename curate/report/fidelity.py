"""Pages about fidelity: how far estimates agree with training that was run again without the samples.

Rows come with their statistics; here they are only averaged, arranged and said. Any number may be None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from curate.report.charts import Section, write_sections
from curate.report.fidelity_figures import (
    Cell,
    Row,
    bars_figure,
    cell_name,
    drawable,
    grid,
    horizon_name,
    key_of,
    known,
    of_cell,
    ordered,
    pareto_figure,
    scatter_figure,
    smoothness_figure,
    spearman_figure,
)
from curate.report.style import HELPED, HURT, QUIET, count, decimal, listed, number, percent, size
from curate.report.tables import Cell as Format
from curate.report.tables import Table, table

# Words for numbers: limits of what the sentences say, no number depends on them.
_GOOD, _FAIR = 0.8, 0.5  # Spearman from which a ranking is said to be nearly, or roughly, that of retraining
_SMOOTH = 0.3  # relative deviation of slopes up to which training is said to be smooth in its data weights
_NOISY = 0.3  # share of the signal from which noise is said to hide it
_AXIS_NOTE = "Spearman of estimated and real values over the removed samples"

# Field -> header and format; the fields are also what a row must have, see `_full`.
_WHERE: dict[str, tuple[str, Format | None]] = {
    "window": ("window", None),
    "horizon": ("evaluated at", None),
    "target": ("target", None),
}
_ROWS = _WHERE | {
    "estimator": ("estimator", None),
    "seed": ("seed", count),
    "n": ("removals", count),
    "spearman": ("Spearman", decimal),
    "low": ("low", decimal),
    "high": ("high", decimal),
    "noise_cap": ("noise cap", lambda value: decimal(value, 3)),
    "spearman_within_step": ("within step", decimal),
    "spearman_of_difference": ("difference of targets", decimal),
    "group_lds": ("groups", decimal),
    "cost_units_per_step": ("passes per step", number),
    "bytes_per_sample": ("per sample", size),
}
_PAIRS = _WHERE | {
    "step": ("step", count),
    "value": ("real value, nats per token", number),
    "estimate": ("estimate, nats per token", number),
}
_SMOOTHNESS = _WHERE | {
    "part": ("part removed", number),
    "relative_deviation": ("relative deviation", number),
    "spearman": ("Spearman with whole removal", decimal),
    "n": ("removals", count),
}
_NOISE = _WHERE | {"noise": ("noise, nats per token", number), "signal": ("signal, nats per token", number)}
_MEANS: dict[str, tuple[str, Format | None]] = {
    "estimator": ("estimator", None),
    "window": ("window", None),
    "horizon": ("evaluated at", None),
    "rankings": ("rankings", count),
    "spearman": ("Spearman", decimal),
    "lowest": ("lowest", decimal),
    "highest": ("highest", decimal),
    "noise_cap": ("noise cap", lambda value: decimal(value, 3)),
    "within": ("within step", decimal),
    "difference": ("difference of targets", decimal),
    "group_lds": ("groups", decimal),
    "cost": ("passes per step", number),
    "bytes": ("per sample", size),
}


def verify_page(path: Path, result: Mapping[str, Any]) -> None:
    """Write what `python -m curate.verify` found.

    Args:
        path: the HTML file.
        result: `rows` (one per estimator, window, horizon, target and seed), `pairs` (one per removal), `smoothness`,
            `noise` and `cost`.
    """
    rows, pairs, smoothness = (_full(result[name], names) for name, names in _PARTS.items())
    targets = sorted({row["target"] for row in [*rows, *pairs, *smoothness]})
    noise = _full(result["noise"], _NOISE)
    sentences = [trust(rows), noise_sentence(noise), smoothness_sentence(smoothness), cost_sentence(result["cost"])]
    write_sections(
        path,
        "How far this run's values can be trusted",
        sentences,
        [
            _spearman_section(rows),
            _scatter_section(pairs, targets),
            _smoothness_section(smoothness, targets),
            Section(
                heading="How much of a value is rounding",
                note="Noise: spread of a value when the same training is run again with the samples of each batch in "
                "another order. Signal: spread of the values of different samples.",
                table=_table(noise, _NOISE),
                folded=False,
            ),
        ],
    )


_PARTS = {"rows": _ROWS, "pairs": _PAIRS, "smoothness": _SMOOTHNESS}


def _full(rows: Sequence[Row], names: Iterable[str]) -> list[Row]:
    """The rows with every field, None where it was left out or is not a finite number."""
    return [{name: _finite(row.get(name)) for name in names} for row in rows]


def _finite(value: Any) -> Any:
    # JSON and polars have nan, a sentence has no word for it
    return None if isinstance(value, float) and not known(value) else value


def _table(rows: Sequence[Row], columns: Mapping[str, tuple[str, Format | None]]) -> Table:
    """All rows, in the order of the figures."""
    ordered_rows = [row for cells in grid(rows) for cell in cells for row in of_cell(rows, cell)]
    # polars would take the type of a column from its first rows, which may be all null
    schema = {name: pl.String if show is None else pl.Float64 for name, (_, show) in columns.items()}
    named = [{name: row[name] for name in columns} | {"horizon": horizon_name(row["horizon"])} for row in ordered_rows]
    return table(pl.DataFrame(named, schema=schema, strict=False), columns)


def _spearman_section(rows: Sequence[Row]) -> Section:
    # what is the same in all rows says nothing as a label; the target is always named
    apart = [
        name for name in ("estimator", "target", "seed") if len({row[name] for row in rows}) > 1 or name == "target"
    ]
    labels = [", ".join(_label(name, row[name]) for name in apart) for row in rows]
    return Section(
        heading="How well values rank samples, held against retraining",
        note=f"{_AXIS_NOTE}, with its interval. The upright tick is the noise cap: the highest Spearman that the noise "
        "of retraining itself lets any estimate reach.",
        key=[("●", HELPED, "estimate"), ("❘", HURT, "noise cap")],
        plots=[
            [("Spearman with intervals per window, evaluation checkpoint and target", spearman_figure(rows, labels))]
        ],
        table=_table(rows, _ROWS),
        folded=False,
    )


def _label(name: str, value: Any) -> str:
    return f"seed {value}" if name == "seed" else str(value)


def _scatter_section(pairs: Sequence[Row], targets: Sequence[str]) -> Section:
    return Section(
        heading="Each removed sample: estimate against real value",
        note="A mark is one sample left out of one step. On the dotted line both are equal. Axes are logarithmic away "
        "from zero and linear near it; each line of the grid is a factor of ten. Panels have scales of their own.",
        key=key_of(targets),
        plots=[
            [
                (f"Estimates against real values, {cell_name(cell)}", scatter_figure(pairs, cell, targets))
                for cell in line
            ]
            for line in grid(pairs)
        ],
        table=_table(pairs, _PAIRS),
    )


def _smoothness_section(rows: Sequence[Row], targets: Sequence[str]) -> Section:
    return Section(
        heading="Removing a part of a sample's weight against removing all of it",
        note="Where training is smooth in its data weights, a tenth of the removal has a tenth of the effect and the "
        "deviation is small. At the dotted line the slope is off by its own size: no derivative can tell the effect.",
        key=key_of(targets),
        plots=[
            [(f"Deviation of slopes, {cell_name(cell)}", smoothness_figure(rows, cell, targets)) for cell in line]
            for line in grid(rows)
        ],
        table=_table(rows, _SMOOTHNESS),
    )


def trust(rows: Sequence[Row]) -> str:
    """How far the values can be trusted, in one sentence: each window and horizon by its worst target."""
    measured = [row for row in rows if row["spearman"] is not None]
    cells = [cell for line in grid(measured) for cell in line]
    verdicts: dict[str, list[Cell]] = {"nearly": [], "roughly": [], "hardly": []}
    for cell in cells:
        # the worst target, not the mean: a reader may care for that one
        worst = min(row["spearman"] for row in of_cell(measured, cell))
        verdicts["nearly" if worst >= _GOOD else "roughly" if worst >= _FAIR else "hardly"].append(cell)
    clauses = [
        f"{verdict} as retraining did in {_places(verdict_cells, cells)} "
        f"({_agreement([row for cell in verdict_cells for row in of_cell(measured, cell)])})"
        for verdict, verdict_cells in verdicts.items()
        if verdict_cells
    ]
    names = listed(sorted({str(row["estimator"]) for row in rows})) if rows else ""
    return (
        f"Values by {names} ranked the removed samples {'; '.join(clauses)}." if clauses else "No ranking was measured."
    )


def _places(cells: Sequence[Cell], every: Sequence[Cell]) -> str:
    """Windows and horizons in words; each window once."""
    # of a single window its name says more than "every window"
    if len(cells) == len(every) > 1:
        return "every window"
    horizons = {
        window: [horizon_name(at) for name, at in cells if name == window]
        for window in ordered(window for window, _ in cells)
    }
    return listed([f"the {window} window at {listed(names)}" for window, names in horizons.items()])


def _agreement(rows: Sequence[Row]) -> str:
    """Range of Spearman over targets, and how low its intervals reach."""
    lows = [row["low"] for row in rows if row["low"] is not None]
    spread = _spread([row["spearman"] for row in rows])
    return f"Spearman {spread}" + (f", intervals from {decimal(min(lows))}" if lows else "")


def _spread(values: Sequence[float]) -> str:
    low, high = decimal(min(values)), decimal(max(values))
    return low if low == high else f"{low} to {high}"


def noise_sentence(rows: Sequence[Row]) -> str:
    """The worst share of noise in the values."""
    shares = {
        _at(row): row["noise"] / row["signal"] for row in rows if row["noise"] is not None and (row["signal"] or 0) > 0
    }
    if not shares:
        return "How much of a value is rounding was not measured."
    worst_at, worst = max(shares.items(), key=lambda item: item[1])
    verdict = "; there no estimate can rank small values" if worst >= _NOISY else ""
    return f"Rounding alone moves a value by at most {percent(worst)} of the spread of values ({worst_at}){verdict}."


def smoothness_sentence(rows: Sequence[Row]) -> str:
    """The worst deviation of a part's slope."""
    measured = [row for row in rows if row["relative_deviation"] is not None]
    if not measured:
        return "Whether training is smooth in its data weights was not measured."
    worst = max(measured, key=lambda row: row["relative_deviation"])
    deviation, worst_at = percent(worst["relative_deviation"], 0), _at(worst)
    if worst["relative_deviation"] <= _SMOOTH:
        return (
            "Training is smooth in its data weights: parts of a removal differ in slope by at most "
            f"{deviation} ({worst_at})."
        )
    return (
        f"Training is not smooth in its data weights everywhere: removing {percent(worst['part'], 0)} of a sample's "
        f"weight differs in slope by {deviation} ({worst_at}); trust single values there less than their ranking."
    )


def _at(row: Row) -> str:
    return f"{cell_name((row['window'], row['horizon']))}, {row['target']}"


def cost_sentence(cost: Mapping[str, Any]) -> str:
    """What checking cost, beside what it checks."""
    reruns, passes, estimate = (cost.get(name) for name in ("reruns", "rerun_units", "estimate_units"))
    return (
        f"Retraining cost {number(passes, 4)} passes for {count(reruns)} reruns, the estimates {number(estimate, 4)}. "
        "A pass is one forward and backward pass over a training batch."
    )


def pareto_page(path: Path, rows: Sequence[Row]) -> None:
    """Write how estimators compare: agreement with retraining against cost.

    Args:
        path: the HTML file.
        rows: one per estimator, window, horizon, target and seed, as in `verify_page`.
    """
    means = mean_rows(_full(rows, _ROWS))
    estimators = _ranked(means)
    cells = grid(means)
    left_out = sorted({row["estimator"] for row in means if not drawable(row)})
    missing = f" Without a cost or a Spearman somewhere, so not drawn there: {listed(left_out)}." if left_out else ""
    write_sections(
        path,
        "What agreement with retraining costs",
        [best_sentence(means)],
        [
            Section(
                heading="Agreement with retraining against cost",
                note=f"{_AXIS_NOTE}, mean over targets and seeds; lines run from the lowest of them to the highest. A "
                "pass is one forward and backward pass over a training batch. Nothing cheaper reaches the blue "
                f"steps.{missing}",
                plots=[
                    [(f"Spearman against cost, {cell_name(cell)}", pareto_figure(means, cell))]
                    for line in cells
                    for cell in line
                ],
            ),
            Section(
                heading="Ranking samples of one step, and whole groups",
                note="Within a step learning rate and gradient scale are the same for all, so that only the samples "
                "differ. Groups: sums of values against retraining without the group (LDS). Means over targets and "
                "seeds.",
                key=[("■", HELPED, "within a step"), ("■", QUIET, "groups")],
                plots=[
                    [
                        (
                            f"Within-step and group agreement at {horizon_name(line[0][1])}",
                            bars_figure(means, line, estimators),
                        )
                    ]
                    for line in cells
                ],
            ),
            Section(heading="All means", table=_table(means, _MEANS), folded=False),
        ],
    )


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    """Means over targets and seeds per estimator, window and horizon; what is None is left out of them."""
    means: list[Row] = []
    for estimator in ordered(row["estimator"] for row in rows):
        estimator_rows = [row for row in rows if row["estimator"] == estimator]
        for cell in [cell for line in grid(estimator_rows) for cell in line]:
            cell_rows = of_cell(estimator_rows, cell)
            spearmans = [row["spearman"] for row in cell_rows if row["spearman"] is not None]
            means.append(
                {
                    "estimator": estimator,
                    "window": cell[0],
                    "horizon": cell[1],
                    "rankings": len(spearmans),
                    "lowest": min(spearmans, default=None),
                    "highest": max(spearmans, default=None),
                    **{name: _mean(cell_rows, column) for name, column in _AVERAGED.items()},
                }
            )
    return means


_AVERAGED = {
    "spearman": "spearman",
    "noise_cap": "noise_cap",
    "within": "spearman_within_step",
    "difference": "spearman_of_difference",
    "group_lds": "group_lds",
    "cost": "cost_units_per_step",
    "bytes": "bytes_per_sample",
}


def _mean(rows: Sequence[Row], column: str) -> float | None:
    numbers = [row[column] for row in rows if row[column] is not None]
    return sum(numbers) / len(numbers) if numbers else None


def _ranked(means: Sequence[Row]) -> list[str]:
    """Estimators, the best on average first."""
    average = {name: _mean([row for row in means if row["estimator"] == name], "spearman") for name in _names(means)}
    # 2: behind every Spearman, also the negative ones
    return sorted(average, key=lambda name: 2.0 if average[name] is None else -(average[name] or 0.0))


def _names(means: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["estimator"] for row in means))


def best_sentence(means: Sequence[Row]) -> str:
    """Which estimator agrees best with retraining, where, and at what cost."""
    measured = [row for row in means if row["spearman"] is not None]
    cells = [cell for line in grid(measured) for cell in line]
    winners: dict[str, list[Row]] = {}
    for cell in cells:
        best = max(of_cell(measured, cell), key=lambda row: row["spearman"])
        winners.setdefault(best["estimator"], []).append(best)
    if not winners:
        return "No ranking was measured."
    clauses = [
        f"{name} in {_places([(row['window'], row['horizon']) for row in wins], cells)} "
        f"(mean Spearman {_spread([row['spearman'] for row in wins])}, {number(_mean(wins, 'cost'))} passes per step)"
        for name, wins in sorted(winners.items(), key=lambda item: -len(item[1]))
    ]
    return f"Best of {count(len(_names(means)))} estimators in agreement with retraining: {'; '.join(clauses)}."
