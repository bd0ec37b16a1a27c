"""`python -m tests.ranks FOLDER STREAMS RANK WORLD`: one rank of a captured training in DistributedDataParallel.

Every rank takes its share of each step's samples, in two micro-batches of which only the second synchronises.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from curate.data.mds import MdsStream
from curate.embeddings.run_capture import CaptureConfig, RunCapture
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from tests.tiny import CLIP_NORM, SEQ_LEN, TASK, factory

STEPS, BATCH = 4, 8


def train(folder: Path, streams: dict[str, Path], rank: int, world: int) -> None:
    plain = factory()
    model = DistributedDataParallel(plain) if world > 1 else plain
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = TrajectoryRecorder(
        folder, RecorderConfig(windows={"early": (0, 2), "late": (2, STEPS)}), model, optimizer, task=TASK,
        streams=streams, steps=STEPS, seq_len=SEQ_LEN, clip_norm=CLIP_NORM,
    )  # fmt: skip
    recorder.attach(RunCapture(recorder, CaptureConfig(estimator="dvemb-adam", width=4)))
    pools = [MdsStream(path) for path in streams.values()]
    for step in range(STEPS):
        recorder.begin_step(step)
        model.zero_grad()
        samples = [pools[i % 2][step * BATCH + i] for i in range(BATCH)]
        total = sum(sample.predicted_tokens for sample in samples)
        own = samples[rank * BATCH // world : (rank + 1) * BATCH // world]
        loss = torch.zeros(())
        for half, last in ((own[: len(own) // 2], False), (own[len(own) // 2 :], True)):
            with nullcontext() if last or world == 1 else model.no_sync():
                tokens = torch.from_numpy(np.stack([sample.tokens for sample in half]).astype(np.int64))
                mask = torch.from_numpy(np.stack([sample.loss_mask for sample in half]))[:, 1:]
                logits = model(tokens)[:, :-1].transpose(1, 2)
                nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
                micro_loss = (nll * mask).sum() / total
                (micro_loss * world).backward()  # DDP takes the mean
                loss += micro_loss.detach()
            recorder.micro_batch([sample.sample_id for sample in half], mask.sum(1) / total, mask.sum(1))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if world > 1:
            distributed.all_reduce(loss)
        recorder.end_step(loss, norm)
    recorder.finish()


if __name__ == "__main__":
    folder, data, rank, world = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}.rendezvous", rank=rank, world_size=world)
    train(folder, {name: data / name for name in ("json", "dataclasses")}, rank, world)
    distributed.destroy_process_group()
