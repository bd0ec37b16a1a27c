"""`python -m pipelines.fidelity.moments`: how far values move where optimizer state had to be estimated.

The state before a window is stripped of its optimizer state, which is estimated as `curate.reconstruct` does, and the
window is valued from both.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from curate.core.artifacts import list_files
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.progress import start_logging
from curate.embeddings.embed import EmbedConfig, embed
from curate.embeddings.values import embedded_values
from curate.reconstruct.moments import estimate_moments
from curate.stats.rank_correlation import spearman
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.target import load_targets

# Folders that earlier commands made in the run from its real states: a copy would reuse them.
_MADE = ("embeddings", "influence", "branch-tests", "verify", "selections", "reports")


class MomentsConfig(Config):
    """What to compare."""

    run: Path
    """A finished run."""
    target: Path
    """Target documents (JSONL)."""
    out: Path = Path("runs/moments")
    """Where the copy of the run with estimated state is made; emptied first."""
    window: Literal["early", "late"] = "late"
    """Window that is valued."""
    steps: int = Field(default=100, ge=1)
    """Gradients of as many steps before the window are used."""
    min_target_tokens: int = Field(default=1, ge=1)
    """Least predicted tokens of the target."""
    tolerance: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Of replayed losses, relative; they differ because the state does."""


def agreement(config: MomentsConfig) -> dict[str, float]:
    """Spearman of the values from estimated and from real state.

    Returns:
        `pooled`, and `within_step`, the mean over steps.

    Raises:
        UserError: the window starts with the run, or at no snapshot.
    """
    from safetensors.torch import load_file, save_file

    run = Run(config.run)
    start, _ = run.window(config.window)
    if start == 0 or start not in run.snapshots:
        raise UserError(f"window {config.window} starts at step {start}: nothing to estimate, or no snapshot there")
    shutil.rmtree(config.out, ignore_errors=True)
    shutil.copytree(config.run, config.out, ignore=shutil.ignore_patterns(*_MADE))
    copy = Run(config.out)
    state = copy.snapshot(start)
    save_file({name: tensor for name, tensor in load_file(state).items() if not name.startswith("optimizer.")}, state)
    # the state has a new hash: without it the copy would be refused as damaged
    list_files(config.out, [state])
    estimate_moments(Replay(copy, tolerance=config.tolerance), start, state, config.steps)
    targets = load_targets([config.target], None, run.spec, config.min_target_tokens)
    frames = []
    for valued_run in (run, copy):
        embed_config = EmbedConfig(
            target=config.target,
            window=config.window,
            min_target_tokens=config.min_target_tokens,
            tolerance=config.tolerance,
        )
        (embedding,) = embed(embed_config, valued_run, targets)[config.window]
        frames.append(embedded_values(embedding, targets.main).sort("step", "sample_id"))
    real, estimated = frames
    # both frames are sorted by the same keys: row i is one sample
    joined = real.select("step", "value_total_nats").with_columns(estimated=estimated["value_total_nats"])
    steps = joined.partition_by("step", maintain_order=True)
    within = [spearman(step["value_total_nats"].to_numpy(), step["estimated"].to_numpy()) for step in steps]
    pooled = spearman(joined["value_total_nats"].to_numpy(), joined["estimated"].to_numpy())
    defined = [rho for rho in within if rho is not None]  # none where all values of a step are equal
    return {"pooled": np.nan if pooled is None else pooled, "within_step": float(np.mean(defined))}


def main() -> None:
    """Entry point."""
    config = parse_command(
        MomentsConfig, "python -m pipelines.fidelity.moments", "How far values move with estimated optimizer state."
    )
    start_logging()
    with locked(config.out.parent, f".{config.out.name}.lock"):
        result = agreement(config)
    sys.stdout.write(f"Spearman pooled {result['pooled']:.3f}, within a step {result['within_step']:.3f}\n")


if __name__ == "__main__":
    run_command(main)
