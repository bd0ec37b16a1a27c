"""The streams of a stage's data: a folder, a streams.yaml or a schedule.yaml; and what domains may be called."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError

from curate.core.artifacts import MANIFEST, STARTED, SUMS, checked, file_fingerprint
from curate.core.errors import UserError
from curate.core.reading import read_yaml, shortened
from curate.core.validation import first_problem
from curate.data.documents import load_tokenizer, tokenizer_file
from curate.data.mds import shard_readers
from curate.data.phases import StreamArguments, load_schedule

# Names of files that lie beside the folders of domains.
RESERVED = frozenset({"dropped.parquet", "index.json", MANIFEST, STARTED, SUMS, "schedule.yaml", "tokenizer.json"})
NAME = r"\w[\w.-]*"  # of domains and windows: they become names of files
_LONGEST = 200  # bytes of a name; parts of a domain and unfinished folders add to it, file systems allow 255
_SHARD = re.compile(r"\.mds(\.(br|bz2|gz|snappy|zstd))?$")


def check_domain(name: str, where: str = "") -> str:
    """A domain's name as it is: domains become names of folders, columns and settings.

    Args:
        name: of the domain.
        where: it is from, for the error.

    Raises:
        UserError: it cannot be one.
    """
    reserved = name in RESERVED or name.endswith(".part") or len(name.encode(errors="replace")) > _LONGEST
    if reserved or not re.fullmatch(NAME, name):
        raise UserError(
            f"domain {shortened(repr(name))}{where} cannot name a folder; use letters, digits, '_', '-' and '.' (not "
            f"the last two first), up to {_LONGEST} bytes, no end in .part, and none of {', '.join(sorted(RESERVED))}"
        )
    return name


DomainName = Annotated[str, AfterValidator(check_domain)]


def load_streams(data: Path) -> list[dict[str, Any]]:
    """`Stream` arguments: every domain of a prepared folder, or the entries of a streams.yaml.

    Those of a schedule.yaml have the samples of all its phases. A folder holds MDS folders or is one; it is read whole.

    Raises:
        UserError: there are none, the file cannot be read, or the folder holds shards that none of them names.
    """
    if data.suffix in (".yaml", ".yml") and not data.is_dir():
        schedule = load_schedule(data)
        streams = schedule.totals() if schedule else _listed(data)
    else:
        streams = [{"local": str(folder)} for folder in _folders(data)]
    if not streams:
        raise UserError(f"{data} holds no MDS streams; make them with python -m pipelines.prepare")
    return streams


def _listed(path: Path) -> list[dict[str, Any]]:
    entries = read_yaml(checked(path))
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path} must hold a list of Stream arguments, each with `local`")
    return [stream_arguments(entry, f"{path}, entry {place}") for place, entry in enumerate(entries)]


def stream_arguments(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """The arguments of a `Stream`, as given.

    Raises:
        UserError: an unknown one, or a value that it cannot have.
    """
    try:
        return StreamArguments.model_validate(entry).model_dump(exclude_unset=True)
    except ValidationError as error:
        known = ", ".join(StreamArguments.model_fields)
        raise UserError(f"{where}: {first_problem(error)}; the arguments of a Stream are {known}") from None


def _folders(data: Path) -> list[Path]:
    """The MDS folders of a folder; itself, where it is one and holds none.

    Raises:
        UserError: it is no folder, or part of what it holds would not be read.
    """
    if not data.is_dir():
        what = "is a file" if data.exists() else "does not exist"
        raise UserError(f"{data} {what}; expected a folder of MDS folders, a streams.yaml or a schedule.yaml")
    if data.name in ("", ".."):
        data = data.resolve()  # a stream is called by its folder
    if (data / STARTED).exists() and not (data / MANIFEST).exists():
        raise UserError(f"{data} is not finished: run the command again that was writing it, to its end")
    index = data / "index.json"
    inner = [path.parent for path in sorted(data.glob("*/index.json"))]
    folders = inner or ([data] if index.exists() else [])
    named = {path for folder in folders for path in _named(folder)}
    unread = sorted(_shards(data) - named)
    if unread:
        raise UserError(
            f"{unread[0].parent} holds {unread[0].name}, which no index.json of {data} or of a folder in it names, as "
            "where a writer was stopped: write that stream again, move it away, or list the streams in a streams.yaml"
        )
    lost = sorted(_named(data) - named) if index.exists() and inner else []
    if lost:
        raise UserError(f"{index} names {lost[0]}, which is in none of the streams of {data}; restore it")
    return folders


def _named(folder: Path) -> set[Path]:
    """Files that the index of an MDS folder names, compressed forms too."""
    pairs = [pair for reader in shard_readers(folder) for pair in reader.file_pairs]
    return {folder / info.basename for pair in pairs for info in pair if info is not None}


def _shards(folder: Path) -> set[Path]:
    """MDS shards in a folder, and at any depth in the folders in it."""
    inner = [path for child in folder.iterdir() if child.is_dir() for path in child.rglob("*.mds*")]
    return {path for path in (*folder.glob("*.mds*"), *inner) if _SHARD.search(path.name)}


def find_tokenizer(data: Path, streams: list[dict[str, Any]], given: Path | None = None) -> Path | None:
    """The tokenizer of a stage's data: the given one, else what prepare or select left beside the streams.

    Args:
        data: folder, streams.yaml or schedule.yaml.
        streams: see `load_streams`.
        given: by the user.

    Raises:
        UserError: there are different ones, so that equal token ids mean different text.
    """
    beside = [data if data.is_dir() else data.parent, *(Path(stream["local"]).parent for stream in streams)]
    places = [path for folder in dict.fromkeys(beside) if (path := folder / "tokenizer.json").exists()]
    tokenizers = [*([] if given is None else [tokenizer_file(given)]), *places]
    for other in tokenizers[1:]:
        check_same_tokenizer(tokenizers[0], other, "of the data")
    return tokenizers[0] if tokenizers else None


def check_same_tokenizer(one: Path, other: Path, what: str) -> None:
    """Refuse two different tokenizers of the same token ids.

    Args:
        one: a tokenizer.json.
        other: another.
        what: the other is the tokenizer of, for the error.

    Raises:
        UserError: they differ, or one cannot be read.
    """
    same = one.is_file() and other.is_file() and file_fingerprint(one) == file_fingerprint(other)
    if not same and load_tokenizer(one).to_str() != load_tokenizer(other).to_str():
        raise UserError(
            f"{one} is not the tokenizer {what}, {other}: token ids mean something else; use that one, or write the "
            f"data again with --tokenizer {other}"
        )


def domain_folders(streams: list[dict[str, Any]]) -> dict[str, Path]:
    """Domain -> MDS folder: domains are called by their folders, with the parent's name where that is not enough.

    Raises:
        UserError: two streams would have the same name, or one has a name that no domain can have.
    """
    folders = [Path(stream["local"]) / (stream.get("split") or "") for stream in streams]
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}.{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"two streams are called {max(names, key=names.count)}; give their folders different names")
    return {check_domain(name, f" ({folder})"): folder for name, folder in zip(names, folders, strict=True)}
