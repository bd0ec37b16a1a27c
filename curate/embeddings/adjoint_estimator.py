"""`adjoint` as an estimator: replayed states, the recursion of `adjoint.py`, and progress that survives a crash."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.artifacts import replacing
from curate.config import Config
from curate.embeddings.adjoint import adjoint_step, check_forward_mode
from curate.embeddings.estimator import HALVES, job_target
from curate.errors import UserError
from curate.optimizers.state import TrainingState
from curate.progress import progress
from curate.target import loss_gradients
from curate.trajectory.replay import records

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.artifacts import Json
    from curate.embeddings.estimator import WindowJob


class AdjointConfig(Config):
    """Settings of `adjoint`."""

    memory_bytes: int = 8 * 10**9
    """Memory for the states of a window (4 numbers per parameter and step)."""
    save_seconds: float = 60.0
    """Time between saves of the progress that an interrupted window continues from."""


class AdjointEstimator:
    """Exact values for the target's two halves as anchors: D = 2, and `t` selects a half."""

    name = "adjoint"

    def __init__(self, config: AdjointConfig) -> None:
        self.config = config

    def settings(self, job: WindowJob) -> Json:
        """The anchors: embeddings serve one target."""
        return {"anchors": job_target(job, self.name).fingerprint}

    def dimension(self, job: WindowJob) -> int:
        """One number per anchor."""
        return HALVES

    def cost_units(self, job: WindowJob) -> float:
        """Replay, then about 1 + 2 R per step, and the target's own gradient."""
        target = job_target(job, self.name)
        batch = max(next(records(job.replay.run, job.start, job.stop)).size, 1)
        return (job.horizon - job.start) * (2 + 2 * HALVES) + sum(len(half) for half in target.halves) / batch

    def encode(self, job: WindowJob) -> npt.NDArray[np.float32]:
        """Unit vectors: anchor h is half h."""
        return np.eye(HALVES, dtype=np.float32)

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Push the halves' gradients back from the horizon to the window's start; see `curate.embeddings.adjoint`.

        Raises:
            UserError: the window's states exceed the memory limit, or the model has no forward-mode derivative.
        """
        replay, layout = job.replay, job.replay.layout
        self._check_memory(job)
        replay.load(replay.run.snapshots[0])
        first = next(records(replay.run, job.start, job.stop))
        check_forward_mode(replay.task, layout, replay.batches(first)[0])
        step, cotangent = self._resume(job)
        states = list(progress(replay.states(job.start, step), total=step - job.start, what="states"))
        stop_rows = _row_starts(job)
        saved = monotonic()
        for state in progress(reversed(states), total=len(states), what="adjoint"):
            rows, cotangent = adjoint_step(replay.task, layout, state, replay.run.spec.clip_norm, cotangent)
            if state.record.step < job.stop:
                start = stop_rows[state.record.step]
                out[start : start + len(rows)] = rows.float().cpu().numpy()
            if monotonic() - saved > self.config.save_seconds:
                out.flush()  # type: ignore[attr-defined]
                _save_cotangent(job.scratch, state.record.step, cotangent)
                saved = monotonic()
        return {"anchors": HALVES}

    def _check_memory(self, job: WindowJob) -> None:
        per_step = 4 * job.replay.layout.size * 4
        steps = job.horizon - job.start
        if steps * per_step > self.config.memory_bytes:
            raise UserError(
                f"the states of {steps} steps need {steps * per_step:,} bytes, "
                f"adjoint.memory_bytes is {self.config.memory_bytes:,}: "
                f"{self.config.memory_bytes // per_step} steps fit; raise it, or value a part with --window_steps"
            )

    def _resume(self, job: WindowJob) -> tuple[int, TrainingState]:
        """The step whose state the cotangent belongs to, and the cotangent."""
        saved = _load_cotangent(job.scratch, job.replay.device)
        if saved is not None:
            return saved
        job.replay.horizon_model(job.horizon)
        halves = job_target(job, self.name).halves
        flat = loss_gradients(job.replay.task, job.replay.layout, halves, job.batch_size)
        return job.horizon, TrainingState.zeros(flat)


def _row_starts(job: WindowJob) -> dict[int, int]:
    """First row of each step of the window."""
    step_records = list(records(job.replay.run, job.start, job.stop))
    starts = np.cumsum([0, *(record.size for record in step_records)]).tolist()
    return {record.step: start for record, start in zip(step_records, starts, strict=False)}


def _save_cotangent(folder: Path, step: int, cotangent: TrainingState) -> None:
    from safetensors.torch import save_file

    with replacing(folder / "cotangent.safetensors") as part:
        save_file({key: value.contiguous() for key, value in vars(cotangent).items()}, str(part), {"step": str(step)})


def _load_cotangent(folder: Path, device: Any) -> tuple[int, TrainingState] | None:
    from safetensors import safe_open

    path = folder / "cotangent.safetensors"
    if not path.exists():
        return None
    with safe_open(str(path), framework="pt", device=str(device)) as file:
        tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return int(file.metadata()["step"]), TrainingState(**tensors)
