"""Embeddings on disk: `embeddings.npy` (memory-mapped), `rows.parquet`, `target-<fingerprint>.npz`, a manifest.

A folder is named after its settings, so other settings never overwrite it. The progress of an interrupted job lies in
`scratch/` inside; the same call continues it.

`horizon` is the evaluation checkpoint: the state that the target's loss is read at.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

import dataframely as dy
import numpy as np
import polars as pl

from curate.core.arrays import create_memmap, read_array, read_arrays, read_table, write_arrays
from curate.core.artifacts import finalize, fingerprint, list_files, listed, making, read_hashed, write_hashed
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.writing import atomic_write
from curate.embeddings.estimator import Encoded, WindowJob
from curate.tables import WindowRows
from curate.training.replay import records
from curate.training.samples import window_rows

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.core.artifacts import Json
    from curate.embeddings.estimator import Estimator
    from curate.training.replay import Replay
    from curate.training.target import Target

Horizon = Literal["window_end", "stage_end"] | int  # an integer: the state before that step


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """A window's embeddings.

    Attributes:
        folder: of the embeddings.
        vectors: (N, D) float32, memory-mapped.
        rows: N rows, see `curate.training.samples.window_rows`.
        targets: (2, D), the vector t of each half of the target, or None without a target.
        residual: see `Encoded`.
        seconds: time that it took to compute.
        passes: the same in forward-backward passes of a training batch, measured in that job; 0 where it replayed
            nothing.
    """

    folder: Path
    vectors: npt.NDArray[np.float32]
    rows: dy.DataFrame[WindowRows]
    targets: npt.NDArray[np.float32] | None
    residual: float | None
    seconds: float
    passes: float

    def values(self, target: Target) -> npt.NDArray[np.float64]:
        """(N,) values of the rows for the target that the embedding was opened with, nats per token of it."""
        assert self.targets is not None
        # The halves by their numbers of documents: the target's loss is a mean over all of its documents.
        values: npt.NDArray[np.float64] = self.vectors @ self.targets.T @ np.asarray(target.half_weights)
        return values


def plan_job(
    replay: Replay,
    window: str,
    horizon: Horizon,
    target: Target | None,
    *,
    batch_size: int,
    window_steps: int | None = None,
    borders: tuple[int, int] | None = None,
) -> WindowJob:
    """The job of one declared window (or of other borders), or of its last `window_steps`.

    Raises:
        UserError: the run declared no such window, or the horizon is not between its end and the stage's.
    """
    start, stop = borders or replay.run.window(window)
    start = start if window_steps is None else max(start, stop - window_steps)
    steps = replay.run.spec.steps
    # str: a horizon may be a number, which is no key, and then stands for itself.
    end = {"window_end": stop, "stage_end": steps}.get(str(horizon), horizon)
    assert isinstance(end, int)
    if not stop <= end <= steps:
        raise UserError(
            f"horizon {end} is not between the end of the {window} window ({stop}) and the end of the stage ({steps}): "
            "give a step from there, window_end or stage_end, or value one window alone"
        )
    return WindowJob(replay=replay, start=start, stop=stop, horizon=end, target=target, batch_size=batch_size)


def horizon_name(horizon: Horizon) -> str:
    """The horizon in artifacts and in names of folders: `window_end`, `stage_end`, or `step_350`."""
    return f"step_{horizon}" if isinstance(horizon, int) else horizon


def embedding_folder(job: WindowJob, window: str, horizon: Horizon, estimator: Estimator) -> tuple[Path, Json]:
    """Folder of a job's embeddings, and the settings that they depend on."""
    settings = {
        "run": job.replay.run.fingerprint,
        "window": [job.start, job.stop],
        "horizon": job.horizon,
        "estimator": estimator.name,
        **estimator.settings(job),
    }
    # A part of the fingerprint: a folder name that a person can read and type; the manifest has the settings in full.
    name = f"{window}-{horizon_name(horizon)}-{estimator.name}-{fingerprint(settings)[:8]}"
    return job.replay.run.folder / "embeddings" / name, settings


