"""Windows that are declared before a stage, as ranges of its steps."""

from __future__ import annotations

import re

from curate.core.errors import UserError
from curate.data.streams import NAME

Border = int | float


def default_windows(steps: int) -> dict[str, tuple[int, int]]:
    """The first and the last tenth of a stage, at most 50 steps each: values cost several passes per step."""
    # a stage of fewer than ten steps has windows of one step
    length = min(max(steps // 10, 1), 50)
    return {"early": (0, length), "late": (steps - length, steps)}


def window_steps(windows: dict[str, tuple[Border, Border]], steps: int) -> dict[str, tuple[int, int]]:
    """Turn declared windows into step ranges.

    Raises:
        UserError: a window is empty or reaches beyond the stage, or its name cannot be that of a folder.
    """
    resolved = {}
    for name, borders in windows.items():
        if not re.fullmatch(NAME, name):
            raise UserError(f"window {name!r}: a name has letters, digits, '_', '-' and '.' only; rename it")
        # the type decides, as the settings say: 1 is step 1, 1.0 is the end of the stage
        start, stop = (round(border * steps) if isinstance(border, float) else border for border in borders)
        if not 0 <= start < stop <= steps:
            raise UserError(
                f"window {name!r} covers steps {start} to {stop} of a stage of {steps}; "
                "set recorder.windows to a range inside it"
            )
        resolved[name] = (start, stop)
    return resolved
