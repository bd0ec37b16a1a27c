"""What a trainer reads: a `StreamingDataset` over a folder, a streams.yaml or a schedule.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from streaming import Stream, StreamingDataset
from streaming.base.shuffle import get_shuffle

from curate.core.artifacts import checked, fingerprint
from curate.core.errors import UserError
from curate.core.rng import derive_seed, generator
from curate.data.mds import check_inside, verify_shard
from curate.data.memory import construct
from curate.data.phases import load_schedule, stream_key
from curate.data.streams import load_streams

if TYPE_CHECKING:
    from streaming.base.world import World

    from curate.data.phases import Schedule

Ints = npt.NDArray[np.int64]
# Samples that are shuffled among each other within a stream.
_BLOCK = 1 << 18
# Key of a loader's state: fingerprint of the schedule that it is a position in.
_STATE = "schedule"


def open_dataset(data: Path, *, batch_size: int, seed: int, **options: Any) -> StreamingDataset:
    """Open the training data of a stage, shuffled.

    Args:
        data: folder of MDS folders, streams.yaml or schedule.yaml.
        batch_size: samples of a batch on each rank.
        seed: seed of the order.
        options: more arguments of `StreamingDataset`.

    Raises:
        UserError: there are no streams, the schedule does not hold together, or streaming refuses them.
    """
    schedule = load_schedule(data)
    streams = load_streams(data)
    # Streaming reads the indexes itself, so they are compared with their lists before.
    for stream in streams:
        checked(Path(stream["local"]) / (stream.get("split") or "") / "index.json")

    def make() -> StreamingDataset:
        if schedule is not None:
            return ScheduledDataset(schedule, batch_size=batch_size, seed=seed, **options)
        return CheckedDataset(
            streams=[LocalStream(**stream) for stream in streams],
            batch_size=batch_size,
            shuffle=True,
            shuffle_seed=seed,
            num_canonical_nodes=1,  # so the order does not depend on the number of machines
            shuffle_block_size=_BLOCK,
            **options,
        )

    try:
        return construct(make)
    except UserError:
        raise
    except (ValueError, RuntimeError, KeyError, ZeroDivisionError) as error:  # what streaming raises
        reason = " ".join(str(error).split())
        raise UserError(f"StreamingDataset refuses {data} ({reason}); correct it") from None


class LocalStream(Stream):  # type: ignore[misc]
    """A `Stream` that reads nothing outside its folder and deletes nothing that it cannot fetch again."""

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Any]:
        """Return the readers of its shards; called by StreamingDataset.

        Raises:
            UserError: the index names a file that does not lie in the folder.
        """
        folder = Path(self.local) / self.split
        readers: list[Any] = super().get_shards(world, allow_unsafe_types)
        check_inside(folder, readers)
        for reader in () if self.remote else readers:
            # Streaming deletes a shard whose compressed form is gone, to download both again
            if reader.compression and not any(
                (folder / info.basename).exists() for _, info in reader.file_pairs if info
            ):
                reader.compression, reader.file_pairs = None, [(raw, None) for raw, _ in reader.file_pairs]
        return readers


class CheckedDataset(StreamingDataset):  # type: ignore[misc]
    """A `StreamingDataset` that compares each shard with its index once in a process, before its samples are used.

    Streaming itself compares hashes only of what it downloads.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._verified: set[int] = set()

    def get_item(self, sample_id: int, retry: int = 7) -> Any:
        """Return a sample; called by StreamingDataset.

        Raises:
            UserError: its shard is damaged.
        """
        shard = int(self.spanner[sample_id][0])
        if shard not in self._verified:
            # Downloads or decompresses it, where that is needed.
            self.prepare_shard(shard)
            reader = self.shards[shard]
            verify_shard(Path(reader.dirname) / (reader.split or "") / reader.raw_data.basename, reader)
            self._verified.add(shard)
        return super().get_item(sample_id, retry)


