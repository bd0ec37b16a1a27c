"""The protocol between estimators and everything that uses their embeddings.

An estimator turns the steps of a window into rows `E[z]` (N, D) and a target into vectors t (D,) such that
`value(z; target) ~ <E[z], t>` with the sign of `curate.core.artifacts.SIGN`. Nothing else crosses this border, so the
embeddings of every estimator are indexed, rolled up and searched in the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from curate.core.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from curate.core.artifacts import Json
    from curate.training.replay import Replay
    from curate.training.target import Target


HALVES = 2  # of a target: two independent values of each sample, from which their reliability follows


@dataclass(frozen=True, kw_only=True)
class WindowJob:
    """One window to embed.

    Attributes:
        replay: repeats the run's steps.
        start: first step of the window.
        stop: step after its last.
        horizon: the evaluation checkpoint: the target's loss is read at the state before this step. `stop`, the end of
            the stage, or a step between.
        batch_size: samples per pass where the estimator chooses (targets).
        target: the target to serve, or None where the estimator needs none.
        folder: where the embeddings lie, set by `embed_window`; an estimator may keep files of its own there.
    """

    replay: Replay
    start: int
    stop: int
    horizon: int
    batch_size: int
    target: Target | None = None
    folder: Path = Path()

    @property
    def scratch(self) -> Path:
        """Folder for progress that an interrupted job continues from; deleted when the job is done."""
        return self.folder / "scratch"


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A target in the coordinates of a window's embeddings.

    Attributes:
        vectors: (2, D) float32, t of each half of the target.
        residual: relative residual of the target's gradient where it was solved into coordinates, the larger of its
            halves'; None where the coordinates are exact, or the estimator knows no such measure.
    """

    vectors: npt.NDArray[np.float32]
    residual: float | None = None


class Estimator(Protocol):
    """Computes the embeddings of one window."""

    @property
    def name(self) -> str:
        """Name on the command line and in artifacts."""

    def settings(self, job: WindowJob) -> Json:
        """What the embeddings depend on beside run, window and evaluation checkpoint."""

    def dimension(self, job: WindowJob) -> int:
        """D."""

    def passes(self, job: WindowJob) -> float:
        """Expected cost of `embed` in forward-backward passes of a training batch, stated before the work."""

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Fill `out` (N, D), rows in the order of `window_rows`; returns facts for the manifest."""

    def encode(self, job: WindowJob) -> Encoded:
        """The job's target; called when the embeddings are complete."""


def job_target(job: WindowJob, estimator: str) -> Target:
    """The target of a job.

    Raises:
        UserError: it has none.
    """
    if job.target is None:
        raise UserError(f"estimator {estimator} needs a target here; pass --target FILE.jsonl")
    return job.target
