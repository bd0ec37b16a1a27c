"""The order in which StreamingDataset and its loaders hand out samples, without training.

The installed streaming's own code makes each epoch's partition; this module repeats what a `DataLoader` does with it.

An order follows from the streams, their sizes, shuffle settings, seed, batch size, world size, workers per rank and
epoch. It does not depend on predownload, cache limits or download settings.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from unittest.mock import patch

import numpy as np
from pydantic import Field

from curate.core.config import Config
from curate.core.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    Ids = npt.NDArray[np.int64]

PLACE = ("local", "split", "proportion", "repeat", "choose")
"""Arguments of a `Stream` that say where it lies and how much of it is taken; the others concern downloads."""
_REFUSALS = (TypeError, ValueError, RuntimeError, KeyError, ZeroDivisionError)  # what streaming raises
# Of names in shared memory; streaming counts its prefixes up from 0, so none is that large.
_NO_PREFIX = 10**9
# Arguments of a dataset that do not change the order; set here, or left out so that nothing is downloaded.
_NOT_OF_THE_ORDER = (
    "predownload",
    "cache_limit",
    "remote",
    "download_retry",
    "download_timeout",
    "validate_hash",
    "keep_zip",
)


class Resumed(Config):
    """Where a new process continued the training."""

    step: int = Field(ge=0)
    """Its first optimizer step."""
    epoch: int | None = Field(default=None, ge=0)
    """Epoch that it was given (`StreamingDataLoader.state_dict`); null: the epoch of the process before it."""
    sample_in_epoch: int | None = Field(default=None, ge=0)
    """Samples of that epoch that it skipped, over all ranks; null: as many as were trained on."""


class LoaderConfig(Config):
    """Processes and loaders of the training."""

    batch_size: int = Field(ge=1)
    """Samples of one batch of a rank's DataLoader."""
    world_size: int = Field(default=1, ge=1)
    """Ranks, over all nodes."""
    nodes: int = Field(default=1, ge=1)
    """Physical nodes."""
    workers: int = Field(default=0, ge=0)
    """`num_workers` of each rank's DataLoader."""
    drop_last: bool = True
    """Whether the DataLoader drops a short batch at the end of an epoch."""
    accumulation: int = Field(default=1, ge=1)
    """DataLoader batches of a rank per optimizer step."""
    epoch_end: Literal["continue", "step", "drop"] = "continue"
    """What happens to fewer batches than `accumulation` at the end of an epoch: the step continues with the next epoch,
    is made of them alone, or they are left out."""
    first_epoch: int = Field(default=0, ge=0)
    """Epoch that the stage began in."""
    first_sample: int = Field(default=0, ge=0)
    """Samples of that epoch that were used before the stage began, over all ranks."""
    resumed: tuple[Resumed, ...] = ()
    """Every point where training continued in a new process; empty: it ran in one."""


def streaming_version() -> str:
    """Version of the installed mosaicml-streaming."""
    return version("mosaicml-streaming")


