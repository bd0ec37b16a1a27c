"""Targets for a verification without target files: samples of the run's own streams, untrained while they last."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from curate.core.artifacts import fingerprint
from curate.embeddings.anchors import GENERAL, draw_samples
from curate.training.samples import SampleReader
from curate.training.target import Target, weighted

if TYPE_CHECKING:
    from curate.training.run import Run

_SEQUENCES = 32  # of each target


def heldout_targets(run: Run) -> list[Target]:
    """One target per domain, and `general` with other sequences, as many of each domain.

    Raises:
        UserError: a domain has too few samples.
    """
    shared = 2 * -(-_SEQUENCES // (2 * len(run.streams)))  # even, so that each domain is in both halves as often
    reader, targets, mixed = SampleReader(run.source), [], []
    for domain in sorted(run.streams):
        ids = draw_samples(run, domain, _SEQUENCES, shared, "verification targets")
        targets.append(_target(domain, ids[:_SEQUENCES], reader))
        mixed += ids[_SEQUENCES:]
    return [*targets, _target(GENERAL, mixed, reader)]


def _target(name: str, ids: Sequence[int], reader: SampleReader) -> Target:
    """Every sequence counts as one document; every second one belongs to the second half."""
    samples = reader.samples(ids)
    return Target(
        name=name,
        fingerprint=fingerprint([name, list(ids)]),
        documents=len(samples),
        tokens=sum(sample.predicted_tokens for sample in samples),
        halves=(weighted([[sample] for sample in samples[::2]]), weighted([[sample] for sample in samples[1::2]])),
        half_weights=(0.5, 0.5),
    )
