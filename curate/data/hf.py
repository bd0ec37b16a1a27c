"""Parquet files and Hugging Face datasets on disk: the only module that imports `datasets`.

Rows are read from memory-mapped Arrow files, so memory does not grow with the dataset. A Parquet file is first
converted to such an Arrow file in a cache folder (disk space of about the uncompressed file).
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.core.escape import visible
from curate.core.reading import first_line
from curate.data.documents import Document, Fields, parse_document

if TYPE_CHECKING:
    from datasets import Dataset

_log = logging.getLogger(__name__)
_EXPECTED = "expected one document per row"
# What `save_to_disk` writes beside the rows.
SAVED_FILES = ("state.json", "dataset_dict.json", "dataset_info.json")
_ROWS = 1024  # of a Parquet file in memory


class HfFile:
    """Random access to the documents of a Parquet file or of a dataset saved by `save_to_disk`.

    Args:
        path: a `.parquet` file, or the folder of a `Dataset` or `DatasetDict`.
        split: which split of a `DatasetDict` is read.
        cache: where the Arrow copy of a Parquet file goes; the caller removes it when the reader is no longer used.
        fields: column names.
        name: what the ids of documents without one begin with (the file's name by default).

    Raises:
        UserError: it is missing, has no such split, cannot be read, or has no rows.
    """

    def __init__(
        self, path: Path, split: str, cache: Path, fields: Fields | None = None, name: str | None = None
    ) -> None:
        self.path = path
        self.fields = fields
        self.name = name or path.name
        columns = fields or Fields()
        self._rows = _open_parquet(path, columns, cache) if path.is_file() else _open_folder(path, split, columns)
        if len(self) == 0:
            raise UserError(f"{path} has no rows; {_EXPECTED}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Document]:
        """Read the documents at these positions, in the given order.

        Raises:
            UserError: a row is not a document; the message names file and row.
        """
        try:
            # Column -> values: one read of Arrow for all rows.
            columns = self._rows[list(indices)]
        except (OSError, ValueError, NotImplementedError, ImportError) as error:
            raise UserError(f"{self.path} cannot be read ({first_line(error)})") from None
        return [
            parse_document(
                {name: values[position] for name, values in columns.items()},
                f"{self.path} row {index + 1}",
                f"{visible(self.name)}:{index + 1}",
                self.fields,
            )
            for position, index in enumerate(indices)
        ]


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    # Not `dataset_info.json`, which the cache folders of `datasets` have too.
    return any((path / name).is_file() for name in SAVED_FILES[:2])


def _open_parquet(path: Path, fields: Fields, cache: Path) -> "Dataset":
    """Copy a Parquet file to Arrow and map its rows; `datasets` itself would read the path as a pattern."""
    import datasets
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    cache.mkdir(parents=True, exist_ok=True)
    try:
        with (
            # Off by default; a page whose bits flipped would decode to other text.
            ParquetFile(path, page_checksum_verification=True) as file,
            NamedTemporaryFile(dir=cache, suffix=".arrow", delete=False) as copy,
        ):
            names = _needed(file.schema_arrow.names, fields)
            schema = pa.schema([file.schema_arrow.field(name) for name in names])
            # A stream of small batches: memory stays at one of them.
            with pa.ipc.new_stream(copy, schema) as arrow:
                for batch in file.iter_batches(_ROWS, columns=names):
                    arrow.write_batch(batch)
        return datasets.Dataset.from_file(copy.name)
    except (OSError, ValueError, LookupError, NotImplementedError) as error:
        # An error of the disk has a number, one of the content has none (pyarrow's are OSErrors too).
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path} is not a Parquet file that can be read ({first_line(error)})") from None


def _needed(names: Sequence[str], fields: Fields) -> list[str]:
    """Choose the columns that documents are made of, so that no others are decoded; all where none is one."""
    needed = [name for name in names if name in (fields.id, *fields.content())]
    return needed if set(needed) - {fields.id} else list(names)


def _open_folder(path: Path, split: str, fields: Fields) -> "Dataset":
    import datasets

    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a Parquet file or a dataset saved by save_to_disk")
    try:
        stored = datasets.load_from_disk(str(path))
    except Exception as error:  # noqa: BLE001 - the library checks little of what it reads
        raise UserError(f"{path} is not a dataset with rows, saved by save_to_disk ({first_line(error)})") from None
    if isinstance(stored, datasets.DatasetDict):
        if split not in stored:
            raise UserError(f"{path} has no split {split!r} (it has {', '.join(sorted(stored))}); set split")
        if len(stored) > 1:
            _log.info("%s: split %r is read, %s not", path, split, ", ".join(sorted(set(stored) - {split})))
        stored = stored[split]
    # A saved format gives rows as tensors or tables, and hides columns.
    rows = stored.with_format(None).select_columns(_needed(stored.column_names, fields))
    # Validated first: reading a damaged Arrow file can end the process.
    try:
        rows.data.validate(full=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({first_line(error)}); write it again") from None
    return rows
