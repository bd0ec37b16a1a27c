"""A tiny language model, tiny MDS streams of real text and a recorded run over them, built in seconds by the tests."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curate.data.mds import COLUMNS, MdsStream, content_id, write_stream
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.run import Run
from curate.training.snapshots import load_state, snapshot_path
from curate.training.task import ModelSpec, TaskSpec

VOCABULARY = 128  # ASCII
SEQ_LEN = 12
STEPS = 12
CLIP_NORM = 0.7
SOURCES = {"json": json.__file__, "dataclasses": __import__("dataclasses").__file__}


class TinyLM(nn.Module):
    """Causal, nonlinear and small: embedding, a causal mixing layer, an MLP, a norm, a head (tied where asked)."""

    def __init__(self, vocabulary: int = VOCABULARY, width: int = 8, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.mix = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device, dtype=hidden.dtype)
        hidden = hidden + torch.tanh(self.mix(hidden.cumsum(1) / positions[:, None]))
        hidden = hidden + self.down(torch.nn.functional.gelu(self.up(hidden)))
        return self.lm_head(self.norm(hidden))


def factory(**kwargs: Any) -> TinyLM:
    torch.manual_seed(0)
    return TinyLM(**kwargs)


TASK = TaskSpec(model=ModelSpec(factory="tests.tiny:factory"))


def write_tiny_streams(folder: Path, samples: int = 80, sources: Mapping[str, str | Path] = SOURCES) -> dict[str, Path]:
    """One stream per source file: consecutive pieces of real source text, bytes as tokens, some positions masked."""
    for domain, source in sources.items():
        text = np.frombuffer(Path(source).read_bytes(), np.uint8).astype(np.int32) % VOCABULARY
        write_stream(folder / domain, COLUMNS, list(_rows(text, domain, samples)), shard_bytes=4000)
    return {domain: folder / domain for domain in sources}


def _rows(text: np.ndarray, domain: str, samples: int) -> Iterator[dict[str, Any]]:
    for index in range(samples):
        tokens = text[index * SEQ_LEN : (index + 1) * SEQ_LEN].copy()
        mask = np.ones(SEQ_LEN, np.uint8)
        mask[: index % 4] = 0  # samples predict different numbers of tokens
        yield {
            "tokens": tokens, "loss_mask": mask, "sample_id": content_id(tokens, mask), "domain": domain,
            "documents": [[f"{domain}-{index}a", 0, 5], [f"{domain}-{index}b", 5, SEQ_LEN]],
        }  # fmt: skip


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "Adam": {},
    "SGD": {},
    "momentum": {"momentum": 0.9, "dampening": 0.3},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "Muon": {"momentum": 0.9},
    "Muon without Nesterov": {"nesterov": False, "adjust_lr_fn": "match_rms_adamw"},
}


def build_optimizers(model: nn.Module, name: str) -> list[torch.optim.Optimizer]:
    """Matrices and vectors in two groups; for Muon, the hidden matrices there and the rest in AdamW's groups."""
    hidden: list[nn.Parameter] = []
    optimizers: list[torch.optim.Optimizer] = []
    kind = torch.optim.Adam if name == "Adam" else torch.optim.AdamW
    settings: dict[str, Any] = {"betas": (0.9, 0.95)}
    if name.startswith("Muon"):
        hidden = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.startswith(("embedding", "lm_head"))]
        optimizers.append(torch.optim.Muon(hidden, lr=1e-2, **OPTIMIZERS[name]))
    elif name not in ("AdamW", "Adam"):
        kind, settings = torch.optim.SGD, OPTIMIZERS[name]
    rest = [p for p in model.parameters() if p.requires_grad and all(p is not one for one in hidden)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() == 1], "weight_decay": 0.0},
    ]
    if kind is not torch.optim.SGD:
        groups[1]["eps"] = 1e-7
    return [*optimizers, kind(groups, lr=1e-2, **settings)]


