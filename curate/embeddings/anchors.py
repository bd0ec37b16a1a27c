"""Anchors: small document sets whose gradients at the evaluation checkpoint `adjoint` pushes back through training.

`E[z]` holds the exact value of z for each anchor. So a target that is an anchor, or a mean of anchors, is valued
exactly, and any other target as far as its gradient is a combination of theirs (`curate.embeddings.basis`). An anchor
is made of documents of a file (the target's own parts), of samples of one domain that the run did not train on, or of
such samples of all domains together.

R anchors, P parameters.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from curate.core.artifacts import fingerprint
from curate.core.errors import UserError
from curate.core.escape import name_of
from curate.core.rng import generator
from curate.training.samples import SampleReader
from curate.training.target import loss_gradients, predicted_tokens, read_pieces, shuffled_parts, weighted

if TYPE_CHECKING:
    from torch import Tensor

    from curate.training.layout import FlatLayout
    from curate.training.run import Run, RunSpec
    from curate.training.target import Pieces
    from curate.training.task import Batch, Task

_log = logging.getLogger(__name__)
GENERAL = "general"


@dataclass(frozen=True, kw_only=True)
class AnchorSet:
    """R anchors in a fixed order.

    Attributes:
        names: unique.
        batches: the loss of each, a mean over documents of their token means; the weights of a batch sum to 1.

    Raises:
        UserError: two anchors have the same name.
    """

    names: list[str]
    batches: list[Batch]

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.batches)
        for name in self.names:
            if self.names.count(name) > 1:
                raise UserError(f"two anchors are called {name!r}; give the files of targets different names")

    def __len__(self) -> int:
        """R."""
        return len(self.names)

    def __add__(self, other: AnchorSet) -> AnchorSet:
        """These anchors, then the other ones."""
        return AnchorSet(names=self.names + other.names, batches=self.batches + other.batches)

    def find(self, batch: Batch) -> int | None:
        """Position of the anchor with exactly this loss, or None."""
        # By content, not by name: a target file under another name is still the same anchor.
        digest = _digest(batch)
        return next((position for position, anchor in enumerate(self.batches) if _digest(anchor) == digest), None)

    @cached_property
    def fingerprint(self) -> str:
        """Of names, tokens, masks and weights: whatever the anchors' losses depend on beside the model."""
        return fingerprint([[name, _digest(batch)] for name, batch in zip(self.names, self.batches, strict=True)])


def _digest(batch: Batch) -> str:
    # The shape too: the same bytes as 2 x 8 and 4 x 4 are different sequences.
    digest = hashlib.blake2b(repr(tuple(batch.tokens.shape)).encode(), digest_size=8)
    for tensor in (batch.tokens, batch.loss_mask, batch.weights):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def document_anchors(path: Path, spec: RunSpec, parts: int, min_tokens: int = 1000) -> AnchorSet:
    """Split the documents of a file into anchors; two parts are the halves of `load_target`.

    Args:
        path: document JSONL (`curate.data.documents`).
        spec: the run; supplies tokenizer and sequence length.
        parts: number of anchors.
        min_tokens: predicted tokens that every part must have: the gradient of fewer would be noise.

    Returns:
        Anchors `<stem>_0`, `<stem>_1`, ...

    Raises:
        UserError: the file is unreadable, there is no tokenizer for text, or a part has too few tokens.
    """
    assert parts > 0
    documents = read_pieces(path, spec)
    document_sets = shuffled_parts(documents, parts)
    smallest = min(predicted_tokens(document_set) for document_set in document_sets)
    if smallest < max(min_tokens, 1):
        fitting = _fitting_parts(documents, parts, min_tokens)
        raise UserError(
            f"{path} has {predicted_tokens(documents)} predicted tokens in {len(documents)} documents: the smallest of "
            f"{parts} anchors would have {smallest}, at least {min_tokens} are needed for a gradient that is more than "
            f"noise; {f'{fitting} anchors fit' if fitting else 'not even one fits'}, or add documents"
        )
    names = [f"{name_of(path)}_{number}" for number in range(parts)]
    return AnchorSet(names=names, batches=[weighted(document_set) for document_set in document_sets])


