"""The recorder: a few lines in a PyTorch training loop that change no number of it.

    recorder = TrajectoryRecorder(folder, config, model, optimizer, ...)
    for step in range(first_step, steps):
        recorder.begin_step(step)
        for batch in micro_batches:
            ...
            recorder.micro_batch(batch["sample_id"], weights, predicted_tokens)
        norm = clip_grad_norm_(...)
        optimizer.step()
        recorder.end_step(loss, norm)
    recorder.finish()

It only reads: losses and norms are kept as tensors and copied to the host when rows are flushed, so there is no
synchronisation per step. Rows since the last flush are lost in a crash; call `flush()` where you write a checkpoint.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl
from pydantic import Field

from curate.core.artifacts import hash_of, list_files, sum_of, write_json
from curate.core.config import Config, TokenCount
from curate.core.errors import UserError
from curate.core.lock import LOCK, Lock, sweep
from curate.core.paths import local_path
from curate.core.writing import atomic_write
from curate.data.documents import tokenizer_file
from curate.data.mds import Columns
from curate.data.streams import check_domain
from curate.training.declared import Border, default_windows, window_steps
from curate.training.run import STEPS, RunSpec, keep_model_config, part_rows
from curate.training.snapshots import (
    as_sequence,
    save_snapshot,
    snapshot_budget,
    snapshot_schedule,
    state_bytes,
)
from curate.training.task import TaskSpec
from curate.training.watch import BufferWatch, OptimizerWatch, check_rebuilt, check_replayable, groups_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


class RecorderConfig(Config):
    """What is recorded beside the step records."""

    windows: dict[str, tuple[Border, Border]] | None = None
    """Windows to value, `early` and `late`: first step and step after the last; an integer is a step, a decimal a
    fraction of the stage. None: the first and the last tenth of the stage, at most 50 steps each."""
    cadence_snapshots: int = Field(default=8, ge=0)
    """Snapshots spread evenly over the stage beside those at window borders; fewer where `snapshot_bytes` is too
    small.
    """
    snapshot_bytes: TokenCount | None = None
    """Byte budget of all snapshots (8B = 8 GB); those at window borders come first. None: what is free on the disk."""
    flush_steps: int = Field(default=100, ge=1)
    """Steps between writes of the step records."""


class StepObserver(Protocol):
    """Takes part in a recorded training beside the recorder, see `TrajectoryRecorder.attach`."""

    def begin_step(self, step: int) -> None:
        """Before the first forward pass of a step."""

    def micro_batch(
        self, sample_ids: Iterable[int], weights: Tensor | Sequence[float], backward_scale: Tensor | float | None
    ) -> None:
        """After the backward pass of a micro-batch."""

    def end_step(self, grad_norm: Tensor | float | None) -> None:
        """After the optimizer's step."""

    def flush(self) -> None:
        """Where a checkpoint is written."""

    def finish(self) -> None:
        """After the last step."""


