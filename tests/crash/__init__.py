"""Kills at events, see `sitecustomize.py`."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def crash_environment(before: str, at: int = 1, *, alone: bool = False) -> dict[str, str]:
    """Environment of a process that kills its group (or itself alone) before a file is renamed for the `at`-th time."""
    crash = {"CRASH_BEFORE": before, "CRASH_AT": str(at), **({"CRASH_ALONE": "1"} if alone else {})}
    return {**os.environ, **crash, "PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{ROOT}"}
