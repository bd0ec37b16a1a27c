"""What makes a file or folder on disk trustworthy: atomic replacement and a manifest with a fingerprint.

A folder artifact is complete exactly when it holds `manifest.json`, which is written last. The manifest names the
settings and the parents (fingerprints) that it was made from; asked for again with the same settings it is reused,
with others it is refused with the settings that differ. Nothing in a manifest depends on the time or the machine.
"""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import UserError
from curate.lock import LOCK, is_locked_here, locked, sweep

MANIFEST = "manifest.json"
STARTED = "settings.json"
SIGN = "positive = removing the sample would raise the target's loss = the sample helped"
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "polars", "mosaicml-streaming", "transformers")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Json = Mapping[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path` to write to; on success it is renamed to `path`, on error removed.

    Works for files and for folders (a folder that stands at `path` is replaced). All that was written is on disk before
    the new name is, and the name when this returns: what is written later never survives a power loss without it.

    Raises:
        OSError: of what could not be written, with its path.
    """
    part = _part_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    try:
        yield part
        _flush(part)
        if part.is_dir() and path.is_dir():
            shutil.rmtree(path)
        part.replace(path)
        _flush_one(path.parent)
    except Exception as error:
        _remove(part)
        failure = _write_failure(error, path, part)
        if failure is None:
            raise
        raise failure from error
    except BaseException:
        _remove(part)
        raise


def write_json(path: Path, value: Json) -> None:
    """Replace `path` atomically with `value` as indented JSON, keys in the order given."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it was truncated or edited by hand") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}, expected a JSON object")
    return value


def write_arrays(path: Path, arrays: Mapping[str, npt.ArrayLike]) -> None:
    """Replace `path` atomically with an npz of named arrays."""
    with replacing(path) as part, part.open("wb") as file:
        np.savez(file, **dict(arrays))


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """What `write_arrays` wrote; nothing is unpickled."""
    with np.load(path) as stored:
        return {name: stored[name] for name in stored.files}


def create_memmap(path: Path, shape: tuple[int, int]) -> np.memmap[Any, Any]:
    """A new file of float32 zeros in memory, with its place on the disk: writing to it cannot find the disk full.

    Raises:
        OSError: there is no space for it.
    """
    with replacing(path) as part:
        np.lib.format.open_memmap(part, "w+", np.float32, shape)
        with part.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
    created: np.memmap[Any, Any] = np.lib.format.open_memmap(path, "r+")
    return created


def fingerprint(value: Any) -> str:
    """16 hex digits of the canonical JSON of `value`: equal settings, equal fingerprint."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(canonical.encode(), digest_size=8).hexdigest()


def file_fingerprint(path: Path) -> str:
    """16 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()


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


def seal(folder: Path, kind: str, settings: Json, **facts: Any) -> None:
    """Write the manifest that makes `folder` complete.

    Args:
        folder: the artifact.
        kind: what it is, e.g. "embeddings".
        settings: everything that its content depends on, parents' fingerprints included (JSON values).
        facts: what is worth knowing and was not an input (counts, recall, residuals; no times).
    """
    manifest = {"kind": kind, "fingerprint": fingerprint(settings), "sign": SIGN, "settings": dict(settings)}
    write_json(folder / MANIFEST, {**manifest, **facts, "versions": versions()})


def is_complete(folder: Path, settings: Json) -> bool:
    """Whether `folder` holds a complete artifact made with exactly `settings`; False where there is none yet.

    Raises:
        UserError: it is complete but was made with other settings; the message names those that differ.
    """
    if not (folder / MANIFEST).exists():
        return False
    _same_settings(folder, "is complete but was made", read_json(folder / MANIFEST).get("settings", {}), settings)
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


def _part_of(path: Path) -> Path:
    """Where what is to stand at `path` is written: no name that a user may give, nor one of another process.

    Under a lock it is always the same, so that the next process that holds the lock writes over what a killed one left.
    """
    token = "" if is_locked_here(path) else f".{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}{token}.part")


def _flush(path: Path) -> None:
    """Wait until a file, or all that lies below a folder, is on disk."""
    for folder, _, files in os.walk(path, topdown=False):
        for name in files:
            _flush_one(Path(folder) / name)
        _flush_one(Path(folder))
    if path.is_file():
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that has no fsync of folders
            raise
    finally:
        os.close(descriptor)


def _write_failure(error: Exception, path: Path, part: Path) -> OSError | None:
    """What the system refused while `part` was written, with the path; None for other errors.

    Libraries say it in their own exceptions, or without the path.
    """
    if isinstance(error, UserError):
        return None
    place = error.filename if isinstance(error, OSError) else None
    if isinstance(place, str) and not Path(place).is_relative_to(part):
        return None  # of something that was read
    number = (error.errno if isinstance(error, OSError) else None) or _errno_in(str(error))
    return None if number is None else OSError(number, os.strerror(number), str(path))


def _errno_in(message: str) -> int | None:
    """The system's error in a message of Rust ("os error 28"), of C++ ("No space left on device") or of NumPy."""
    if match := re.search(r"os error (\d+)", message):
        return int(match[1])
    if re.search(r"\d+ requested and \d+ written", message):
        return errno.ENOSPC
    return next((number for number in _FULL if os.strerror(number) in message), None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
