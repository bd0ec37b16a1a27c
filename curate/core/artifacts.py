"""What makes a file or folder on disk trustworthy: atomic replacement, a manifest with a fingerprint, a list of hashes.

A folder artifact is complete exactly when it holds `manifest.json`, which is written last. The manifest names the
settings and the parents (fingerprints) that it was made from; asked for again with the same settings it is reused,
with others it is refused with the settings that differ. Nothing in a manifest depends on the time or the machine.

`curate.sums.json` lists size and hash of the files beside and below it, as they were written (`list_files`, `seal`).
`checked` holds a file against the list that names it before its content is used; files that no list names are taken as
they are. One rule: a file that is not what its list says is refused and named, never mended in silence. What is missing
and can be made from the rest is made again. See docs/integrity.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import xxhash

from curate.core.errors import UserError
from curate.core.lock import LOCK, locked, sweep
from curate.core.reading import parse_json, read_text
from curate.core.writing import replacing

MANIFEST = "manifest.json"
SUMS = "curate.sums.json"
STARTED = "settings.json"
SCRATCH = "scratch"
SIGN = "positive = removing the sample would raise the target's loss = the sample helped"
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "polars", "mosaicml-streaming", "transformers")

_LEVELS = 4  # folders above a file that may list it
_CHUNK = 1 << 20
_HASH = "hash"  # of a JSON file, in itself
_TRACKER = "wandb"  # folder whose logs still grow when the artifact beside it is complete

Json = Mapping[str, Any]
Sum = tuple[int, str]
"""Bytes of a file, and their xxh3_128."""

State = tuple[int, int, int]
"""What changes when a file is written or replaced: its place on disk, its size, its time."""

_lists: dict[Path, tuple[State, dict[str, Sum]]] = {}  # what this process read, by folder
_hashes: dict[tuple[Path, State], str] = {}  # that this process computed


def write_json(path: Path, value: Json) -> None:
    """Replace `path` atomically with `value` as indented JSON, keys in the order given."""
    with replacing(path) as part:
        part.write_text(_text(value), encoding="utf-8")


def _text(value: Json) -> str:
    text = json.dumps(value, indent=2) + "\n"
    if "\\ud" in text:  # halves of pairs among the escapes
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:  # nobody could read it again
            told = error.object[max(error.start - 80, 0) : error.end + 20]
            raise UserError(f"{told!r} is not UTF-8 and cannot be kept in JSON; rename the file or folder") from None
    return text


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing, is not what its list says, or is not a JSON object.
    """
    return _parsed(checked(path))


def _parsed(path: Path) -> dict[str, Any]:
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except UserError as error:
        raise UserError(f"{error}: it was truncated or edited by hand; restore it") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_hashed(path: Path, value: Json) -> None:
    """`write_json` of a file that is written again and again: its hash stands in it."""
    write_json(path, {**value, _HASH: fingerprint(value)})


def read_hashed(path: Path) -> dict[str, Any]:
    """What `write_hashed` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _own_hash(path, read_json(path))


def _own_hash(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    if value.pop(_HASH, None) != fingerprint(value):
        raise UserError(f"{path} is corrupted or was changed after it was written: {remedy_of(path.parent)}")
    return value


def fingerprint(value: Any) -> str:
    """16 hex digits of the canonical JSON of `value`: equal settings, equal fingerprint."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def hash_of(data: bytes) -> str:
    """The xxh3_128 of some bytes."""
    return xxhash.xxh3_128_hexdigest(data)


