"""`python -m pipelines.capture_bench`: what recording and capturing cost in a training step, and the recursion.

A GPT-2 on real text (source files of Python's library, bytes as tokens). Every contender has its own model. They
take their steps in turn, in an order that changes from round to round, in one process. Seconds are CPU time of all its
threads, the writer's included. Ratios are medians over rounds with a bootstrap bound. Multiplications
are counted by torch's dispatcher, bytes by its allocator, each in one more step.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from curate.core.artifacts import write_json
from curate.core.config import parse_command, run_command
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.progress import start_logging
from pipelines.capture_bench.config import MODELS, CaptureBenchConfig
from pipelines.capture_bench.contenders import Bench, write_data
from pipelines.capture_bench.recursion import OPERATORS, recursion_rows

_log = logging.getLogger(__name__)


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows on the terminal."""
    sys.stdout.write(
        f"{'model':6}{'case':18}{'width':>6}{'pairs':>7}{'s':>9}{'/ step':>8}{'/ f+b':>8}{'upper':>8}"
        f"{'added':>8}{'x floor':>9}{'peak MB':>9}\n"
    )
    for row in rows:
        floor = "" if row["added_over_floor"] is None else f"{row['added_over_floor']:.2f}"
        sys.stdout.write(
            f"{row['model']:6}{row['case']:18}{row['width'] or '':>6}{row['pairs']:7}{row['seconds']:9.4f}"
            f"{row['ratio_to_plain_step']:8.3f}{row['ratio_to_forward_backward']:8.3f}{row['ratio_upper_95']:8.3f}"
            f"{row['added_multiplications_share']:8.3f}{floor:>9}{row['peak_bytes'] / 1e6:9.1f}\n"
        )


def bench(config: CaptureBenchConfig) -> dict[str, Any]:
    """Measure everything.

    Returns:
        `rows` (one per model and case) and `recursion`.

    Raises:
        UserError: a model is not one of `MODELS`.
    """
    import shutil

    import torch

    models = ("3M",) if config.small else config.models
    unknown = sorted({*models} - set(MODELS))
    if unknown:
        raise UserError(f"models {unknown[0]!r} is not one of {', '.join(MODELS)}")
    # CPU time of many threads that spin would hide what a step costs
    torch.set_num_threads(config.threads)
    # a recorder would find the runs of an earlier bench there
    shutil.rmtree(config.folder, ignore_errors=True)
    # fewer than the rounds need: batches begin again, timing does not care
    stream = write_data(config, samples=40 * config.batch_size)
    rows = [row for model in models for row in Bench(config, model, stream).measure()]
    print_table(rows)
    recursions = [
        # a GPT-2 block has 4 matrices: query-key-value, attention output, and two of the MLP
        {"model": model, **recursion_rows(config, 4 * MODELS[model][1], operator)}
        for model in models
        for operator in OPERATORS
    ]
    for row in recursions:
        sys.stdout.write(
            f"{row['model']:6}{row['case']:18}{row['width']:6}  {row['rows_per_second']:,.0f} rows per second, "
            f"{row['bytes_per_sample']:,} bytes per sample, {100 * row['share_of_matrix_product']:.0f} % of a matrix "
            "product's speed\n"
        )
    return {"rows": rows, "recursion": recursions}


def main() -> None:
    """Entry point."""
    config = parse_command(
        CaptureBenchConfig, "python -m pipelines.capture_bench", "What recording and capturing cost in a training step."
    )
    start_logging()
    with locked(config.folder.parent, f".{config.folder.name}.lock"):
        result = bench(config)
    if config.out is not None:
        write_json(config.out, result)
        _log.info("wrote %s", config.out)


if __name__ == "__main__":
    run_command(main)
