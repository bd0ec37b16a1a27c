"""`python -m pipelines.capture_bench`: what recording and capturing cost in a training step, and the recursion.

A GPT-2 on real text (source files of Python's library, bytes as tokens). Every contender has its own model and
takes its step in turn, in an order that changes from round to round, in one process; seconds are CPU time of all its
threads, the waiting for the writer's included. Ratios are medians over rounds with a bootstrap bound. Multiplications
are counted by torch's dispatcher, bytes by its allocator, each in one more step.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from curate.artifacts import write_json
from curate.config import Config, parse_command, run_command
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.errors import UserError
from curate.formats.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.gradients.capture import GradientCapture
from curate.progress import progress, start_logging
from curate.rng import generator
from curate.task import Batch, ModelSpec, Task, TaskSpec, collate
from curate.trajectory.recorder import NoRecorder, RecorderConfig, TrajectoryRecorder
from curate.trajectory.replay import Replay
from curate.trajectory.run import Run
from pipelines.corpus.sources import STANDARD_LIBRARY, python_sources

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)

MODELS = {"tiny": (32, 2, 2), "3M": (256, 4, 4), "25M": (512, 8, 8)}
"""Name -> width of the residual stream, blocks, heads; 12 width^2 parameters a block."""
CASES = ("forward-backward", "plain-step", "recorder", "capture", "capture-adam", "capture-frozen", "replay-capture")
CLIP_NORM = 1.0
REPLAYED_STEPS = 8  # the replay begins again after so many
WARM_UP = 2


class CaptureBenchConfig(Config):
    """What to measure."""

    folder: Path = Path("runs/capture-bench")
    """Where data and runs of the bench are written; emptied first."""
    models: tuple[str, ...] = ("3M", "25M")
    """Sizes: 3M, 25M, or tiny."""
    pairs: dict[str, int] = {"3M": 200, "25M": 30, "tiny": 3}
    """Rounds of each size; in a round every case takes one step."""
    context: int = Field(default=256, ge=8)
    """Tokens of a sequence."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences of a step."""
    width: int = Field(default=16, ge=1)
    """Projected size of each side of a layer."""
    recursion_rows: int = Field(default=4096, ge=1)
    """Rows that the recursion walks back over."""
    threads: int = Field(default=1, ge=1)
    """Threads of torch."""
    small: bool = False
    """3M only, 10 rounds."""
    out: Path | None = None
    """JSON file of the rows; none: only print."""


@dataclass
class Contender:
    """One case: its step, and what was measured of it.

    Attributes:
        model: its own.
        optimizers: those that it has so far.
        pending: whether its next step begins by using the gradient of the last one.
        step: takes a batch with its sample ids.
        close: ends it.
        seconds: CPU time of each round.
        inside: seconds inside the recorder's calls.
    """

    model: nn.Module
    optimizers: list[Optimizer] = field(default_factory=list)
    pending: bool = False
    step: Callable[[list[int], Batch], object] = field(default=lambda _ids, _batch: None)
    close: Callable[[], None] = lambda: None
    seconds: list[float] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)


class Timed:
    """A recorder whose calls are timed."""

    def __init__(self, recorder: TrajectoryRecorder | NoRecorder) -> None:
        self._recorder, self.seconds = recorder, 0.0

    def call(self, name: str, *arguments: Any) -> None:
        """Call a method of the recorder."""
        begin = perf_counter()
        getattr(self._recorder, name)(*arguments)
        self.seconds += perf_counter() - begin


def write_data(config: CaptureBenchConfig, samples: int) -> Path:
    """An MDS stream of consecutive pieces of source files."""
    text = bytearray()
    for source in python_sources(STANDARD_LIBRARY):
        text += source.text.encode()
        if len(text) >= samples * config.context:
            break
    tokens = np.frombuffer(bytes(text), np.uint8).astype(np.int32)[: samples * config.context]
    mask = np.ones(config.context, np.uint8)
    rows = [
        {
            "tokens": piece, "loss_mask": mask, "sample_id": content_id(piece, mask), "domain": "python",
            "documents": [["python", 0, config.context]],
        }
        for piece in tokens.reshape(-1, config.context)
    ]  # fmt: skip
    unique = list({row["sample_id"]: row for row in rows}.values())
    write_stream(config.folder / "data" / "python", COLUMNS, unique, shard_bytes=1 << 20)
    return config.folder / "data" / "python"


