"""When a description does not give the logged losses: is one setting wrong, and which?

Each setting that a user may have got wrong is changed alone. The loss of the first step after each checkpoint is then
compared with the log, with forward passes only. A setting that fits is proposed, never used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.errors import UserError
from curate.data.order import SampleOrder
from curate.reconstruct.check import Digits, batch_loss, telling
from curate.reconstruct.records import content, micro_batches, sample_weights
from curate.training.replay import StepRecord

if TYPE_CHECKING:
    import polars as pl

    from curate.reconstruct.description import ReconstructConfig
    from curate.training.replay import Replay

# Seeds that people choose, 17 of LLM Foundry's examples and 9176, streaming's default.
_SEEDS = (0, 1, 2, 17, 42, 123, 1234, 9176)
_ALGORITHMS = ("py1e", "py1s", "py1br", "py2s", "naive")
_NODES = (1, 2, 4, 8, 16, 32, 64, 128)
_MOST_CHECKPOINTS = 4  # some tell a chance agreement from a real one; each costs a forward pass for every variant


def variants(config: ReconstructConfig) -> Iterator[tuple[str, ReconstructConfig]]:
    """Descriptions that differ in one setting, with its name."""
    dataset, loader = config.dataset, config.loader
    seed = int(dataset.get("shuffle_seed", 9176))
    dataset_values: dict[str, tuple[Any, ...]] = {
        # Off by one first: trainers add an epoch or a rank to a seed.
        "shuffle": (not dataset.get("shuffle", False),),
        "shuffle_seed": tuple(dict.fromkeys((seed + 1, max(seed - 1, 0), *_SEEDS))),
        "shuffle_algo": _ALGORITHMS,
        "num_canonical_nodes": (None, *(nodes * loader.nodes for nodes in _NODES)),
        "shuffle_block_size": (None, 1 << 14, 1 << 16, 1 << 18, 1 << 20, 4_000_000),
        "sampling_method": ("balanced", "fixed"),
        "batching_method": ("random", "stratified", "per_stream", "device_per_stream"),
    }
    for name, values in dataset_values.items():
        for value in values:
            # A default that differs from every value: where a setting is left out, each value is a variant, None too.
            if value != dataset.get(name, "as by default"):
                yield f"dataset.{name} {value}", config.model_copy(update={"dataset": {**dataset, name: value}})
    loader_updates: list[tuple[str, dict[str, Any]]] = [("first_epoch", {"first_epoch": loader.first_epoch + 1})]
    loader_updates += [
        ("workers", {"workers": workers}) for workers in (0, 1, 2, 4, 8, 16) if workers != loader.workers
    ]
    loader_updates += [("drop_last", {"drop_last": not loader.drop_last}), ("resumed", {"resumed": ()})]
    for name, update in loader_updates:
        yield f"loader.{name} {update[name]}", config.model_copy(update={"loader": loader.model_copy(update=update)})
    for mean in ("token", "sample"):
        for over in ("step", "rank", "micro_batch"):
            loss = config.loss.model_copy(update={"mean": mean, "over": over})
            yield f"loss.mean {mean} and loss.over {over}", config.model_copy(update={"loss": loss})
    yield "the streams in reverse order", config.model_copy(update={"streams": dict(reversed(config.streams.items()))})


def diagnose(config: ReconstructConfig, replay: Replay, catalogue: pl.DataFrame, losses: dict[int, float]) -> list[str]:
    """Which single settings would give the logged losses.

    Args:
        config: the description that does not give them.
        replay: of the run that was built from it.
        catalogue: of its streams.
        losses: logged loss by step.

    Returns:
        The settings, as a user writes them.
    """
    steps = [step for step in replay.run.snapshots if step in losses][:_MOST_CHECKPOINTS]
    shifted = {
        f"log.first_step {config.log.first_step - by}": {step: losses.get(step - by) for step in steps}
        for by in (1, -1)
    }
    batches: dict[str, dict[int, StepRecord]] = {"as described": _batches(config, catalogue, steps)}
    for name, variant in variants(config):
        records = _batches(variant, catalogue, steps)
        if records:
            batches[name] = records
    replayed: dict[str, dict[int, float]] = {name: {} for name in batches}
    # Checkpoints outside, variants inside: each state is loaded once.
    for step in steps:
        replay.load(step)
        for name, records in batches.items():
            replayed[name][step] = batch_loss(replay, replay.batches(records[step]))
    logged: dict[int, float | None] = {step: losses[step] for step in steps}
    described = replayed.pop("as described")
    agreement = _Agreement(replay.tolerance, Digits.of(replay.run.steps["loss"]))
    hints = [name for name, variant_losses in replayed.items() if agreement.fits(variant_losses, logged, described)]
    # A log that is off by one: the described order, other steps' losses.
    return hints + [name for name, other in shifted.items() if agreement.fits(described, other, logged)]


@dataclass(frozen=True)
class _Agreement:
    """When a replayed loss is the logged one."""

    tolerance: float
    digits: Digits

    def fits(
        self, replayed: dict[int, float], logged: dict[int, float | None], before: Mapping[int, float | None]
    ) -> bool:
        """Whether all losses agree, and at least one of them clearly better than before (`before`: as described)."""
        compared = [(replayed[step], value, before[step]) for step, value in logged.items() if value is not None]
        agree = all(
            math.isclose(loss, value, rel_tol=self.tolerance) or abs(loss - value) <= self.digits.rounding(value)
            for loss, value, _ in compared
        )
        # A setting that changes no batch of these steps agrees as well as the description did: it explains nothing.
        return agree and any(other is not None and telling(other, loss, value) for loss, value, other in compared)


def _batches(config: ReconstructConfig, catalogue: pl.DataFrame, steps: list[int]) -> dict[int, StepRecord]:
    """What a description would train on at some steps; empty where streaming refuses it."""
    ids, tokens = content(catalogue, list(config.streams))
    step_records = {}
    try:
        order = SampleOrder(list(config.streams.values()), config.dataset, config.loader)
        # An order is followed from step 0 on: no further than the last step that is compared.
        for step, ranks in enumerate(micro_batches(config.model_copy(update={"steps": max(steps) + 1}), order)):
            if step in steps:
                counts = [[tokens[indexes] for indexes in rank] for rank in ranks]
                step_records[step] = _record(step, ids, ranks, sample_weights(counts, config.loss))
    # A variant that streaming refuses is not what the training used.
    except UserError:
        return {}
    return step_records


def _record(step: int, ids: np.ndarray[Any, Any], ranks: list[Any], weights: list[Any]) -> StepRecord:
    batches = [
        (ids[indexes].tolist(), batch_weights.tolist())
        for rank, rank_weights in zip(ranks, weights, strict=True)
        for indexes, batch_weights in zip(rank, rank_weights, strict=True)
    ]
    return StepRecord(step=step, micro_batches=batches, loss=None, grad_norm=None, clip_factor=None, groups=[])
