"""Settings of the capture bench: sizes, cases, lengths."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from curate.core.config import Config

MODELS = {"tiny": (32, 2, 2), "3M": (256, 4, 4), "25M": (512, 8, 8)}
"""Name -> width of the residual stream, blocks, heads; 12 width^2 parameters a block."""
CASES = ("forward-backward", "plain-step", "recorder", "capture", "capture-adam", "capture-frozen", "replay-capture")
CLIP_NORM = 1.0
REPLAYED_STEPS = 8  # the replay begins again after so many
WARM_UP = 2  # rounds that are not counted: optimizer state and kernels are set up in them


class CaptureBenchConfig(Config):
    """What to measure."""

    folder: Path = Path("runs/capture-bench")
    """Where data and runs of the bench are written; emptied first."""
    models: tuple[str, ...] = ("3M", "25M")
    """Sizes: 3M, 25M, or tiny."""
    pairs: dict[str, int] = {"3M": 200, "25M": 30, "tiny": 3}
    """Rounds of each size; in a round every case takes one step."""
    context: int = Field(default=256, ge=8)
    """Tokens of a sequence."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences of a step."""
    width: int = Field(default=16, ge=1)
    """Projected size of each side of a layer."""
    recursion_rows: int = Field(default=4096, ge=1)
    """Rows that the recursion walks back over."""
    threads: int = Field(default=1, ge=1)
    """Threads of torch."""
    small: bool = False
    """3M only, 10 rounds."""
    out: Path | None = None
    """JSON file of the rows; none: only print."""