class TrajectoryRecorder:
    """Writes `run.json`, `steps.parquet` and `snapshots/` while a model trains.

    Args:
        folder: the run; one recorder per rank may share it.
        config: windows, byte budget.
        model: the model as trained (DDP and torch.compile wrappers are seen through).
        optimizer: its optimizer, or several over different parameters (Muon and AdamW).
        task: how to rebuild the model and its loss.
        streams: domain -> MDS folder trained on.
        steps: optimizer steps of the stage.
        seq_len: tokens of a sequence.
        clip_norm: threshold given to `clip_grad_norm_`, or None.
        first_step: where this process starts; records of that step and later ones are dropped (they are repeated).
        columns: columns of the streams.
        tokenizer: tokenizer file of the tokens.
        previous: run of the stage that this one continues from; its samples count as seen.

    Attributes:
        folder, model, optimizers, clip_norm, first_step: as given.
        windows: name -> first step and step after the last.
        rank: of this process.
        world: number of ranks.

    Raises:
        BusyError: another process records there; it does as long as its recorder is in use.
        UserError: the folder holds a finished run, replay could not repeat this training, or windows or byte budget do
            not fit.
    """

    def __init__(
        self,
        folder: Path,
        config: RecorderConfig,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        task: TaskSpec,
        streams: dict[str, Path],
        steps: int,
        seq_len: int,
        clip_norm: float | None,
        first_step: int = 0,
        columns: Columns | None = None,
        tokenizer: Path | None = None,
        previous: Path | None = None,
    ) -> None:
        self.folder, self.model, self.optimizers = local_path(Path(folder)), model, as_sequence(optimizer)
        # before the lock, which makes the folder: a refused training leaves nothing on disk
        check_replayable(model, self.optimizers)
        for domain in streams:
            check_domain(domain)
        self.clip_norm, self._flush_steps = clip_norm, config.flush_steps
        self.rank, self.world = _rank_and_world()
        # a lock per rank: the ranks of one training share the folder, two trainings must not
        self._lock = Lock(self.folder, LOCK if self.rank == 0 else f".rank-{self.rank:05d}.lock")
        self._observers: list[StepObserver] = []
        self._rows: list[dict[str, Any]] = []
        # -1 until this process's first step, so that `begin_step` recognises it
        self._step = -1
        self.first_step = first_step
        self.windows = default_windows(steps) if config.windows is None else window_steps(config.windows, steps)
        check_rebuilt(task.model, model)
        self._watch = OptimizerWatch(self.optimizers, model)
        self._buffers: BufferWatch | None = None
        task = keep_model_config(self.folder, task, write=self.rank == 0)
        # absolute paths: the selection may run in another working directory
        self._spec = RunSpec(
            task=task,
            streams={domain: Path(path).resolve() for domain, path in streams.items()},
            columns=columns or Columns(),
            seq_len=seq_len,
            tokenizer=None if tokenizer is None else tokenizer_file(Path(tokenizer)).resolve(),
            steps=steps,
            windows=self.windows,
            optimizers=[name for name, _ in groups_of(self.optimizers)],
            clip_norm=clip_norm,
            groups=self._watch.names,
            previous=previous and Path(previous).resolve(),
        )
        self._snapshot_steps = snapshot_schedule(
            self.windows,
            steps,
            config.cadence_snapshots,
            state_bytes(model, self.optimizers),
            snapshot_budget(self.folder, None if config.snapshot_bytes is None else int(config.snapshot_bytes)),
        )
        self._open(first_step)

    def _open(self, first_step: int) -> None:
        """Begin a run, or continue one: keep its unbroken records of the steps before `first_step`, drop all others."""
        if (self.folder / "steps.parquet").exists():
            # the process that finished it may have been killed before it could tidy up
            remove_parts(self.folder)
            raise UserError(f"{self.folder} holds a finished run; choose another output folder")
        self._parts = self.folder / "steps.parts" / f"rank-{self.rank:05d}"
        self._parts.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            write_json(self.folder / "run.json", self._spec.model_dump(mode="json"))
            list_files(self.folder, [self.folder / "run.json"])
        # number of steps that are recorded without a gap from step 0 on
        reached = 0
        # names begin with the first step, so this is their order
        for path in sorted(self._parts.glob("*.parquet")):
            rows = part_rows(path)
            # from `reached` on: a kill between the write and the unlink below leaves a step in two parts
            kept = rows.filter(pl.col("step").is_between(reached, first_step, closed="left"))
            if len(kept) < len(rows):
                if len(kept):
                    self._write(kept)
                path.unlink()
            for step in kept["step"].unique().sort():
                # a gap stops the count for good
                reached += step == reached
        if reached < first_step:
            raise UserError(
                f"{self._parts} has no record of step {reached}, so training cannot go on at step {first_step}: start "
                "the stage anew in another folder, with recorder.flush() at each checkpoint"
            )

    def attach(self, observer: StepObserver) -> None:
        """Call an observer from the next step on, such as `curate.embeddings.run_capture.RunCapture`."""
        self._observers.append(observer)

    def begin_step(self, step: int) -> None:
        """Call before the first micro-batch of a step; takes the snapshot where one is due."""
        # first, because an observer installs its hooks here
        for observer in self._observers:
            observer.begin_step(step)
        self._watch.begin()
        # buffers are copied and compared in this process's first step only: that would cost at every step
        self._buffers = BufferWatch(self.model) if self._step < 0 else None
        self._step = step
        self._first_row = len(self._rows)
        if step in self._snapshot_steps:
            self._snapshot(step)

    def micro_batch(
        self,
        sample_ids: Iterable[int],
        weights: Tensor | Sequence[float],
        tokens: Tensor | Sequence[int],
        backward_scale: Tensor | float | None = None,
    ) -> None:
        """Call once per micro-batch, after its backward pass.

        Args:
            sample_ids: B content ids (`curate.data.mds.content_id`; a column of prepared streams).
            weights: B weights `c_z` of the step's loss; over all micro-batches and ranks the gradient is `sum c_z g_z`.
            tokens: B predicted token counts.
            backward_scale: what this rank's `sum c_z l_z` was multiplied by before `backward()`: the scale of a
                GradScaler, times the ranks where the gradient is their mean. None: 1, or the ranks of a model in
                DistributedDataParallel. Only a capture in the run reads it.
        """
        sample_ids = np.asarray(sample_ids, dtype=np.int64)
        for observer in self._observers:
            observer.micro_batch(sample_ids, weights, backward_scale)
        self._rows.append(
            {
                "step": self._step,
                "rank": self.rank,
                "micro_batch": len(self._rows) - self._first_row,
                "sample_ids": sample_ids,
                "weights": _detached(weights),
                "tokens": _detached(tokens),
            }
        )

    def end_step(
        self, loss: Tensor | float, grad_norm: Tensor | float | None = None, updated: bool | None = None
    ) -> None:
        """Call after the optimizer's step and before the schedule's.

        Args:
            loss: `L_k` of the whole step (all micro-batches and ranks), nats per token.
            grad_norm: global gradient norm before clipping, as `clip_grad_norm_` returns it.
            updated: False where the step took no update (a GradScaler found an infinity, the batch was bad); None:
                whether `optimizer.step()` was called, which is enough but where it is compiled.

        Raises:
            UserError: the step is none that replay could repeat.
        """
        groups = self._watch.end(self._step, updated)
        if self._buffers is not None:
            self._buffers.check()
        # loss, norm and settings are known at the end of the step only, and are the same in all its rows
        for row in self._rows[self._first_row :]:
            row.update(loss=_detached(loss), grad_norm=_detached(grad_norm), groups=groups)
        for observer in self._observers:
            observer.end_step(grad_norm)
        if (self._step + 1) % self._flush_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Write the rows gathered so far; call it where you write a checkpoint."""
        for observer in self._observers:
            observer.flush()
        if not self._rows:
            return
        # beside snapshots, the only place where the host waits for the device
        rows = [{key: _host(value) for key, value in row.items()} for row in self._rows]
        for row in rows:
            row["clip_factor"] = clip_factor(row["grad_norm"], self.clip_norm)
            # `updated` is a tensor where a fused optimizer decides on the device whether it steps
            row["groups"] = [{**group, "updated": bool(group["updated"])} for group in row["groups"]]
        self._write(pl.DataFrame(rows, schema=STEPS))
        self._rows = []
        self._first_row = 0

    def finish(self) -> None:
        """Write the last snapshot and merge all ranks' records into `steps.parquet`; the run is then complete."""
        self.flush()
        self._watch.close()
        for observer in self._observers:
            observer.finish()
        # the state after the last update, where the stage's values end
        self._snapshot(self._spec.steps)
        # every rank has flushed before rank 0 merges
        _barrier(self.world)
        if self.rank == 0:
            paths = sorted((self.folder / "steps.parts").glob("*/*.parquet"))
            merged = pl.concat([part_rows(path) for path in paths]).sort("step", "rank", "micro_batch")
            with atomic_write(self.folder / "steps.parquet") as part:
                merged.write_parquet(part)
                # listed before it is renamed: steps.parquet says that a run is finished, and must never be without sum
                list_files(self.folder, [], sums={"steps.parquet": sum_of(part)})
            remove_parts(self.folder)
        self._lock.release()

    def _snapshot(self, step: int) -> None:
        # the ranks of DistributedDataParallel hold the same state
        if self.rank == 0:
            save_snapshot(self.folder, step, self.model, self.optimizers)

    def _write(self, frame: pl.DataFrame) -> None:
        """Write a part of the step records; its name ends in its hash.

        Parts come every few steps, and a list of sums beside them could not be replaced in one step with a part.
        """
        frame.write_parquet(content := io.BytesIO())
        with atomic_write(self._parts / f"{frame['step'][0]:08d}-{hash_of(content.getvalue())}.parquet") as part:
            part.write_bytes(content.getvalue())