def embed_window(job: WindowJob, window: str, horizon: Horizon, estimator: Estimator) -> Embedding:
    """Compute a window's embeddings, continue an interrupted job, or open complete ones.

    Raises:
        UserError: what the estimator or the replay refuses.
    """
    folder, settings = embedding_folder(job, window, horizon, estimator)
    job = replace(job, folder=folder)
    with making(folder, settings) as missing:
        if missing:
            _make(job, window, horizon, estimator, settings)
    # Here and not in `_make`: a job that was killed after its manifest was written leaves it to the next call.
    shutil.rmtree(folder / "scratch", ignore_errors=True)
    return _open(folder, job, estimator)


def _make(job: WindowJob, window: str, horizon: Horizon, estimator: Estimator, settings: Json) -> None:
    folder = job.folder
    job.scratch.mkdir(parents=True, exist_ok=True)
    begin = perf_counter()
    # Rows first: they need no replay, and a run whose data moved fails here, before the long work.
    rows = window_rows(job.replay.run, window, job.start, job.stop, horizon_name(horizon))
    with atomic_write(folder / "rows.parquet") as partial:
        rows.write_parquet(partial)
    vectors = _open_output(folder / "embeddings.npy", (len(rows), estimator.dimension(job)))
    try:
        facts = estimator.embed(job, vectors)
        vectors[_skipped_rows(job, rows)] = 0
    finally:
        # An interrupted attempt cost its time too: what is stated afterwards is the sum of all attempts.
        add_time(folder, perf_counter() - begin, job.replay.pass_seconds)
    # The manifest last: it says that everything else is there.
    vectors.flush()
    finalize(folder, "embeddings", settings, rows=len(rows), dimension=vectors.shape[1], **facts)


def _skipped_rows(job: WindowJob, rows: pl.DataFrame) -> npt.NDArray[np.bool_]:
    """(N,) whether a row is of a step whose update was skipped: whatever its gradient says, it moved nothing."""
    skipped = [record.step for record in records(job.replay.run, job.start, job.stop) if not record.updated]
    return rows["step"].is_in(skipped).to_numpy()


def _open(folder: Path, job: WindowJob, estimator: Estimator) -> Embedding:
    timings = read_timings(folder)
    encoded = None if job.target is None else _encode(folder / f"target-{job.target.fingerprint}.npz", job, estimator)
    return Embedding(
        folder=folder,
        vectors=read_array(folder / "embeddings.npy"),
        rows=WindowRows.validate(read_table(folder / "rows.parquet")),
        targets=None if encoded is None else encoded.vectors,
        residual=None if encoded is None else encoded.residual,
        seconds=timings["seconds"],
        passes=timings["cost_units"],
    )


def _encode(path: Path, job: WindowJob, estimator: Estimator) -> Encoded:
    """The target's vectors, computed once for each target."""
    # A file that the manifest does not list was left by a killed process and may be of another state: make it again.
    if not path.exists() or path.name not in listed(path.parent):
        with locked(path.parent, wait=True):
            encoded = estimator.encode(job)
            residual = np.nan if encoded.residual is None else encoded.residual  # npz holds no None
            write_arrays(path, {"vectors": encoded.vectors, "residual": np.float64(residual)})
            list_files(path.parent, [path])
    stored = read_arrays(path)
    residual = float(stored["residual"])
    return Encoded(vectors=stored["vectors"], residual=None if np.isnan(residual) else residual)


def _open_output(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """An existing output of an interrupted job is kept: the estimator continues in it."""
    if path.exists():
        output: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "r+")
        if output.shape == shape:
            return output
    return create_memmap(path, shape)


def read_timings(folder: Path) -> dict[str, Any]:
    """What `add_time` wrote: `seconds`, `cost_units` (forward-backward passes), `unit_seconds` (of one; may be null).

    Raises:
        UserError: the file is missing or damaged.
    """
    return read_hashed(folder / "timings.json")


def add_time(folder: Path, seconds: float, pass_seconds: float | None) -> None:
    """Add the time of one attempt.

    Args:
        folder: of the artifact.
        seconds: time of the attempt.
        pass_seconds: time of one forward-backward pass in it; None: nothing was replayed, an earlier attempt's counts.
    """
    path = folder / "timings.json"
    before: dict[str, Any] = read_timings(folder) if path.exists() else {"seconds": 0.0, "unit_seconds": None}
    pass_seconds = pass_seconds or before["unit_seconds"]
    total = before["seconds"] + seconds
    passes = total / pass_seconds if pass_seconds else 0.0
    write_hashed(path, {"seconds": total, "cost_units": passes, "unit_seconds": pass_seconds})
