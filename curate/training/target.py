"""Targets: held-out documents that say what the next stage should get better at, as a weighted loss.

The loss of a target is the mean over its documents of each document's token mean; a document
longer than a training sequence is split, each piece starting with the last token of the piece before, so that every
token is predicted exactly once. That makes it a loss `sum_p c_p l_p` over pieces, the same form as a training batch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from curate.core.artifacts import file_fingerprint
from curate.core.errors import UserError
from curate.core.escape import name_of
from curate.core.rng import generator
from curate.data.documents import find_eot, load_tokenizer
from curate.data.files import read_documents
from curate.data.mds import Sample
from curate.data.spelling import Spelling
from curate.training.model import all_parameters
from curate.training.task import Batch, Task, collate

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor

    from curate.training.layout import FlatLayout
    from curate.training.run import RunSpec

_log = logging.getLogger(__name__)
Pieces = list[Sample]  # the sequences that one document is split into


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

    def sequences(self) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
        """Tokens (T,) and loss mask (T,) of every sequence, padded as in its half."""
        for half in self.halves:
            yield from zip(half.tokens.numpy(), half.loss_mask.numpy(), strict=True)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The targets, and the retention target, which must not get worse; read once.

    Attributes:
        named: the targets, the main one first.
        retain: the retention target; None: there is none.
    """

    named: tuple[Target, ...] = ()
    retain: Target | None = None

    @property
    def every(self) -> list[Target]:
        """All of them, the retention target last."""
        return [*self.named, *([] if self.retain is None else [self.retain])]

    @property
    def main(self) -> Target:
        """The first target."""
        return self.named[0]


def load_targets(paths: Sequence[Path], retain: Path | None, spec: RunSpec, min_tokens: int) -> Targets:
    """Read the targets and the retention target, see `load_target`.

    Raises:
        UserError: a file is bad, or two have one name: a target is called by its file's stem.
    """
    named = tuple(load_target(path, spec, min_tokens) for path in paths)
    targets = Targets(named=named, retain=None if retain is None else load_target(retain, spec, min_tokens))
    # names become columns and folder names
    names = [target.name for target in targets.every]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(
            f"two targets are called {repeated[0]!r}, by the names of their files: rename one, or leave it out"
        )
    return targets


def load_target(path: Path, spec: RunSpec, min_tokens: int = 1000) -> Target:
    """Read a target file with the run's tokenizer.

    Args:
        path: one file of documents (`curate.data.files`).
        spec: the run; supplies tokenizer and sequence length.
        min_tokens: fewer predicted tokens are refused: their gradient would be noise.

    Raises:
        UserError: the file is unreadable or holds too few documents or tokens; there is no tokenizer for text.
    """
    documents = read_pieces(path, spec)
    tokens = predicted_tokens(documents)
    # two documents, because the halves' agreement is how noise is told from signal
    if len(documents) < 2 or tokens < min_tokens:
        raise UserError(
            f"target {path} has {tokens} predicted tokens in {len(documents)} documents; at least {min_tokens} tokens "
            "in 2 different documents are needed for a gradient that is more than noise; add documents, or lower "
            "min_target_tokens"
        )
    first, second = shuffled_parts(documents, 2)
    return Target(
        name=name_of(path),
        fingerprint=file_fingerprint(path),
        documents=len(documents),
        tokens=tokens,
        halves=(weighted(first), weighted(second)),
        half_weights=(len(first) / len(documents), len(second) / len(documents)),
    )


def read_pieces(path: Path, spec: RunSpec) -> list[Pieces]:
    """Read documents with the run's tokenizer and split each to the run's sequence length.

    A document that repeats an earlier one is left out: halves that share documents would agree for no reason.

    Args:
        path: one file of documents (`curate.data.files`).
        spec: the run; supplies tokenizer and sequence length.

    Returns:
        The pieces of each document that has a predicted token, in the file's order.

    Raises:
        UserError: the file is unreadable; there is no tokenizer for text.
    """
    tokenizer = load_tokenizer(spec.tokenizer) if spec.tokenizer else None
    start = find_eot(tokenizer) if tokenizer else None
    documents = read_documents(path)
    # reversed twice: a dictionary keeps the last of equal keys, and the first one is wanted, in the file's order
    distinct = list({document.content_hash: document for document in reversed(documents)}.values())[::-1]
    spelling = Spelling(str(path), tokenizer)
    split = [split_document(*encoded, spec.seq_len, start) for encoded in spelling.encode(distinct)]
    usable = [pieces for pieces in split if pieces]
    spelling.warn()
    if len(usable) < len(documents):
        _log.warning(
            "%s: %d of %d documents count; %d repeat an earlier one, %d have no token to predict",
            path,
            len(usable),
            len(documents),
            len(documents) - len(distinct),
            len(distinct) - len(usable),
        )
    return usable


