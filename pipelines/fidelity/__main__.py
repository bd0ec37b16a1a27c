"""`python -m pipelines.fidelity` (`scripts/bench_fidelity`): every estimator against real leave-one-out, with seeds.

For each seed: a recorded run on real text, reruns without single samples and without groups, all estimators, and rows
of agreement per window, horizon and target. Each part is kept as it is finished, so an interrupted bench continues.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.artifacts import SIGN, file_fingerprint, fingerprint, read_json, write_json
from curate.core.config import parse_command, run_command
from curate.core.lock import locked
from curate.core.progress import start_logging
from curate.embeddings.anchors import GENERAL
from curate.evaluation.draw import draw
from curate.evaluation.measure import HorizonName, compare
from curate.evaluation.reruns import Reruns
from curate.evaluation.truth import collect
from curate.report.fidelity import pareto_page
from curate.training.replay import Replay
from curate.training.target import load_target
from pipelines.fidelity.config import BenchConfig, small
from pipelines.fidelity.data import make_data, make_run
from pipelines.fidelity.estimators import estimates, open_bench

if TYPE_CHECKING:
    from pathlib import Path

_log = logging.getLogger(__name__)


def bench(config: BenchConfig) -> dict[str, Any]:
    """Run what is missing, and gather the rows of all seeds.

    Returns:
        rows (see `curate.evaluation.measure`), smoothness and noise.
    """
    data = make_data(config)
    found: dict[str, Any] = {"rows": [], "smoothness": [], "noise": []}
    for seed in config.seeds:
        path = config.folder / f"seed-{seed}" / f"rows-{fingerprint(_settings(config))[:8]}.json"
        if not path.exists():
            write_json(path, one_seed(config, data, seed))
        part = read_json(path)
        for key, own in found.items():
            own += part[key]
    return found


def _settings(config: BenchConfig) -> dict[str, Any]:
    """What a seed's rows depend on."""
    chosen = config.model_dump(mode="json", exclude={"out", "folder", "seeds", "small", "corpus", "model"})
    return {**chosen, "model": file_fingerprint(config.model)}


def one_seed(config: BenchConfig, data: Path, seed: int) -> dict[str, Any]:
    """Train, rerun, estimate, compare."""
    run = make_run(config, data, seed)
    folder = config.folder / f"seed-{seed}"
    names = [*config.targets, GENERAL]
    targets = [load_target(data / "split" / "targets" / f"{name}.jsonl", run.spec, 1) for name in names]
    windows = config.windows
    horizons: dict[str, dict[HorizonName, int]] = {
        name: {"window_end": stop, "stage_end": config.steps} for name, (_, stop) in windows.items()
    }
    steps = {name: sorted(set(found.values())) for name, found in horizons.items()}
    reruns = Reruns(Replay(run), targets, 48)
    truth_of = fingerprint([target.fingerprint for target in targets])[:8]
    removals = draw(run, windows, config.draw, seed)
    truth = collect(folder / f"truth-{truth_of}.parquet", reruns, removals, steps, names)
    found = compare(truth, estimates(open_bench(config, run, data, folder)), horizons, seed)
    return {key: [{**row, "seed": seed} for row in found[key]] for key in ("rows", "smoothness", "noise")}


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over targets and seeds of each estimator, window and horizon, with a t interval over seeds."""
    from scipy.stats import t

    cells: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["target"] != GENERAL:
            cells.setdefault((row["estimator"], row["window"], row["horizon"]), []).append(row)
    lines = []
    for (estimator, window, horizon), own in cells.items():
        line: dict[str, Any] = {"estimator": estimator, "window": window, "horizon": horizon}
        for key in ("spearman", "spearman_within_step", "spearman_of_difference", "group_lds", "noise_cap"):
            line[key] = _mean([row[key] for row in own])
        seeds = sorted({row["seed"] for row in own})
        means = [_mean([row["spearman"] for row in own if row["seed"] == seed]) for seed in seeds]
        kept = [mean for mean in means if mean is not None]
        width = float(t.ppf(0.975, len(kept) - 1) * np.std(kept, ddof=1) / len(kept) ** 0.5) if len(kept) > 1 else None
        line |= {"half_width": width, "seeds": len(seeds)}
        line["worst"] = min((row["spearman"] for row in own if row["spearman"] is not None), default=None)
        line["cost_units_per_step"] = _mean([row["cost_units_per_step"] for row in own])
        lines.append(line)
    return lines


def _mean(values: list[float | None]) -> float | None:
    kept = [value for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


def show(lines: list[dict[str, Any]], write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the table."""
    keys = ("spearman", "half_width", "worst", "spearman_within_step", "spearman_of_difference", "group_lds")
    heads = ("Spearman", "+-", "worst", "in step", "differ.", "groups")
    write(
        f"{'estimator':24}{'window':8}{'horizon':12}"
        + "".join(f"{head:>10}" for head in (*heads, "cap", "units"))
        + "\n"
    )
    for line in sorted(lines, key=lambda one: (one["window"], one["horizon"], -(one["spearman"] or 0))):
        numbers = [line[key] for key in (*keys, "noise_cap", "cost_units_per_step")]
        cells = "".join(f"{'-' if number is None else format(number, '.3f'):>10}" for number in numbers)
        write(f"{line['estimator']:24}{line['window']:8}{line['horizon']:12}{cells}\n")


def main() -> None:
    """Entry point."""
    config = parse_command(
        BenchConfig, "python -m pipelines.fidelity", "Every estimator of values against real leave-one-out, with seeds."
    )
    start_logging()
    config = small(config) if config.small else config
    with locked(config.folder):
        result = bench(config)
    lines = table(result["rows"])
    show(lines)
    target = config.out or config.folder / "fidelity.json"
    write_json(target, {"sign": SIGN, "table": lines, **result})
    pareto_page(target.with_suffix(".html"), result["rows"])
    _log.info("wrote %s and %s", target, target.with_suffix(".html"))


if __name__ == "__main__":
    run_command(main)
