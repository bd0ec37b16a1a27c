"""MDS shards: the only module that imports mosaicml-streaming.

Reading here is random access on local shards with streaming's own shard reader: no shared memory, no background
threads, so it can run beside a training job on the same folder. Training itself uses `StreamingDataset`.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from curate.core.artifacts import checked
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.progress import progress
from curate.core.reading import parse_json, read_text
from curate.core.writing import atomic_write
from curate.data.memory import construct, release
from curate.data.stored import loss_mask, token_ids
from curate.ngrams.hashes import NgramMemory

# Columns that `pipelines.prepare` writes; `Columns` maps them to those of other writers.
COLUMNS = {
    "tokens": "ndarray:int32",  # (T,) token ids
    "loss_mask": "ndarray:uint8",  # (T,) 1 where the token is predicted and its loss counts
    "sample_id": "int64",  # content_id(tokens, loss_mask)
    "domain": "str",
    "documents": "json",  # [[document id, first token, token after the last], ...]
}

CATALOGUE = (
    "index",
    "shard",
    "sample_id",
    "stored_tokens",
    "predicted_tokens",
    "largest_token_id",
    "novel_ngrams",
    "ngrams",
)

# Of a shard, at least (int32): bounds the number of tokens from above.
_BYTES_PER_TOKEN = 4


class Columns(Config):
    """Names of the columns of an MDS stream; the defaults are those of `pipelines.prepare`."""

    tokens: str = "tokens"
    """Token ids: an ndarray, or raw bytes of `tokens_dtype` (llm-foundry)."""
    tokens_dtype: str = "int64"
    """Type of the token ids where the column holds raw bytes."""
    loss_mask: str = "loss_mask"
    """0 or 1 for each token, 1 where its loss counts (raw bytes are uint8); or labels, -100 where it does not count. A
    stream without this column predicts every token but the first."""
    documents: str = "documents"
    """JSON list of [document id, first token, token after the last]; may be absent."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One training sequence of T tokens, as stored."""

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    documents: list[tuple[str, int, int]]

    @property
    def sample_id(self) -> int:
        """Content hash: equal content, equal id, whatever the shard."""
        return content_id(self.tokens, self.loss_mask)

    @property
    def predicted_tokens(self) -> int:
        """Number of tokens whose loss counts (the first token of a sequence is never predicted)."""
        return int(self.loss_mask[1:].sum())

    def document_tokens(self) -> list[dict[str, str | int]]:
        """Return `id` and `predicted_tokens` of each document in the sample: its share of the sample's value."""
        # From 1 at least: the first token of a sequence is never predicted.
        return [
            {"id": name, "predicted_tokens": int(self.loss_mask[max(start, 1) : stop].sum())}
            for name, start, stop in self.documents
        ]


