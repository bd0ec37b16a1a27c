"""The cheap estimators that `adjoint` is held against: gradient dot products at checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from curate.embeddings.anchors import AnchorSet, anchor_gradients
from curate.embeddings.products import sample_gradients
from curate.trajectory.replay import records
from curate.trajectory.snapshots import named_parameters

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.trajectory.replay import Replay

    Floats = npt.NDArray[np.float64]

_TRACIN_EVERY = 10  # steps between checkpoints at which the targets' gradients are taken


def checkpoint_products(
    replay: Replay, anchors: AnchorSet, window: tuple[int, int], horizon: int
) -> tuple[Floats, Floats]:
    """`grad-dot` and `less` of every sample of a window: both with the model at the horizon.

    grad-dot: `<g_z, g_q>`. less: the cosine of g_q with Adam's update direction for z alone, from the moments at the
    horizon [LESS, arXiv 2402.04333, section 3]; both gradients unprojected.

    Returns:
        (N, R) each.
    """
    import torch

    optimizers = replay.horizon_optimizers(horizon)
    layout, task = replay.layout, replay.task
    targets = anchor_gradients(task, layout, anchors, 48)
    theta = layout.flatten(named_parameters(replay.model)).detach().clone()
    first, second, _ = replay.moments(optimizers)
    lengths = targets.norm(dim=1)
    dots, cosines = [], []
    for record in records(replay.run, *window):
        beta1, beta2, eps = record.groups[0].beta1, record.groups[0].beta2, record.groups[0].eps
        for batch in replay.batches(record):
            for _, gradients in sample_gradients(task, layout, batch, theta, layout.names):
                dots.append(gradients @ targets.T)
                moment = beta2 * second + (1 - beta2) * gradients**2
                update = (beta1 * first + (1 - beta1) * gradients) / (moment.sqrt() + eps)
                cosines.append((update @ targets.T) / update.norm(dim=1, keepdim=True) / lengths)
    return torch.cat(dots).double().numpy(), torch.cat(cosines).double().numpy()


def tracin(replay: Replay, anchors: AnchorSet, window: tuple[int, int]) -> Floats:
    """`lr_k clip_k c_z <g_z(theta_k), g_q>` [TracIn, arXiv 2002.08484], g_q at the last checkpoint; (N, R)."""
    import torch

    layout, task = replay.layout, replay.task
    rows, targets = [], None
    for replayed in replay.steps(*window):
        record = replayed.record
        if targets is None or (record.step - window[0]) % _TRACIN_EVERY == 0:
            targets = anchor_gradients(task, layout, anchors, 48)
        theta = layout.flatten(named_parameters(replay.model)).detach().clone()
        scale = record.groups[0].lr * record.clipped
        for batch in replayed.batches:
            for part, gradients in sample_gradients(task, layout, batch, theta, layout.names):
                rows.append(scale * part.weights[:, None] * (gradients @ targets.T))
    found: Floats = torch.cat(rows).double().numpy()
    return found
