"""Values of one run by the adjoint, for many anchors and several kinds of own step, in one walk backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.arrays import read_arrays, write_arrays
from curate.core.errors import UserError
from curate.core.progress import progress
from curate.embeddings.adjoint import StepOptions, adjoint_step, embedding_names
from curate.embeddings.adjoint_estimator import load_cotangent, save_cotangent
from curate.embeddings.anchors import anchor_gradients
from curate.embeddings.leave_one_out import embedding_corrections, exact_values
from curate.embeddings.states import plan_states, states_backward
from curate.optimizers.state import TrainingState

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.embeddings.anchors import AnchorSet
    from curate.embeddings.products import Hessian
    from curate.training.replay import Replay, State

_MEMORY = 3 * 10**9  # bytes of training states held at once; more of them are replayed or lie on disk


@dataclass(frozen=True, kw_only=True)
class Walk:
    """One walk from a horizon back.

    Attributes:
        name: of its files.
        horizon: step whose state the anchors' losses are read at.
        windows: windows to value, name -> first step and step after the last, all before the horizon.
        hessian: see `curate.embeddings.products`.
        own_steps: ways of taking the own step.
    """

    name: str
    horizon: int
    windows: Mapping[str, tuple[int, int]]
    hessian: Hessian = "exact"
    own_steps: tuple[str, ...] = ("linear",)

    @property
    def stretches(self) -> list[tuple[str | None, int, int]]:
        """Windows and what lies between them, last first: window or None, first step, step after the last."""
        stretches: list[tuple[str | None, int, int]] = []
        # the cotangent must pass through the steps between windows too
        at = self.horizon
        for window, (start, stop) in sorted(self.windows.items(), key=lambda item: -item[1][0]):
            if stop < at:
                stretches.append((None, stop, at))
            stretches.append((window, start, stop))
            at = start
        return stretches


def walk_back(replay: Replay, anchors: AnchorSet, walk: Walk, folder: Path) -> dict[str, dict[str, Any]]:
    """Walk, or open what an earlier call wrote; an interrupted walk continues at the last finished part.

    Returns:
        Window -> own step -> (N, R) values, and "units": own step -> cost per step of the window, in forward+backward
        passes of a training batch.
    """
    values: dict[str, dict[str, Any]] = {}
    cotangent: TrainingState | None = None
    for window, start, stop in walk.stretches:
        path = folder / f"{walk.name}-{window or f'bridge-{start}'}.npz"
        if not path.exists():
            if cotangent is None:
                cotangent = _cotangent(replay, anchors, walk, stop, folder)
            cotangent, arrays = _part(replay, walk, window, start, stop, cotangent, folder)
            # the cotangent before the arrays: a part that is there never lacks the border that the next one starts from
            save_cotangent(_border(folder, walk, start), start, cotangent)
            write_arrays(path, arrays)
        else:
            cotangent = None  # of another border: the next part reads its own from the disk
        # both of its parts are done
        _border(folder, walk, stop).unlink(missing_ok=True)
        if window is not None:
            values[window] = read_arrays(path)
    _border(folder, walk, walk.stretches[-1][1]).unlink(missing_ok=True)
    return values


def _border(folder: Path, walk: Walk, step: int) -> Path:
    """The cotangent at a border between parts; it goes when both parts are done."""
    return folder / f"{walk.name}-{step:08d}.safetensors"


def _cotangent(replay: Replay, anchors: AnchorSet, walk: Walk, stop: int, folder: Path) -> TrainingState:
    """Of the state at `stop`.

    Raises:
        UserError: a part was deleted whose cotangent is gone.
    """
    if stop == walk.horizon:
        replay.model_at(stop)
        return TrainingState.zeros(anchor_gradients(replay.task, replay.layout, anchors, 48))
    saved = load_cotangent(_border(folder, walk, stop), replay.device)
    if saved is None:
        raise UserError(f"the walk {walk.name} in {folder} lacks a part; delete its other parts to make it again")
    return saved[1]


def _part(
    replay: Replay, walk: Walk, window: str | None, start: int, stop: int, cotangent: TrainingState, folder: Path
) -> tuple[TrainingState, dict[str, npt.NDArray[Any]]]:
    """One window, or one stretch between windows."""
    values: dict[str, list[npt.NDArray[Any]]] = {own_step: [] for own_step in walk.own_steps if window is not None}
    seconds = dict.fromkeys(("linear", *walk.own_steps), 0.0)
    begin = perf_counter()
    # 1 TB: in effect no limit on the disk
    plan = plan_states(replay.layout.size, start, stop, _MEMORY, 10**12)
    states = states_backward(replay, plan, folder / f"{walk.name}-states")
    for state in progress(states, total=stop - start, what=f"{walk.name} {window or 'bridge'}"):
        options = StepOptions(hessian=walk.hessian, rows=window is not None)
        after = cotangent
        linear, cotangent = adjoint_step(replay.task, replay.layout, state, replay.run.spec.clip_norm, after, options)
        if linear is not None:
            for own_step in walk.own_steps:
                own_begin = perf_counter()
                values[own_step].append(_own(replay, state, own_step, linear, after).float().cpu().numpy())
                seconds[own_step] += perf_counter() - own_begin
    total = perf_counter() - begin
    unit = (replay.pass_seconds or 1.0) * (stop - start)
    # the walk went backward: the last step's rows came first
    arrays = {own_step: np.concatenate(rows[::-1]) for own_step, rows in values.items()}
    shared = total - sum(seconds.values())
    # each kind of own step pays the whole walk, and its own extra
    arrays |= {f"units {own_step}": np.float64((shared + seconds[own_step]) / unit) for own_step in walk.own_steps}
    return cotangent, arrays


def _own(replay: Replay, state: State, own_step: str, linear: Any, after: TrainingState) -> Any:
    """The step's rows with one kind of own step."""
    arguments = replay.task, replay.layout, state, replay.run.spec.clip_norm, after
    if own_step == "linear":
        return linear
    if own_step == "exact":
        return exact_values(*arguments)
    return linear + embedding_corrections(*arguments, embedding_names(replay.task, replay.layout))