def task_spec(config: CaptureBenchConfig, model: str) -> TaskSpec:
    """A GPT-2 of one size, its config written to the bench's folder."""
    width, blocks, heads = MODELS[model]
    path = config.folder / model / "config.json"
    write_json(
        path,
        {
            "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 256, "n_embd": width,
            "n_layer": blocks, "n_head": heads, "n_positions": config.context, "n_ctx": config.context,
            "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
        },
    )  # fmt: skip
    return TaskSpec(model=ModelSpec(hf_config=path.resolve()))


class Bench:
    """The contenders of one size.

    Args:
        config: the bench.
        model: name of the size.
        stream: where the data lies.
    """

    def __init__(self, config: CaptureBenchConfig, model: str, stream: Path) -> None:
        self.config, self.model, self.stream = config, model, stream
        self.spec = task_spec(config, model)
        self.samples = MdsStream(stream)
        self.pairs = 10 if config.small else config.pairs[model]
        self.rounds = self.pairs + WARM_UP + 2  # two more: multiplications and bytes

    def batch(self, step: int) -> tuple[list[int], Batch]:
        """A step's samples, all of the same weight."""
        size = self.config.batch_size
        rows = [self.samples[(step * size + i) % len(self.samples)] for i in range(size)]
        return [row.sample_id for row in rows], collate(rows, np.full(size, 1 / size, np.float32))

    def contender(self, case: str) -> Contender:
        """Set up one case."""
        if case == "replay-capture":
            return self._replay()
        if case == "capture-frozen":
            return self._frozen()
        return self._training(case, self.config.folder / self.model / case, self.rounds)

    def _training(self, case: str, folder: Path, steps: int) -> Contender:
        import torch

        task = self._task()
        optimizer = torch.optim.AdamW(task.model.parameters(), lr=3e-4, weight_decay=0.1)
        recorder: TrajectoryRecorder | NoRecorder = NoRecorder()
        capture: RunCapture | None = None
        if case not in ("forward-backward", "plain-step"):
            recorder = TrajectoryRecorder(
                folder, RecorderConfig(windows={"late": (0, steps)}, cadence_snapshots=0), task.model, optimizer,
                task=self.spec, streams={"python": self.stream}, steps=steps, seq_len=self.config.context,
                clip_norm=CLIP_NORM,
            )  # fmt: skip
            if case != "recorder":
                name: Any = {"capture": "dvemb", "capture-adam": "dvemb-adam"}[case]
                capture = RunCapture(recorder, CaptureConfig(estimator=name, width=self.config.width))
                recorder.attach(capture)
        timed, count = Timed(recorder), iter(range(steps))
        contender = Contender(model=task.model, optimizers=[optimizer], close=recorder.finish)

        def step(sample_ids: list[int], batch: Batch) -> None:
            timed.seconds = 0.0
            timed.call("begin_step", next(count))
            task.model.zero_grad(set_to_none=True)
            loss = (task.sample_losses(batch) * batch.weights).sum()
            loss.backward()
            if case == "forward-backward":
                return
            timed.call("micro_batch", sample_ids, batch.weights, batch.loss_mask[:, 1:].sum(1))
            norm = torch.nn.utils.clip_grad_norm_(task.model.parameters(), CLIP_NORM)
            optimizer.step()
            timed.call("end_step", loss, norm)
            if capture is not None:
                capture.flush()  # so that the writer's time is this step's
            contender.inside.append(timed.seconds)

        contender.step = step
        return contender

    def _frozen(self) -> Contender:
        task = self._task()
        capture = GradientCapture(task.model, self.config.width, 0, frozen=True).__enter__()
        rows = np.zeros((self.config.batch_size, capture.size), np.float32)

        def step(_: list[int], batch: Batch) -> None:
            (task.sample_losses(batch) * batch.weights).sum().backward()
            rows[:] = capture.take(batch.weights).numpy()

        return Contender(model=task.model, step=step, close=lambda: capture.__exit__(None, None, None))

    def _replay(self) -> Contender:
        """Replay of a run that is recorded here first."""
        folder = self.config.folder / self.model / "replayed"
        trained = self._training("recorder", folder, REPLAYED_STEPS)
        for step in range(REPLAYED_STEPS):
            trained.step(*self.batch(step))
        trained.close()
        replay = Replay(Run(folder))
        capture = GradientCapture(replay.model, self.config.width, 0)
        rows = np.zeros((self.config.batch_size, capture.size), np.float32)
        contender = Contender(model=replay.model, pending=True)

        def steps() -> Generator[None, None, None]:
            with capture:
                while True:
                    for replayed in replay.steps(0, REPLAYED_STEPS, capture.take):
                        contender.optimizers = list(replayed.optimizers)
                        rows[:] = np.concatenate([part.numpy() for part in replayed.captured])
                        yield

        walk = steps()
        contender.step, contender.close = lambda _ids, _batch: next(walk), walk.close
        return contender

    def _task(self) -> Task:
        import torch

        torch.manual_seed(0)
        return Task(self.spec)

    def measure(self) -> list[dict[str, Any]]:
        """Rows of the issue's form, one per case."""
        contenders = {case: self.contender(case) for case in CASES}
        self._rounds(contenders)
        counted = {case: _multiplications(partial(one.step, *self.batch(0))) for case, one in contenders.items()}
        peaks = {case: _peak_bytes(one, *self.batch(1)) for case, one in contenders.items()}
        for one in contenders.values():
            one.close()
        size = GradientCapture(self._task().model, self.config.width, 0).size
        rows = [self._row(case, contenders, counted, peaks[case], size) for case in CASES]
        inside = contenders["recorder"].inside[WARM_UP:]
        wall = contenders["recorder"].seconds[WARM_UP:]
        share = float(np.sum(inside[: len(wall)]) / np.sum(wall))
        _log.info("%s: %.2f %% of a recorded step is spent inside the recorder's calls", self.model, 100 * share)
        return rows

    def _rounds(self, contenders: dict[str, Contender]) -> None:
        total = WARM_UP + self.pairs
        for number in progress(range(total), total=total, what=f"{self.model} rounds"):
            for case in np.roll(CASES, number):
                one, (ids, batch) = contenders[case], self.batch(number)
                begin = process_time()
                one.step(ids, batch)
                one.seconds.append(process_time() - begin)

    def _row(
        self, case: str, contenders: dict[str, Contender], counted: dict[str, int], peak: int, size: int
    ) -> dict[str, Any]:
        own, plain, passes = (
            np.array(contenders[name].seconds[WARM_UP : WARM_UP + self.pairs])
            for name in (case, "plain-step", "forward-backward")
        )
        captures = case not in ("forward-backward", "plain-step", "recorder")
        added = counted[case] - counted["forward-backward"]
        frozen = case == "capture-frozen"
        return {
            "model": self.model, "context": self.config.context, "case": case, "width": size if captures else None,
            "pairs": self.pairs, "seconds": float(np.median(own)),
            "ratio_to_plain_step": float(np.median(own / plain)),
            "ratio_to_forward_backward": float(np.median(own / passes)),
            "ratio_upper_95": _upper_bound(own / (passes if frozen else plain)),
            "added_multiplications_share": added / counted["forward-backward"],
            "added_over_floor": added / self._floor(case) if captures and not frozen else None,
            "peak_bytes": peak,
        }  # fmt: skip

    def _floor(self, case: str) -> int:
        """Fewest multiplications that bring all factors to rows: each order of the two projections and the sum over T.

        For one sample and layer T O k + T I k + T k^2, or T O k + T k I + I k^2 (the other side last), or the mirror.
        Rows in AdamW's coordinates are rows of other projections, so `capture-adam` makes each row twice.
        """
        capture = GradientCapture(self._task().model, self.config.width, 0)
        tokens, total = self.config.context, 0
        for inputs, outputs in capture.identity["layers"].values():
            k_in, k_out = min(inputs, self.config.width), min(outputs, self.config.width)
            total += min(
                tokens * (outputs * k_out + inputs * k_in + k_in * k_out),
                tokens * (outputs * k_out + inputs * k_out) + inputs * k_in * k_out,
                tokens * (inputs * k_in + outputs * k_in) + outputs * k_in * k_out,
            )
        return total * self.config.batch_size * (2 if case == "capture-adam" else 1)


