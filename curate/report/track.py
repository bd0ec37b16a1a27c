"""The report's numbers in a tracker."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import polars as pl

from curate.core.tracking import Tracker, TrackingConfig, open_tracker, without_places
from curate.output.layout import SelectionFolder
from curate.report.data import ReportData, save_data
from curate.report.page import render, write_report

_NAME = 128  # characters of a name that W&B allows


def publish(selection: SelectionFolder, data: ReportData, config: TrackingConfig) -> None:
    """Write the report of a selection into its folder, and log it."""
    # the data first: a page that cannot be rendered can be tried again from it
    save_data(selection, data)
    write_report(selection.report, data)
    log_report(data, selection.mixture, config, selection.root, f"select {data.target}", "select")


def log_report(data: ReportData, mixture: Path, config: TrackingConfig, folder: Path, name: str, job: str) -> None:
    """Log what a report shows: settings, curves by step, every table, the HTML page, the mixture as an artifact.

    Args:
        data: the report's data.
        mixture: `mixture.yaml`.
        config: which tracker, and whether texts are sent to it.
        folder: that the tracker writes below.
        name: of the tracker's run.
        job: what the run does.
    """
    if config.mode == "none":
        return
    tracker = open_tracker(config, folder, name[:_NAME], job)
    log_all(tracker, without_private(data, texts=config.texts), mixture)
    tracker.finish()


def without_private(data: ReportData, *, texts: bool) -> ReportData:
    """The report without paths of this machine, and without texts of samples unless they are asked for."""
    examples = data.examples if texts else data.examples.with_columns(text=pl.lit("texts are sent with wandb_texts"))
    return replace(data, examples=examples, settings=without_places(data.settings), loader=_moved(data.loader))


def log_all(tracker: Tracker, data: ReportData, mixture: Path) -> None:
    """Log everything to a started tracker."""
    tracker.log_config({**data.settings, "estimator": data.estimator, "target": data.target, "sign": data.sign})
    # W&B drops what is logged for a step below the last one: ascending
    for step, metrics in sorted(curves(data).items()):
        tracker.log_metrics(metrics, step)
    # not `curve` and `training`: they go as metrics by step, which a tracker draws better than a table
    for name in ("reliability", "domains", "mixture", "sweep", "targets", "examples", "shards", "costs"):
        tracker.log_table(f"report/{name}", getattr(data, name))
    tracker.log_html("report/page", render(data))
    # W&B refuses longer names, and other characters
    tracker.log_artifact(f"mixture-{_plain(data.run)}-{_plain(data.target)}"[:_NAME], "mixture", mixture)


def curves(data: ReportData) -> Mapping[int, dict[str, float]]:
    """Step -> `train/...` and `value/SOURCE/DOMAIN` (mean value per predicted token)."""
    metrics: dict[int, dict[str, float]] = defaultdict(dict)
    for row in data.training.select("step", "loss", "lr", "grad_norm").to_dicts():
        step = row.pop("step")
        metrics[step] |= {f"train/{name}": value for name, value in row.items() if value is not None}
    for row in data.curve.filter(pl.col("value").is_not_null()).to_dicts():
        metrics[row["step"]][f"value/{row['source']}/{row['domain']}"] = row["value"]
    return metrics


def _moved(loader: str) -> str:
    """Python lines with places as `without_places` has them."""
    # string literals with their escapes: a quote inside a path must not end the match
    return re.sub(r'"((?:[^"\\]|\\.)*)"', lambda quoted: f'"{without_places(quoted[1])}"', loader)


def _plain(name: str) -> str:
    """A name as artifact names allow it: letters, digits, dashes, underscores and dots."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in name)
