"""Rows that a run captured in its own backward pass, on disk: one file per rank and step, keyed by sample id.

`captures/<fingerprint of the coordinates>/rank-<r>/step-<k>.npz` holds `sample_ids` (B,), `weights` (B,), `gradients`
(B, D) and, in AdamW's coordinates, `preconditioned` (B, D), in the order in which the rank trained. The first file of a
window also holds `gradient` (D,): the projected gradient of the whole step. All rows of the step must add up to it. A
capture that had to stop leaves `failed.json`; a step without files is replayed.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from curate.core.arrays import UNREADABLE, write_arrays
from curate.core.artifacts import fingerprint, read_json, write_json

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.core.artifacts import Json
    from curate.training.run import Run

_log = logging.getLogger(__name__)
_SETTINGS, _FAILED = "capture.json", "failed.json"
# Of the gradient's norm: half precision loses about a hundredth, a wrong loss scale is a factor of 2 or more.
_SUM_TOLERANCE = 0.1


def capture_folder(run: Path, identity: Json) -> Path:
    """Where rows of given coordinates (`GradientCapture.identity`) lie in a run."""
    return run / "captures" / fingerprint(identity)


def off_by(rows: npt.NDArray[np.float32], weights: npt.NDArray[np.float32], total: npt.NDArray[np.float32]) -> float:
    """How far `sum_z c_z g_z` is from the gradient of a step, relative to it; NaN columns of it are not compared.

    Args:
        rows: (N, D) of the whole step.
        weights: (N,) `c_z`.
        total: (D,).
    """
    # NaN columns are weights that two modules share: `.grad` holds the sum of both, a row only one of them.
    comparable = ~np.isnan(total)
    expected = total[comparable].astype(np.float64)
    summed = weights.astype(np.float64) @ rows[:, comparable].astype(np.float64)
    return float(np.linalg.norm(summed - expected) / max(np.linalg.norm(expected), np.finfo(np.float32).tiny))


def adds_up(rows: npt.NDArray[np.float32], weights: npt.NDArray[np.float32], total: npt.NDArray[np.float32]) -> bool:
    """Whether rounding explains `off_by`; a gradient that overflowed says nothing, and passes."""
    return bool(np.isinf(total).any()) or off_by(rows, weights, total) < _SUM_TOLERANCE


class RowWriter:
    """Writes the files of one rank in a thread of its own.

    A training that is faster than the disk waits while `queue_steps` steps are unwritten, but at most
    `patience_seconds`. A disk that hangs, is full or fails ends the capture, never the training.

    Args:
        folder: of the coordinates, see `capture_folder`.
        identity: the coordinates.
        rank: of this process.
        first_step: where this process starts; files of this and later steps are of an earlier attempt: removed.
        queue_steps: steps in memory at most.
        patience_seconds: longest wait.

    Attributes:
        failure: why nothing more is written, or None.
    """

    def __init__(
        self,
        folder: Path,
        identity: Json,
        *,
        rank: int,
        first_step: int,
        queue_steps: int,
        patience_seconds: float,
    ) -> None:
        self.failure: str | None = None
        self._folder, self._patience = folder / f"rank-{rank:05d}", patience_seconds
        self._folder.mkdir(parents=True, exist_ok=True)
        # A resumed run starts a new capture; steps that the old one missed have no file, which is enough.
        (self._folder / _FAILED).unlink(missing_ok=True)
        # A training that continues from a snapshot repeats the steps after it, perhaps with other samples.
        for path in self._folder.glob("step-*.npz"):
            if int(path.stem.removeprefix("step-")) >= first_step:
                path.unlink()
        if rank == 0:
            write_json(folder / _SETTINGS, identity)
        # A step to write, an event to set when everything before it is written, or None to end the thread.
        self._queue: queue.Queue[tuple[int, dict[str, Any]] | threading.Event | None] = queue.Queue(queue_steps)
        # Daemon: a thread that hangs on a dead disk must not keep a finished training alive.
        self._thread = threading.Thread(target=self._work, name="curate capture", daemon=True)
        self._thread.start()

    def put(self, step: int, arrays: dict[str, Any]) -> None:
        """Queue one step: NumPy arrays, or tensors on any device, which the thread copies from there."""
        self._send((step, arrays))

    def flush(self) -> None:
        """Wait until everything queued is on disk."""
        written = threading.Event()
        if self._send(written) and not written.wait(self._patience):
            self.stop(f"the disk took longer than {self._patience:g} seconds (capture.patience_seconds)")

    def close(self) -> None:
        """Write what is queued and end the thread."""
        self.flush()
        if self._send(None):
            self._thread.join(self._patience)

    def stop(self, reason: str) -> None:
        """Write nothing more; log the reason, and leave it on disk for whoever uses the run later."""
        if self.failure is not None:
            return
        self.failure = reason
        _log.error("capture of gradients in %s stops, the training goes on: %s", self._folder, reason)
        try:
            write_json(self._folder / _FAILED, {"reason": reason})
        except OSError as error:
            _log.error("nor can the reason be written there (%s); the missing steps will be replayed", error)

    def _send(self, item: tuple[int, dict[str, Any]] | threading.Event | None) -> bool:
        # After a failure the thread may hang on the disk: a put could wait for its whole timeout.
        if self.failure is not None:
            return False
        try:
            self._queue.put(item, timeout=self._patience)
        except queue.Full:
            self.stop(f"the disk took longer than {self._patience:g} seconds (capture.patience_seconds)")
            return False
        return True

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            # After a failure the thread still takes items, so that a training that waits for room goes on.
            elif self.failure is None:
                step, arrays = item
                try:
                    write_arrays(step_file(self._folder, step), {key: _host(value) for key, value in arrays.items()})
                except Exception as error:  # noqa: BLE001 - `stop` says it; the training goes on
                    self.stop(f"step {step} was not written: {type(error).__name__}: {error}")


def step_file(rank_folder: Path, step: int) -> Path:
    """File of one step."""
    return rank_folder / f"step-{step:08d}.npz"


def _host(value: Any) -> npt.NDArray[Any]:
    # In the thread: a copy from the device waits for its kernels, and the training must not.
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


class CapturedRows:
    """What a run captured in given coordinates.

    Args:
        run: the run.
        identity: the coordinates, see `GradientCapture.identity`.
        names: arrays that are wanted, `gradients` and perhaps `preconditioned`.
    """

    def __init__(self, run: Run, identity: Json, names: Sequence[str]) -> None:
        self._folder, self._names = capture_folder(run.folder, identity), names
        self._run = run
        self._refused: set[int] = set()
        for path in sorted(self._folder.glob(f"rank-*/{_FAILED}")):
            _log.warning(
                "the run's capture of gradients is incomplete, %s stopped: %s; what is missing is replayed",
                path.parent.name,
                read_json(path)["reason"],
            )

    def has(self, step: int) -> bool:
        """Whether every rank's file of a step is there and of the samples that the run recorded."""
        return self._folder.exists() and step not in self._refused and self._opened(step) is not None

    def count(self, start: int, stop: int) -> int:
        """How many steps of a range are there."""
        return sum(self.has(step) for step in range(start, stop))

    def read(self, step: int) -> list[npt.NDArray[np.float32]] | None:
        """The wanted arrays (B_k, D) of a step, rows in the order of the record; None where it must be replayed."""
        files = self._opened(step) if self.has(step) else None
        if files is None:
            return None
        try:
            # An npz member is read and its CRC checked only here: damage inside a file shows now, not in `_opened`.
            arrays = [np.concatenate([file[name] for file in files]) for name in self._names]
            rows = arrays[0] if self._names[0] == "gradients" else np.concatenate([file["gradients"] for file in files])
            totals = [file["gradient"] for file in files if "gradient" in file]
        except (OSError, *UNREADABLE) as error:
            self._refuse(step, f"its file is damaged ({error})")
            return None
        weights = np.concatenate([file["weights"] for file in files])
        # Only all ranks' rows together add up: the total is the averaged gradient, the same on every rank.
        if totals and not adds_up(rows, weights, totals[0]):
            self._refuse(step, "its rows do not add up to the gradient (what was backward_scale?)")
            return None
        return arrays

    def _refuse(self, step: int, why: str) -> None:
        # Remembered: `has` must not offer the step again, or a replay would stop before it.
        _log.warning("step %d was captured in the run but is replayed: %s", step, why)
        self._refused.add(step)

    def _opened(self, step: int) -> list[Mapping[str, npt.NDArray[Any]]] | None:
        """Each rank's file, arrays read when asked for; None where one is missing or not of the recorded samples."""
        ranks = self._run.steps.filter(pl.col("step") == step).partition_by("rank", maintain_order=True)
        files = []
        for rows in ranks:
            path = step_file(self._folder / f"rank-{rows['rank'][0]:05d}", step)
            try:
                file = np.load(path)  # lazy: only the ids and weights are read here
                # The run may have been resumed with other data since: rows must be of exactly the recorded samples.
                same = set(self._names) <= set(file.files) and all(
                    np.array_equal(file[key], rows[column].explode().to_numpy())
                    for key, column in (("sample_ids", "sample_ids"), ("weights", "weights"))
                )
            except (OSError, *UNREADABLE):
                return None
            if not same:
                return None
            files.append(file)
        return files or None