def predicted_tokens(documents: Sequence[Pieces]) -> int:
    """Predicted tokens of some documents."""
    return sum(piece.predicted_tokens for pieces in documents for piece in pieces)


def shuffled_parts(documents: Sequence[Pieces], parts: int) -> list[list[Pieces]]:
    """Deal the documents into parts whose sizes differ by at most one, the same way each time."""
    # shuffled, because neighbours in a file are often of one source; seed 0, because the halves belong to the target
    order = generator(0, "target halves").permutation(len(documents))
    # sorted: within a part the order of the file
    return [[documents[i] for i in sorted(order[part::parts])] for part in range(parts)]


def weighted(documents: Sequence[Pieces]) -> Batch:
    """The loss of some documents, a mean over documents of each document's token mean, as one weighted batch.

    Returns:
        Their pieces; `c_p` = the piece's share of its document's tokens / number of documents. The weights sum to 1.
    """
    weights = []
    # the loss of a piece is a mean over its tokens, so its share of tokens restores the mean over the document
    for pieces in documents:
        total = sum(piece.predicted_tokens for piece in pieces)
        weights += [piece.predicted_tokens / total / len(documents) for piece in pieces]
    return collate([piece for pieces in documents for piece in pieces], np.asarray(weights, np.float32))


def check_vocabulary(target: Target, task: Task) -> None:
    """Refuse a target whose token ids the model does not have.

    Raises:
        UserError: names the largest id and the vocabulary.
    """
    vocabulary = task.vocabulary
    largest = max(int(half.tokens.max()) for half in target.halves)
    if largest >= vocabulary:
        raise UserError(
            f"target {target.name} has token id {largest}, the model's vocabulary is {vocabulary}: its tokens are of "
            "another tokenizer than the model's"
        )


def target_loss(task: Task, target: Target, batch_size: int) -> float:
    """`l_q` of the task's model, nats per token."""
    import torch

    with torch.no_grad():
        losses = [
            sum(
                float((task.sample_losses(batch) * batch.weights).sum())
                for batch in _batches(half, batch_size, task.device)
            )
            for half in target.halves
        ]
    return sum(weight * loss for weight, loss in zip(target.half_weights, losses, strict=True))


def loss_gradients(task: Task, layout: FlatLayout, batches: Sequence[Batch], batch_size: int) -> Tensor:
    """Gradients of some weighted losses `sum_p c_p l_p` at the task's parameters.

    Args:
        task: model and loss.
        layout: of the gradients.
        batches: R losses.
        batch_size: samples per pass; changes nothing but memory.

    Returns:
        (R, P), type and device of the parameters; 0 where a loss does not depend on a parameter.
    """
    import torch

    named = all_parameters(task.model)
    parameters = [named[name] for name in layout.names]
    gradients = parameters[0].new_zeros(len(batches), layout.size)
    for batch, gradient in zip(batches, gradients, strict=True):
        for small_batch in _batches(batch, batch_size, task.device):
            loss = (task.sample_losses(small_batch) * small_batch.weights).sum()
            # autograd.grad leaves `.grad` alone: a replay may hold a step's gradient there
            terms = torch.autograd.grad(loss, parameters, allow_unused=True)
            # the views write into the row of `gradients`
            for total, term in zip(layout.views(gradient).values(), terms, strict=True):
                if term is not None:
                    total += term
    return gradients


def _batches(batch: Batch, batch_size: int, device: torch.device) -> list[Batch]:
    """Split a batch into batches of at most `batch_size` samples, on the device."""
    return [small_batch.to(device) for small_batch in batch.split(batch_size)]


def split_document(
    tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.bool_], seq_len: int, start: int | None
) -> list[Sample]:
    """Split a document into sequences of at most `seq_len` tokens that predict each token once.

    The first token is predicted from end-of-text where the tokenizer has one, else it is context only.
    """
    if start is not None:
        tokens, mask = np.append(np.int32(start), tokens), np.append(False, mask)
    pieces = []
    # by seq_len - 1: a piece begins with the last token of the one before, as context only
    for begin in range(0, max(len(tokens) - 1, 0), seq_len - 1):
        piece = slice(begin, begin + seq_len)
        pieces.append(Sample(tokens=tokens[piece], loss_mask=mask[piece], documents=[]))
    return [piece for piece in pieces if piece.predicted_tokens]
