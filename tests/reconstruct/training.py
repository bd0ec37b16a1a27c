"""A plain torch loop over StreamingDataset, as somebody else wrote it: it logs to a CSV and saves torch checkpoints.

Beside it, and read by nothing of it, runs the recorder; what is reconstructed without it is held against its records.
Run as a program it is one of several processes: `python training.py CONFIG.json`.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed

from curate.data.mds import Columns, as_sample
from curate.data.memory import construct
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from tests.tiny import CLIP_NORM, SEQ_LEN, TASK, factory

ROOT = Path(__file__).resolve().parents[2]
PEAK, WARMUP = 1e-2, 3
ADAMW = {"betas": [0.9, 0.95], "weight_decay": 0.1}


@dataclass
class Loop:
    """One training; paths are texts so that it goes through JSON."""

    folder: str
    streams: dict[str, dict[str, Any]]
    dataset: dict[str, Any]
    steps: int = 24
    batch_size: int = 4
    accumulation: int = 1
    workers: int = 0
    drop_last: bool = True
    kills: list[int] = field(default_factory=list)  # steps before which a new process takes over
    frozen: str = ""  # how the names of parameters begin that are not trained
    saved: list[int] = field(default_factory=lambda: [0, 6, 12, 18, 24])

    def run(self) -> None:
        """Train to the end, in as many lives as there are kills."""
        state: dict[str, Any] | None = None
        log: list[dict[str, float]] = []
        borders = [0, *self.kills, self.steps]
        for start, stop in pairwise(borders):
            state = self._life(start, stop, state, log)
        if _rank() == 0:
            with (Path(self.folder) / "log.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, ["step", "loss", "lr", "grad_norm"])
                writer.writeheader()
                writer.writerows(log)

    def _life(self, start: int, stop: int, state: dict[str, Any] | None, log: list[dict[str, float]]) -> dict[str, Any]:
        folder, world = Path(self.folder), int(os.environ.get("WORLD_SIZE", "1"))
        model = self._model()
        trained = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.dim() >= 2]},
            {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.1)
        loader = self._loader()
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            loader.load_state_dict(state["data"])
        recorder = TrajectoryRecorder(
            folder / "recorded",
            RecorderConfig(windows={"early": (0, 6), "late": (18, self.steps)}, cadence_snapshots=4),
            model, optimizer, task=TASK, streams={n: s["local"] for n, s in self.streams.items()}, steps=self.steps,
            seq_len=SEQ_LEN, clip_norm=CLIP_NORM, first_step=start,
        )  # fmt: skip
        batches = _forever(loader)
        for step in range(start, stop):
            recorder.begin_step(step)
            if step in self.saved:
                self._save(step, model, optimizer)
            rate = PEAK * (step + 1) / WARMUP if step < WARMUP else PEAK
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            total = torch.zeros(())
            for _ in range(self.accumulation):
                rows = next(batches)
                samples = [as_sample(row, Columns(), "test") for row in rows]
                tokens = torch.from_numpy(np.stack([sample.tokens for sample in samples]).astype(np.int64))
                mask = torch.from_numpy(np.stack([sample.loss_mask for sample in samples]))[:, 1:]
                nll = torch.nn.functional.cross_entropy(
                    model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none"
                )
                loss = (nll * mask).sum() / mask.sum() / self.accumulation
                loss.backward()
                total += loss.detach()
                share = mask.sum(1) / (mask.sum() * self.accumulation * world)
                recorder.micro_batch([sample.sample_id for sample in samples], share, mask.sum(1))
            if world > 1:
                for tensor in [total, *(p.grad for p in model.parameters())]:
                    distributed.all_reduce(tensor)
                    tensor /= world
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            recorder.end_step(total, norm)
            log.append({"step": step, "loss": total.item(), "lr": rate, "grad_norm": norm.item()})
        recorder.flush()
        if stop == self.steps:
            if stop in self.saved:
                self._save(stop, model, optimizer)
            recorder.finish()
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "data": loader.state_dict()}

    def _model(self) -> torch.nn.Module:
        model = factory()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not (self.frozen and name.startswith(self.frozen)))
        return model

    def _save(self, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if _rank() == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(self.folder) / f"{step}.pt")

    def _loader(self) -> Any:
        from streaming import Stream, StreamingDataLoader, StreamingDataset

        def make() -> StreamingDataset:
            streams = [Stream(**stream) for stream in self.streams.values()]
            return StreamingDataset(streams=streams, batch_size=self.batch_size, predownload=64, **self.dataset)

        dataset = construct(make)
        return StreamingDataLoader(
            dataset, batch_size=self.batch_size, collate_fn=_keep, drop_last=self.drop_last, num_workers=self.workers
        )

    def description(self, **changes: Any) -> dict[str, Any]:
        """What its user could say about it afterwards."""
        folder = Path(self.folder)
        said: dict[str, Any] = {
            "out": folder / "rebuilt", "streams": self.streams, "dataset": self.dataset, "steps": self.steps,
            "loader": {
                "batch_size": self.batch_size, "workers": self.workers, "accumulation": self.accumulation,
                "drop_last": self.drop_last, "resumed": [{"step": step} for step in self.kills],
            },
            "task": TASK, "loss": {"over": "micro_batch"}, "clip_norm": CLIP_NORM,
            "optimizers": [{"arguments": ADAMW, "groups": [{"min_dim": 2}, {"arguments": {"weight_decay": 0.0}}]}],
            "log": {"file": folder / "log.csv"},
            "checkpoints": {step: folder / f"{step}.pt" for step in self.saved},
            "windows": {"early": (0, 6), "late": (18, self.steps)},
        }  # fmt: skip
        return {**said, **changes}


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _keep(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"rows": rows}


def _forever(loader: Any) -> Any:
    while True:
        for batch in loader:
            yield batch["rows"]


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    _look_from(int(os.environ["MASTER_PORT"]))
    distributed.init_process_group("gloo")
    Loop(**json.loads(Path(sys.argv[1]).read_text())).run()
    distributed.barrier()
    distributed.destroy_process_group()


def _look_from(first: int) -> None:
    """Look for names in shared memory where no other test does.

    Every rank looks for the first free one for itself; where a data set of another test takes or frees one in between,
    ranks find different ones, and streaming gives up.
    """
    from streaming.base.shared import prefix

    prefix._each_prefix_int = lambda: itertools.count(first)


def in_processes(loop: Loop, world: int) -> None:
    """Run a loop in several real processes."""
    import socket
    import subprocess

    config = Path(loop.folder) / "loop.json"
    config.write_text(json.dumps(asdict(loop)))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    shared = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world), "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(config)], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        )
        for rank in range(world)
    ]
    assert [process.wait() for process in running] == [0] * world


if __name__ == "__main__":
    main()