def _fitting_parts(documents: Sequence[Pieces], parts: int, min_tokens: int) -> int:
    """The largest number of parts below `parts` that all have enough tokens; 0 if there is none."""
    # Downward one by one, not by bisection: each number deals the documents anew, so fitting is not monotonic.
    limit = min(parts - 1, len(documents))
    fits = (
        number
        for number in range(limit, 0, -1)
        if all(predicted_tokens(part) >= min_tokens for part in shuffled_parts(documents, number))
    )
    return next(fits, 0)


def stream_anchors(run: Run, per_domain: int, samples_per_anchor: int, *, general: bool = True) -> AnchorSet:
    """Anchors of samples that the run could have trained on but did not.

    Every sample counts the same, whatever its length, as a document of its own; no sample is in two anchors. Exact
    copies of trained samples count as trained. Where a domain has too few unseen samples, its last anchors use samples
    that were trained on, with a warning: the value of such a sample for its own anchor includes memorisation.

    Args:
        run: the run.
        per_domain: anchors of each domain.
        samples_per_anchor: sequences of each anchor.
        general: add one anchor of at least `samples_per_anchor` sequences, as many from every domain.

    Returns:
        Anchors `<domain>/0`, `<domain>/1`, ..., domains in the order of their names, then `general`.

    Raises:
        UserError: a domain has too few samples even with the trained ones.
    """
    assert per_domain >= 0
    assert samples_per_anchor > 0
    reader = SampleReader(run.source)
    domains = sorted(run.streams)  # by name: the order of streams in a config must not change the anchors
    # Rounded up, so that every domain counts the same in the general anchor.
    shared = -(-samples_per_anchor // len(domains)) if general else 0
    names, groups, mixed = [], [], []
    for domain in domains:
        ids = draw_samples(run, domain, per_domain * samples_per_anchor, shared)
        for number in range(per_domain):
            names.append(f"{domain}/{number}")
            groups.append(ids[number * samples_per_anchor : (number + 1) * samples_per_anchor])
        mixed += ids[per_domain * samples_per_anchor :]
    if general:
        names.append(GENERAL)
        groups.append(mixed)
    # Each sample as a document of its own: `weighted` takes means of documents.
    batches = [weighted([[sample] for sample in reader.samples(group)]) for group in groups]
    return AnchorSet(names=names, batches=batches)


def draw_samples(run: Run, domain: str, domain_samples: int, shared: int, purpose: str = "anchors") -> list[int]:
    """Ids of samples of a domain in random order, those that the run did not train on first.

    The order depends on the contents of the samples, not on their positions in shards.

    Args:
        run: the run.
        domain: the domain.
        domain_samples: how many its own anchors need.
        shared: how many the general anchor needs of it.
        purpose: of the random generator; another one draws other samples.

    Raises:
        UserError: the domain has too few samples with predicted tokens.
    """
    trained = run.steps.select(sample_id="sample_ids").explode("sample_id").unique()
    of_domain = run.unique_samples.filter(domain=domain)
    # A sample without a predicted token has no loss, and so no gradient.
    usable = of_domain.filter(pl.col("predicted_tokens") > 0).select("sample_id")
    # Sorted by content id before the shuffle: the same samples in other shards are drawn alike.
    unseen, seen = (usable.join(trained, on="sample_id", how=how).sort("sample_id") for how in ("anti", "semi"))
    # A generator for each: how many were trained on must not change which unseen ones are drawn.
    unseen_ids, seen_ids = (
        generator(0, purpose, domain, stream).permutation(frame["sample_id"].to_numpy()).tolist()
        for stream, frame in (("fresh", unseen), ("trained", seen))
    )
    wanted, available = domain_samples + shared, len(unseen_ids) + len(seen_ids)
    if wanted > available:
        raise UserError(
            f"the anchors need {wanted} samples of domain {domain} ({domain_samples} for its own, {shared} for the "
            f"general one), it has {available} with predicted tokens; ask for fewer or smaller anchors"
        )
    if wanted > len(unseen_ids):
        _log.warning(
            "%d of the %d samples in the anchors of domain %s were trained on: only %d were not; the values of those "
            "samples for these anchors include memorisation",
            wanted - len(unseen_ids),
            wanted,
            domain,
            len(unseen_ids),
        )
    drawn: list[int] = (unseen_ids + seen_ids)[:wanted]
    return drawn


def anchor_gradients(task: Task, layout: FlatLayout, anchors: AnchorSet, batch_size: int) -> Tensor:
    """Gradients of the anchors' losses at the task's parameters, (R, P); see `training.target.loss_gradients`."""
    return loss_gradients(task, layout, anchors.batches, batch_size)
