"""What makes a file or folder on disk trustworthy: atomic replacement, a manifest with a fingerprint, a list of hashes.

A folder artifact is complete exactly when it holds `manifest.json`, which is written last. The manifest names the
settings and the parents (fingerprints) that it was made from; asked for again with the same settings it is reused,
with others it is refused with the settings that differ. Nothing in a manifest depends on the time or the machine.

`curate.sums.json` lists size and hash of the files beside and below it, as they were written (`list_files`,
`finalize`). `checked` compares a file with the list that names it before its content is used; files that no list names
are taken as they are. One rule: a file that is not what its list says is refused and named, never repaired in silence.
What is missing and can be made from the rest is made again. See docs/integrity.md.
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
from curate.core.writing import atomic_write

MANIFEST = "manifest.json"
SUMS = "curate.sums.json"
STARTED = "settings.json"
SCRATCH = "scratch"
SIGN = "positive = removing the sample would raise the target's loss = the sample helped"
# Packages that can change a number of a result.
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "polars", "mosaicml-streaming", "transformers")

_LEVELS = 4  # folders above a file that may list it
_CHUNK = 1 << 20  # bytes read at once while hashing
# Key of the hash that a JSON file holds of itself.
_HASH = "hash"
# Folder of a tracker, whose logs still grow when the artifact beside it is complete.
_TRACKER = "wandb"

Json = Mapping[str, Any]
Sum = tuple[int, str]
"""Bytes of a file, and their xxh3_128."""

State = tuple[int, int, int]
"""What changes when a file is written or replaced: inode, bytes, time of the last change in ns."""

# Lists that this process read, by folder, and hashes that it computed: each file is read once for its check.
_lists: dict[Path, tuple[State, dict[str, Sum]]] = {}
_hashes: dict[tuple[Path, State], str] = {}


def write_json(path: Path, value: Json) -> None:
    """Replace `path` atomically with `value` as indented JSON, keys in the order given."""
    with atomic_write(path) as temporary:
        temporary.write_text(_text(value), encoding="utf-8")


def _text(value: Json) -> str:
    text = json.dumps(value, indent=2) + "\n"
    # `\ud...` is half of a surrogate pair, or of a whole one; only encoding tells which.
    if "\\ud" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            excerpt = error.object[max(error.start - 80, 0) : error.end + 20]
            raise UserError(f"{excerpt!r} is not UTF-8 and cannot be kept in JSON; rename the file or folder") from None
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
    """Write a JSON file that changes often: it holds its own hash, so that no list has to follow it."""
    write_json(path, {**value, _HASH: fingerprint(value)})


def read_hashed(path: Path) -> dict[str, Any]:
    """Read what `write_hashed` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    return _without_hash(path, read_json(path))


