"""The report's numbers in a tracker."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from curate.report.data import ReportData, save_data
from curate.report.page import write_report
from curate.tracking import Tracker, TrackingConfig, open_tracker


def publish(selection: Path, data: ReportData, config: TrackingConfig) -> None:
    """Write the report of a selection into its folder, and log it."""
    save_data(selection, data)
    write_report(selection / "report.html", data)
    tracker = open_tracker(config, selection, f"select {data.target}", "select")
    log_report(tracker, data, selection / "report.html", selection / "mixture.yaml")
    tracker.finish()


def log_report(tracker: Tracker, data: ReportData, html_path: Path, mixture_path: Path) -> None:
    """Log what a report shows: settings, curves by step, every table, the HTML page, the mixture as an artifact.

    Args:
        tracker: a started tracker; it is not finished here.
        data: the report's data.
        html_path: the page that `write_report` wrote.
        mixture_path: `mixture.yaml`.
    """
    tracker.log_config({**data.settings, "estimator": data.estimator, "target": data.target, "sign": data.sign})
    for step, metrics in sorted(curves(data).items()):
        tracker.log_metrics(metrics, step)
    for name in ("reliability", "domains", "mixture", "sweep", "targets", "examples", "shards", "costs"):
        tracker.log_table(f"report/{name}", getattr(data, name))
    tracker.log_html("report/page", html_path)
    tracker.log_artifact(f"mixture-{_plain(data.run)}-{_plain(data.target)}", "mixture", mixture_path)


def curves(data: ReportData) -> Mapping[int, dict[str, float]]:
    """Step -> `train/...` and `value/WINDOW/DOMAIN` (mean value per predicted token)."""
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    for row in data.training.select("step", "loss", "lr", "grad_norm").to_dicts():
        step = row.pop("step")
        metrics[step] |= {f"train/{name}": value for name, value in row.items() if value is not None}
    for row in data.curve.filter(pl.col("value").is_not_null()).to_dicts():
        metrics[row["step"]][f"value/{row['window']}/{row['domain']}"] = row["value"]
    return metrics


def _plain(name: str) -> str:
    """A name as artifact names allow it: letters, digits, dashes, underscores and dots."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
