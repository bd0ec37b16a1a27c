"""Files of documents: their kinds, the files that a path stands for, and a reader for each kind."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from curate.core.errors import UserError
from curate.data.documents import Document, Fields
from curate.data.hf import SAVED_FILES, HfFile, is_saved_dataset
from curate.data.jsonl import JsonlFile

_JSONL = tuple(f"{name}{compressed}" for name in (".jsonl", ".json", ".ndjson") for compressed in ("", ".gz", ".zst"))
_PARQUET = (".parquet",)
_KINDS = ".jsonl, .json, .ndjson (each also .gz or .zst) or .parquet"
_EXPECTED = f"{_KINDS}, or a dataset saved by save_to_disk"
_SHOWN = 5  # files named in an error


class Reader(Protocol):
    """Random access to the documents of one file."""

    path: Path

    def __len__(self) -> int:
        """Number of documents."""

    def read(self, indices: Sequence[int]) -> list[Document]:
        """Read the documents at these positions, in the given order."""


@dataclass(frozen=True, kw_only=True)
class DocumentFile:
    """One file of documents, or one saved dataset.

    Attributes:
        path: where it lies.
        name: its path inside the folder that was given, or its own name; ids of documents without one begin with it.
    """

    path: Path
    name: str


def suffix_of(path: Path) -> str:
    """Return the suffix that shows the kind of a document file, as it is written; "" for anything else."""
    ending = next((end for end in _JSONL + _PARQUET if path.name.lower().endswith(end)), "")
    return path.name[len(path.name) - len(ending) :]


def find_files(path: Path) -> list[DocumentFile]:
    """Find the files (or saved datasets) that a path of the configuration stands for; a folder: all below it.

    Raises:
        UserError: it does not exist, cannot be read, or holds something that cannot; the message names it.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist; expected {_EXPECTED}")
    if _is_document(path):
        return [DocumentFile(path=path, name=path.name)]
    # Sorted: the order of a folder differs between file systems, and ids and samples follow it.
    files = [DocumentFile(path=item, name=str(item.relative_to(path))) for item in sorted(_walk(path))]
    if not files:
        raise UserError(f"folder {path} holds no file of documents; expected {_EXPECTED}")
    # Refused, not skipped: a corpus that silently lacks a file is found out after the training.
    refused = [str(file.path) for file in files if not _is_document(file.path) or _is_hidden(Path(file.name))]
    if refused:
        more = f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise UserError(
            f"no documents can be read from {', '.join(refused[:_SHOWN])}{more}: hidden, or of an unknown kind; "
            f"expected {_EXPECTED}"
        )
    return files


def passed_over(path: Path) -> bool:
    """Whether an entry of a folder is what tools leave beside data (`.git`, `_SUCCESS`) and holds no document."""
    return path.name.startswith((".", "_")) and not any(map(_is_document, _walk(path)))


def _walk(path: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield a file, or everything below a folder; a saved dataset counts as a file."""
    if not path.is_dir() or is_saved_dataset(path):
        yield path
        return
    # A link to a folder above would be walked without end; links to other folders are followed.
    if path.resolve() in above:
        raise UserError(f"{path} is a link to a folder that it lies in; remove the link")
    for item in path.iterdir():
        if not passed_over(item):
            yield from _walk(item, above | {path.resolve()})


def _is_document(path: Path) -> bool:
    return is_saved_dataset(path) if path.is_dir() else path.is_file() and suffix_of(path) != ""


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def open_reader(file: DocumentFile, fields: Fields | None, split: str, cache: Path) -> Reader:
    """Open one of the files that `find_files` found.

    Args:
        file: the file.
        fields: column names.
        split: split of a saved dataset that is read, where it has several.
        cache: folder for copies of Parquet and compressed files; the caller removes it.

    Raises:
        UserError: the file cannot be read, or has no documents.
    """
    # Python reads bytes of a file's name that are not UTF-8 as surrogates, which no table takes.
    name = file.name.encode(errors="backslashreplace").decode()
    if file.path.is_dir():
        _refuse_strays(file.path)
    if file.path.is_dir() or suffix_of(file.path).lower() in _PARQUET:
        return HfFile(file.path, split, cache, fields, name)
    return JsonlFile(file.path, cache, fields, name)


def _refuse_strays(saved: Path) -> None:
    """Refuse a saved dataset with other documents beside its own files."""
    strays = [item for item in sorted(saved.iterdir()) if suffix_of(item) and item.name not in SAVED_FILES]
    if strays:
        raise UserError(f"{strays[0]} lies in a saved dataset, whose rows alone would be read; move it elsewhere")


def read_documents(path: Path) -> list[Document]:
    """Read all documents of one file, such as a target's.

    Raises:
        UserError: the file is missing or of an unknown kind, or a line or row is not a document.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder; expected one file of documents ({_KINDS})")
    (file,) = find_files(path)
    # The copies of compressed and Parquet files are needed until the documents are in memory.
    with tempfile.TemporaryDirectory(prefix="curate-documents-") as cache:
        reader = open_reader(file, None, "train", Path(cache))
        return reader.read(range(len(reader)))