def _without_hash(path: Path, value: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a hashed file, once its hash was compared."""
    if value.pop(_HASH, None) != fingerprint(value):
        raise UserError(f"{path} is corrupted or was changed after it was written: {remedy_of(path.parent)}")
    return value


def fingerprint(value: Any) -> str:
    """Hash the canonical JSON of `value` to 16 hex digits: equal settings have equal fingerprints."""
    # Sorted keys and no spaces: neither the order of settings nor the writer changes it. Paths become text.
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def file_fingerprint(path: Path) -> str:
    """Hash a file's bytes to 16 hex digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


def hash_of(data: bytes) -> str:
    """Hash bytes with xxh3_128, in hex digits."""
    return xxhash.xxh3_128_hexdigest(data)


def sum_of(path: Path) -> Sum:
    """Return size and hash of a file, which is read once."""
    digest, buffer = xxhash.xxh3_128(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return path.stat().st_size, digest.hexdigest()


def list_files(folder: Path, paths: Iterable[Path], *, sums: Mapping[str, Sum] | None = None) -> None:
    """Add files to the list of a folder, or renew their entries; call it once they are written.

    Args:
        folder: folder of the list; the files lie in it or below.
        paths: the files.
        sums: size and hash of files that do not exist yet, by their path in the folder.
    """
    new = {path.relative_to(folder).as_posix(): sum_of(path) for path in paths} | dict(sums or {})
    with locked(folder, f".{SUMS}.lock", wait=True):  # another process may list other files of the folder
        write_hashed(folder / SUMS, {"files": dict(sorted({**listed(folder), **new}.items()))})


def listed(folder: Path) -> dict[str, Sum]:
    """Read the files that a folder lists, by path; empty where it has no list.

    Raises:
        UserError: the list is damaged.
    """
    path = folder / SUMS
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    state = _state(status)
    read_before = _lists.get(folder)
    if read_before is None or read_before[0] != state:
        # `_parsed`, not `read_json`: that would look for the list in a list, without end.
        files = _without_hash(path, _parsed(path))["files"]
        read_before = _lists[folder] = state, {name: (size, digest) for name, (size, digest) in files.items()}
    return read_before[1]


def checked(path: Path, by: Path | None = None, *, remedy: str | None = None) -> Path:
    """Return a path once its file was compared with the list that names it, if one does.

    A file is hashed once in a process, and again when its size or time changed.

    Args:
        path: the file.
        by: folder that must list it; None: the nearest one above that does, if any.
        remedy: what to do where it is damaged, if not what its folder suggests.

    Raises:
        UserError: it is not what the list says, is missing although a list names it, or has to be listed and is not.
    """
    # A run may lie in a folder of runs, and its windows in it: the nearest list that names the file counts.
    folders = [by] if by is not None else list(path.absolute().parents)[:_LEVELS]
    for folder in folders:
        # The name as written, links not resolved: lists hold paths below their own folder.
        name = (path if by is not None else path.absolute()).relative_to(folder).as_posix()
        wanted = listed(folder).get(name)
        if wanted is not None:
            _compare(path, wanted, remedy or remedy_of(folder))
            return path
    if by is not None:
        if not (by / SUMS).exists():
            raise UserError(f"{by / SUMS}, which lists what was written, is missing: {remedy_of(by)}")
        what = "is missing" if not path.exists() else f"is not in {by / SUMS}, which lists what was written"
        raise UserError(f"{path} {what}: {remedy or remedy_of(by)}")
    return path


def check_sizes(folder: Path) -> None:
    """Check that all files of a folder's list exist and have the size that they had; reads no content.

    Raises:
        UserError: one is not.
    """
    for name, wanted in listed(folder).items():
        _compare_size(folder / name, wanted, remedy_of(folder))


def check_contents(folder: Path) -> None:
    """Compare every file of a folder with its list; reads all that this process did not read yet.

    Raises:
        UserError: one is not what was written.
    """
    for name, wanted in listed(folder).items():
        _compare(folder / name, wanted, remedy_of(folder))


def _compare(path: Path, wanted: Sum, remedy: str) -> None:
    # The size first: it needs no reading, and its message says more.
    status = _compare_size(path, wanted, remedy)
    # The state is in the key, so a file that was replaced since is hashed again.
    key = path.absolute(), _state(status)
    if key not in _hashes:
        _hashes[key] = sum_of(path)[1]
    if _hashes[key] != wanted[1]:
        raise UserError(f"{path} is corrupted or was changed after it was written: {remedy}")


def _compare_size(path: Path, wanted: Sum, remedy: str) -> os.stat_result:
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
    """Say what to do about a damaged file of a folder."""
    if (folder / MANIFEST).exists():
        return f"restore it, or delete {folder} and run the same command again"
    # A run has no manifest, and what a training wrote no command can write again.
    if (folder / "run.json").exists():
        return "restore it, or train the stage again in another folder"
    return "restore it, or delete it and run the command that wrote it again"


def folder_bytes(folder: Path) -> int:
    """Sum the bytes of all files below a folder; 0 where none exists."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def versions() -> dict[str, str]:
    """Look up the installed versions of the packages that can change a number."""
    installed = {}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except ModuleNotFoundError:
            continue
    return installed


def finalize(folder: Path, kind: str, settings: Json, *, parts: Iterable[str] = ("*",), **facts: Any) -> None:
    """List the files of `folder`, then write the manifest that makes it complete.

    Args:
        folder: the artifact.
        kind: what it is, e.g. "embeddings".
        settings: everything that its content depends on, parents' fingerprints included (JSON values).
        parts: glob patterns of what belongs to it, where the folder may hold other things too.
        facts: results worth knowing that were no input (counts, recall, residuals; no times).
    """
    manifest = {"kind": kind, "fingerprint": fingerprint(settings), "sign": SIGN, "settings": dict(settings)}
    text = _text({**manifest, **facts, "versions": versions()})
    # A pattern may name a folder; all files below it belong to the artifact.
    matches = {match for pattern in parts for match in folder.glob(pattern)}
    below = {path for match in matches for path in (match, *match.rglob("*"))}
    paths = [path for path in below if path.is_file() and not _passing(path.relative_to(folder))]
    # The list is made anew, without what an earlier attempt listed. It holds the manifest's hash before the manifest is
    # there: the manifest makes the folder complete, so nothing may be written after it.
    (folder / SUMS).unlink(missing_ok=True)
    list_files(folder, paths, sums={MANIFEST: (len(text.encode()), hash_of(text.encode()))})
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _passing(path: Path) -> bool:
    """Whether a file is no part of an artifact: its list and manifest, locks, a tracker's log, leftovers of a job."""
    unfinished = any(part == SCRATCH or part.endswith(".part") for part in path.parts)
    is_log = path.parts[0] == _TRACKER
    return unfinished or is_log or path.as_posix() in (SUMS, MANIFEST) or path.name.endswith(LOCK)


def is_complete(folder: Path, settings: Json) -> bool:
    """Whether `folder` holds a complete artifact made with exactly `settings`; False where none exists yet.

    It checks that all files exist in their size; contents are compared with their hashes where they are read.

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
    """Hold the lock of an artifact while it is made; yields whether it is still to be made.

    Where another process makes it, this one waits and uses what that one made. A complete artifact needs no lock.

    Raises:
        UserError: see `is_complete`.
        OSError: nothing can be written there.
    """
    if is_complete(folder, settings):
        sweep(folder)
        yield False
        return
    with locked(folder, wait=True):
        # Asked again: whoever held the lock may have made it meanwhile.
        yield not is_complete(folder, settings)


def begin(folder: Path, settings: Json) -> None:
    """Begin an artifact of several files, or continue it after an interruption; `settings.json` marks it.

    Raises:
        UserError: see `check_can_begin`.
    """
    check_can_begin(folder, settings)
    write_json(folder / STARTED, settings)


def check_can_begin(folder: Path, settings: Json) -> None:
    """Check, before any long work, that `begin` would succeed.

    Raises:
        UserError: the folder holds something else, or was started with other settings (names those that differ).
    """
    if (folder / STARTED).exists():
        _same_settings(folder, "was started", read_json(folder / STARTED), settings)
    elif folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir())):
        raise UserError(f"{folder} exists and was not made by this command; choose another output folder")


def _same_settings(folder: Path, how: str, stored: Json, settings: Json) -> None:
    # Through JSON and back, as the stored ones went: tuples become lists, paths text.
    wanted = json.loads(json.dumps(dict(settings), default=str))
    differing = [
        f"{key}: {stored.get(key)!r} there, {wanted.get(key)!r} now"
        for key in sorted({*stored, *wanted})
        if stored.get(key) != wanted.get(key)
    ]
    if differing:
        raise UserError(
            f"{folder} {how} with other settings ({'; '.join(differing)}); "
            "choose another output folder, or delete it to make it again"
        )
