"""Locks: one process at a time writes an artifact.

A lock is a file, `.lock`, in the artifact's folder. The kernel releases it when the last process that holds it ends,
however it ends, so no lock is ever stale. Its text says who holds it; it is removed when it is released.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from curate.core.errors import UserError

_log = logging.getLogger(__name__)
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system that has none


class BusyError(UserError):
    """Another process holds the lock."""


@dataclass
class _Held:
    """A lock file that this process has open.

    Attributes:
        descriptor: of the open file.
        count: `Lock` objects that share it.
        made_folder: whether the folder was made for the lock.
    """

    descriptor: int
    count: int
    made_folder: bool


# By lock file. The kernel's lock belongs to the open file, so a second `os.open` in the same process would wait for
# itself; a `Lock` on the same path shares the descriptor instead.
_held: dict[Path, _Held] = {}


class Lock:
    """The lock of an artifact, held until `release`, until nothing refers to it any more or until the process ends.

    A process that holds it gets it again. Processes that it forks do not hold it; a program that it starts does where
    it is given the descriptor (`pass_fds`), and holds it as long as it runs.

    Args:
        folder: the artifact; it is made where it is missing, and removed again where it stays empty.
        name: of the lock file.
        wait: whether to wait, which is said, for a process that holds it.

    Raises:
        BusyError: another process holds it; the message says which.
        OSError: nothing can be written there.
    """

    def __init__(self, folder: Path, name: str = LOCK, *, wait: bool = False) -> None:
        self._path = folder.resolve() / name
        if self._path not in _held:
            _close_in_forks()
            _held[self._path] = _open(self._path, wait=wait)
            self.say(f"process {os.getpid()}")
        _held[self._path].count += 1
        # Runs once: when it is called, when the Lock is collected, or at exit.
        self.release = weakref.finalize(self, _release, self._path, os.getpid())

    @property
    def descriptor(self) -> int:
        """The open file, for `pass_fds`."""
        return _held[self._path].descriptor

    def say(self, holder: str) -> None:
        """Write who holds the lock, for whoever wants it meanwhile."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"{holder} on {socket.gethostname()}".encode(), 0)


@contextmanager
def locked(folder: Path, name: str = LOCK, *, wait: bool = False) -> Iterator[Lock]:
    """Hold a `Lock` while the block runs.

    Raises:
        BusyError, OSError: see `Lock`.
    """
    lock = Lock(folder, name, wait=wait)
    try:
        yield lock
    finally:
        lock.release()


def sweep(folder: Path, name: str = LOCK) -> None:
    """Remove the lock file that a killed process left beside complete work; one that is held stays."""
    if (folder / name).exists():
        with suppress(BusyError, OSError), locked(folder, name):
            pass


def is_locked_here(path: Path) -> bool:
    """Whether this process holds the lock of a folder that `path` lies in."""
    parents = path.resolve().parents
    # A copy, as another thread may release a lock meanwhile.
    return any(lock.parent in parents for lock in tuple(_held))


def _open(path: Path, *, wait: bool) -> _Held:
    while True:
        made_folder = not path.parent.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # released in between, and its folder removed
            continue
        try:
            _acquire(descriptor, path, wait=wait)
            # The holder unlinks the file when it releases, so what was locked may no longer be the file at `path`.
            if _is_at(descriptor, path):
                return _Held(descriptor, 0, made_folder)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, *, wait: bool) -> None:
    # `flock`, not `fcntl.lockf`: the latter is lost as soon as the process closes any descriptor of the file.
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace") or "another process"
        if not wait:
            raise BusyError(
                f"{path.parent} is in use by {holder}: wait until it has ended, or choose another folder"
            ) from None
        _log.info("waiting for %s, which works on %s", holder, path.parent)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # Better without a lock than not at all: some network file systems have none.
        _log.warning("%s cannot be locked (%s): let no second process write there", path.parent, error.strerror)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _release(path: Path, process: int) -> None:
    held = _held.get(path)
    # In a fork the finalizers run too, but the lock is the parent's.
    if held is None or process != os.getpid():
        return
    held.count -= 1
    if held.count:
        return
    del _held[path]
    with suppress(OSError):  # before it is released: whoever waits for the removed file tries again
        path.unlink()
    if held.made_folder:
        with suppress(OSError):  # not empty, as a rule: then it holds the artifact
            path.parent.rmdir()
    os.close(held.descriptor)


@cache
def _close_in_forks() -> None:
    """Close the lock files in forked workers, which may outlive their parent and would go on holding its locks."""
    os.register_at_fork(after_in_child=_close_all)


def _close_all() -> None:
    while _held:
        os.close(_held.popitem()[1].descriptor)
