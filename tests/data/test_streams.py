"""A folder of streams is read whole or refused; its indexes name nothing outside; what domains may be called."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from streaming import MDSWriter
from streaming.base.compression import decompress

from curate.core.errors import UserError
from curate.data.dataset import open_dataset
from curate.data.mds import MdsStream, merge_indexes, write_stream
from curate.data.memory import release
from curate.data.order import LoaderConfig, SampleOrder
from curate.data.streams import RESERVED, check_domain, domain_folders, load_streams
from pipelines.catalogue import find_domains

TOKENS = {"tokens": "ndarray:int32"}


def rows(count=6):
    return [{"tokens": np.arange(index, index + 40, dtype=np.int32)} for index in range(count)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Two streams, and one of compressed shards."""
    base = tmp_path_factory.mktemp("written")
    for domain in ("a", "b"):
        write_stream(base / domain, TOKENS, rows(), shard_bytes=400)
    with MDSWriter(out=str(base / "zipped"), columns=TOKENS, compression="zstd", size_limit=400) as writer:
        for row in rows():
            writer.write(row)
    return base


@pytest.fixture
def data(tmp_path, written):
    for domain in ("a", "b"):
        shutil.copytree(written / domain, tmp_path / "data" / domain)
    return tmp_path / "data"


@pytest.fixture
def zipped(data, written):
    return shutil.copytree(written / "zipped", data / "c")


def domains(data):
    return list(domain_folders(load_streams(data)))


def test_a_folder_of_streams_or_one_stream_is_read(data):
    assert domains(data) == ["a", "b"]
    assert domains(data / "a") == ["a"]
    (data / "tokenizer.json").write_text("{}")
    merge_indexes(data, ["a", "b"])  # as filtered data has it
    assert domains(data) == ["a", "b"]


def test_a_stream_may_be_the_working_folder(data, monkeypatch):
    monkeypatch.chdir(data / "a")
    assert domains(Path()) == ["a"]


def test_a_merged_stream_with_streams_inside_is_one(data):
    merge_indexes(data, ["a", "b"])
    assert domains(data.parent) == ["data"]


@pytest.mark.parametrize("name", ["b", "b.part", "sub/b", "a/b"])
def test_shards_without_an_index_are_refused_by_name(data, name):
    """A writer that was stopped, or the rest of one."""
    shutil.move(data / "b", data.parent / "b")
    (data / name).parent.mkdir(exist_ok=True)
    shutil.move(data.parent / "b", data / name)
    (data / name / "index.json").unlink()
    for read in (load_streams, lambda path: open_dataset(path, batch_size=1, seed=0)):
        with pytest.raises(UserError, match=rf"{name} holds shard.00000.mds"):
            read(data)


def test_compressed_shards_without_an_index_are_refused_by_name(data, zipped):
    assert domains(data) == ["a", "b", "c"]
    (zipped / "index.json").unlink()
    with pytest.raises(UserError, match=r"c holds shard.00000.mds.zstd"):
        load_streams(data)


def test_a_stream_deeper_than_a_folder_is_refused_by_name(data):
    (data / "c").mkdir()
    shutil.move(data / "b", data / "c" / "train")
    with pytest.raises(UserError, match=r"c/train holds shard.00000.mds"):
        load_streams(data)
    shutil.rmtree(data / "a")
    with pytest.raises(UserError, match=r"c/train holds shard.00000.mds"):
        load_streams(data)


def test_a_shard_that_the_index_does_not_name_is_refused(data):
    shutil.copy(data / "a" / "shard.00000.mds", data / "a" / "shard.00009.mds")
    with pytest.raises(UserError, match=r"a holds shard.00009.mds"):
        load_streams(data)


def test_a_merged_index_over_a_stream_that_is_gone_is_refused(data):
    merge_indexes(data, ["a", "b"])
    shutil.rmtree(data / "b")
    with pytest.raises(UserError, match=r"index.json names .*b/shard.00000.mds"):
        load_streams(data)


def test_an_index_without_its_shards_is_refused(data):
    (data / "a" / "shard.00001.mds").unlink()
    with pytest.raises(UserError, match=r"shard.00001.mds is missing"):
        MdsStream(data / "a")


@pytest.mark.parametrize("name", ["nothing", "file.jsonl", "empty"])
def test_what_is_no_data_is_said(tmp_path, name):
    (tmp_path / "file.jsonl").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=name):
        load_streams(tmp_path / name)


