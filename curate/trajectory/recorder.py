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
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import polars as pl

from curate.artifacts import hash_of, list_files, replacing, sum_of, write_json
from curate.config import Config, TokenCount
from curate.errors import UserError
from curate.formats.mds import Columns
from curate.optimizers.settings import GroupSettings, refuse_unsupported
from curate.task import TaskSpec, refuse_dropout
from curate.trajectory.run import STEPS, RunSpec, keep_model_config, part_rows
from curate.trajectory.snapshots import as_sequence, named_parameters, save_snapshot, state_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

Border = int | float


class RecorderConfig(Config):
    """What is recorded beside the step records."""

    windows: dict[str, tuple[Border, Border]] | None = None
    """Windows to value, `early` and `late`: first step and step after the last; an integer is a step, a decimal a
    fraction of the stage. None: the first and the last tenth of the stage, at most 50 steps each."""
    cadence_snapshots: int = 8
    """Snapshots spread evenly over the stage beside those at window borders; fewer where `snapshot_bytes` is too
    small.
    """
    snapshot_bytes: TokenCount = "8B"
    """Byte budget of all snapshots (8B = 8 GB); those at window borders come first."""
    flush_steps: int = 100
    """Steps between writes of the step records."""


def default_windows(steps: int) -> dict[str, tuple[int, int]]:
    """The first and the last tenth of a stage, at most 50 steps each: values cost several passes per step."""
    length = min(max(steps // 10, 1), 50)
    return {"early": (0, length), "late": (steps - length, steps)}


def window_steps(windows: dict[str, tuple[Border, Border]], steps: int) -> dict[str, tuple[int, int]]:
    """Turn declared windows into step ranges.

    Raises:
        UserError: a window is empty or reaches beyond the stage.
    """
    resolved = {}
    for name, borders in windows.items():
        start, stop = (round(border * steps) if isinstance(border, float) else border for border in borders)
        if not 0 <= start < stop <= steps:
            raise UserError(
                f"window {name!r} covers steps {start} to {stop} of a stage of {steps}; "
                "set recorder.windows to a range inside it"
            )
        resolved[name] = (start, stop)
    return resolved


def snapshot_schedule(
    windows: dict[str, tuple[int, int]], steps: int, cadence: int, snapshot_bytes: int, budget_bytes: int
) -> set[int]:
    """Steps to snapshot before: all window borders and the stage's end, then an even cadence within the byte budget.

    Args:
        windows: step ranges.
        steps: steps of the stage.
        cadence: snapshots wanted beside those at the borders.
        snapshot_bytes: size of one snapshot.
        budget_bytes: size of all of them.

    Raises:
        UserError: the borders alone exceed the budget.
    """
    borders = {step for window in windows.values() for step in window} | {steps}
    needed = len(borders) * snapshot_bytes
    if needed > budget_bytes:
        raise UserError(
            f"{len(borders)} snapshots of {snapshot_bytes:,} bytes at the window borders exceed "
            f"recorder.snapshot_bytes = {budget_bytes:,}; set it to at least {needed}"
        )
    spare = min(cadence, (budget_bytes - needed) // snapshot_bytes)
    return borders | (set(range(0, steps, ceil(steps / spare))) if spare else set())


class StepObserver(Protocol):
    """What takes part in a recorded training beside the recorder, see `TrajectoryRecorder.attach`."""

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
        previous: run of the stage that this one continues from, for the ledger of consumed samples.

    Attributes:
        folder, model, optimizers, clip_norm, first_step: as given.
        windows: name -> first step and step after the last.
        rank: of this process.
        world: number of ranks.

    Raises:
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
        self.folder, self.model, self.optimizers = Path(folder), model, as_sequence(optimizer)
        _check_replayable(model, self.optimizers)
        self.clip_norm, self._flush_steps = clip_norm, config.flush_steps
        self.rank, self.world = _rank_and_world()
        self._observers: list[StepObserver] = []
        self._rows: list[dict[str, Any]] = []
        self._step = -1
        self.first_step = first_step
        self.windows = default_windows(steps) if config.windows is None else window_steps(config.windows, steps)
        names = {id(parameter): name for name, parameter in named_parameters(model).items()}
        task = keep_model_config(self.folder, task, write=self.rank == 0)
        self._spec = RunSpec(
            task=task, streams={domain: Path(path).resolve() for domain, path in streams.items()},
            columns=columns or Columns(), tokenizer=tokenizer and Path(tokenizer).resolve(), seq_len=seq_len,
            steps=steps, windows=self.windows,
            optimizers=[name for name, _ in self._groups()], clip_norm=clip_norm,
            groups=[[names[id(p)] for p in group["params"] if id(p) in names] for _, group in self._groups()],
            previous=previous and Path(previous).resolve(),
        )  # fmt: skip
        self._snapshot_steps = snapshot_schedule(
            self.windows,
            steps,
            config.cadence_snapshots,
            state_bytes(model, self.optimizers),
            int(config.snapshot_bytes),
        )
        self._open(first_step)

    def _groups(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every parameter group, with the class name of its optimizer."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield type(optimizer).__name__, group

    def _open(self, first_step: int) -> None:
        if (self.folder / "steps.parquet").exists():
            raise UserError(f"{self.folder} holds a finished run; choose another output folder")
        self._parts = self.folder / "steps.parts" / f"rank-{self.rank:05d}"
        self._parts.mkdir(parents=True, exist_ok=True)
        if self.rank == 0:
            write_json(self.folder / "run.json", self._spec.model_dump(mode="json"))
            list_files(self.folder, [self.folder / "run.json"])
        reached = 0
        for path in sorted(self._parts.glob("*.parquet")):
            rows = part_rows(path)
            kept = rows.filter(pl.col("step").is_between(reached, first_step, closed="left"))
            if len(kept) < len(rows):
                if len(kept):
                    self._write(kept)
                path.unlink()
            for step in kept["step"].unique().sort():
                reached += step == reached
        if reached < first_step:
            raise UserError(
                f"{self._parts} has no record of step {reached}, so training cannot go on at step {first_step}: start "
                "the stage anew in another folder, with recorder.flush() at each checkpoint"
            )

    def attach(self, observer: StepObserver) -> None:
        """Let another take part from the next step on, such as `curate.embeddings.run_capture.RunCapture`."""
        self._observers.append(observer)

    def begin_step(self, step: int) -> None:
        """Call before the first micro-batch of a step: takes the snapshot where one is due."""
        for observer in self._observers:
            observer.begin_step(step)
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
            sample_ids: B content ids (`curate.formats.mds.content_id`; a column of prepared streams).
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

    def end_step(self, loss: Tensor | float, grad_norm: Tensor | float | None = None) -> None:
        """Call after the optimizer's step and before the schedule's.

        Args:
            loss: `L_k` of the whole step (all micro-batches and ranks), nats per token.
            grad_norm: global gradient norm before clipping, as `clip_grad_norm_` returns it.
        """
        groups = [vars(GroupSettings.read(name, group)) for name, group in self._groups()]
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
        rows = [{key: _host(value) for key, value in row.items()} for row in self._rows]
        for row in rows:
            row["clip_factor"] = clip_factor(row["grad_norm"], self.clip_norm)
        self._write(pl.DataFrame(rows, schema=STEPS))
        self._rows = []
        self._first_row = 0

    def finish(self) -> None:
        """Write the last snapshot and merge all ranks' records into `steps.parquet`; the run is then complete."""
        self.flush()
        for observer in self._observers:
            observer.finish()
        self._snapshot(self._spec.steps)
        _barrier(self.world)
        if self.rank == 0:
            parts = sorted((self.folder / "steps.parts").glob("*/*.parquet"))
            merged = pl.concat([part_rows(part) for part in parts]).sort("step", "rank", "micro_batch")
            with replacing(self.folder / "steps.parquet") as part:
                merged.write_parquet(part)
                list_files(self.folder, [], sums={"steps.parquet": sum_of(part)})
            shutil.rmtree(self.folder / "steps.parts")

    def _snapshot(self, step: int) -> None:
        if self.rank == 0:
            save_snapshot(self.folder, step, self.model, self.optimizers)

    def _write(self, frame: pl.DataFrame) -> None:
        """Write a part, whose name ends in its hash: a list beside it could not be replaced together with it."""
        frame.write_parquet(content := io.BytesIO())
        with replacing(self._parts / f"{frame['step'][0]:08d}-{hash_of(content.getvalue())}.parquet") as part:
            part.write_bytes(content.getvalue())


def _check_replayable(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse before training what replay could not repeat after it.

    Raises:
        UserError: dropout, sparse gradients, or optimizers that are not supported.
    """
    refuse_dropout(model)
    refuse_unsupported(optimizers)
    sparse = [name for name, module in model.named_modules() if getattr(module, "sparse", False) is True]
    if sparse:
        raise UserError(f"{sparse[0]} has sparse gradients, which cannot be replayed; build it with sparse=False")


class NoRecorder:
    """Stands where a loop may run without recording; every call does nothing."""

    def begin_step(self, step: int) -> None:
        """Nothing is taken."""

    def micro_batch(
        self,
        sample_ids: Iterable[int],
        weights: Tensor | Sequence[float],
        tokens: Tensor | Sequence[int],
        backward_scale: Tensor | float | None = None,
    ) -> None:
        """Nothing is kept."""

    def end_step(self, loss: Tensor | float, grad_norm: Tensor | float | None = None) -> None:
        """Nothing is kept."""

    def flush(self) -> None:
        """Nothing is written."""

    def finish(self) -> None:
        """Nothing is written."""


def clip_factor(grad_norm: float | None, clip_norm: float | None) -> float | None:
    """`torch.nn.utils.clip_grad_norm_` multiplies by min(1, max_norm / (norm + 1e-6)); None where that is unknown."""
    if clip_norm is None:
        return 1.0
    return None if grad_norm is None else min(1.0, clip_norm / (grad_norm + 1e-6))


def _detached(value: Any) -> Any:
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