def set_lr(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = lr


@dataclass
class Training:
    """A plain loop with everything that replay has to repeat: token-mean weights, two micro-batches, two groups,
    clipping.
    """

    streams: dict[str, Path]
    seed: int = 0
    steps: int = STEPS
    batch_size: int = 6
    dtype: torch.dtype = torch.float32
    optimizer: str = "AdamW"
    tied: bool = True
    frozen: str = ""  # how the names of parameters begin that are not trained
    skipped: frozenset[int] = frozenset()  # steps without an update
    dropped: frozenset[tuple[int, int]] = frozenset()  # (step, position) of samples whose weight is set to 0
    capture: CaptureConfig | None = None
    autocast: bool = False  # bfloat16
    loss_scale: float = 1.0  # as a GradScaler's
    said_scale: float | None = None  # what the recorder is told of it
    model: nn.Module | None = None  # as the last run left it

    def run(
        self,
        folder: Path | None,
        config: RecorderConfig | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        previous: Path | None = None,
    ) -> list[float]:
        """Train; with a folder, record there. Stops early (as in a crash) or continues at a snapshot where asked."""
        model = self.model = factory(tied=self.tied).to(self.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (self.frozen and name.startswith(self.frozen)))
        optimizers = build_optimizers(model, self.optimizer)
        if folder and start:
            load_state(snapshot_path(folder, start), model, optimizers)
        recorder = folder and self._recorder(folder, config, optimizers, start, previous)
        pools = [MdsStream(path) for path in self.streams.values()]
        losses = []
        for step in range(start, stop or self.steps):
            if recorder:
                recorder.begin_step(step)
            set_lr(optimizers, 1e-2 * (1 - step / (2 * self.steps)))
            model.zero_grad()
            samples = [pools[i % 2][(self.seed * 31 + step * self.batch_size + i) % 80] for i in range(self.batch_size)]
            total = sum(sample.predicted_tokens for sample in samples)
            loss = torch.zeros((), dtype=self.dtype)
            kept = torch.tensor([(step, i) not in self.dropped for i in range(self.batch_size)])
            size = self.batch_size // 2
            for first in (0, size):
                half = samples[first : first + size]
                micro_loss, predicted = self._micro_loss(half, kept[first : first + size, None], total)
                (micro_loss * self.loss_scale).backward()
                loss += micro_loss.detach()
                if recorder:
                    ids = [sample.sample_id for sample in half]
                    recorder.micro_batch(ids, predicted / total, predicted, self.said_scale)
            norm = self._update(optimizers, step)
            if recorder:
                recorder.end_step(loss, norm)
            losses.append(float(loss))
        if recorder and stop is None:
            recorder.finish()
        return losses

    def _update(self, optimizers: list[torch.optim.Optimizer], step: int) -> Tensor:
        """Unscale, clip and, where the step is not skipped, update; returns the norm before clipping."""
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad /= self.loss_scale
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        for optimizer in optimizers if step not in self.skipped else ():
            optimizer.step()
        return norm

    def _recorder(
        self,
        folder: Path,
        config: RecorderConfig | None,
        optimizers: list[torch.optim.Optimizer],
        start: int,
        previous: Path | None,
    ) -> TrajectoryRecorder:
        model = TASK.model.model_copy(update={"kwargs": {"tied": self.tied}})
        recorder = TrajectoryRecorder(
            folder, config or RecorderConfig(windows={"early": (0, 4), "late": (8, self.steps)}), self.model,
            optimizers, task=TaskSpec(model=model, autocast="bfloat16" if self.autocast else None),
            streams=self.streams, steps=self.steps, seq_len=SEQ_LEN, clip_norm=CLIP_NORM,
            first_step=start, previous=previous,
        )  # fmt: skip
        if self.capture:
            recorder.attach(RunCapture(recorder, self.capture))
        return recorder

    def _micro_loss(self, samples: list[Any], kept: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """This micro-batch's part of the step's loss, and its predicted tokens per sample."""
        tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))
        mask = torch.from_numpy(np.stack([sample.loss_mask for sample in samples]))[:, 1:] & kept
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            logits = self.model(tokens)[:, :-1]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
        nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none").view(mask.shape)
        return (nll * mask).sum() / total, mask.sum(1)


def record_tiny_run(folder: Path, **settings: Any) -> Run:
    """Streams and a finished recorded run below `folder`."""
    Training(write_tiny_streams(folder / "data"), **settings).run(folder / "run")
    return Run(folder / "run")


def write_tiny_target(
    path: Path, documents: int = 12, length: int = 30, source: str | Path = argparse.__file__
) -> Path:
    """Documents of ASCII tokens from another real source file; longer than a sequence, so that they are split."""
    text = Path(source).read_bytes()
    with path.open("w", encoding="utf-8") as file:
        for index in range(documents):
            piece = [byte % VOCABULARY for byte in text[index * length : (index + 1) * length]]
            file.write(json.dumps({"id": f"t{index}", "tokens": piece}) + "\n")
    return path
