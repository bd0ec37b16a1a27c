"""The streams of a stage's data: a folder, a streams.yaml or a schedule.yaml; and the names of domains."""

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
# Of domains and windows: they become names of files.
NAME = r"\w[\w.-]*"
# Bytes of a name; file systems allow 255, and suffixes and unfinished folders add to it.
_LONGEST = 200
_SHARD = re.compile(r"\.mds(\.(br|bz2|gz|snappy|zstd))?$")


def check_domain(name: str, where: str = "") -> str:
    """Return a domain's name if it can be one: domains become names of folders, columns and settings.

    Args:
        name: the domain's name.
        where: where it is from, for the error.

    Raises:
        UserError: it cannot be a domain's name.
    """
    # `.part` ends the names of unfinished folders, which are removed.
    reserved = name in RESERVED or name.endswith(".part") or len(name.encode(errors="replace")) > _LONGEST
    if reserved or not re.fullmatch(NAME, name):
        raise UserError(
            f"domain {shortened(repr(name))}{where} cannot name a folder; use letters, digits, '_', '-' and '.' (not "
            f"the last two first), up to {_LONGEST} bytes, no end in .part, and none of {', '.join(sorted(RESERVED))}"
        )
    return name


DomainName = Annotated[str, AfterValidator(check_domain)]


def load_streams(data: Path) -> list[dict[str, Any]]:
    """Read `Stream` arguments: of every domain of a prepared folder, or the entries of a streams.yaml.

    Those of a schedule.yaml have the samples of all its phases. A folder holds MDS folders or is one; every shard in
    it must belong to one of them.

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
    return [stream_arguments(entry, f"{path}, entry {number}") for number, entry in enumerate(entries)]


def stream_arguments(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the arguments of a `Stream` as given, once they were validated.

    Raises:
        UserError: one is unknown, or has a value that it cannot have.
    """
    try:
        return StreamArguments.model_validate(entry).model_dump(exclude_unset=True)
    except ValidationError as error:
        names = ", ".join(StreamArguments.model_fields)
        raise UserError(f"{where}: {first_problem(error)}; the arguments of a Stream are {names}") from None


def _folders(data: Path) -> list[Path]:
    """Find the MDS folders in a folder; the folder itself, where it is one and holds none.

    Raises:
        UserError: it is no folder, or part of what it holds would not be read.
    """
    if not data.is_dir():
        what = "is a file" if data.exists() else "does not exist"
        raise UserError(f"{data} {what}; expected a folder of MDS folders, a streams.yaml or a schedule.yaml")
    if data.name in ("", ".."):
        data = data.resolve()  # a stream is called by its folder
    # Both files mark a folder of ours: begun without an end means that streams may be missing.
    if (data / STARTED).exists() and not (data / MANIFEST).exists():
        raise UserError(f"{data} is not finished: run the command again that was writing it, to its end")
    index = data / "index.json"
    inner = [path.parent for path in sorted(data.glob("*/index.json"))]
    folders = inner or ([data] if index.exists() else [])
    named = {path for folder in folders for path in _named(folder)}
    # Shards without an index are data that a training would silently do without.
    unread = sorted(_shards(data) - named)
    if unread:
        raise UserError(
            f"{unread[0].parent} holds {unread[0].name}, which no index.json of {data} or of a folder in it names, as "
            "where a writer was stopped: write that stream again, move it away, or list the streams in a streams.yaml"
        )
    # A folder of MDS folders may have an index over all of them (`merge_indexes`); it must name nothing else.
    lost = sorted(_named(data) - named) if index.exists() and inner else []
    if lost:
        raise UserError(f"{index} names {lost[0]}, which is in none of the streams of {data}; restore it")
    return folders


def _named(folder: Path) -> set[Path]:
    """Collect the files that the index of an MDS folder names, compressed forms too."""
    pairs = [pair for reader in shard_readers(folder) for pair in reader.file_pairs]
    return {folder / info.basename for pair in pairs for info in pair if info is not None}


def _shards(folder: Path) -> set[Path]:
    """Find the MDS shards in a folder, and at any depth in its sub-folders."""
    # `rglob` in each child: a folder that is a link would not be entered from above.
    inner = [path for child in folder.iterdir() if child.is_dir() for path in child.rglob("*.mds*")]
    return {path for path in (*folder.glob("*.mds*"), *inner) if _SHARD.search(path.name)}


def find_tokenizer(data: Path, streams: list[dict[str, Any]], given: Path | None = None) -> Path | None:
    """Find the tokenizer of a stage's data: the given one, else what prepare or select left beside the streams.

    Args:
        data: folder, streams.yaml or schedule.yaml.
        streams: see `load_streams`.
        given: tokenizer that the user named.

    Raises:
        UserError: they differ, so that equal token ids mean different text.
    """
    folders = [data if data.is_dir() else data.parent, *(Path(stream["local"]).parent for stream in streams)]
    beside = [path for folder in dict.fromkeys(folders) if (path := folder / "tokenizer.json").exists()]
    tokenizers = [*([] if given is None else [tokenizer_file(given)]), *beside]
    for other in tokenizers[1:]:
        check_same_tokenizer(tokenizers[0], other, "of the data")
    return tokenizers[0] if tokenizers else None


def check_same_tokenizer(one: Path, other: Path, what: str) -> None:
    """Refuse two different tokenizers for the same token ids.

    Args:
        one: a tokenizer.json.
        other: another one.
        what: what `other` is the tokenizer of, for the error ("of the data").

    Raises:
        UserError: they differ, or one cannot be read.
    """
    # Equal bytes save loading both; files of other spacing or version may still be the same tokenizer.
    same = one.is_file() and other.is_file() and file_fingerprint(one) == file_fingerprint(other)
    if not same and load_tokenizer(one).to_str() != load_tokenizer(other).to_str():
        raise UserError(
            f"{one} is not the tokenizer {what}, {other}: token ids mean something else; use that one, or write the "
            f"data again with --tokenizer {other}"
        )


def domain_folders(streams: list[dict[str, Any]]) -> dict[str, Path]:
    """Map domain -> MDS folder: a folder names its domain, with its parent's name where names are equal.

    Raises:
        UserError: two streams would have the same name, or one has a name that no domain can have.
    """
    folders = [Path(stream["local"]) / (stream.get("split") or "") for stream in streams]
    # `en/web` and `de/web` become `en.web` and `de.web`.
    names = [folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{folder.parent.name}.{folder.name}" for folder in folders]
    if len(set(names)) < len(names):
        raise UserError(f"two streams are called {max(names, key=names.count)}; give their folders different names")
    return {check_domain(name, f" ({folder})"): folder for name, folder in zip(names, folders, strict=True)}
