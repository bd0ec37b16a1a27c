"""Shared memory of StreamingDataset: names that two trainings race for, and names that nobody frees."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from tempfile import gettempdir
from time import sleep
from typing import TYPE_CHECKING, TypeVar

from curate.core.errors import UserError

if TYPE_CHECKING:
    from streaming import StreamingDataset

Dataset = TypeVar("Dataset", bound="StreamingDataset")

_ATTEMPTS = 50  # at a name in shared memory

# Names are a six-digit number, counted up from 0, and what the block holds (streaming.base.constant).
_NAME = re.compile(r"\d{6}_(barrier|cache_usage|locals|next_epoch|resume|shard_access_times|shard_states)")


def construct(make: Callable[[], Dataset]) -> Dataset:
    """Make a `StreamingDataset` and its `Stream`s; try again where another process took its name in shared memory.

    Streaming looks for a free name and takes it later, so two trainings that start together on one machine can collide.
    With several ranks the error is raised: the others already wait for this one.

    Raises:
        UserError: no name can be had, time after time.
    """
    for attempt in range(_ATTEMPTS):
        try:
            return make()
        except FileExistsError as error:
            if not str(error.filename).endswith("_locals") or int(os.environ.get("WORLD_SIZE", "1")) > 1:
                raise
            # Longer each time, so that two processes fall out of step.
            sleep(0.001 * attempt)
    raise UserError(
        "streaming finds no free name in shared memory, where a training that was killed left some: call "
        "streaming.base.util.clean_stale_shared_memory() while no other training runs on this machine"
    )


def release(dataset: StreamingDataset) -> None:
    """Free the names in shared memory, and the lock files, of a dataset that no rank uses any more.

    Streaming frees the names when the process ends, and the files never. Until then each new dataset attaches to all
    existing ones and keeps their file descriptors: a process that opens 140 datasets runs out of 20,000.
    """
    from streaming.base import constant
    from streaming.base.shared import _get_path

    # Taken out of the dataset: a second call must not free the names, which another dataset may have by then.
    prefix = vars(dataset).pop("_shm_prefix_int", -1)
    if prefix < 0:
        return
    blocks = ("BARRIER", "CACHE_USAGE", "LOCALS", "NEXT_EPOCH", "RESUME", "SHARD_ACCESS_TIMES", "SHARD_STATES")
    for block in blocks:
        with suppress(FileNotFoundError):
            memory = SharedMemory(_get_path(prefix, getattr(constant, block)))
            memory.close()
            memory.unlink()
    for lock_file in ("BARRIER_FILELOCK", "CACHE_FILELOCK"):
        (Path(gettempdir()) / _get_path(prefix, getattr(constant, lock_file))).unlink(missing_ok=True)


def sweep(folder: Path = Path("/dev/shm")) -> int:  # noqa: S108 - where streaming puts them
    """Remove names in shared memory that killed processes left; returns how many.

    Every new dataset attaches to all existing names: after a hundred killed trainings it runs out of file descriptors.
    It removes only names of this user that no visible process has open; call it where no other container shares them.
    """
    names = (path for path in folder.glob("[0-9]*_*") if _NAME.fullmatch(path.name))
    of_this_user = [path for path in names if path.stat().st_uid == os.getuid()]
    in_use = set()
    # A process may end while its descriptors are listed, and others' cannot be read.
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            in_use.add(str(link.readlink()))
    stale = [path for path in of_this_user if str(path) not in in_use]
    for path in stale:
        path.unlink(missing_ok=True)
    return len(stale)
