"""`dvemb` as an estimator: gradients captured to disk, then the recursion of `dvemb.py` from disk.

Steps that the run captured itself (`run_capture.py`) are read; all others are replayed. A job's `horizon` is its
evaluation checkpoint, where the recursion begins.

An estimator with another recursion over captured gradients replaces `_capture`, `_taker`, `_in_run`, `_stored`, `_rows`
and `_recursion`.

With `segment_steps` the recursion goes segment by segment, last first. The joined operator of all finished segments
lies in the scratch folder. It carries the segment before them (`dvemb.py`): an interrupted recursion continues there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from curate.core.arrays import create_memmap, read_arrays, write_arrays
from curate.core.artifacts import read_hashed, write_hashed
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.progress import progress
from curate.embeddings.captured import CapturedRows
from curate.embeddings.dvemb import carry, joined, recursion
from curate.embeddings.estimator import HALVES, Encoded, job_target
from curate.training.replay import records

if TYPE_CHECKING:
    from pathlib import Path

    import numpy.typing as npt
    from torch import Tensor

    from curate.core.artifacts import Json
    from curate.embeddings.estimator import WindowJob
    from curate.gradients.capture import GradientCapture
    from curate.optimizers.settings import GroupSettings
    from curate.training.replay import ReplayedStep, StepRecord


class DvembConfig(Config):
    """Settings of `dvemb`."""

    width: int = Field(default=16, ge=1)
    """Projected size of each side of a layer; a layer contributes up to width^2 dimensions."""
    operator: Literal["block", "full"] = "block"
    """One operator per layer (as published), or one for all layers."""
    exclude: tuple[str, ...] = ("lm_head",)
    """Name patterns of Linear and Conv1D modules that are not captured."""
    rows_per_block: int | None = Field(default=None, ge=1)
    """Rows solved at once by the blocked recursion; none: 256 with an operator per layer, 1024 with one for all."""
    seed: int = 0
    """Seed of the projections."""
    segment_steps: int | None = Field(default=None, ge=1)
    """Steps between influence checkpoints, where an interrupted recursion continues; none: one pass. The embeddings are
    those of one pass within float32 rounding: a row differs by less than 1e-5 of its own step `lr_k c_z D_k g_z` where
    no later step amplifies it."""

    @property
    def block_rows(self) -> int:
        """`rows_per_block`, or its default for the operator."""
        return self.rows_per_block or (256 if self.operator == "block" else 1024)


class DvembEstimator:
    """The published recursion over projected gradients; serves any target without a new pass over the window."""

    name: str = "dvemb"
    shared_settings: tuple[str, ...] = ("lr",)
    """Settings of the parameter groups that a full operator needs equal."""

    def __init__(self, config: DvembConfig) -> None:
        self.config = config

    def settings(self, job: WindowJob) -> Json:
        """Projection and operator; also segments where there are some, because they round differently."""
        # rows_per_block only says how much is solved at once; exclude_none: no segments is no setting.
        return self.config.model_dump(mode="json", exclude={"rows_per_block"}, exclude_none=True)

    def dimension(self, job: WindowJob) -> int:
        """Sum over layers of k_o k_i."""
        return self._plain_capture(job).size

    def passes(self, job: WindowJob) -> float:
        """A replay of the steps that the run did not capture itself; the recursion is small beside it."""
        in_run = self._in_run(job, self._plain_capture(job))
        return float(job.horizon - job.start - (in_run.count(job.start, job.horizon) if in_run else 0))

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Bring projected gradients to disk, from the run or by replay, then run the recursion from disk.

        Peak memory: training state, one micro-batch of captures, one block of the recursion, and the operators
        of all layers on the CPU (twice with `segment_steps`).
        """
        capture = self._capture(job)
        step_records = list(records(job.replay.run, job.start, job.horizon))
        settings = [self._block_settings(job, capture, record) for record in step_records]
        stored = self._captured(job, capture, sum(record.size for record in step_records))
        self._walk_segments(
            job,
            stored,
            step_records,
            settings,
            out,
            blocks=list(capture.blocks.values()) if self.config.operator == "block" else [slice(0, capture.size)],
            rows_per_block=self.config.block_rows,
            device=str(job.replay.device),
        )
        return {"layers": capture.layers, "gradient_bytes": sum(array.nbytes for array in stored.values())}

    def encode(self, job: WindowJob) -> Encoded:
        """Projected gradient of each half at the horizon."""
        import torch

        target = job_target(job, self.name)
        capture = self._capture(job, frozen=True)
        job.replay.model_at(job.horizon)
        vectors = np.zeros((HALVES, capture.size), np.float32)
        with capture:
            for half, batch in enumerate(target.halves):
                for part in batch.split(job.batch_size):
                    pieces = part.to(job.replay.device)
                    (job.replay.task.sample_losses(pieces) * pieces.weights).sum().backward()
                    # `take` divides the weights out of each row; the target's gradient is the weighted sum.
                    rows = capture.take(pieces.weights)
                    vectors[half] += torch.einsum("bd,b->d", rows, pieces.weights).cpu().numpy()
        return Encoded(vectors=vectors)

    def _plain_capture(self, job: WindowJob, *, keep: bool = False, frozen: bool = False) -> GradientCapture:
        from curate.gradients.capture import GradientCapture

        config = self.config
        return GradientCapture(job.replay.model, config.width, config.seed, config.exclude, keep=keep, frozen=frozen)

    def _capture(self, job: WindowJob, *, frozen: bool = False) -> GradientCapture:
        """What captures the window's gradients, or (frozen) the target's; it may load other states into the model."""
        return self._plain_capture(job, frozen=frozen)

    def _taker(self, capture: GradientCapture) -> Callable[[Tensor], Any]:
        """What collects a micro-batch after its backward pass, given its weights."""
        return capture.take

    def _stored(self) -> tuple[str, ...]:
        """Names of the arrays that `_rows` fills."""
        return ("gradients",)

    def _rows(self, job: WindowJob, capture: GradientCapture, replayed: ReplayedStep) -> list[Tensor]:
        """One step's rows (B_k, D) of each stored array."""
        import torch

        return [torch.cat(replayed.captured)]

    def _recursion(
        self,
        stored: Mapping[str, npt.NDArray[np.float32]],
        step_records: Sequence[StepRecord],
        settings: Sequence[Sequence[GroupSettings]],
        out: npt.NDArray[np.float32],
        **options: Any,
    ) -> list[Tensor]:
        """From the stored arrays to embeddings and operators; `settings` are those of each step and block."""
        steps = row_steps(step_records)
        return recursion(stored["gradients"], row_scales(step_records, settings), steps, out, **options)

    def _walk_segments(
        self,
        job: WindowJob,
        stored: Mapping[str, npt.NDArray[np.float32]],
        step_records: Sequence[StepRecord],
        settings: Sequence[Sequence[GroupSettings]],
        out: npt.NDArray[np.float32],
        **options: Any,
    ) -> None:
        """`_recursion` of each segment, last first, carried to the horizon by the operator of the later ones."""
        path, device = job.scratch / "segments.npz", options["device"]
        length = self.config.segment_steps or len(step_records)
        stop, later = _load_progress(path, options["blocks"]) if path.exists() else (len(step_records), [])
        first_rows = np.cumsum([0, *(record.size for record in step_records)])
        while stop:
            # Borders are multiples of the length from the start: an interrupted job meets the same segments again.
            segment = slice((stop - 1) // length * length, stop)
            rows = slice(first_rows[segment.start], first_rows[segment.stop])
            gradients = {name: array[rows] for name, array in stored.items()}
            operators = self._recursion(gradients, step_records[segment], settings[segment], out[rows], **options)
            if later:
                carry(out[rows], later, **options)
                pairs = zip(operators, later, strict=True)
                operators = [joined(before.to(device), after.to(device)).cpu() for before, after in pairs]
            stop, later = segment.start, operators
            if stop:
                # Rows before the progress: it may only say that a segment is done when its rows are on disk.
                out.flush()  # type: ignore[attr-defined]
                _save_progress(path, stop, later)

    def _captured(self, job: WindowJob, capture: GradientCapture, rows: int) -> dict[str, npt.NDArray[np.float32]]:
        """The stored arrays (N, D) of all steps from the window's start to the horizon, on disk.

        An interrupted capture continues at the last snapshot that it passed: from elsewhere a replay would first have
        to repeat the steps since the snapshot.
        """
        marker = job.scratch / "captured.json"
        first, row = job.start, 0
        if marker.exists():
            done = read_hashed(marker)
            first, row = int(done["step"]), int(done["row"])
        paths = {name: job.scratch / f"{name}.npy" for name in self._stored()}
        arrays: dict[str, np.memmap[Any, Any]] = {
            name: np.lib.format.open_memmap(path, "r+") if row else create_memmap(path, (rows, capture.size))
            for name, path in paths.items()
        }
        # A recursion was interrupted: capture is complete.
        if first == job.horizon:
            return dict(arrays)
        with capture:
            steps = self._step_rows(job, capture, first)
            for step, step_rows in progress(steps, total=job.horizon - first, what="capture"):
                for array, captured in zip(arrays.values(), step_rows, strict=True):
                    array[row : row + len(captured)] = captured
                row += len(step_rows[0])
                if (step + 1) in {*job.replay.run.snapshots, job.horizon}:
                    # The marker last: what it counts must be on disk.
                    for array in arrays.values():
                        array.flush()
                    write_hashed(marker, {"step": step + 1, "row": row})
        return dict(arrays)

    def _step_rows(
        self, job: WindowJob, capture: GradientCapture, first: int
    ) -> Iterator[tuple[int, list[npt.NDArray[np.float32]]]]:
        """Each step from `first` to the horizon with its stored arrays: read where the run has them, else replayed.

        The arrays of a step whose update was skipped are 0: it moved nothing, and its gradients may not be finite.
        """
        in_run, step = self._in_run(job, capture), first
        skipped = {
            record.step: record.size for record in records(job.replay.run, first, job.horizon) if not record.updated
        }

        def zeros(step: int) -> list[npt.NDArray[np.float32]]:
            return [np.zeros((skipped[step], capture.size), np.float32) for _ in self._stored()]

        while step < job.horizon:
            arrays = zeros(step) if step in skipped else in_run and in_run.read(step)
            if arrays:
                yield step, arrays
                step += 1
                continue
            # One replay up to the next captured step: each new start would repeat the steps since a snapshot.
            later = range(step + 1, job.horizon) if in_run else ()
            stop = next((other for other in later if in_run and in_run.has(other)), job.horizon)
            for replayed in job.replay.steps(step, stop, self._taker(capture)):
                at = replayed.record.step
                rows = [] if at in skipped else self._rows(job, capture, replayed)
                yield at, [array.cpu().numpy() for array in rows] or zeros(at)
            step = stop

    def _in_run(self, job: WindowJob, capture: GradientCapture) -> CapturedRows | None:
        """What the run captured itself in the coordinates of these settings; None where no capture could serve."""
        return CapturedRows(job.replay.run, capture.identity, self._stored())

    def _block_settings(self, job: WindowJob, capture: GradientCapture, record: StepRecord) -> list[GroupSettings]:
        """Settings of the parameter group of each block of the operator.

        Raises:
            UserError: a full operator over layers whose groups differ in what the recursion reads.
        """
        settings = list(layer_settings(job, capture, record).values())
        if self.config.operator == "block":
            return settings
        # One operator for all layers has one lr: with several, a row would need a scale for each of its columns.
        if len({tuple(getattr(group, key) for key in self.shared_settings) for group in settings}) > 1:
            raise UserError(
                f"{self.name.replace('-', '_')}.operator full needs one {' and '.join(self.shared_settings)} for all "
                "captured layers; their parameter groups differ: use block"
            )
        return settings[:1]


def _save_progress(path: Path, stop: int, operators: Sequence[Tensor]) -> None:
    """Keep how many steps are left, counted from the window's start, and the operators after them."""
    flat = np.concatenate([operator.numpy().ravel() for operator in operators])
    write_arrays(path, {"stop": np.int64(stop), "operators": flat})


def _load_progress(path: Path, blocks: Sequence[slice]) -> tuple[int, list[Tensor]]:
    """What `_save_progress` kept."""
    import torch

    sizes = [columns.stop - columns.start for columns in blocks]
    stored = read_arrays(path)
    parts = torch.from_numpy(stored["operators"]).split([size**2 for size in sizes])
    return int(stored["stop"]), [part.view(size, size) for part, size in zip(parts, sizes, strict=True)]


def layer_settings(job: WindowJob, capture: GradientCapture, record: StepRecord) -> dict[str, GroupSettings]:
    """Settings of the parameter group of each captured layer at one step."""
    # By the weight: a bias may be in another group, but it is not captured.
    group_of = {name: index for index, group in enumerate(job.replay.run.spec.groups) for name in group}
    return {layer: record.groups[group_of[f"{layer}.weight"]] for layer in capture.layers}


def row_steps(step_records: Sequence[StepRecord]) -> npt.NDArray[np.int64]:
    """(N,) step of each row."""
    return np.repeat([record.step for record in step_records], [record.size for record in step_records])


def row_scales(
    step_records: Sequence[StepRecord], settings: Sequence[Sequence[GroupSettings]]
) -> npt.NDArray[np.float64]:
    """(N, blocks) `clip_k lr_k c_z`; 0 where no update was taken."""
    weights = [np.concatenate([np.asarray(c) for _, c in record.micro_batches]) for record in step_records]
    return np.concatenate(
        [
            # `clipped` is asked only of an updated step: a skipped one may have no gradient norm, which is an error.
            np.outer(step_weights * record.clipped, [group.lr * group.updated for group in groups])
            if record.updated
            else np.zeros((len(step_weights), len(groups)))
            for step_weights, record, groups in zip(weights, step_records, settings, strict=True)
        ]
    )
