"""Ground truth: training run again without some samples [trajectory-specific leave-one-out, DVEmb, arXiv 2412.09538].

The same steps with `c_z = 0` for the removed samples and everything else unchanged: batch order, normalisation,
schedule, kernels. `value = l_q(theta_horizon without) - l_q(theta_horizon)`: positive = the samples helped.

Reruns branch off in memory, at the first step that differs, from a cursor that starts at the snapshot before it. So
does the run as it was that they are held against: other hardware than the training's shifts both sides alike. Cost: the
steps from there to the last horizon, plus the targets' losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from curate.core.rng import generator
from curate.training.replay import records
from curate.training.target import target_loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy.typing as npt
    from torch.optim import Optimizer

    from curate.evaluation.draw import Removal
    from curate.training.replay import Replay
    from curate.training.target import Target
    from curate.training.task import Batch

_CACHE_BYTES = 10**9  # of batches, which reruns from one snapshot read again and again


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Outcome of one rerun.

    Attributes:
        removal: what was removed.
        values: horizon step -> (Q,) value for each target, nats per token.
    """

    removal: Removal
    values: Mapping[int, npt.NDArray[np.float64]]


class Reruns:
    """Runs the training of a recorded run again.

    Args:
        replay: rebuilds states of the run.
        targets: Q targets whose losses are read.
        batch_size: sequences per pass over a target.
    """

    def __init__(self, replay: Replay, targets: Sequence[Target], batch_size: int) -> None:
        self._replay, self._targets, self._batch_size = replay, targets, batch_size
        self._records = {record.step: record for record in records(replay.run, 0, replay.run.spec.steps)}
        # 9 bytes a token: int64 ids and a mask
        size = max(record.size for record in self._records.values()) * replay.run.spec.seq_len * 9
        self._batches = lru_cache(maxsize=max(1, _CACHE_BYTES // size))(self._read)

    def run(self, removals: Sequence[Removal], horizons: Mapping[str, Sequence[int]]) -> Iterator[Truth]:
        """Run again without some samples.

        Args:
            removals: what to leave out, one rerun each.
            horizons: window -> steps whose state the targets are read at.

        Yields:
            One outcome per removal, in the order of their first steps.

        Raises:
            UserError: the run as it was does not repeat its recorded losses.
        """
        ordered = sorted(removals, key=lambda removal: removal.step)
        for at, group in groupby(ordered, key=lambda removal: self._replay.run.snapshot_before(removal.step)):
            same_snapshot = list(group)
            optimizers = self._replay.restore(at)
            wanted = {step for removal in same_snapshot for step in horizons[removal.window]}
            # the unchanged run, trained here too: what hardware or kernels shift, they shift on both sides
            base = self._continue(at, None, wanted, optimizers)
            for removal in same_snapshot:
                # the cursor moves on, unchanged, to the first step that differs; steps before it are trained once
                for step in range(at, removal.step):
                    self._step(step, self._batches(step), optimizers)
                at = removal.step
                losses = self._continue(at, removal, set(horizons[removal.window]), optimizers)
                yield Truth(removal=removal, values={step: without - base[step] for step, without in losses.items()})

    def _continue(
        self, start: int, removal: Removal | None, horizons: set[int], optimizers: Sequence[Optimizer]
    ) -> dict[int, npt.NDArray[np.float64]]:
        """Losses (Q,) at some steps of training from `start` on, as it was or changed; the state is put back."""
        saved = self._replay.checkpoint(optimizers)
        losses = {}
        for step in range(start, max(horizons)):
            batches = self._batches(step)
            if removal is None:
                # only here: changed training has other losses than were recorded
                self._step(step, batches, optimizers, check=True)
            else:
                self._step(step, _changed(batches, step, removal), optimizers)
            if step + 1 in horizons:
                losses[step + 1] = self._losses()
        self._replay.rewind(saved, optimizers)
        return losses

    def _step(
        self, step: int, batches: Sequence[Batch], optimizers: Sequence[Optimizer], *, check: bool = False
    ) -> None:
        loss, _ = self._replay.backward(batches, optimizers)
        if check:
            self._replay.check(self._records[step], loss)
        self._replay.update(self._records[step], optimizers)

    def _read(self, step: int) -> list[Batch]:
        return self._replay.batches(self._records[step])

    def _losses(self) -> npt.NDArray[np.float64]:
        return np.asarray([target_loss(self._replay.task, target, self._batch_size) for target in self._targets])


def _changed(batches: Sequence[Batch], step: int, removal: Removal) -> list[Batch]:
    """The micro-batches of one step as the rerun sees them."""
    dropped = {position for at, position in removal.samples if at == step}
    changed, first = [], 0
    for index, batch in enumerate(batches):
        weights = batch.weights.clone()
        for position in dropped:
            if first <= position < first + len(batch):
                weights[position - first] *= 1 - removal.part  # others keep theirs: no normalisation anew
        first += len(batch)
        batch = replace(batch, weights=weights)
        changed.append(batch if removal.order is None else _reordered(batch, removal.order, step, index))
    return changed


def _reordered(batch: Batch, seed: int, step: int, index: int) -> Batch:
    import torch

    order = torch.from_numpy(generator(seed, "fidelity order", step, index).permutation(len(batch)))
    order = order.to(batch.tokens.device)
    return replace(batch, tokens=batch.tokens[order], loss_mask=batch.loss_mask[order], weights=batch.weights[order])
