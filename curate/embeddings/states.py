"""The states of a range of steps, last first, within a memory limit: replay with checkpoints on disk.

A walk backward needs the states in the reverse of the order in which a replay makes them. Where all states fit, they
are kept. Otherwise one replay leaves a checkpoint (3 P numbers) before each segment of as many steps as fit, and each
segment is replayed once more from there: two replays in all, `steps / segment` checkpoints. A segment of sqrt(steps)
balances memory against disk; a longer one needs less disk [Griewank 1992].
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from curate.core.errors import UserError
from curate.core.machine import free_disk, free_memory
from curate.core.progress import progress
from curate.training.snapshots import save_state

if TYPE_CHECKING:
    from curate.training.replay import Replay, State

# Numbers per parameter. A state: parameters, momentum, second moment, gradient; a checkpoint has no gradient.
_STATE_NUMBERS, _CHECKPOINT_NUMBERS = 4, 3


@dataclass(frozen=True, kw_only=True)
class StatePlan:
    """How the states of steps `start` to `stop - 1` are held.

    Attributes:
        starts: first step of each segment, ascending; each but the first needs a checkpoint.
        stop: step after the last.
        state_bytes: of one state.
        checkpoint_bytes: of one checkpoint.
    """

    starts: list[int]
    stop: int
    state_bytes: int
    checkpoint_bytes: int

    @property
    def line(self) -> str:
        """In words, to be said before the work."""
        borders = [*self.starts, self.stop]
        longest = max((stop - start for start, stop in pairwise(borders)), default=0)
        memory, disk = longest * self.state_bytes, max(len(self.starts) - 1, 0) * self.checkpoint_bytes
        return (
            f"states of {longest} steps are held at once: {memory / 1e9:,.2f} GB of memory (adjoint.memory_bytes), "
            f"{disk / 1e9:,.2f} GB of disk for checkpoints (adjoint.disk_bytes)"
        )

    @property
    def replays(self) -> int:
        """Times that a step is replayed."""
        return 2 if len(self.starts) > 1 else 1


def limits(replay: Replay, memory_bytes: int | None, disk_bytes: int | None) -> tuple[int, int]:
    """Bytes of memory and disk that may be used: as set, or half of the free memory and all of the free disk."""
    # Half: cotangents and the activations of a second derivative need the rest.
    memory = free_memory(replay.device) // 2 if memory_bytes is None else memory_bytes
    return memory, free_disk(replay.run.folder) if disk_bytes is None else disk_bytes


def plan_states(parameters: int, start: int, stop: int, memory_bytes: int, disk_bytes: int) -> StatePlan:
    """Segments that fit into memory, their checkpoints onto disk.

    Args:
        parameters: P.
        start: first step.
        stop: step after the last.
        memory_bytes: for the states of one segment.
        disk_bytes: for all checkpoints.

    Raises:
        UserError: not even one state fits into memory, or the checkpoints do not fit onto disk; says what would.
    """
    # 4 bytes: states are kept in float32, whatever the training computes in.
    state, checkpoint = 4 * _STATE_NUMBERS * parameters, 4 * _CHECKPOINT_NUMBERS * parameters
    # As long as memory allows: fewer checkpoints, and any length costs two replays.
    length = min(memory_bytes // state, stop - start)
    if length < 1 and stop > start:
        raise UserError(
            f"adjoint.memory_bytes is {memory_bytes:,}; the state of one step is {state:,} bytes: set it to that at "
            "least, better to that of many steps (by default it is half of what is free)"
        )
    starts = list(range(start, stop, max(length, 1)))
    needed = max(len(starts) - 1, 0) * checkpoint  # the first segment starts from a snapshot of the run
    if needed > disk_bytes:
        # So many bytes of memory make segments long enough for the checkpoints that the disk holds; rounded up.
        fitting = -(-(stop - start) // (disk_bytes // checkpoint + 1)) * state
        raise UserError(
            f"{stop - start} steps in segments of {length} need {len(starts) - 1} checkpoints of {checkpoint:,} bytes, "
            f"adjoint.disk_bytes is {disk_bytes:,}: set it to {needed}, or adjoint.memory_bytes to {fitting}"
        )
    return StatePlan(starts=starts, stop=stop, state_bytes=state, checkpoint_bytes=checkpoint)


def states_backward(replay: Replay, plan: StatePlan, scratch: Path) -> Iterator[State]:
    """The states of a plan, last step first.

    Args:
        replay: of the run.
        plan: segments.
        scratch: folder for checkpoints; those that an interrupted call left there are used, those of another plan
            are deleted. It is deleted at the end.
    """
    borders = [*plan.starts, plan.stop]
    _write_checkpoints(replay, plan, scratch)
    for first, stop in reversed(list(pairwise(borders))):
        path = _checkpoint(scratch, first)
        states = list(replay.states(first, stop, path if path.exists() else None))
        # pop, not reversed: a state that has been used is freed while the caller works on the next.
        while states:
            yield states.pop()
    shutil.rmtree(scratch, ignore_errors=True)


def _write_checkpoints(replay: Replay, plan: StatePlan, scratch: Path) -> None:
    """Replay once up to the last segment, leaving a checkpoint at the start of each but the first."""
    wanted = {_checkpoint(scratch, step): step for step in plan.starts[1:]}
    # Checkpoints of another plan (other free memory at the first attempt) would only fill the disk.
    for path in set(scratch.glob("*")) - set(wanted):
        path.unlink()
    missing = [step for path, step in wanted.items() if not path.exists()]
    if not missing:
        return
    # An interrupted call wrote the earlier ones: continue from the last checkpoint before the first missing one.
    first = max(step for step in plan.starts if step < missing[0])
    begin = _checkpoint(scratch, first)
    steps = replay.steps(first, missing[-1] + 1, checkpoint=begin if begin.exists() else None)
    for replayed in progress(steps, total=missing[-1] + 1 - first, what="checkpoints"):
        if replayed.record.step in missing:
            save_state(_checkpoint(scratch, replayed.record.step), replay.model, replayed.optimizers)


def _checkpoint(scratch: Path, step: int) -> Path:
    return scratch / f"state-{step:08d}.safetensors"