def sum_of(path: Path) -> Sum:
    """Size and hash of a file, read once."""
    state, digest = xxhash.xxh3_128(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(digest):
            state.update(memoryview(digest)[:count])
    return path.stat().st_size, state.hexdigest()


def list_files(folder: Path, paths: Iterable[Path], *, sums: Mapping[str, Sum] | None = None) -> None:
    """Add files to the list of a folder, or renew what it says of them; call it when they are written.

    Args:
        folder: theirs, or one above it.
        paths: the files.
        sums: of files that are not yet there, by their name in the folder.
    """
    new = {path.relative_to(folder).as_posix(): sum_of(path) for path in paths} | dict(sums or {})
    with locked(folder, f".{SUMS}.lock", wait=True):  # another process may list other files of the folder
        write_hashed(folder / SUMS, {"files": dict(sorted({**listed(folder), **new}.items()))})


def listed(folder: Path) -> dict[str, Sum]:
    """The files that a folder lists, by name; none where it has no list.

    Raises:
        UserError: the list is damaged.
    """
    path = folder / SUMS
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    state = _state(status)
    known = _lists.get(folder)
    if known is None or known[0] != state:
        files = _own_hash(path, _parsed(path))["files"]
        known = _lists[folder] = state, {name: (size, digest) for name, (size, digest) in files.items()}
    return known[1]


def checked(path: Path, by: Path | None = None, *, remedy: str | None = None) -> Path:
    """A file that may be read: where a list above it names it, it is what was written.

    A file is hashed once in a process, and again when its size or time changed.

    Args:
        path: the file.
        by: folder that must list it; none: the nearest one above that does, if any.
        remedy: what to do where it is damaged, if not what its folder suggests.

    Raises:
        UserError: it is not what the list says, is missing although a list names it, or has to be listed and is not.
    """
    folders = [by] if by is not None else list(path.absolute().parents)[:_LEVELS]
    for folder in folders:
        name = (path if by is not None else path.absolute()).relative_to(folder).as_posix()
        wanted = listed(folder).get(name)
        if wanted is not None:
            _hold(path, wanted, remedy or remedy_of(folder))
            return path
    if by is not None:
        if not (by / SUMS).exists():
            raise UserError(f"{by / SUMS}, which lists what was written, is missing: {remedy_of(by)}")
        what = "is missing" if not path.exists() else f"is not in {by / SUMS}, which lists what was written"
        raise UserError(f"{path} {what}: {remedy or remedy_of(by)}")
    return path


def check_sizes(folder: Path) -> None:
    """Ask whether all files of a folder's list are there and have the size that they had; reads no content.

    Raises:
        UserError: one is not.
    """
    for name, wanted in listed(folder).items():
        _size(folder / name, wanted, remedy_of(folder))


def check_contents(folder: Path) -> None:
    """Hold every file of a folder against its list; reads all that this process did not read yet.

    Raises:
        UserError: one is not what was written.
    """
    for name, wanted in listed(folder).items():
        _hold(folder / name, wanted, remedy_of(folder))


def _hold(path: Path, wanted: Sum, remedy: str) -> None:
    status = _size(path, wanted, remedy)
    key = path.absolute(), _state(status)
    if key not in _hashes:
        _hashes[key] = sum_of(path)[1]
    if _hashes[key] != wanted[1]:
        raise UserError(f"{path} is corrupted or was changed after it was written: {remedy}")


def _size(path: Path, wanted: Sum, remedy: str) -> os.stat_result:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {remedy}") from None
    if status.st_size != wanted[0]:
        raise UserError(f"{path} is corrupted: it has {status.st_size:,} bytes, {wanted[0]:,} were written; {remedy}")
    return status


def _state(status: os.stat_result) -> State:
    return status.st_ino, status.st_size, status.st_mtime_ns


def remedy_of(folder: Path) -> str:
    """What to do about a damaged file of a folder."""
    if (folder / MANIFEST).exists():
        return f"restore it, or delete {folder} and run the same command again"
    if (folder / "run.json").exists():
        return "restore it, or train the stage again in another folder"
    return "restore it, or delete it and run the command that wrote it again"


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def versions() -> dict[str, str]:
    """The installed versions of the packages that can change a number."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def seal(folder: Path, kind: str, settings: Json, *, parts: Iterable[str] = ("*",), **facts: Any) -> None:
    """List the files of `folder` and write the manifest that makes it complete.

    Args:
        folder: the artifact.
        kind: what it is, e.g. "embeddings".
        settings: everything that its content depends on, parents' fingerprints included (JSON values).
        parts: patterns of what belongs to it, where other things may lie beside.
        facts: what is worth knowing and was not an input (counts, recall, residuals; no times).
    """
    manifest = {"kind": kind, "fingerprint": fingerprint(settings), "sign": SIGN, "settings": dict(settings)}
    text = _text({**manifest, **facts, "versions": versions()})
    tops = {top for part in parts for top in folder.glob(part)}
    below = {path for top in tops for path in (top, *top.rglob("*"))}
    paths = [path for path in below if path.is_file() and not _passing(path.relative_to(folder))]
    (folder / SUMS).unlink(missing_ok=True)
    list_files(folder, paths, sums={MANIFEST: (len(text.encode()), hash_of(text.encode()))})
    with replacing(folder / MANIFEST) as part:
        part.write_text(text, encoding="utf-8")


def _passing(path: Path) -> bool:
    """Whether a file is no part of an artifact: its list and manifest, locks, a tracker's log, leftovers of a job."""
    left = any(part == SCRATCH or part.endswith(".part") for part in path.parts)
    return left or path.parts[0] == _TRACKER or path.as_posix() in (SUMS, MANIFEST) or path.name.endswith(LOCK)


def is_complete(folder: Path, settings: Json) -> bool:
    """Whether `folder` holds a complete artifact made with exactly `settings`; False where there is none yet.

    Contents are held against their hashes where they are read; here that all files are there, in their size.

    Raises:
        UserError: it is complete but was made with other settings (the message names those that differ), or a file of
            it is missing or has another size.
    """
    if not (folder / MANIFEST).exists():
        return False
    manifest = _parsed(checked(folder / MANIFEST, by=folder))
    _same_settings(folder, "is complete but was made", manifest.get("settings", {}), settings)
    check_sizes(folder)
    return True


@contextmanager
def making(folder: Path, settings: Json) -> Iterator[bool]:
    """Hold the lock of an artifact that is not complete; yields whether it is still to be made.

    Where another process makes it, wait for it and use what it made.

    Raises:
        UserError: see `is_complete`.
        OSError: nothing can be written there.
    """
    if is_complete(folder, settings):
        sweep(folder)
        yield False
        return
    with locked(folder, wait=True):
        yield not is_complete(folder, settings)


def start(folder: Path, settings: Json) -> None:
    """Start an artifact that takes several files, or continue it after an interruption; `settings.json` marks it.

    Raises:
        UserError: see `check_startable`.
    """
    check_startable(folder, settings)
    write_json(folder / STARTED, settings)


def check_startable(folder: Path, settings: Json) -> None:
    """Ask, before any long work, whether `start` would succeed.

    Raises:
        UserError: the folder holds something else, or was started with other settings (names those that differ).
    """
    if (folder / STARTED).exists():
        _same_settings(folder, "was started", read_json(folder / STARTED), settings)
    elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UserError(f"{folder} exists and was not made by this command; choose another output folder")


def _same_settings(folder: Path, how: str, found: Json, settings: Json) -> None:
    wanted = json.loads(json.dumps(dict(settings), default=str))
    differing = [
        f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]
    if differing:
        raise UserError(
            f"{folder} {how} with other settings ({'; '.join(differing)}); "
            "choose another output folder, or delete it to make it again"
        )