def _upper_bound(ratios: np.ndarray[Any, Any]) -> float:
    """97.5th percentile of the bootstrapped median: the upper end of a two-sided 95 % interval."""
    random = generator(0, "capture bench")
    medians = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.975))


def _multiplications(work: Callable[[], object]) -> int:
    """Multiplications of matrix products in a step, as torch's dispatcher sees them (not those of attention on CPU)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops()) // 2


def _peak_bytes(contender: Contender, sample_ids: list[int], batch: Batch) -> int:
    """Most bytes of tensors held at once in a step, parameters and optimizer state included."""
    from torch.profiler import ProfilerActivity, profile

    if not contender.pending:
        contender.model.zero_grad(set_to_none=True)
    states = [state for optimizer in contender.optimizers for state in optimizer.state.values()]
    tensors = [*contender.model.parameters(), *(tensor for state in states for tensor in state.values())]
    resident = sum(tensor.nbytes for tensor in tensors)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        contender.step(sample_ids, batch)
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(resident + np.cumsum([0, *changes]).max())


def recursion_rows(config: CaptureBenchConfig, blocks: int, operator: str) -> dict[str, Any]:
    """Speed of the recursion of `dvemb` from disk to disk, against a square float32 matrix product of 2048.

    A block of n rows of D dimensions takes n D^2 (G M^T) + n^2 D / 2 (the later steps' half of K) + n^2 D / 2 (the
    triangular solve) + n D^2 (the operator) multiplications; the speed counts only these.
    """
    from curate.embeddings.dvemb import recursion, step_blocks
    from curate.embeddings.dvemb_estimator import DvembConfig

    size, rows = config.width**2 * blocks, config.recursion_rows
    folder = config.folder / "recursion"
    folder.mkdir(parents=True, exist_ok=True)
    gradients, out = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (rows, size)) for name in ("rows", "out")
    )
    random = generator(0, "capture bench recursion")
    for start in range(0, rows, 512):
        gradients[start : start + 512] = random.normal(0, 0.01, gradients[start : start + 512].shape)
    steps = np.arange(rows) // config.batch_size
    per_block = DvembConfig().rows_per_block
    dimensions = config.width**2 if operator == "block" else size
    columns = [slice(start, start + dimensions) for start in range(0, size, dimensions)]
    begin = process_time()
    recursion(
        gradients, np.full((rows, len(columns)), 1e-4), steps, out, blocks=columns, rows_per_block=per_block,
        device="cpu",
    )  # fmt: skip
    out.flush()
    seconds = process_time() - begin
    counts = [part.stop - part.start for part in step_blocks(steps, per_block)]
    products = sum(2 * n * dimensions**2 + n**2 * dimensions for n in counts) * len(columns)
    return {
        "case": f"recursion-{operator}", "width": size, "rows_per_second": rows / seconds, "bytes_per_sample": 4 * size,
        "share_of_matrix_product": products / seconds / _matrix_product_speed(),
    }  # fmt: skip


def _matrix_product_speed() -> float:
    """Multiplications per second of CPU time, best of a few products of 2048 x 2048 in float32."""
    import torch

    left = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(6):
        begin = process_time()
        left @ left
        best = min(best, process_time() - begin)
    return 2048**3 / best


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows on the terminal."""
    sys.stdout.write(
        f"{'model':6}{'case':18}{'width':>6}{'pairs':>7}{'s':>9}{'/ step':>8}{'/ f+b':>8}{'upper':>8}"
        f"{'added':>8}{'x floor':>9}{'peak MB':>9}\n"
    )
    for row in rows:
        floor = "" if row["added_over_floor"] is None else f"{row['added_over_floor']:.2f}"
        sys.stdout.write(
            f"{row['model']:6}{row['case']:18}{row['width'] or '':>6}{row['pairs']:7}{row['seconds']:9.4f}"
            f"{row['ratio_to_plain_step']:8.3f}{row['ratio_to_forward_backward']:8.3f}{row['ratio_upper_95']:8.3f}"
            f"{row['added_multiplications_share']:8.3f}{floor:>9}{row['peak_bytes'] / 1e6:9.1f}\n"
        )