class SampleOrder:
    """Partitions of epochs into batches of ranks.

    Args:
        streams: arguments of each `Stream`, in the order of the training.
        dataset: other arguments of `StreamingDataset`.
        loader: processes and loaders.

    Raises:
        UserError: streaming refuses the arguments.
    """

    def __init__(self, streams: Sequence[Mapping[str, Any]], dataset: Mapping[str, Any], loader: LoaderConfig) -> None:
        from streaming.base.world import World

        from curate.data.dataset import LocalStream

        # StreamingDataset reads it, and would wait for the other ranks.
        if int(os.environ.get("WORLD_SIZE", "1")) != 1:
            raise UserError("the order of all ranks is rebuilt in one process; unset WORLD_SIZE")
        if loader.world_size % loader.nodes:
            raise UserError(f"loader.world_size {loader.world_size} is not a multiple of loader.nodes {loader.nodes}")
        self._loader = loader
        others = {key: value for key, value in dataset.items() if key not in _NOT_OF_THE_ORDER}
        options = {"batch_size": loader.batch_size, **others}
        try:
            local_streams = [LocalStream(**{key: stream[key] for key in PLACE if key in stream}) for stream in streams]
            # Streaming warns where `predownload` is less than a batch; the value is its own default.
            self._dataset = _dataset(streams=local_streams, predownload=8 * loader.batch_size, **options)
            # A loader without workers reads in its own process, which streaming counts as one worker.
            world = World(loader.nodes, loader.world_size // loader.nodes, max(loader.workers, 1), 0)
            self._world = world.replicate(self._dataset.replication) if self._dataset.replication else world
            self._dataset._resume(self._world, 0)  # noqa: SLF001 (fills in the defaults that depend on the world)
        except _REFUSALS as error:
            raise _refused(error) from None

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments that the order was made with, defaults filled in."""
        names = (
            "num_canonical_nodes",
            "batch_size",
            "shuffle",
            "shuffle_algo",
            "shuffle_seed",
            "shuffle_block_size",
            "sampling_method",
            "sampling_granularity",
            "partition_algo",
            "batching_method",
            "epoch_size",
        )
        return {name: getattr(self._dataset, name) for name in names}

    @property
    def ranks(self) -> int:
        """Data-parallel ranks: all, divided by the replication."""
        return int(self._world.num_ranks)

    def batches(self, epoch: int, sample_in_epoch: int = 0) -> list[list[Ids]]:
        """Compute the batches of each rank's loader in one epoch.

        Args:
            epoch: its number.
            sample_in_epoch: samples of it that are skipped, over all ranks.

        Returns:
            Per rank, its batches of dataset-wide sample indexes (streams one after the other).

        Raises:
            UserError: streaming refuses, or ranks would get different numbers of batches.
        """
        from streaming.base.batching import generate_work

        world = self._world
        # As a resumed dataset has it from its checkpoint; without it the rest of the epoch is dealt out otherwise.
        if sample_in_epoch:
            self._dataset.initial_physical_nodes = world.num_nodes
        try:
            work = generate_work(self._dataset.batching_method, self._dataset, world, epoch, sample_in_epoch)
        except _REFUSALS as error:
            raise _refused(error) from None
        # Streaming's axes are (nodes, ranks of a node, workers, batches, samples).
        by_rank = work.reshape(world.num_ranks, world.workers_per_rank, -1)
        ranks = [_loader_batches(workers, self._loader) for workers in by_rank]
        if len({len(batches) for batches in ranks}) > 1:
            raise UserError(
                f"ranks would have {sorted({len(batches) for batches in ranks})} batches in epoch {epoch}, so training "
                "would have waited forever: check loader.batch_size and dataset.batching_method"
            )
        return ranks

    def steps(self, steps: int) -> Iterator[list[list[Ids]]]:
        """Yield per step, per rank, the batches of its loader.

        Args:
            steps: optimizer steps of the stage.

        Raises:
            UserError: an epoch has no batch, or a resumed process is given a place that is not in its epoch.
        """
        starts = {resumed.step: resumed for resumed in self._loader.resumed}
        reader = _Reader(self, self._loader)
        for step in range(steps):
            if step in starts:
                reader.seek(starts[step].epoch, starts[step].sample_in_epoch)
            yield [list(batches) for batches in zip(*reader.take(), strict=True)]


def _refused(error: Exception) -> UserError:
    if isinstance(error, UserError):
        return error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return UserError(f"StreamingDataset {streaming_version()} refuses the description ({reason}); correct `dataset`")


class _Private:
    """Replaces a value that a dataset shares with other processes: here there are none."""

    def __init__(self, *arguments: Any) -> None:
        self.value: Any = None
        self.lock = None

    def get(self) -> Any:
        """Return the value."""
        return self.value

    def set(self, value: Any) -> None:
        """Set the value."""
        self.value = value


def _dataset(**arguments: Any) -> Any:
    """Make a `StreamingDataset` that is never iterated, and so needs no shared memory.

    A real one takes file descriptors, and a name that trainings on the same machine have to avoid.
    """
    from streaming import StreamingDataset
    from streaming.base import dataset as module

    private: dict[str, Any] = {
        "get_shm_prefix": lambda *_: (_NO_PREFIX, None),
        "SharedBarrier": _Private,
        "SharedScalar": _Private,
        "SharedArray": lambda size, dtype, _: np.zeros(size, dtype),
    }
    with patch.multiple(module, **private):
        return StreamingDataset(**arguments)


class _Reader:
    """Walks through the epochs as a training loop does."""

    def __init__(self, order: SampleOrder, loader: LoaderConfig) -> None:
        self._order, self._loader = order, loader
        self._epoch, self._used = loader.first_epoch, loader.first_sample  # samples of the epoch, over all ranks
        self.seek(None, None)

    def seek(self, epoch: int | None, sample_in_epoch: int | None) -> None:
        """Continue at a sample of an epoch; None: where the reader is."""
        self._epoch = self._epoch if epoch is None else epoch
        self._used = self._used if sample_in_epoch is None else sample_in_epoch
        ranks = self._order.batches(self._epoch, self._used)
        self._batches = iter(list(zip(*ranks, strict=True)))
        self._left = min(map(len, ranks))

    def take(self) -> list[tuple[Ids, ...]]:
        """Take the batches of one step, each of them per rank."""
        taken: list[tuple[Ids, ...]] = []
        while len(taken) < self._loader.accumulation:
            batch = next(self._batches, None)
            if batch is not None:
                taken.append(batch)
                self._used += sum(map(len, batch))
                continue
            if taken and self._loader.epoch_end == "step":
                break
            if self._loader.epoch_end == "drop":
                taken = []
            # With "continue" a step takes its first batches from this epoch and the rest from the next.
            self._next_epoch()
        return taken

    def _next_epoch(self) -> None:
        self.seek(self._epoch + 1, 0)
        # Without this an epoch of too few batches would be followed by the next one, without end.
        needed = self._loader.accumulation if self._loader.epoch_end == "drop" else 1
        if self._left < needed:
            raise UserError(
                f"epoch {self._epoch} of the description has {self._left} batches of {self._loader.batch_size} samples "
                f"for each of {self._order.ranks} ranks, a step needs {needed}; check loader and streams"
            )


def _loader_batches(workers: Ids, loader: LoaderConfig) -> list[Ids]:
    """Make the batches of a DataLoader from its workers' samples (W, N): one of each worker in turn.

    A sample of -1 is streaming's padding and left out.
    """
    queues = []
    for samples in workers:
        kept = samples[samples != -1]
        batches = [kept[at : at + loader.batch_size] for at in range(0, len(kept), loader.batch_size)]
        queues.append([batch for batch in batches if len(batch) == loader.batch_size or not loader.drop_last])
    longest = max(map(len, queues))
    # A worker that has no batch left is passed over, as torch does.
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def stream_folder(stream: Mapping[str, Any]) -> Path:
    """Return the folder of a stream's shards.

    Raises:
        UserError: it has no local folder.
    """
    if not stream.get("local"):
        raise UserError(f"a stream of the description has no `local` folder (it has {sorted(stream)}); sync it first")
    return Path(stream["local"]) / (stream.get("split") or "")
