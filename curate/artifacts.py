"""What makes a file or folder on disk trustworthy: atomic replacement and a manifest with a fingerprint.

A folder artifact is complete exactly when it holds `manifest.json`, which is written last. The manifest names the
settings and the parents (fingerprints) that it was made from; asked for again with the same settings it is reused,
with others it is refused with the settings that differ. Nothing in a manifest depends on the time or the machine.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from curate.errors import UserError
from curate.reading import parse_json, read_text

MANIFEST = "manifest.json"
STARTED = "settings.json"
SIGN = "positive = removing the sample would raise the target's loss = the sample helped"
_PACKAGES = ("torch", "numpy", "faiss-cpu", "faiss-gpu", "polars", "mosaicml-streaming", "transformers")

Json = Mapping[str, Any]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield `path` + ".part" to write to; on success it is flushed to disk and renamed to `path`, on error removed.

    Works for files and for folders (a folder that stands at `path` is replaced).
    """
    part = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(part)
    try:
        yield part
        if part.is_file():
            _flush(part)
        elif path.is_dir():
            shutil.rmtree(path)
        part.replace(path)
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
    text = read_text(path)
    try:
        value = parse_json(text, str(path))
    except UserError as error:
        raise UserError(f"{error}; it was truncated or edited by hand") from None
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
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
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


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
