"""Atomic replacement: a file or folder is on disk whole or not at all, also after a power loss."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from curate.core.errors import UserError
from curate.core.lock import is_locked_here

# Looked for in the messages of libraries.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside `path` to write to; on success it is renamed to `path`, on error removed.

    Works for files and for folders (a folder at `path` is replaced). The content is on disk before the new name is, and
    the name is on disk when this returns: what is written later never survives a power loss without it.

    Raises:
        OSError: of what could not be written, with its path.
    """
    temporary = _temporary_name(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(temporary)  # of a process that was killed
    try:
        yield temporary
        # The order matters: content, name, then the folder that holds the name.
        _flush(temporary)
        if temporary.is_dir() and path.is_dir():
            # `rename` replaces no folder that holds something.
            shutil.rmtree(path)
        temporary.replace(path)
        _flush_one(path.parent)
    except Exception as error:
        _remove(temporary)
        failure = _write_failure(error, path, temporary)
        if failure is None:
            raise
        raise failure from error
    except BaseException:  # a signal: its error is kept as it is
        _remove(temporary)
        raise


def _temporary_name(path: Path) -> Path:
    """Choose the temporary name for `path`: none that a user may give, nor one of another process.

    Under a lock it is always the same, so the next holder of the lock writes over what a killed process left.
    """
    token = "" if is_locked_here(path) else f".{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}{token}.part")


def _flush(path: Path) -> None:
    """Wait until a file, or everything below a folder, is on disk."""
    # From below: a folder's entries last, after what they point to. Of a file `os.walk` yields nothing.
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


def _write_failure(error: Exception, path: Path, temporary: Path) -> OSError | None:
    """Return the system's error while `temporary` was written, with the path; None for other errors.

    Libraries raise it as their own exceptions, or without the path.
    """
    if isinstance(error, UserError):
        return None
    failed = error.filename if isinstance(error, OSError) else None
    if isinstance(failed, str) and not Path(failed).is_relative_to(temporary):
        return None  # of something that was read
    number = (error.errno if isinstance(error, OSError) else None) or _errno_in(str(error))
    return None if number is None else OSError(number, os.strerror(number), str(path))


def _errno_in(message: str) -> int | None:
    """Find the system's error in a message of Rust ("os error 28"), C++ ("No space left on device") or NumPy."""
    if match := re.search(r"os error (\d+)", message):
        return int(match[1])
    if re.search(r"\d+ requested and \d+ written", message):
        # NumPy says only how many items it could write.
        return errno.ENOSPC
    return next((number for number in _FULL if os.strerror(number) in message), None)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
