"""Schedules served by a real StreamingDataset: exact in every phase, resumed anywhere, refused where silent."""

import errno
from collections import Counter
from pathlib import Path
from tempfile import gettempdir

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from streaming import StreamingDataLoader
from streaming.base.partition import get_partitions

from curate.core.errors import UserError
from curate.data import memory
from curate.data.dataset import ScheduledDataset, open_dataset, phase_order, stream_order
from curate.data.mds import iterate
from curate.data.memory import construct, release
from curate.data.phases import load_schedule
from curate.data.streams import load_streams
from curate.mixture.record import Phase
from curate.output.write import write_schedule
from tests.output.conftest import SIZES, folders  # noqa: F401

PHASES = ({"a": 30, "b": 6, "c": 0}, {"a": 11, "b": 40, "c": 3}, {"a": 3, "b": 4, "c": 3})
TOTAL = 100


def write(path, folders, phases=PHASES, start=0):  # noqa: F811
    laid = []
    for domains in phases:
        samples = sum(domains.values())
        laid.append(Phase(start_sample=start, blend=0.0, samples=samples, domains=domains))
        start += samples
    write_schedule(path, {name: str(folder) for name, folder in folders.items()}, laid)
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory, folders):  # noqa: F811
    return write(tmp_path_factory.mktemp("schedule") / "schedule.yaml", folders)


def loader(path, batch_size=4, workers=0, seed=3):
    dataset = open_dataset(path, batch_size=batch_size, seed=seed, predownload=64)
    return StreamingDataLoader(
        dataset, batch_size=batch_size, num_workers=workers, collate_fn=lambda rows: {"rows": rows}
    )


def read(batches):
    return [(row["domain"], row["sample_id"]) for batch in batches for row in batch["rows"]]


@pytest.fixture(scope="module")
def whole(path):
    return read(loader(path))


def test_every_phase_has_its_samples_exactly(path, whole):
    assert len(whole) == TOTAL
    start = 0
    for domains in PHASES:
        stop = start + sum(domains.values())
        assert Counter(domain for domain, _ in whole[start:stop]) == Counter(domains)
        start = stop
    assert whole[:36] != sorted(whole[:36])
    assert read(loader(path)) == whole
    assert read(loader(path, seed=4)) != whole


def test_no_sample_comes_again_before_the_others_of_its_stream_came(whole):
    for domain, size in SIZES.items():
        mine = [sample for name, sample in whole if name == domain]
        for start in range(0, len(mine), size):
            part = mine[start : start + size]
            assert len(set(part)) == len(part)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 24), st.sampled_from([0, 2]))
def test_stopped_anywhere_it_goes_on_with_the_same_samples(path, whole, batches, workers):
    first = loader(path)
    head, at = [], iter(first)
    for _ in range(batches):
        head += read([next(at)])
    state = first.state_dict() if batches else first.dataset.state_dict(0, from_beginning=True)
    del first, at
    rest = loader(path, workers=workers)
    rest.load_state_dict(state)
    assert head + read(rest) == whole


def test_data_workers_and_batch_sizes_change_nothing(path, whole):
    assert read(loader(path, workers=2)) == whole
    assert read(loader(path, batch_size=7)) == whole


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 2), (2, 2), (1, 8)])
def test_steps_of_several_ranks_take_consecutive_samples(nodes, ranks):
    """Streaming's own partition of 100 samples in canonical order, as the schedule's dataset asks for it."""
    ids = get_partitions("relaxed", TOTAL, 1, nodes, ranks, 1, 2, 0, nodes).reshape(nodes * ranks, -1)
    for step in range(TOTAL // (2 * nodes * ranks)):
        taken = sorted(ids[:, 2 * step : 2 * step + 2].ravel())
        assert taken == list(range(step * 2 * nodes * ranks, (step + 1) * 2 * nodes * ranks))


@given(st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=1, max_size=5), st.integers(0, 9))
def test_order_of_any_counts(counts, seed):
    table = np.array(counts, np.int64)
    sizes = [np.array([4, 3]), np.array([9]), np.array([2, 2, 2])]
    passes = [
        stream_order(size, total, seed) + 100 * i
        for i, (size, total) in enumerate(zip(sizes, table.sum(0), strict=True))
    ]
    order, start = phase_order(passes, table, seed), 0
    for row in table:
        part = order[start : start + row.sum()]
        assert np.bincount(part // 100, minlength=3).tolist() == row.tolist()
        start += row.sum()
    for stream, size in enumerate(sizes):
        uses = np.bincount(order[order // 100 == stream] - 100 * stream, minlength=int(size.sum()))
        assert uses.max() - uses.min() <= 1


def test_a_stage_is_served_once(path):
    once = loader(path)
    read(once)
    with pytest.raises(UserError, match=r"\b100\b"):
        next(iter(once))


def test_a_place_in_another_schedule_is_refused(path, folders, tmp_path):  # noqa: F811
    state = loader(path).dataset.state_dict(8, from_beginning=True)
    other = write(tmp_path / "schedule.yaml", folders, ({"a": 30, "b": 6, "c": 0}, {"a": 12, "b": 39, "c": 3}))
    for dataset in (loader(other), loader(path, seed=4)):
        with pytest.raises(UserError, match="schedule"):
            dataset.load_state_dict(state)
    with pytest.raises(UserError, match="schedule"):
        loader(path).load_state_dict({"epoch": 0, "sample_in_epoch": 4, "num_canonical_nodes": 1, "shuffle_seed": 3})


def test_steps_outside_the_entries_are_refused(path, folders, tmp_path):  # noqa: F811
    late = write(tmp_path / "late.yaml", folders, start=500)
    schedule = load_schedule(late)
    for step, message in ((0, r"\b0\b.*start_sample 500"), (600, r"\b600\b")):
        with pytest.raises(UserError, match=message):
            schedule.at(step)
    assert schedule.at(535) is schedule.entries[0]
    assert schedule.at(536) is schedule.entries[1]
    with pytest.raises(UserError, match="start_sample 500"):
        ScheduledDataset(schedule, batch_size=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda entries: entries[1].update(start_sample=37),
            r"start_sample 0 .*\b36\b.*\b37\b",
        ),
        (lambda entries: entries[0]["streams"][0].update(choose=2.5), r"streams.0.choose"),
        (lambda entries: entries[0].pop("streams"), r"s.yaml .*streams"),
        (lambda entries: entries[0]["streams"][0].update(split="x"), None),
        (lambda entries: entries[0]["streams"][0].update(keep_zip=True), r"s.yaml.* 36"),
        (lambda entries: entries[0]["streams"][0].update(proportion=1), r"proportion.*choose"),
        (lambda entries: entries[0]["streams"][0].update(chose=3), r"streams.0.chose"),
    ],
)
def test_a_schedule_that_does_not_hold_together_is_refused(path, tmp_path, change, message):
    entries = yaml.safe_load(path.read_text())
    change(entries)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(entries))
    if message is None:
        assert len(load_streams(tmp_path / "s.yaml")) == 4  # a split is another stream
        return
    with pytest.raises(UserError, match=message):
        load_streams(tmp_path / "s.yaml")


