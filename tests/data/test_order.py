"""The rebuilt order is what a real StreamingDataLoader hands out, epoch after epoch, also after a restart."""

import itertools
import random

import pytest

from curate.core.errors import UserError
from curate.data.mds import MdsStream
from curate.data.memory import construct
from curate.data.order import LoaderConfig, Resumed, SampleOrder
from tests.tiny import write_tiny_streams


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_tiny_streams(tmp_path_factory.mktemp("data"), samples=23)


def loaded(streams, dataset, batch_size, drop_last, state=None):
    """Sample ids of batches as a training gets them, for ever, and a way to ask for the loader's state."""
    from streaming import Stream, StreamingDataLoader, StreamingDataset

    def make():
        return StreamingDataset(
            streams=[Stream(**s) for s in streams], batch_size=batch_size, predownload=64, **dataset
        )

    made = construct(make)
    loader = StreamingDataLoader(
        made,
        batch_size=batch_size,
        drop_last=drop_last,
        collate_fn=lambda rows: {"ids": [r["sample_id"] for r in rows]},
    )
    if state is not None:
        loader.load_state_dict(state)
    return (batch["ids"] for _ in itertools.count() for batch in loader), loader


@pytest.mark.filterwarnings("ignore:Trying to partition:UserWarning")
@pytest.mark.parametrize("seed", range(10))
def test_the_order_is_that_of_a_real_loader(folders, seed):
    draw = random.Random(seed)
    dataset = {
        "shuffle": draw.random() < 0.7,
        "shuffle_seed": draw.randint(0, 50),
        "shuffle_algo": draw.choice(["py1e", "py1s", "py2s", "py1br", "naive"]),
        "num_canonical_nodes": draw.choice([None, 1, 2, 3]),
        "shuffle_block_size": draw.choice([None, 10, 1 << 18]),
        "sampling_method": draw.choice(["balanced", "fixed"]),
        "batching_method": draw.choice(["random", "stratified"]),
    }
    parts = [draw.choice([{}, {"repeat": 0.4}, {"repeat": 2.3}, {"choose": 31}]) for _ in folders]
    streams = [{"local": str(folder), **part} for folder, part in zip(folders.values(), parts, strict=True)]
    ids = [MdsStream(folder)[index].sample_id for folder in folders.values() for index in range(23)]
    steps, batch_size, drop_last = 24, draw.randint(6, 9), draw.random() < 0.5
    killed = draw.choice([None, 3, 7, 12])
    batches, loader = loaded(streams, dataset, batch_size, drop_last)
    wanted = list(itertools.islice(batches, killed or steps))
    if killed:
        state = loader.state_dict()
        batches, _ = loaded(streams, dataset, batch_size, drop_last, state)
        wanted += itertools.islice(batches, steps - killed)
    resumed = (Resumed(step=killed),) if killed else ()
    config = LoaderConfig(batch_size=batch_size, drop_last=drop_last, resumed=resumed)
    found = [[ids[i] for i in ranks[0][0]] for ranks in SampleOrder(streams, dataset, config).steps(steps)]
    assert found == wanted


def test_what_streaming_refuses_is_bad_input(folders):
    streams = [{"local": str(folder)} for folder in folders.values()]
    with pytest.raises(UserError, match="shuffle_seed"):
        SampleOrder(streams, {"shuffle_seed": -1}, LoaderConfig(batch_size=2))
    with pytest.raises(UserError, match="refuses the description"):
        list(SampleOrder(streams, {"shuffle": True, "shuffle_algo": "fisher"}, LoaderConfig(batch_size=2)).steps(1))
    with pytest.raises(UserError, match="0 batches of 100 samples"):
        list(SampleOrder(streams, {}, LoaderConfig(batch_size=100)).steps(1))
    with pytest.raises(UserError, match=r"not a multiple of loader\.nodes"):
        SampleOrder(streams, {}, LoaderConfig(batch_size=2, world_size=3, nodes=2))