def remove_parts(run: Path) -> None:
    """Remove what a process left beside `steps.parquet` that was killed while it finished a run."""
    shutil.rmtree(run / "steps.parts", ignore_errors=True)
    sweep(run)


class NoRecorder:
    """A recorder that does nothing, for a loop that may run without recording."""

    def begin_step(self, step: int) -> None:
        """Take no snapshot."""

    def micro_batch(
        self,
        sample_ids: Iterable[int],
        weights: Tensor | Sequence[float],
        tokens: Tensor | Sequence[int],
        backward_scale: Tensor | float | None = None,
    ) -> None:
        """Keep nothing."""

    def end_step(
        self, loss: Tensor | float, grad_norm: Tensor | float | None = None, updated: bool | None = None
    ) -> None:
        """Keep nothing."""

    def flush(self) -> None:
        """Write nothing."""

    def finish(self) -> None:
        """Write nothing."""


def clip_factor(grad_norm: float | None, clip_norm: float | None) -> float | None:
    """What `torch.nn.utils.clip_grad_norm_` multiplied by: min(1, max_norm / (norm + 1e-6)); None where unknown."""
    if clip_norm is None:
        return 1.0
    return None if grad_norm is None else min(1.0, clip_norm / (grad_norm + 1e-6))


def _detached(value: Any) -> Any:
    # a copy on the device: the trainer may write the next micro-batch into the same tensor
    return value.detach().clone() if hasattr(value, "detach") else value


def _host(value: Any) -> Any:
    if hasattr(value, "detach"):
        return value.tolist()
    return value.tolist() if isinstance(value, np.ndarray) else value


def _rank_and_world() -> tuple[int, int]:
    from torch import distributed

    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def _barrier(world: int) -> None:
    from torch import distributed

    if world > 1:
        distributed.barrier()