def test_relative_folders_count_from_the_file(folders, tmp_path):  # noqa: F811
    (tmp_path / "a").symlink_to(folders["a"])
    laid = [Phase(start_sample=0, blend=1.0, samples=50, domains={"a": 50})]
    write_schedule(tmp_path / "schedule.yaml", {"a": "a"}, laid)
    assert load_streams(tmp_path / "schedule.yaml") == [{"local": str(tmp_path / "a"), "choose": 50}]
    assert len(read(loader(tmp_path / "schedule.yaml"))) == 50


def test_a_dataset_that_is_released_leaves_no_names_behind(path, folders):  # noqa: F811
    def named(prefix):
        return [found for folder in ("/dev/shm", gettempdir()) for found in Path(folder).glob(f"{prefix}*")]

    folder = Path(next(iter(folders.values())))
    rows = [row["sample_id"] for row in iterate(folder)]
    assert [row["sample_id"] for row in iterate(folder)] == rows
    dataset = open_dataset(path, batch_size=4, seed=0)
    taken = list(dataset)
    prefix = f"{dataset._shm_prefix_int:06}_"
    assert named(prefix)
    release(dataset)
    release(dataset)
    assert not named(prefix)
    again = open_dataset(path, batch_size=4, seed=0)
    assert [row["sample_id"] for row in again] == [row["sample_id"] for row in taken]
    release(again)


def test_two_that_start_together_do_not_take_one_name(path, folders, monkeypatch):  # noqa: F811
    """The other process takes the name between the look for a free one and its use."""
    from streaming.base.shared import prefix

    first = open_dataset(path, batch_size=4, seed=0)
    look, looked = prefix._check_and_find_retrying, []

    def late(*args, **options):
        looked.append(1)
        return first._shm_prefix_int if len(looked) <= len(prefix.SHM_TO_CLEAN) else look(*args, **options)

    monkeypatch.setattr(prefix, "_check_and_find_retrying", late)
    second = open_dataset(path, batch_size=4, seed=0)
    assert second._shm_prefix_int != first._shm_prefix_int
    assert [row["sample_id"] for row in second] == [row["sample_id"] for row in first]
    release(first)
    release(second)


@pytest.mark.parametrize(("ranks", "name"), [("2", "/000000_locals"), ("1", "data/index.json")])
def test_where_a_second_try_cannot_help_the_error_is_raised(monkeypatch, ranks, name):
    """Other ranks would meet at another barrier; other files do not go away."""
    monkeypatch.setenv("WORLD_SIZE", ranks)

    def taken():
        raise FileExistsError(errno.EEXIST, "File exists", name)

    with pytest.raises(FileExistsError):
        construct(taken)


def test_a_name_that_is_never_free_is_not_waited_for_without_end(monkeypatch):
    monkeypatch.setattr(memory, "_ATTEMPTS", 3)
    tried = []

    def taken():
        tried.append(1)
        raise FileExistsError(errno.EEXIST, "File exists", "/000000_locals")

    with pytest.raises(UserError, match="clean_stale_shared_memory"):
        construct(taken)
    assert len(tried) == 3
