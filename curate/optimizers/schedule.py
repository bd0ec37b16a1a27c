"""Learning rates as a function of the step: linear warm-up, then constant, linear or cosine decay."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from curate.core.config import Config


class LrSchedule(Config):
    """Learning rate of the first parameter group; others are multiples of it."""

    peak: float = Field(gt=0)
    """Peak learning rate."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up."""
    warmup_from: Literal[0, 1] = 1
    """Step k of the warm-up has lr `peak (k + warmup_from) / warmup_steps`; 0: the first step has lr 0."""
    decay: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """lr at the end of the decay, as a share of the peak."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Steps from the first one to the end of the decay; none: the stage's."""

    def lr(self, step: int, steps: int) -> float:
        """The lr at `step` of a stage of `steps`."""
        if step < self.warmup_steps:
            return self.peak * (step + self.warmup_from) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        end = self.decay_steps or steps
        # at most 1: a decay that ends before the stage stays at its end; max: the warm-up may fill the whole stage
        progress = min((step - self.warmup_steps) / max(end - self.warmup_steps, 1), 1.0)
        remaining = 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * (self.min_ratio + (1 - self.min_ratio) * remaining)
