"""The two estimators: they feed replayed steps into the pure recursions of `dvemb.py` and `adjoint.py`."""

from __future__ import annotations

from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.artifacts import read_json, replacing, write_json
from curate.config import Config
from curate.embeddings.adamw import TrainingState
from curate.embeddings.adjoint import adjoint_step, check_forward_mode
from curate.embeddings.dvemb import recursion
from curate.errors import UserError
from curate.progress import progress
from curate.target import half_gradients
from curate.trajectory.replay import records

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from curate.artifacts import Json
    from curate.embeddings.estimator import Estimator, WindowJob
    from curate.gradients.capture import GradientCapture
    from curate.target import Target

HALVES = 2


class DvembConfig(Config):
    """Settings of `dvemb`."""

    width: int = 16
    """Projected size of each side of a layer; a layer contributes up to width^2 dimensions."""
    operator: Literal["block", "full"] = "block"
    """One operator per layer (as published), or one for all layers."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Name patterns of Linear and Conv1D modules that are not captured."""
    rows_per_block: int = 1024
    """Rows solved at once by the blocked recursion."""
    seed: int = 0
    """Seed of the projections."""


class AdjointConfig(Config):
    """Settings of `adjoint`."""

    memory_bytes: int = 8 * 10**9
    """Memory for the states of a window (4 numbers per parameter and step)."""
    save_seconds: float = 60.0
    """Time between saves of the progress that an interrupted window continues from."""


def make_estimator(name: Literal["adjoint", "dvemb"], adjoint: AdjointConfig, dvemb: DvembConfig) -> Estimator:
    """The estimator of that name."""
    return AdjointEstimator(adjoint) if name == "adjoint" else DvembEstimator(dvemb)


class AdjointEstimator:
    """Exact values for the target's two halves as anchors: D = 2, and `t` selects a half."""

    name = "adjoint"

    def __init__(self, config: AdjointConfig) -> None:
        self.config = config

    def settings(self, job: WindowJob) -> Json:
        """The anchors: embeddings serve one target."""
        return {"anchors": _target(job, self.name).fingerprint}

    def dimension(self, job: WindowJob) -> int:
        """One number per anchor."""
        return HALVES

    def cost_units(self, job: WindowJob) -> float:
        """Replay, then about 1 + 2 R per step, and the target's own gradient."""
        target = _target(job, self.name)
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
        import torch

        layout = job.replay.layout
        job.replay.horizon_model(job.horizon)
        gradients = half_gradients(job.replay.task, _target(job, self.name), layout.names, job.batch_size)
        flat = torch.stack([layout.flatten(gradient) for gradient in gradients])
        return job.horizon, TrainingState(
            parameters=flat, exp_avg=torch.zeros_like(flat), exp_avg_sq=torch.zeros_like(flat)
        )


class DvembEstimator:
    """The published recursion over projected gradients; serves any target without a new pass over the window."""

    name = "dvemb"

    def __init__(self, config: DvembConfig) -> None:
        self.config = config

    def settings(self, job: WindowJob) -> Json:
        """Projection and operator."""
        return self.config.model_dump(mode="json", exclude={"rows_per_block"})

    def dimension(self, job: WindowJob) -> int:
        """Sum over layers of k_o k_i."""
        return self._capture(job).size

    def cost_units(self, job: WindowJob) -> float:
        """One replay; the recursion is small beside it."""
        return float(job.horizon - job.start)

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Capture projected gradients by replay to disk, then run the recursion from disk (`dvemb.py`).

        Peak memory: training state, one micro-batch of captures, and one block of the recursion.
        """
        capture = self._capture(job)
        step_records = list(records(job.replay.run, job.start, job.horizon))
        rows = sum(record.size for record in step_records)
        steps = np.repeat([record.step for record in step_records], [record.size for record in step_records])
        gradients = self._captured(job, capture, rows)
        blocks = list(capture.blocks.values()) if self.config.operator == "block" else [slice(0, capture.size)]
        scales = np.concatenate([self._scales(job, capture, record) for record in step_records])
        recursion(
            gradients,
            scales,
            steps,
            out,
            blocks=blocks,
            rows_per_block=self.config.rows_per_block,
            device=str(job.replay.device),
        )
        return {"layers": capture.layers, "gradient_bytes": gradients.nbytes}

    def encode(self, job: WindowJob) -> npt.NDArray[np.float32]:
        """Projected gradient of each half at the horizon."""
        import torch

        target = _target(job, self.name)
        job.replay.horizon_model(job.horizon)
        vectors = np.zeros((HALVES, self._capture(job).size), np.float32)
        with self._capture(job) as capture:
            for half, batch in enumerate(target.halves):
                for part in batch.split(job.batch_size):
                    moved = part.to(job.replay.device)
                    (job.replay.task.sample_losses(moved) * moved.weights).sum().backward()
                    vectors[half] += torch.einsum("bd,b->d", capture.take(moved.weights), moved.weights).cpu().numpy()
        job.replay.model.zero_grad(set_to_none=True)
        return vectors

    def _capture(self, job: WindowJob) -> GradientCapture:
        from curate.gradients.capture import GradientCapture

        return GradientCapture(job.replay.model, self.config.width, self.config.seed, self.config.exclude)

    def _captured(self, job: WindowJob, capture: GradientCapture, rows: int) -> npt.NDArray[np.float32]:
        """(N, D) gradients of all steps from the window's start to the horizon, on disk.

        An interrupted capture continues at the last snapshot that it passed.
        """
        path, marker = job.scratch / "gradients.npy", job.scratch / "captured.json"
        first, row = job.start, 0
        if marker.exists():
            done = read_json(marker)
            first, row = int(done["step"]), int(done["row"])
        mode: Literal["r+", "w+"] = "r+" if row else "w+"
        shape = (rows, capture.size)
        gradients: np.memmap[Any, Any] = np.lib.format.open_memmap(path, mode, np.float32, None if row else shape)
        if first == job.horizon:
            return gradients
        with capture:
            replayed_steps = job.replay.steps(first, job.horizon, capture.take)
            for replayed in progress(replayed_steps, total=job.horizon - first, what="capture"):
                for captured in replayed.captured:
                    gradients[row : row + len(captured)] = captured.cpu().numpy()
                    row += len(captured)
                if (replayed.record.step + 1) in {*job.replay.run.snapshots, job.horizon}:
                    gradients.flush()
                    write_json(marker, {"step": replayed.record.step + 1, "row": row})
        return gradients

    def _scales(self, job: WindowJob, capture: GradientCapture, record: Any) -> npt.NDArray[np.float64]:
        """(B_k, blocks) `clip_k lr_k c_z`.

        Raises:
            UserError: a full operator over layers whose groups have different learning rates.
        """
        group_of = {name: index for index, group in enumerate(job.replay.run.spec.groups) for name in group}
        lrs = [record.groups[group_of[f"{layer}.weight"]].lr for layer in capture.layers]
        if self.config.operator == "full":
            if len(set(lrs)) > 1:
                raise UserError(
                    "dvemb.operator full needs one lr for all captured layers; their parameter groups differ: use block"
                )
            lrs = lrs[:1]
        weights = np.concatenate([np.asarray(weights) for _, weights in record.micro_batches])
        return np.outer(weights * record.clip_factor, lrs)


def _target(job: WindowJob, estimator: str) -> Target:
    if job.target is None:
        raise UserError(f"estimator {estimator} needs a target here; pass --target FILE.jsonl")
    return job.target


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
