"""Held-out losses of a state, for documents that selection never saw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from curate.data.documents import encode, find_eot, load_tokenizer
from curate.data.files import read_documents
from curate.training.snapshots import load_state
from curate.training.target import load_target, split_document, target_loss
from curate.training.task import Batch, Task, collate

if TYPE_CHECKING:
    from curate.training.run import RunSpec

BATCH_SIZE = 32


def load_task(spec: RunSpec, state: Path, device: str) -> Task:
    """The run's model with the weights of a state file."""
    task = Task(spec.task, device)
    load_state(state, task.model)
    return task


def document_loss(task: Task, spec: RunSpec, path: Path) -> float:
    """A target's loss `l_q`: mean over documents of each document's token mean, nats per token."""
    return target_loss(task, load_target(path, spec), BATCH_SIZE)


def domain_losses(task: Task, spec: RunSpec, path: Path) -> dict[str, float]:
    """Token mean of each domain of a file whose rows name their `domain`, nats per token."""
    import numpy as np
    import torch

    tokenizer = load_tokenizer(spec.tokenizer) if spec.tokenizer else None
    start = find_eot(tokenizer) if tokenizer else None
    domains = [json.loads(line)["domain"] for line in path.read_text(encoding="utf-8").splitlines()]
    pieces: dict[str, list[Batch]] = {}
    for domain, document in zip(domains, read_documents(path), strict=True):
        split = split_document(*encode(document, tokenizer), spec.seq_len, start)
        if not split:
            continue  # a single token predicts nothing
        weights = np.array([piece.predicted_tokens for piece in split], np.float32)
        pieces.setdefault(domain, []).extend(collate(split, weights).split(BATCH_SIZE))
    losses = {}
    with torch.no_grad():
        for domain, batches in sorted(pieces.items()):
            moved = [batch.to(task.device) for batch in batches]
            total = sum(float((task.sample_losses(batch) * batch.weights).sum()) for batch in moved)
            losses[domain] = total / sum(float(batch.weights.sum()) for batch in moved)
    return losses
