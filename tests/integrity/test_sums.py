"""Lists of hashes, and files that carry their own."""

import os
import re

import pytest

from curate.core.artifacts import (
    SUMS,
    check_contents,
    check_sizes,
    checked,
    finalize,
    is_complete,
    list_files,
    read_hashed,
    write_hashed,
    write_json,
)
from curate.core.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """A sealed artifact with a file of its own and one in a sub-folder."""
    place = tmp_path / "artifact"
    (place / "inner").mkdir(parents=True)
    (place / "table").write_bytes(b"0123456789")
    (place / "inner" / "array").write_bytes(b"abc")
    finalize(place, "test", {"a": 1})
    return place


def test_what_is_as_it_was_written_is_read(folder):
    assert is_complete(folder, {"a": 1})
    check_contents(folder)
    for path in (folder / "table", folder / "inner" / "array", folder / "manifest.json"):
        assert checked(path, by=folder) == checked(path) == path


def test_the_same_size_is_not_enough(folder):
    path = folder / "inner" / "array"
    path.write_bytes(b"abd")
    check_sizes(folder)
    assert is_complete(folder, {"a": 1})
    for check in (lambda: checked(path), lambda: check_contents(folder)):
        with pytest.raises(UserError, match=f"{re.escape(str(path))} is corrupted.*delete {re.escape(str(folder))} "):
            check()


@pytest.mark.parametrize("content", [b"012345678", b"", None])
def test_a_file_of_another_size_or_none_makes_no_complete_artifact(folder, content):
    path = folder / "table"
    path.write_bytes(content) if content is not None else path.unlink()
    with pytest.raises(UserError, match=re.escape(str(path))):
        is_complete(folder, {"a": 1})


def test_a_file_is_hashed_again_when_it_was_replaced(folder):
    path = folder / "table"
    checked(path)
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    (folder / "other").write_bytes(b"012345678x")
    (folder / "other").rename(path)
    os.utime(path, ns=times)  # size and time are the same
    with pytest.raises(UserError, match="table is corrupted"):
        checked(path)
    list_files(folder, [path])
    assert checked(path) == path


def test_what_no_list_names_is_read_as_it_is_but_where_it_has_to_be_listed(folder):
    (folder / "notes").write_bytes(b"mine")
    assert checked(folder / "notes") == folder / "notes"
    assert checked(folder.parent / "nowhere") == folder.parent / "nowhere"
    with pytest.raises(UserError, match="notes is not in"):
        checked(folder / "notes", by=folder)
    (folder / SUMS).unlink()
    with pytest.raises(UserError, match=re.escape(str(folder / SUMS))):
        is_complete(folder, {"a": 1})


def test_every_bit_of_a_list_counts(folder):
    path, content = folder / SUMS, (folder / SUMS).read_bytes()
    for at in range(0, len(content), 7):
        (folder / "other").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
        (folder / "other").rename(path)
        with pytest.raises(UserError, match=re.escape(str(path))):
            check_sizes(folder)


def test_only_what_belongs_to_an_artifact_is_listed(tmp_path):
    for name in ("own", "mine", "b.part", ".lock", "c.lock"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "progress").write_bytes(b"x")
    finalize(tmp_path, "test", {}, parts=["own"])
    (tmp_path / "mine").write_bytes(b"changed")
    assert is_complete(tmp_path, {})
    (tmp_path / "manifest.json").unlink()
    finalize(tmp_path, "test", {})
    for name in ("b.part", ".lock", "c.lock", "scratch/progress"):
        (tmp_path / name).unlink()
    assert is_complete(tmp_path, {})


def test_a_log_of_a_tracker_may_grow_afterwards(tmp_path):
    log = tmp_path / "wandb" / "offline-run" / "debug.log"
    log.parent.mkdir(parents=True)
    log.write_bytes(b"a line\n")
    (tmp_path / "table").write_bytes(b"0123456789")
    finalize(tmp_path, "test", {})
    log.write_bytes(b"a line\nanother\n")
    assert is_complete(tmp_path, {})
    check_contents(tmp_path)


def test_a_file_that_carries_its_hash(tmp_path):
    path, value = tmp_path / "a.json", {"step": 3, "data": {"at": [1, 2.5]}}
    write_hashed(path, value)
    assert read_hashed(path) == value
    path.write_text(path.read_text().replace("3", "4", 1))
    with pytest.raises(UserError, match=r"a.json is corrupted"):
        read_hashed(path)


def test_what_could_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(UserError, match="is not UTF-8"):
        write_json(tmp_path / "run.json", {"streams": {"web": os.fsdecode(b"data/w\xffb")}})
    assert not list(tmp_path.iterdir())
