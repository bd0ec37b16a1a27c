"""The contenders of one size, each with its own model, taking steps in turn; what a step cost, counted and timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.artifacts import write_json
from curate.core.progress import progress
from curate.core.rng import generator
from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.gradients.capture import GradientCapture
from curate.training.recorder import NoRecorder, RecorderConfig, TrajectoryRecorder
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.task import Batch, ModelSpec, Task, TaskSpec, collate
from pipelines.capture_bench.config import CASES, CLIP_NORM, MODELS, REPLAYED_STEPS, WARM_UP, CaptureBenchConfig
from pipelines.corpus.sources import STANDARD_LIBRARY, python_sources

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

_log = logging.getLogger(__name__)


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
            "activation_function": "gelu_pytorch_tanh",  # one kernel; GPT-2's own is eight, a tenth of the step
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
