"""Targets: held-out documents that say what the next stage should get better at, as a weighted loss.

The loss of a target is the mean over its documents of each document's token mean; a document
longer than a training sequence is split, each piece starting with the last token of the piece before, so that every
token is predicted exactly once. That makes it a loss `sum_p c_p l_p` over pieces, the same form as a training batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.artifacts import file_fingerprint
from curate.errors import UserError
from curate.formats.documents import encode, find_eot, load_tokenizer, read_documents
from curate.formats.mds import Sample
from curate.rng import generator
from curate.task import Batch, Task, collate

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from curate.trajectory.run import RunSpec


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target, as two halves of its documents.

    Attributes:
        name: stem of its file.
        fingerprint: of the file's bytes.
        documents: number of documents.
        tokens: predicted tokens.
        halves: one weighted batch per half; each half's weights sum to 1.
        half_weights: share of the documents in each half, so that `l_q = sum_h half_weights[h] * loss of half h`.
    """

    name: str
    fingerprint: str
    documents: int
    tokens: int
    halves: tuple[Batch, Batch]
    half_weights: tuple[float, float]


def load_target(path: Path, spec: RunSpec, min_tokens: int = 1000) -> Target:
    """Read a target file with the run's tokenizer.

    Args:
        path: document JSONL (`curate.formats.documents`).
        spec: the run; supplies tokenizer and sequence length.
        min_tokens: fewer predicted tokens are refused: their gradient would be noise.

    Raises:
        UserError: the file is unreadable or holds too few documents or tokens; there is no tokenizer for text.
    """
    documents = read_documents(path)
    tokenizer = load_tokenizer(spec.tokenizer) if spec.tokenizer else None
    start = find_eot(tokenizer) if tokenizer else None
    pieces = [split_document(*encode(document, tokenizer), spec.seq_len, start) for document in documents]
    pieces = [document for document in pieces if document]
    tokens = sum(piece.predicted_tokens for document in pieces for piece in document)
    if len(pieces) < 2 or tokens < min_tokens:
        raise UserError(
            f"target {path} has {tokens} predicted tokens in {len(pieces)} documents; at least {min_tokens} tokens in "
            "2 documents are needed for a gradient that is more than noise; add documents, or lower --min_target_tokens"
        )
    order = generator(0, "target halves").permutation(len(pieces))
    halves = [[pieces[i] for i in sorted(half)] for half in (order[::2], order[1::2])]
    return Target(
        name=path.stem,
        fingerprint=file_fingerprint(path),
        documents=len(pieces),
        tokens=tokens,
        halves=(_weighted(halves[0]), _weighted(halves[1])),
        half_weights=(len(halves[0]) / len(pieces), len(halves[1]) / len(pieces)),
    )


def check_vocabulary(target: Target, task: Task) -> None:
    """Refuse a target whose token ids the model does not have, where the model says how many it has.

    Raises:
        UserError: names the largest id and the vocabulary.
    """
    vocabulary = getattr(getattr(task.model, "config", None), "vocab_size", None)
    largest = max(int(half.tokens.max()) for half in target.halves)
    if vocabulary is not None and largest >= vocabulary:
        raise UserError(
            f"target {target.name} has token id {largest}, the model's vocabulary is {vocabulary}: give it as text, or "
            "tokenise it with the run's tokenizer"
        )


def target_loss(task: Task, target: Target, batch_size: int) -> float:
    """`l_q` of the task's model, nats per token."""
    import torch

    with torch.no_grad():
        losses = [
            sum(
                float((task.sample_losses(part) * part.weights).sum()) for part in _parts(half, batch_size, task.device)
            )
            for half in target.halves
        ]
    return sum(weight * loss for weight, loss in zip(target.half_weights, losses, strict=True))


def half_gradients(task: Task, target: Target, names: Sequence[str], batch_size: int) -> list[dict[str, Tensor]]:
    """Gradient of each half's loss with respect to the named parameters of the task's model."""
    import torch

    parameters = dict(task.model.named_parameters())
    gradients = []
    for half in target.halves:
        total = {name: torch.zeros_like(parameters[name]) for name in names}
        for part in _parts(half, batch_size, task.device):
            loss = (task.sample_losses(part) * part.weights).sum()
            parts = torch.autograd.grad(loss, [parameters[name] for name in names], allow_unused=True)
            for name, gradient in zip(names, parts, strict=True):
                if gradient is not None:
                    total[name] += gradient
        gradients.append(total)
    return gradients


def _parts(half: Batch, batch_size: int, device: torch.device) -> list[Batch]:
    return [part.to(device) for part in half.split(batch_size)]


def split_document(
    tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], seq_len: int, start: int | None
) -> list[Sample]:
    """Split a document into sequences of at most `seq_len` tokens that predict each token once.

    The first token is predicted from end-of-text where the tokenizer has one, else it is context only.
    """
    if start is not None:
        tokens, mask = np.append(np.int32(start), tokens), np.append(False, mask)
    pieces = []
    for begin in range(0, max(len(tokens) - 1, 0), seq_len - 1):
        piece = slice(begin, begin + seq_len)
        pieces.append(Sample(tokens=tokens[piece], loss_mask=mask[piece], documents=[]))
    return [piece for piece in pieces if piece.predicted_tokens]


def _weighted(documents: list[list[Sample]]) -> Batch:
    """Stack the pieces of some documents: `c_p` = the piece's share of its document's tokens / number of documents."""
    weights = []
    for document in documents:
        total = sum(piece.predicted_tokens for piece in document)
        weights += [piece.predicted_tokens / total / len(documents) for piece in document]
    return collate([piece for document in documents for piece in document], np.asarray(weights, np.float32))