def content_id(tokens: npt.NDArray[Any], loss_mask: npt.NDArray[Any]) -> int:
    """Hash a sample's content to 63 bits; the hash survives re-sharding and needs no id column in the shards."""
    # In one byte order and width, whatever the shard stores.
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8)
    digest.update(loss_mask.astype(np.uint8).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1  # fits the int64 columns of tables


def as_sample(row: Mapping[str, Any], columns: Columns, where: str) -> Sample:
    """Read one row of an MDS stream, as `StreamingDataset` or `MdsStream.row` gives it.

    Args:
        row: column -> value.
        columns: names of the columns; those for the mask and the documents may be absent.
        where: stream and sample, for the error.

    Raises:
        UserError: the tokens column is missing, or a column holds something else than it should.
    """
    if columns.tokens not in row:
        raise UserError(f"{where} has no column {columns.tokens!r} (it has {sorted(row)}); set columns.tokens")
    tokens = token_ids(row[columns.tokens], columns.tokens_dtype, where)
    mask = row.get(columns.loss_mask)
    return Sample(
        tokens=tokens,
        loss_mask=np.ones(len(tokens), bool) if mask is None else loss_mask(mask, tokens, where),
        documents=_documents(row.get(columns.documents, []), len(tokens), where),
    )


def _documents(stored: Any, length: int, where: str) -> list[tuple[str, int, int]]:
    try:
        spans = [(str(name), int(start), int(stop)) for name, start, stop in stored]
    except (TypeError, ValueError):
        spans = None
    # Negative or crossed borders would count tokens of other documents (Python's slices allow them).
    if spans is None or not all(0 <= start <= stop <= length for _, start, stop in spans):
        raise UserError(
            f"the documents of {where} are no list of [id, first token, token after the last] within {length} tokens; "
            "correct them, or set columns.documents to a column that is not there"
        )
    return spans


def shard_readers(folder: Path) -> list[Any]:
    """Return streaming's reader of every shard that an MDS folder's index names.

    Raises:
        UserError: no index, not a valid one, or one that names files outside the folder.
    """
    from streaming.base.format import reader_from_json
    from streaming.base.format.mds.encodings import is_mds_encoding

    path = folder / "index.json"
    if not path.exists():
        raise UserError(f"{folder} has no index.json: it is not an MDS folder (a remote stream must be synced first)")
    index = parse_json(read_text(checked(path)), str(path))
    # Streaming checks little of an index: what a damaged one raises depends on where it is damaged.
    try:
        if index["version"] != 2:
            raise ValueError(f"version {index['version']!r}, expected 2")
        readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
        encodings = [encoding for reader in readers for encoding in reader.column_encodings]
        unknown = [encoding for encoding in encodings if not is_mds_encoding(encoding)]
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is not a valid MDS index ({type(error).__name__}: {error}); restore it") from None
    if unknown:
        raise UserError(f"{path} is not a valid MDS index (it has columns of {unknown[0]!r}); restore it")
    check_inside(folder, readers)
    return readers


def check_inside(folder: Path, readers: Iterable[Any]) -> None:
    """Refuse shards that lie, or would be decompressed, outside their folder; the last name alone may be a link.

    Raises:
        UserError: an index names a file by an absolute path, by `..`, or in a linked folder that lies elsewhere; or a
            link stands where streaming writes before it renames.
    """
    root = folder.resolve()
    # Most shards share a folder, and `resolve` asks the file system.
    inside = cache(lambda parent: parent.resolve().is_relative_to(root))
    names = {info.basename for reader in readers for pair in reader.file_pairs for info in pair if info is not None}
    for name in sorted(names):
        path = folder / name
        # An absolute name replaces the folder in `folder / name`, so it lies elsewhere too.
        below = ".." not in Path(name).parts and path != folder and inside(path.parent)
        # Streaming decompresses into `<name>.tmp`, and would write through a link of that name.
        if not below or path.with_name(f"{path.name}.tmp").is_symlink():
            raise UserError(
                f"{folder / 'index.json'} names the shard {name!r}, which does not lie in {folder}; write the stream "
                "again, its shards below it"
            )


class MdsStream:
    """Random access to the samples of one local MDS folder.

    Args:
        folder: a folder with `index.json` and its shards.
        columns: names of the columns.

    Raises:
        UserError: no index, one that names files outside the folder, an unsafe column type (pickle), a shard missing,
            of another size than the index says, or present only in compressed form.
    """

    def __init__(self, folder: Path, columns: Columns | None = None) -> None:
        self.folder = folder
        self.columns = columns or Columns()
        # Shards whose bytes were compared with the index.
        self._verified: set[int] = set()
        self._readers = shard_readers(folder)
        if not self._readers:
            raise UserError(f"{folder} is an MDS folder without shards; write samples to it, or leave it out")
        for reader in self._readers:
            self._check(reader)

    def _check(self, reader: Any) -> None:
        # A column of pickles would run code when it is read.
        try:
            reader.validate(allow_unsafe_types=False)
        except ValueError as error:
            raise UserError(
                f"{self.folder}: {error} curate loads no pickle; write the column as ndarray, str or json"
            ) from None
        path = self.folder / reader.raw_data.basename
        if not path.exists():
            is_compressed = reader.zip_data is not None and (self.folder / reader.zip_data.basename).exists()
            hint = (
                "only its compressed form is there; iterate a StreamingDataset over the folder once"
                if is_compressed
                else "restore it"
            )
            raise UserError(f"shard {path} is missing: {hint}")
        _check_size(path, reader)

    @cached_property
    def shard_sizes(self) -> list[int]:
        """Samples in each shard."""
        return [reader.samples for reader in self._readers]

    @cached_property
    def _shard_starts(self) -> npt.NDArray[np.int64]:
        return np.cumsum([0, *self.shard_sizes])

    def __len__(self) -> int:
        """Samples in the stream."""
        return int(self._shard_starts[-1])

    @cached_property
    def encodings(self) -> list[dict[str, str]]:
        """Column name -> MDS encoding: one mapping for each kind of shard; a merged stream may have several."""
        distinct: list[dict[str, str]] = []
        for reader in self._readers:
            encodings = dict(zip(reader.column_names, reader.column_encodings, strict=True))
            if encodings not in distinct:
                distinct.append(encodings)
        return distinct

    def row(self, index: int) -> dict[str, Any]:
        """Read all columns of the sample at a stream-wide index, as stored.

        Raises:
            UserError: the shard's bytes cannot be decoded.
        """
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        reader = self._readers[shard]
        # Once per shard, when it is first read: opening a stream must not read all of it.
        if shard not in self._verified:
            verify_shard(self.folder / reader.raw_data.basename, reader)
            self._verified.add(shard)
        try:
            row: dict[str, Any] = reader[int(index - self._shard_starts[shard])]
        except (ValueError, IndexError, KeyError, UnicodeDecodeError) as error:
            path = self.folder / reader.raw_data.basename
            raise UserError(
                f"shard {path} is corrupted (sample {index}: {error}); restore it or write the stream again"
            ) from None
        return row

    def __getitem__(self, index: int) -> Sample:
        """Read the sample at a stream-wide index.

        Raises:
            UserError: the tokens column is missing, or the shard is corrupted.
        """
        return as_sample(self.row(index), self.columns, f"{self.folder}, sample {index}")

    def catalogue(self) -> pl.DataFrame:
        """Read the whole stream once.

        Returns:
            One row per sample: `index` (stream-wide), `shard`, `sample_id`, `stored_tokens`, `predicted_tokens`,
            `largest_token_id`, `novel_ngrams` (n-grams that no earlier sample of the stream has) of all `ngrams` (see
            `ngrams.hashes`).
        """
        # The memory is sized once, by the most tokens that the shards can hold.
        memory = NgramMemory(sum(reader.raw_data.bytes for reader in self._readers) // _BYTES_PER_TOKEN)
        shards = np.repeat(np.arange(len(self.shard_sizes)), self.shard_sizes).tolist()
        rows = []
        for index, shard in enumerate(
            progress(shards, total=len(self), what=f"read {self.folder.name}", unit="sample")
        ):
            sample = self[index]
            sizes = (len(sample.tokens), sample.predicted_tokens, int(sample.tokens.max()))
            rows.append((index, shard, sample.sample_id, *sizes, *memory.count(sample.tokens)))
        return pl.DataFrame(rows, schema=list(CATALOGUE), orient="row")


def verify_shard(path: Path, reader: Any) -> None:
    """Compare a shard's bytes with what its index says of them, before any of its samples is used.

    A writer writes hashes only where it was asked to; without them only the size is compared.

    Raises:
        UserError: they differ.
    """
    from streaming.base.hashing import get_hash

    _check_size(path, reader)
    for algorithm, recorded in reader.raw_data.hashes.items():
        if get_hash(algorithm, path.read_bytes()) != recorded:
            what = f"its {algorithm} is not that of its index"
            raise UserError(f"shard {path} is corrupted: {what}; restore it or write the stream again")


def _check_size(path: Path, reader: Any) -> None:
    if path.stat().st_size != reader.raw_data.bytes:
        raise UserError(
            f"shard {path} has {path.stat().st_size} bytes, its index says {reader.raw_data.bytes}: "
            "it is corrupted; restore it or write the stream again"
        )


def write_stream(
    folder: Path, columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]], shard_bytes: int = 1 << 26
) -> None:
    """Write one MDS folder atomically: shards of at most `shard_bytes` with content hashes, and their index.

    Args:
        folder: replaced as a whole once every row is written.
        columns: column name -> MDS encoding (`COLUMNS`, or another stream's `encodings`).
        rows: samples with those columns.
        shard_bytes: size limit of a shard.
    """
    from streaming import MDSWriter

    # The folder's own replacement makes it atomic: MDSWriter writes the index last, but into the folder itself.
    with (
        atomic_write(folder) as temporary,
        MDSWriter(columns=dict(columns), out=str(temporary), hashes=["xxh64"], size_limit=shard_bytes) as writer,
    ):
        for row in rows:
            writer.write(dict(row))


def merge_indexes(folder: Path, streams: list[str]) -> None:
    """Write `folder/index.json` so that the sub-folders `streams` read as one MDS dataset, in that order.

    The sub-folders stay valid on their own.
    """
    shards = []
    for name in streams:
        for shard in json.loads((folder / name / "index.json").read_text(encoding="utf-8"))["shards"]:
            # Streaming joins folder and name without looking, so a name may have a folder in it.
            shard["raw_data"]["basename"] = os.path.join(name, shard["raw_data"]["basename"])  # noqa: PTH118
            shards.append(shard)
    with atomic_write(folder / "index.json") as temporary:
        temporary.write_text(json.dumps({"version": 2, "shards": shards}), encoding="utf-8")


def iterate(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield every row of an MDS folder in stored order, read by a plain `StreamingDataset` as a trainer would."""
    from streaming import StreamingDataset

    # Released at once, since a process may iterate over many folders.
    dataset = construct(lambda: StreamingDataset(local=str(folder), shuffle=False, batch_size=1))
    try:
        yield from dataset
    finally:
        release(dataset)
