"""`python -m pipelines.fidelity.directions --run RUN --target FILE`: is one direction enough for a recorded window?

Rows of a window would need one vector of a target for all of its steps. Here such directions are held against `adjoint`
with exact derivatives of every sample at the state of its step, so that no projection decides:

- last: the target's gradient at the window's end pulled back through the window's last update, times the ratio of lr;
- own: through the sample's own update;
- carried: through all updates from the window's end back to the sample's (momentum, clipping, Adam's scale), without
  the curvature of the training loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import polars as pl
from pydantic import Field

from curate.core.config import Config, parse_command, run_command
from curate.core.progress import start_logging
from curate.embeddings.embed import EmbedConfig, embed
from curate.embeddings.leave_one_out import before_step
from curate.embeddings.values import embedded_values
from curate.influence.direction import moved, moves_along, sample_derivatives
from curate.optimizers.state import TrainingState
from curate.optimizers.step import update_vjp
from curate.stats.rank_correlation import spearman
from curate.training.replay import Replay
from curate.training.run import open_run
from curate.training.samples import SampleReader
from curate.training.target import load_target, loss_gradients

if TYPE_CHECKING:
    from torch import Tensor

    from curate.training.replay import State
    from curate.training.run import Run
    from curate.training.target import Target

_DIRECTIONS = ("last", "own", "carried")


class DirectionsConfig(Config):
    """What to measure."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    target: Path
    """Target documents (JSONL)."""
    window: Literal["early", "late"] = "late"
    """Window of the run; all of its states are in memory at once."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of the target."""


def measure(config: DirectionsConfig, run: Run) -> pl.DataFrame:
    """Rank correlation of each direction's values with those of `adjoint`.

    Returns:
        `direction`, `domain` (null: all samples), `samples` and `spearman`.
    """
    target = load_target(config.target, run.spec, config.min_target_tokens)
    settings = EmbedConfig(
        run=run.folder, target=config.target, window=config.window, min_target_tokens=config.min_target_tokens
    )
    exact = embedded_values(embed(settings, run)[config.window][0], target)
    joined = exact.join(_along_directions(config, run, target), on=["step", "sample_id"])
    joined = joined.unique(["step", "sample_id"], keep="first", maintain_order=True)
    parts: list[tuple[str | None, pl.DataFrame]] = [(None, joined)]
    parts += [(str(name), part) for (name,), part in joined.group_by("domain", maintain_order=True)]
    rows = [
        {"direction": name, "domain": domain, "samples": len(part), "spearman": _rank(part, name)}
        for name in _DIRECTIONS
        for domain, part in parts
    ]
    return pl.DataFrame(rows, schema_overrides={"domain": pl.String, "spearman": pl.Float64})


def _rank(part: pl.DataFrame, name: str) -> float | None:
    return spearman((part[name] * part["weight"]).to_numpy(), part["value_total_nats"].to_numpy())


def _along_directions(config: DirectionsConfig, run: Run, target: Target) -> pl.DataFrame:
    """Values of every sample of the window along each direction, of weight 1."""
    import torch

    start, stop = run.spec.windows[config.window]
    replay, reader = Replay(run), SampleReader(run.source)
    replay.model_at(stop)
    halves = loss_gradients(replay.task, replay.layout, list(target.halves), 16)
    gradient = (torch.tensor(target.half_weights, dtype=halves.dtype) @ halves)[None]
    states = list(replay.states(start, stop))
    end = TrainingState.zeros(gradient)
    last, carried = _pulled(replay, states[-1], end)[0], _carried(replay, states, end)
    tables = []
    for step, (state, back) in enumerate(zip(states, carried, strict=True), start=start):
        share = _lr(state) / max(_lr(states[-1]), 1e-12)
        directions = torch.cat([share * last, _pulled(replay, state, end)[0], back])
        ids = [sample_id for sample_ids, _ in state.record.micro_batches for sample_id in sample_ids]
        moves = moves_along(directions, state.parameters)
        values = -sample_derivatives(replay, state.parameters, moves, reader.samples(ids))
        columns = {name: values[:, position] for position, name in enumerate(_DIRECTIONS)}
        tables.append(pl.DataFrame({"step": [step] * len(ids), "sample_id": ids, **columns}))
    return pl.concat(tables)


def _carried(replay: Replay, states: list[State], end: TrainingState) -> list[Tensor]:
    """(1, P) what the end asks of the gradient of each step, through all updates after it."""
    directions, cotangent = [], end
    for state in reversed(states):
        direction, cotangent = _pulled(replay, state, cotangent)
        directions.append(direction)
    return directions[::-1]


def _pulled(replay: Replay, state: State, cotangent: TrainingState) -> tuple[Tensor, TrainingState]:
    groups = replay.layout.groups(state.record.groups)
    pulled, before = update_vjp(
        before_step(state), state.gradient, state.updates, groups, replay.run.spec.clip_norm, cotangent
    )
    return pulled.where(moved(state, groups), 0.0), before


def _lr(state: State) -> float:
    return float(np.mean([group.lr for group in state.record.groups]))


def main() -> None:
    """Entry point."""
    config = parse_command(
        DirectionsConfig, "python -m pipelines.fidelity.directions", "Directions of a window held against adjoint."
    )
    start_logging()
    table = measure(config, open_run(config.run))
    for name in _DIRECTIONS:
        part = table.filter(direction=name)
        inside = part["spearman"].slice(1).drop_nulls().to_numpy()
        ranks = f"all {part['spearman'][0]:.3f}, inside domains: mean {inside.mean():.3f}, least {inside.min():.3f}"
        sys.stdout.write(f"{name:10} {ranks}\n")


if __name__ == "__main__":
    run_command(main)
