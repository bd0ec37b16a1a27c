"""Files of documents: every kind is read, everything else in a folder is named."""

import gzip
from pathlib import Path

import datasets
import polars as pl
import pyarrow as pa
import pytest

from curate.core.errors import UserError
from curate.data.documents import Document
from curate.data.files import find_files, open_reader, read_documents

LINE = b'{"text": "x"}\n'


def compressed(path: Path, content: bytes, frames: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    size = -(-len(content) // frames)
    parts = [content[start : start + size] for start in range(0, len(content), size)]
    if path.suffix.lower() == ".gz":
        path.write_bytes(b"".join(map(gzip.compress, parts)))
    else:
        path.write_bytes(b"".join(pa.Codec("zstd").compress(part, asbytes=True) for part in parts))
    return path


def read_all(path: Path, cache: Path) -> list[Document]:
    readers = [open_reader(file, None, "train", cache) for file in find_files(path)]
    return [document for reader in readers for document in reader.read(range(len(reader)))]


def test_a_folder_stands_for_everything_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "w"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "0.jsonl").write_bytes(LINE)
    compressed(folder / "1.jsonl.gz", LINE)
    (folder / "2.JSONL").write_bytes(LINE)
    (folder / "sub" / "0.jsonl").write_bytes(LINE * 2)
    compressed(folder / "sub" / "deep" / "a.Json.ZST", LINE)
    pl.DataFrame({"text": ["x"]}).write_parquet(folder / "sub" / "b.Parquet")
    datasets.Dataset.from_dict({"text": ["x"]}).save_to_disk(folder / "sub" / "saved")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "c.ndjson").write_bytes(LINE)
    (folder / "link").symlink_to(tmp_path / "other")
    for name in (".DS_Store", "_SUCCESS", ".git/config"):  # what tools leave beside data
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    assert [document.id for document in read_all(folder, tmp_path / "cache")] == [
        "0.jsonl:1",
        "1.jsonl.gz:1",
        "2.JSONL:1",
        "link/c.ndjson:1",
        "sub/0.jsonl:1",
        "sub/0.jsonl:2",
        "sub/b.Parquet:1",
        "sub/deep/a.Json.ZST:1",
        "sub/saved:1",
    ]


@pytest.mark.parametrize(
    "name", ["readme.md", "1.jsonl.bz2", "sub/a.txt", ".hidden.jsonl", ".cache/a.parquet", "jsonl", "a.jsonl.part"]
)
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "0.jsonl").write_bytes(LINE)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(LINE)
    with pytest.raises(UserError, match=f"{name}: hidden, or of an unknown kind"):
        find_files(tmp_path)


def test_broken_links_and_circles_are_named(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(LINE)
    (tmp_path / "1.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"1.jsonl: hidden"):
        find_files(tmp_path)
    (tmp_path / "1.jsonl").unlink()
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(UserError, match="again is a link to a folder that it lies in"):
        find_files(tmp_path)


def test_many_unreadable_files_are_counted(tmp_path: Path) -> None:
    for number in range(9):
        (tmp_path / f"{number}.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"0.txt, .*4.txt and 4 more: "):
        find_files(tmp_path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_compressed_files(tmp_path: Path, name: str) -> None:
    lines = b"".join(b'{"text": "%d"}\n' % number for number in range(3000))
    path = compressed(tmp_path / name, lines, frames=3)
    documents = read_documents(path)
    assert [document.text for document in documents] == [str(number) for number in range(3000)]
    assert documents[7].id == f"{name}:8"
    bad = compressed(tmp_path / f"bad-{name}", LINE + b'{"text": ""}\n')
    with pytest.raises(UserError, match=f"bad-{name} line 2: 'text' is empty"):
        read_documents(bad)
    for content in (path.read_bytes()[:-20], LINE, path.read_bytes() + b"more"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name} cannot be decompressed"):
            read_documents(path)


def test_a_single_file_of_any_kind(tmp_path: Path) -> None:
    pl.DataFrame({"id": ["a", "b"], "text": ["x", "y"]}).write_parquet(tmp_path / "t[1].parquet")
    assert read_documents(tmp_path / "t[1].parquet") == [Document(id="a", text="x"), Document(id="b", text="y")]
    (tmp_path / "t.txt").write_bytes(LINE)
    with pytest.raises(UserError, match=r"t.txt: hidden, or of an unknown kind; expected .jsonl"):
        read_documents(tmp_path / "t.txt")


def test_ids_are_text_where_a_name_is_not(tmp_path: Path) -> None:
    path = tmp_path / "\udcff.jsonl"  # the byte 0xff
    path.write_bytes(LINE)
    assert [document.id for document in read_documents(path)] == ["\\udcff.jsonl:1"]


def test_a_saved_dataset_hides_no_other_documents(tmp_path: Path) -> None:
    dataset = datasets.Dataset.from_dict({"text": ["x"]})
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "split")
    for name in ("one", "split"):
        assert [document.text for document in read_all(tmp_path / name, tmp_path / "cache")] == ["x"]
        (tmp_path / name / "more.jsonl").write_bytes(LINE)
        with pytest.raises(UserError, match=f"{name}/more.jsonl lies in a saved dataset"):
            read_all(tmp_path / name, tmp_path / "cache")