def rename(folder, kind, name):
    """Let the index call its first shard by another name."""
    path = folder / "index.json"
    index = json.loads(path.read_text())
    index["shards"][0][kind]["basename"] = name
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("kind", ["raw_data", "zip_data"])
@pytest.mark.parametrize("place", ["../outside", "{absolute}", "link/outside", "sub/../../outside", "..", ""])
def test_an_index_cannot_name_what_lies_outside_its_folder(data, zipped, tmp_path, kind, place):
    """Compressed shards would be written there, raw ones read."""
    (zipped / "sub").mkdir()
    (zipped / "link").symlink_to(tmp_path)
    rename(zipped, kind, place.format(absolute=tmp_path / "outside"))
    shutil.copy(zipped / "shard.00000.mds.zstd", tmp_path / "outside.zstd")
    streams = tmp_path / "streams.yaml"
    streams.write_text(json.dumps([{"local": str(zipped)}]))
    for read in (
        lambda: MdsStream(zipped),
        lambda: open_dataset(streams, batch_size=1, seed=0),
        lambda: SampleOrder([{"local": str(zipped)}], {}, LoaderConfig(batch_size=1)),
    ):
        with pytest.raises(UserError, match=r"c/index.json names the shard"):
            read()
    assert not (tmp_path / "outside").exists()


def test_a_link_where_streaming_writes_before_it_renames_is_refused(data, zipped, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (zipped / "shard.00000.mds.tmp").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match=r"c/index.json names the shard"):
        open_dataset(data, batch_size=1, seed=0)
    assert (tmp_path / "precious").read_text() == "mine"


def test_shards_may_be_links_as_in_a_store_of_content(data, tmp_path):
    for shard in list((data / "a").glob("*.mds")):
        shard.rename(tmp_path / shard.name)
        shard.symlink_to(tmp_path / shard.name)
    assert len(MdsStream(data / "a").catalogue()) == 6
    dataset = open_dataset(data, batch_size=1, seed=0)
    assert len(list(dataset)) == 12
    release(dataset)


def test_shards_whose_compressed_form_is_gone_stay(data, zipped):
    """Streaming alone would delete them, to fetch both forms again from where there is no remote."""
    for path in list(zipped.glob("*.zstd")):
        path.with_suffix("").write_bytes(decompress("zstd", path.read_bytes()))
        path.unlink()
    SampleOrder([{"local": str(zipped)}], {}, LoaderConfig(batch_size=1))
    dataset = open_dataset(data, batch_size=1, seed=0)
    assert len(list(dataset)) == 18
    release(dataset)
    assert len(MdsStream(zipped).catalogue()) == 6


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("version"),
        lambda index: index.update(version=1),
        lambda index: index.update(shards=5),
        lambda index: index["shards"][0].update(column_encodings=["ndarray:foo"]),
        lambda index: index["shards"][0].update(column_encodings=["bytes:x"]),
        lambda index: index["shards"][0].update(column_encodings=["pkl:x"]),
        lambda index: index["shards"][0].update(column_encodings=["pkl"]),
        lambda index: index["shards"][0].update(column_encodings=["nothing"]),
        lambda index: index["shards"][0].pop("raw_data"),
    ],
)
def test_an_index_that_is_none_is_refused(data, change):
    path = data / "a" / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"/a"):
        MdsStream(data / "a")


@pytest.mark.parametrize(
    "entry",
    [
        {"chose": 3},
        {"choose": 2.5},
        {"choose": -1},
        {"repeat": float("inf")},
        {"choose": 3, "repeat": 2},
        {"local": 5},
        {1: 2},
    ],
)
def test_a_list_of_streams_with_wrong_arguments_is_refused(data, tmp_path, entry):
    entries = [{"local": str(data / "a")}, {"local": str(data / "b"), **entry}]
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(entries))
    with pytest.raises(UserError, match=r"s.yaml, entry 1"):
        load_streams(tmp_path / "s.yaml")


def test_what_streaming_refuses_is_bad_input(data, tmp_path):
    (tmp_path / "s.yaml").write_text(f"- {{local: {data / 'a'}, proportion: 1}}\n- {{local: {data / 'b'}}}")
    with pytest.raises(UserError, match=r"refuses .*s.yaml.*proportion"):
        open_dataset(tmp_path / "s.yaml", batch_size=1, seed=0)


def test_names_that_no_domain_can_have(data):
    names = [
        "c++",
        "my data",
        "",
        "-x",
        ".x",
        "a/b",
        "..",
        "a\n",
        "x" * 201,
        "ü" * 101,
        "web.part",
        "\ud800",
        *RESERVED,
    ]
    for name in names:
        with pytest.raises(UserError, match="cannot name a folder"):
            check_domain(name)
    (data / "b").rename(data / "c++")
    with pytest.raises(UserError, match="cannot name a folder"):
        domains(data)
    with pytest.raises(UserError, match="cannot name a folder"):
        find_domains({"my data": "x.jsonl"})


def test_names_that_domains_can_have():
    for name in ("web", "_x", "a-b.c", "网页", "ü" * 100, "x" * 200, "part", "a.parts"):
        assert check_domain(name) == name