class ScheduledDataset(CheckedDataset):
    """A `StreamingDataset` that serves the phases of a schedule in order, once.

    Everything but the order is StreamingDataset's own: download, cache, ranks, data workers, `StreamingDataLoader`,
    `state_dict` and `load_state_dict` in the middle of a phase. Steps of the training take consecutive samples of the
    schedule at any number of ranks and workers, so phases start exactly where they should; with several ranks the last
    step may repeat or pad a few samples. A phase continues in each stream where the phase before stopped: no sample is
    repeated before all others of its stream were used.

    Args:
        schedule: the phases.
        batch_size: samples of a batch on each rank.
        seed: seed of the order.
        options: more arguments of `StreamingDataset`, but for those that set the order.

    Raises:
        UserError: the schedule does not start at step 0, or two streams in it have the same folder.
    """

    def __init__(self, schedule: Schedule, *, batch_size: int, seed: int = 0, **options: Any) -> None:
        # Raises where the schedule does not start at 0.
        schedule.at(0)
        streams = schedule.totals()
        self._schedule, self._seed = schedule, seed
        super().__init__(
            streams=[LocalStream(**stream) for stream in streams],
            batch_size=batch_size,
            shuffle=False,  # `resample_streams` gives the order; streaming's own shuffle would mix the phases
            num_canonical_nodes=1,  # one canonical node, so consecutive samples make a global batch
            shuffle_block_size=_BLOCK,
            **options,
        )
        keys = [stream_key(stream) for stream in streams]
        self._counts = np.zeros((len(schedule.entries), len(keys)), np.int64)
        for row, entry in enumerate(schedule.entries):
            for stream in entry.streams:
                self._counts[row, keys.index(stream_key(stream.model_dump(exclude_unset=True)))] += stream.choose
        self._stamp = fingerprint([self._counts.tolist(), self.samples_per_stream.tolist(), seed])

    def resample_streams(self, epoch: int, stream_id: int | None = None) -> tuple[Ints, Ints]:
        """Return the sizes of the streams, and the schedule as sample ids in order; called by StreamingDataset.

        Raises:
            UserError: the schedule was served already.
        """
        if epoch:
            raise UserError(
                f"the schedule of {self._schedule.stop} samples was served once; it says nothing about what "
                "comes after: train as many steps as it has samples for, and open it anew instead of iterating twice"
            )
        # Orders are drawn over the whole stage, so that a phase can continue where the one before stopped.
        orders = [
            stream_order(self._shard_sizes(stream), total, derive_seed(self._seed, "stream", stream))
            for stream, total in enumerate(self._counts.sum(0).tolist())
        ]
        # Ids of a dataset count through all streams.
        ids = [order + start for order, start in zip(orders, self.sample_offset_per_stream, strict=True)]
        return self._counts.sum(0), phase_order(ids, self._counts, self._seed)

    def _shard_sizes(self, stream: int) -> Ints:
        begin = self.shard_offset_per_stream[stream]
        sizes: Ints = self.samples_per_shard[begin : begin + self.shards_per_stream[stream]].astype(np.int64)
        return sizes

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position in the schedule, with a fingerprint of the schedule."""
        return {**super().state_dict(num_samples, from_beginning), _STATE: self._stamp}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue at a position.

        Raises:
            UserError: it is one of another schedule, where continuing would repeat or leave out samples.
        """
        if obj.get(_STATE) != self._stamp:
            raise UserError(
                "the checkpoint's place in the data is not one in this schedule (other phases, streams or seed): going "
                "on would repeat or leave out samples; restore the schedule, or start the stage anew"
            )
        super().load_state_dict(obj)


def stream_order(shard_sizes: Ints, total: int, seed: int) -> Ints:
    """Order the samples of one stream: all of them in a random order, then all again in another.

    Args:
        shard_sizes: int64 [shards], samples of each; the order keeps to blocks of shards.
        total: samples that are used, with repeats.
        seed: seed of the order.

    Returns:
        int64 [total], indexes within the stream.
    """
    rounds = -(-total // int(shard_sizes.sum()))
    # py1e moves a sample at most a block away from its shard's place, so a trainer reads few shards at once.
    orders = [get_shuffle("py1e", shard_sizes, 1, seed % (1 << 31), epoch, _BLOCK) for epoch in range(rounds)]
    order: Ints = np.concatenate([np.zeros(0, np.int64), *orders])[:total].astype(np.int64)
    return order


def phase_order(passes: Sequence[Ints], counts: Ints, seed: int) -> Ints:
    """Mix streams phase by phase, each stream in its own order.

    Args:
        passes: ids of each stream in the order of their use, as many as its column of `counts` sums to.
        counts: int64 [phases, streams], samples.
        seed: seed of how streams alternate within a phase.

    Returns:
        int64 [counts.sum()], ids.
    """
    order = np.empty(int(counts.sum()), np.int64)
    used, start = np.zeros(counts.shape[1], np.int64), 0
    for phase, row in enumerate(counts):
        # Which stream each slot of the phase belongs to: exact counts, in a random order.
        owners = generator(seed, "phase", phase).permutation(np.repeat(np.arange(len(row)), row))
        slots = order[start : start + len(owners)]
        for stream, count in enumerate(row.tolist()):
            slots[owners == stream] = passes[stream][used[stream] : used[stream] + count]
        used += row
        start += len(owners)
    return order
