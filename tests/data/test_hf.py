"""Parquet files and saved datasets give the same documents as JSONL."""

from pathlib import Path

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curate.core.errors import UserError
from curate.data.documents import Document, Fields
from curate.data.hf import HfFile, is_saved_dataset

ROWS = {"id": ["a", "b", "c"], "text": ["x", "yy", "zzz"], "extra": [1, 2, 3]}
DOCUMENTS = [Document(id="c", text="zzz"), Document(id="a", text="x")]


def test_parquet(tmp_path: Path) -> None:
    pl.DataFrame(ROWS).write_parquet(tmp_path / "a.parquet")
    file = HfFile(tmp_path / "a.parquet", "train", tmp_path / "cache")
    assert len(file) == 3
    assert file.read([2, 0]) == DOCUMENTS


def test_saved_dataset(tmp_path: Path) -> None:
    datasets.Dataset.from_dict(ROWS).save_to_disk(tmp_path / "saved")
    assert is_saved_dataset(tmp_path / "saved")
    assert not is_saved_dataset(tmp_path)
    assert HfFile(tmp_path / "saved", "train", tmp_path / "cache").read([2, 0]) == DOCUMENTS


def test_saved_dataset_with_splits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = datasets.Dataset.from_dict(ROWS)
    datasets.DatasetDict({"big": dataset, "small": dataset.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(HfFile(tmp_path / "saved", "small", tmp_path / "cache")) == 1
    assert "split 'small' is read, big not" in caplog.text
    with pytest.raises(UserError, match=r"saved has no split 'train' \(it has big, small\); set split"):
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow", "polars"])
def test_a_saved_dataset_with_a_format_is_read_as_any_other(tmp_path: Path, kind: str) -> None:
    rows = {"id": ["a"], "tokens": [[1, 2]], "n": [1]}
    dataset = datasets.Dataset.from_dict(rows).with_format(kind)
    dataset.save_to_disk(tmp_path / "whole")
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "split")
    dataset.with_format(kind, columns=["n"]).save_to_disk(tmp_path / "hidden")
    for name in ("whole", "split", "hidden"):
        assert HfFile(tmp_path / name, "train", tmp_path / "cache").read([0]) == [Document(id="a", tokens=[1, 2])]


def test_columns_that_no_document_has_are_not_decoded(tmp_path: Path) -> None:
    """Sound would need a package that is not installed."""
    rows = {"text": ["x"], "sound": [{"bytes": b"no sound", "path": None}]}
    features = datasets.Features({"text": datasets.Value("string"), "sound": datasets.Audio()})
    dataset = datasets.Dataset.from_dict({"text": rows["text"], "sound": rows["sound"]}).cast(features)
    dataset.save_to_disk(tmp_path / "saved")
    dataset.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "a.parquet"):
        assert HfFile(tmp_path / name, "train", tmp_path / "cache").read([0]) == [Document(id=f"{name}:1", text="x")]


def test_types_of_parquet_columns(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "text": pl.Series(["x", "y"], dtype=pl.Categorical),
            "id": pl.Series([2**63, None], dtype=pl.UInt64),
            "meta": [{"a": [1]}, None],
        }
    )
    frame.write_parquet(tmp_path / "a.parquet")
    file = HfFile(tmp_path / "a.parquet", "train", tmp_path / "cache")
    assert file.read([1, 0]) == [Document(id="a.parquet:2", text="y"), Document(id=str(2**63), text="x")]
    pl.DataFrame({"text": [b"x"]}).write_parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b.parquet row 1: 'text' holds bytes"):
        HfFile(tmp_path / "b.parquet", "train", tmp_path / "cache").read([0])


def test_a_damaged_row_group_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = pa.table({"text": [f"some text {number}" for number in range(1000)]})
    pq.write_table(rows, path, compression="none", use_dictionary=False, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[content.index(b"text 500")] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.parquet is not a Parquet file that can be read \(.*checksum"):
        HfFile(path, "train", tmp_path / "cache")


def test_token_columns(tmp_path: Path) -> None:
    pl.DataFrame({"tokens": [[1, 2], [3]], "loss_mask": [[0, 1], None]}).write_parquet(tmp_path / "a.parquet")
    file = HfFile(tmp_path / "a.parquet", "train", tmp_path / "cache")
    assert file.read([0, 1]) == [
        Document(id="a.parquet:1", tokens=[1, 2], loss_mask=[0, 1]),
        Document(id="a.parquet:2", tokens=[3]),
    ]


def test_a_bad_row_is_named(tmp_path: Path) -> None:
    pl.DataFrame({"body": ["x", ""]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet row 2: 'body' is empty"):
        HfFile(tmp_path / "a.parquet", "train", tmp_path / "cache", Fields(text="body")).read([0, 1])
    with pytest.raises(UserError, match=r"a.parquet row 1: expected either 'text'"):
        HfFile(tmp_path / "a.parquet", "train", tmp_path / "cache").read([0])


def test_bad_files(tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"bad.parquet is not a Parquet file that can be read"):
        HfFile(tmp_path / "bad.parquet", "train", tmp_path / "cache")
    pl.DataFrame({"text": []}, schema={"text": pl.String}).write_parquet(tmp_path / "empty.parquet")
    with pytest.raises(UserError, match=r"empty.parquet has no rows; expected one document per row"):
        HfFile(tmp_path / "empty.parquet", "train", tmp_path / "cache")
    datasets.Dataset.from_dict({"text": []}).save_to_disk(tmp_path / "no_rows")
    with pytest.raises(UserError, match="no_rows is not a dataset with rows, saved by save_to_disk"):
        HfFile(tmp_path / "no_rows", "train", tmp_path / "cache")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{")
    with pytest.raises(UserError, match="saved is not a dataset with rows, saved by save_to_disk"):
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")
    with pytest.raises(UserError, match="none does not exist"):
        HfFile(tmp_path / "none", "train", tmp_path / "cache")


def test_a_saved_dataset_that_is_damaged_is_named_and_ends_no_process(tmp_path: Path) -> None:
    """Offsets of text that point behind its end: Arrow itself follows them."""
    datasets.Dataset.from_dict({"text": ["some text", "more"]}).save_to_disk(tmp_path / "saved")
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    content = arrow.read_bytes()
    offsets = b"".join(number.to_bytes(4, "little") for number in (0, 9, 13))
    arrow.write_bytes(content.replace(offsets, offsets[:8] + b"\xff\xff\xff\x7f"))
    with pytest.raises(UserError, match="saved is damaged"):
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")
    arrow.write_bytes(content.replace(b"some text", b"some\xfftext"))
    with pytest.raises(UserError, match="saved is damaged"):
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")
    arrow.write_bytes(content)
    info = tmp_path / "saved" / "dataset_info.json"
    info.write_text(info.read_text().replace('"text": {', '"text": {"x": 1,').replace("_type", "_typo"))
    with pytest.raises(UserError, match="saved is not a dataset with rows"):
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")


def test_what_a_library_repeats_of_a_file_stays_short(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["some text"]}).save_to_disk(tmp_path / "saved")
    info = tmp_path / "saved" / "dataset_info.json"
    info.write_text(info.read_text().replace('"string"', f'"{"9" * 5000}"'))
    with pytest.raises(UserError, match="saved is not a dataset with rows") as refused:
        HfFile(tmp_path / "saved", "train", tmp_path / "cache")
    assert len(str(refused.value)) < 1000
