"""MDS shards: the only module that imports mosaicml-streaming.

Reading here is random access on local shards with streaming's own shard reader: no shared memory, no background
threads, so it can run beside a training job on the same folder. Training itself uses `StreamingDataset`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from tempfile import gettempdir
from time import sleep
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
import yaml

from curate.artifacts import checked, replacing
from curate.config import Config
from curate.errors import UserError
from curate.formats.ngrams import NgramMemory
from curate.formats.phases import load_schedule
from curate.progress import progress

if TYPE_CHECKING:
    from streaming import StreamingDataset

Dataset = TypeVar("Dataset", bound="StreamingDataset")

# Columns that `pipelines.prepare` writes; `Columns` maps them to those of other writers.
COLUMNS = {
    "tokens": "ndarray:int32",  # (T,) token ids
    "loss_mask": "ndarray:uint8",  # (T,) 1 where the token is predicted and its loss counts
    "sample_id": "int64",  # content_id(tokens, loss_mask)
    "domain": "str",
    "documents": "json",  # [[document id, first token, token after the last], ...]
}

CATALOGUE = ("index", "shard", "sample_id", "length", "tokens", "fresh", "ngrams")


_ATTEMPTS = 50  # at a name in shared memory
_BYTES_PER_TOKEN = 4  # of a shard, at least; bounds the number of tokens from above


class Columns(Config):
    """Names of the columns of an MDS stream; the defaults are those of `pipelines.prepare`."""

    tokens: str = "tokens"
    """Token ids: an ndarray, or raw bytes of `tokens_dtype` (llm-foundry)."""
    tokens_dtype: str = "int64"
    """Type of the token ids where the column holds raw bytes."""
    loss_mask: str = "loss_mask"
    """1 where a token's loss counts; a stream without this column predicts every token but the first."""
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
        """`id` and predicted `tokens` of each document in the sample: its share of the sample's value."""
        return [
            {"id": name, "tokens": int(self.loss_mask[max(start, 1) : stop].sum())}
            for name, start, stop in self.documents
        ]


