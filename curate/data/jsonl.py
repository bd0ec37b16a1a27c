"""JSONL files, also compressed ones: one JSON object per line, UTF-8.

Lines are read by random access. A compressed file (gzip or Zstandard) is first written out in a cache folder (disk
space of the uncompressed file).
"""

import gzip
import json
import os
import shutil
import tempfile
import zlib
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from curate.core.errors import UserError
from curate.core.escape import visible
from curate.core.reading import json_problem, unique_keys
from curate.data.documents import Document, Fields, parse_document

_EXAMPLE = '{"id": "a", "text": "..."}'
_EXPECTED = f"expected one JSON object per line, e.g. {_EXAMPLE}"


class JsonlFile:
    """Random access to the documents of a JSONL file; memory is 8 bytes a line.

    Args:
        path: the file; compressed where its name ends in `.gz` or `.zst`.
        cache: where the lines of a compressed file go; the caller removes it when the reader is no longer used.
        fields: column names.
        name: what the ids of documents without one begin with (the file's name by default).

    Raises:
        UserError: the file is missing, is a folder, cannot be decompressed or has no line.
    """

    def __init__(self, path: Path, cache: Path, fields: Fields | None = None, name: str | None = None) -> None:
        self.path = path
        self.fields = fields
        self.name = name or path.name
        # Byte that each line starts at, and the end of the file.
        self._starts = array("q", [0])
        try:
            self._lines = _decompressed(path, cache) if path.suffix.lower() in _COMPRESSED else path
            # Bytes, not text: positions in a text file are no byte offsets, and lines end at b"\n" alone.
            with self._lines.open("rb") as file:
                for line in file:
                    self._starts.append(self._starts[-1] + len(line))
        except FileNotFoundError:
            raise UserError(f"{path} does not exist; expected a JSONL file, one document per line") from None
        except IsADirectoryError:
            raise UserError(f"{path} is a folder; expected a JSONL file, one document per line") from None
        if len(self) == 0:
            raise UserError(f"{path} is empty; {_EXPECTED}")

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._starts) - 1

    def read(self, indices: Sequence[int]) -> list[Document]:
        """Read the documents at these positions, in the given order.

        Raises:
            UserError: a line is not a document; the message names file and line.
        """
        documents = []
        with self._lines.open("rb") as file:
            for index in indices:
                file.seek(self._starts[index])
                line = file.read(self._starts[index + 1] - self._starts[index])
                documents.append(self._parse(line, index + 1))
        return documents

    def _parse(self, line: bytes, number: int) -> Document:
        where = f"{self.path} line {number}"
        return parse_document(_parse_line(line, where), where, f"{visible(self.name)}:{number}", self.fields)


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        # Any line may begin with a byte order mark: files are joined with `cat`.
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        byte = f"byte {error.object[error.start]:#04x} at position {error.start}"
        raise UserError(f"{where}: not UTF-8 ({byte}); {_EXPECTED}") from None
    except (ValueError, RecursionError) as error:
        reason = "an empty line" if not line.strip() else f"not valid JSON ({json_problem(error)})"
        raise UserError(f"{where}: {reason}; {_EXPECTED}") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: holds {type(row).__name__}; {_EXPECTED}")
    return row


def _decompressed(path: Path, cache: Path) -> Path:
    """Write the file's lines to a new file in `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    try:
        with (
            _COMPRESSED[path.suffix.lower()](path) as lines,
            tempfile.NamedTemporaryFile(dir=cache, prefix="lines-", delete=False) as copy,
        ):
            shutil.copyfileobj(lines, copy, 1 << 20)
    except (OSError, EOFError, zlib.error) as error:
        # An error of the disk has a number, one of the content has none (gzip's BadGzipFile is an OSError too).
        if getattr(error, "errno", None) is not None:
            raise
        raise UserError(f"{path} cannot be decompressed ({error}); it is cut off, damaged or of another kind") from None
    return Path(copy.name)


def _open_zstandard(path: Path) -> Any:
    # Python's own library reads no Zstandard before 3.14.
    import pyarrow as pa

    return pa.input_stream(os.fspath(path), compression="zstd")


_COMPRESSED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".zst": _open_zstandard}
