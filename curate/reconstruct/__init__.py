"""A finished run that had no recorder, rebuilt from a description of it and checked against its log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.core.callable_module import make_callable

if TYPE_CHECKING:
    from pathlib import Path

    from curate.reconstruct.description import ReconstructConfig


def reconstruct(config: ReconstructConfig) -> Path:
    """Rebuild a run, see `curate.reconstruct.build.reconstruct`."""
    from curate.reconstruct import build

    return build.reconstruct(config)


make_callable(__name__, reconstruct)
