"""`dvemb` as an estimator: gradients captured by replay to disk, then the recursion of `dvemb.py` from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.artifacts import read_json, write_json
from curate.config import Config
from curate.embeddings.dvemb import recursion
from curate.embeddings.estimator import HALVES, job_target
from curate.errors import UserError
from curate.progress import progress
from curate.trajectory.replay import records

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.artifacts import Json
    from curate.embeddings.estimator import WindowJob
    from curate.gradients.capture import GradientCapture


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

        target = job_target(job, self.name)
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
