"""Parquet files and Hugging Face datasets on disk: the only module that imports `datasets`.

Rows are read from memory-mapped Arrow files, so memory does not grow with the dataset. A Parquet file is first
converted to such an Arrow file in a cache folder (disk space of about the uncompressed file).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from curate.errors import UserError
from curate.escape import visible
from curate.formats.documents import Document, Fields, parse_document

if TYPE_CHECKING:
    from datasets import Dataset

_EXPECTED = "expected one document per row"


class HfFile:
    """Random access to the documents of a Parquet file or of a dataset saved by `save_to_disk`.

    Args:
        path: a `.parquet` file, or the folder of a `Dataset` or `DatasetDict`.
        split: which split of a `DatasetDict` is read.
        cache: where the Arrow copy of a Parquet file goes; the caller removes it when the reader is no longer used.
        fields: column names.

    Raises:
        UserError: it is missing, has no such split, cannot be read, or has no rows.
    """

    def __init__(self, path: Path, split: str, cache: Path, fields: Fields | None = None) -> None:
        self.path = path
        self.fields = fields
        self._rows = _open_parquet(path, cache) if path.is_file() else _open_folder(path, split)
        if len(self) == 0:
            raise UserError(f"{path} has no rows; {_EXPECTED}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._rows)

    def read(self, indices: Sequence[int]) -> list[Document]:
        """The documents at these positions, in the order asked.

        Raises:
            UserError: a row is not a document; the message names file and row.
        """
        columns = self._rows[list(indices)]
        return [
            parse_document(
                {name: values[position] for name, values in columns.items()},
                f"{self.path} row {index + 1}",
                f"{visible(self.path.name)}:{index + 1}",
                self.fields,
            )
            for position, index in enumerate(indices)
        ]


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `save_to_disk` of the datasets library."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_parquet(path: Path, cache: Path) -> "Dataset":
    import datasets

    try:  # first by polars: datasets logs a damaged file instead of only raising
        rows = pl.scan_parquet(path).select(pl.len()).collect().item()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path} is not a Parquet file that can be read ({_first_line(error)})") from None
    if rows == 0:
        raise UserError(f"{path} has no rows; {_EXPECTED}")
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bar()
    try:
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error.__cause__ or error)})") from None
    finally:
        if shown:
            datasets.enable_progress_bar()


def _open_folder(path: Path, split: str) -> "Dataset":
    import datasets

    if not path.is_dir():
        raise UserError(f"{path} does not exist; expected a Parquet file or a dataset saved by save_to_disk")
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not a dataset with rows, saved by save_to_disk ({_first_line(error)})") from None
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise UserError(f"{path} has no split {split!r} (it has {', '.join(sorted(found))}); set split")
    return found[split]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