def content_id(tokens: npt.NDArray[Any], loss_mask: npt.NDArray[Any]) -> int:
    """63-bit content hash of a sample; it survives re-sharding and needs no id column in the shards."""
    digest = hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8)
    digest.update(loss_mask.astype(np.uint8).tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def as_sample(row: Mapping[str, Any], columns: Columns, where: str) -> Sample:
    """Read one row of an MDS stream, as `StreamingDataset` or `MdsStream.row` gives it.

    Args:
        row: column -> value.
        columns: names of the columns; those for the mask and the documents may be absent.
        where: the stream, for the error.

    Raises:
        UserError: the tokens column is missing.
    """
    if columns.tokens not in row:
        raise UserError(f"{where} has no column {columns.tokens!r} (it has {sorted(row)}); set columns.tokens")
    tokens = _token_ids(row[columns.tokens], columns, where)
    mask = row.get(columns.loss_mask)
    return Sample(
        tokens=tokens,
        loss_mask=np.ones(len(tokens), bool) if mask is None else np.asarray(mask).astype(bool),
        documents=[(str(name), int(start), int(stop)) for name, start, stop in row.get(columns.documents, [])],
    )


def _token_ids(stored: Any, columns: Columns, where: str) -> npt.NDArray[np.int32]:
    hint = f"the token ids of {where} do not fit columns.tokens_dtype {columns.tokens_dtype}"
    try:
        ids = np.frombuffer(stored, columns.tokens_dtype) if isinstance(stored, bytes) else np.asarray(stored)
    except (ValueError, TypeError) as error:
        raise UserError(f"{hint} ({error}); set it to the type that the stream was written with") from None
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < 1 << 31:
        raise UserError(
            f"{hint} (found {ids.min()} to {ids.max()}); set it to the type that the stream was written with"
        )
    return ids.astype(np.int32)


class MdsStream:
    """Random access to the samples of one local MDS folder.

    Args:
        folder: a folder with `index.json` and its shards.
        columns: names of the columns.

    Raises:
        UserError: no index, an unsafe column type (pickle), a shard missing, of another size than the index says,
            or present only in compressed form.
    """

    def __init__(self, folder: Path, columns: Columns | None = None) -> None:
        from streaming.base.format import reader_from_json

        self.folder = folder
        self.columns = columns or Columns()
        self._verified: set[int] = set()
        try:
            index = json.loads(checked(folder / "index.json").read_text(encoding="utf-8"))
            self._readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no index.json: it is not an MDS folder (a remote stream must be synced first)"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{folder / 'index.json'} is not a valid MDS index: {error}") from None
        if not self._readers:
            raise UserError(f"{folder} is an MDS folder without shards; write samples to it, or leave it out")
        for reader in self._readers:
            self._check(reader)

    def _check(self, reader: Any) -> None:
        try:
            reader.validate(allow_unsafe_types=False)
        except ValueError as error:
            raise UserError(
                f"{self.folder}: {error} curate loads no pickle; write the column as ndarray, str or json"
            ) from None
        path = self.folder / reader.raw_data.basename
        if not path.exists():
            zipped = reader.zip_data is not None and (self.folder / reader.zip_data.basename).exists()
            hint = (
                "only its compressed form is there; iterate a StreamingDataset over the folder once"
                if zipped
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
    def encodings(self) -> dict[str, str]:
        """Column name -> MDS encoding."""
        first = self._readers[0]
        return dict(zip(first.column_names, first.column_encodings, strict=True))

    def row(self, index: int) -> dict[str, Any]:
        """All columns of the sample at a stream-wide index, as stored.

        Raises:
            UserError: the shard's bytes cannot be decoded.
        """
        shard = int(np.searchsorted(self._shard_starts, index, side="right")) - 1
        reader = self._readers[shard]
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
        """The sample at a stream-wide index.

        Raises:
            UserError: the tokens column is missing, or the shard is corrupted.
        """
        return as_sample(self.row(index), self.columns, str(self.folder))

    def catalogue(self) -> pl.DataFrame:
        """Read the whole stream once.

        Returns:
            One row per sample: `index` (stream-wide), `shard`, `sample_id`, `length` (stored tokens), `tokens`
            (predicted tokens), `fresh` and `ngrams` (n-grams that no earlier sample of the stream has, of all; see
            `ngrams`).
        """
        memory = NgramMemory(sum(reader.raw_data.bytes for reader in self._readers) // _BYTES_PER_TOKEN)
        shards = np.repeat(np.arange(len(self.shard_sizes)), self.shard_sizes).tolist()
        rows = []
        for index, shard in enumerate(
            progress(shards, total=len(self), what=f"read {self.folder.name}", unit="sample")
        ):
            sample = self[index]
            counts = memory.count(sample.tokens)
            rows.append((index, shard, sample.sample_id, len(sample.tokens), sample.predicted_tokens, *counts))
        return pl.DataFrame(rows, schema=list(CATALOGUE), orient="row")


def verify_shard(path: Path, reader: Any) -> None:
    """Hold a shard's bytes against what its index says of them, before any of its samples is used.

    A writer that was told no hashes left none; then only the size is compared.

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

    with (
        replacing(folder) as part,
        MDSWriter(columns=dict(columns), out=str(part), hashes=["xxh64"], size_limit=shard_bytes) as writer,
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
            shard["raw_data"]["basename"] = os.path.join(name, shard["raw_data"]["basename"])  # noqa: PTH118
            shards.append(shard)
    with replacing(folder / "index.json") as part:
        part.write_text(json.dumps({"version": 2, "shards": shards}), encoding="utf-8")


def iterate(folder: Path) -> Iterator[dict[str, Any]]:
    """Every row of an MDS folder in stored order, read by a plain `StreamingDataset` as a trainer would."""
    from streaming import StreamingDataset

    dataset = construct(lambda: StreamingDataset(local=str(folder), shuffle=False, batch_size=1))
    try:
        yield from dataset
    finally:
        release(dataset)


def construct(make: "Callable[[], Dataset]") -> "Dataset":
    """A `StreamingDataset` (and its `Stream`s), made anew when another process took its name in shared memory first.

    Streaming looks for a free name and takes it later; two trainings that start together on one machine can collide.
    Not so where ranks wait for each other in between: there the error is raised.

    Raises:
        UserError: no name can be had, time after time.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except FileExistsError as error:
            if not str(error.filename).endswith("_locals") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            sleep(0.001 * attempt)
    raise UserError(
        "streaming finds no free name in shared memory, where a training that was killed left some: call "
        "streaming.base.util.clean_stale_shared_memory() while no other training runs on this machine"
    )


def release(dataset: "StreamingDataset") -> None:
    """Give back the names in shared memory, and the lock files, of a dataset that no rank uses any more.

    Streaming gives back the names when the process ends, and the files never. Until then each new dataset attaches to
    all that are there, and keeps the file descriptors: a process that opens 140 of them runs out of 20,000.
    """
    from streaming.base import constant
    from streaming.base.shared import _get_path

    prefix = vars(dataset).pop("_shm_prefix_int", -1)
    if prefix < 0:
        return  # given back already; the names may be another dataset's by now
    kinds = ("BARRIER", "CACHE_USAGE", "LOCALS", "NEXT_EPOCH", "RESUME", "SHARD_ACCESS_TIMES", "SHARD_STATES")
    for kind in kinds:
        with suppress(FileNotFoundError):
            block = SharedMemory(_get_path(prefix, getattr(constant, kind)))
            block.close()
            block.unlink()
    for kind in ("BARRIER_FILELOCK", "CACHE_FILELOCK"):
        (Path(gettempdir()) / _get_path(prefix, getattr(constant, kind))).unlink(missing_ok=True)


def load_streams(data: Path) -> list[dict[str, Any]]:
    """`Stream` arguments: every domain of a prepared folder, or the entries of a streams.yaml.

    Those of a schedule.yaml have the samples of all its phases.

    Raises:
        UserError: there are none, or the file cannot be read.
    """
    if data.suffix in (".yaml", ".yml"):
        schedule = load_schedule(data)
        streams: Any = schedule.totals() if schedule else yaml.safe_load(checked(data).read_text(encoding="utf-8"))
        if not isinstance(streams, list) or not all(
            isinstance(stream, dict) and "local" in stream for stream in streams
        ):
            raise UserError(f"{data} must hold a list of Stream arguments, each with `local`")
    else:
        streams = [{"local": str(index.parent)} for index in sorted(data.glob("*/index.json"))]
    if not streams:
        raise UserError(f"{data} holds no MDS streams; make them with python -m pipelines.prepare")
    return list(streams)


def domain_folders(streams: list[dict[str, Any]]) -> dict[str, Path]:
    """Domain -> MDS folder: domains are called by their folders, with the parent's name where that is not enough.

    Raises:
        UserError: two streams would have the same name.
    """
    folders = [Path(stream["local"]) / (stream.get("split") or "") for stream in streams]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}.{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"two streams are called {max(names, key=names.count)}; give their folders different names")
    return dict(zip(names, folders, strict=True))
