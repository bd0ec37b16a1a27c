"""`python -m pipelines.fidelity.cost --run RUN`: what one backward step of `adjoint` costs, in forward+backward passes.

Every way of taking a step goes round by round beside the training's own forward+backward pass, in one process; numbers
are medians of ratios of CPU time (on a GPU: of time). The replay that the states come from costs one pass more.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Annotated, Any, get_args

from pydantic import Field

from curate.core.artifacts import write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.progress import progress, start_logging
from curate.embeddings.adjoint import OwnStep, StepOptions, adjoint_step
from curate.embeddings.products import Hessian
from curate.optimizers.state import TrainingState
from curate.training.replay import Replay
from curate.training.run import Run, open_run

_log = logging.getLogger(__name__)


class CostConfig(Config):
    """What to measure."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    window: str = "late"
    """The window whose first step is taken back."""
    anchors: tuple[Annotated[int, Field(ge=1)], ...] = (1, 8)
    """Numbers of anchors at once."""
    rounds: int = Field(default=7, ge=1)
    """Times that each way is measured."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """JSON file of the rows; none: only print."""


def measure(config: CostConfig, run: Run) -> list[dict[str, Any]]:
    """Cost of one step for every number of anchors, own step and Hessian.

    Returns:
        Rows of anchors, own_step, hessian, units (of the whole step) and units_per_anchor, both with the replay.
    """
    replay = Replay(run, config.device)
    start, _ = run.window(config.window)
    # one state serves all ways: cost depends on shapes, not on numbers
    state = next(replay.states(start, start + 1))
    ways = list(product(config.anchors, get_args(OwnStep), get_args(Hessian)))
    cotangents = {anchors: _cotangent(replay, anchors) for anchors in config.anchors}
    ratios: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in progress(range(config.rounds + 1), total=config.rounds + 1, what="rounds"):
        for way in ways:
            anchors, own_step, hessian = way
            options = StepOptions(own_step=own_step, hessian=hessian)
            arguments = replay.task, replay.layout, state, run.spec.clip_norm, cotangents[anchors], options
            # else the pass would also pay for adding to old gradients
            replay.model.zero_grad(set_to_none=True)
            # right before the step: a machine that slows down slows both, and their ratio stays
            unit = _seconds(config, lambda: replay.backward(state.batches, ()))
            ratios[way].append(_seconds(config, lambda step=arguments: adjoint_step(*step)) / unit)  # type: ignore[misc]
    rows = []
    for way, way_ratios in ratios.items():
        anchors, own_step, hessian = way
        # the replay's pass, which every step of a real walk needs too
        units = median(way_ratios[1:]) + 1  # the first round warms up
        rows.append(
            {
                "anchors": anchors,
                "own_step": own_step,
                "hessian": hessian,
                "units": units,
                "units_per_anchor": units / anchors,
            }
        )
    return rows


def _cotangent(replay: Replay, anchors: int) -> TrainingState:
    """Random numbers: no cost depends on them."""
    import torch

    generator = torch.Generator(device=replay.device).manual_seed(0)
    drawn = torch.randn((3, anchors, replay.layout.size), generator=generator, device=replay.device)
    return TrainingState(parameters=drawn[0], momentum=drawn[1], second_moment=drawn[2])


def _seconds(config: CostConfig, work: Callable[[], object]) -> float:
    """CPU time of the process, or time where the work is a GPU's."""
    import torch

    if config.device == "cpu":
        begin = process_time()
        work()
        return process_time() - begin
    torch.cuda.synchronize(config.device)
    # kernels run behind the call: CPU time says nothing of them
    begin = perf_counter()
    work()
    torch.cuda.synchronize(config.device)
    return perf_counter() - begin


def main() -> None:
    """Entry point."""
    config = parse_command(CostConfig, "python -m pipelines.fidelity.cost", "What a backward step of adjoint costs.")
    start_logging()
    run = open_run(config.run)
    rows = measure(config, run)
    sys.stdout.write(f"{'anchors':>8}  {'own step':10}{'Hessian':14}{'units':>8}{'per anchor':>12}\n")
    for row in rows:
        sys.stdout.write(
            f"{row['anchors']:8}  {row['own_step']:10}{row['hessian']:14}{row['units']:8.2f}"
            f"{row['units_per_anchor']:12.2f}\n"
        )
    if config.out is not None:
        write_json(config.out, {"run": run.fingerprint, "rows": rows})
        _log.info("wrote %s", config.out)


if __name__ == "__main__":
    run_command(main)