def bench(config: CaptureBenchConfig) -> dict[str, Any]:
    """Measure everything.

    Returns:
        `rows` (one per model and case) and `recursion`.

    Raises:
        UserError: a model is not one of `MODELS`.
    """
    import shutil

    import torch

    models = ("3M",) if config.small else config.models
    unknown = sorted({*models} - set(MODELS))
    if unknown:
        raise UserError(f"models {unknown[0]!r} is not one of {', '.join(MODELS)}")
    torch.set_num_threads(config.threads)
    shutil.rmtree(config.folder, ignore_errors=True)
    stream = write_data(config, samples=40 * config.batch_size)
    rows = [row for model in models for row in Bench(config, model, stream).measure()]
    print_table(rows)
    recursions = [
        {"model": model, **recursion_rows(config, 4 * MODELS[model][1], operator)}
        for model in models
        for operator in ("block", "full")
    ]
    for row in recursions:
        sys.stdout.write(
            f"{row['model']:6}{row['case']:18}{row['width']:6}  {row['rows_per_second']:,.0f} rows per second, "
            f"{row['bytes_per_sample']:,} bytes per sample, {100 * row['share_of_matrix_product']:.0f} % of a matrix "
            "product's speed\n"
        )
    return {"rows": rows, "recursion": recursions}


def main() -> None:
    """Entry point."""
    config = parse_command(
        CaptureBenchConfig, "python -m pipelines.capture_bench", "What recording and capturing cost in a training step."
    )
    start_logging()
    found = bench(config)
    if config.out is not None:
        write_json(config.out, found)
        _log.info("wrote %s", config.out)


if __name__ == "__main__":
    run_command(main)
