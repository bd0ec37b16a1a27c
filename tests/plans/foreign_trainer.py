"""A trainer that knows of curate only the recorder and `open_dataset`: its own loop, accumulation, lr and checkpoints.

It goes on from `resume.pt` where it was killed, as the scheduler's contract asks.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from curate.data.dataset import open_dataset
from curate.training.recorder import RecorderConfig, TrajectoryRecorder
from curate.training.task import ModelSpec, TaskSpec

BATCH, PARTS, CHECKPOINT_STEPS = 8, 2, 4


def pick(rows):
    """The columns that are of the same size in every sample."""
    found = {name: torch.stack([torch.as_tensor(row[name].copy()) for row in rows]) for name in ("tokens", "loss_mask")}
    return {**found, "sample_id": [int(row["sample_id"]) for row in rows]}


def save(path, value):
    torch.save(value, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def micro_batch(model, batch, part):
    """Loss, ids, weights and predicted tokens of one part of a batch."""
    rows = slice(part * BATCH // PARTS, (part + 1) * BATCH // PARTS)
    tokens, mask = batch["tokens"][rows].long(), batch["loss_mask"][rows][:, 1:].float()
    losses = cross_entropy(model(tokens).logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    weights = torch.full((len(tokens),), 1 / BATCH)
    loss = ((losses * mask).sum(1) / mask.sum(1).clamp(min=1) * weights).sum()
    return loss, batch["sample_id"][rows], weights, mask.sum(1)


def main():
    parser = argparse.ArgumentParser()
    for name in ("out", "data", "base", "model", "previous", "load"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seq_len", type=int)
    parser.add_argument("--lr", type=float)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(given.model))
    optimizer = torch.optim.AdamW(model.parameters(), lr=given.lr, betas=(0.9, 0.95))
    if given.load:
        model.load_state_dict(torch.load(given.load, weights_only=True)["model"])
    dataset, first, saved = open_dataset(given.data, batch_size=BATCH, seed=3), 0, given.out / "resume.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        dataset.load_state_dict(state["data"])
        first = state["step"]
    recorder = TrajectoryRecorder(
        given.out, RecorderConfig(windows={"early": (0, 3), "late": (given.steps - 3, given.steps)}), model, optimizer,
        task=TaskSpec(model=ModelSpec(hf_config=given.model)), steps=given.steps, clip_norm=1.0, first_step=first,
        streams={path.parent.name: path.parent for path in sorted(given.base.glob("*/index.json"))},
        seq_len=given.seq_len, previous=given.previous,
    )  # fmt: skip
    batches = iter(DataLoader(dataset, batch_size=BATCH, collate_fn=pick))
    for step in range(first, given.steps):
        optimizer.param_groups[0]["lr"] = given.lr * (1 - 0.5 * step / given.steps)
        recorder.begin_step(step)
        optimizer.zero_grad()
        batch, total = next(batches), 0.0
        for part in range(PARTS):
            loss, *seen = micro_batch(model, batch, part)
            loss.backward()
            total += loss.detach()
            recorder.micro_batch(*seen)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recorder.end_step(total, norm)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            recorder.flush()
            data = dataset.state_dict((step + 1) * BATCH, from_beginning=False)
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save(saved, {**states, "step": step + 1, "data": data})
    recorder.finish()
    save(given.out / "final.pt", {"model": model.state_dict()})


if __name__ == "__main__":
    main()
