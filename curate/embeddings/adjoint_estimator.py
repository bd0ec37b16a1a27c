"""`adjoint` and `anchors` as estimators: anchors, replayed states, the recursion, and progress that survives a crash.

`adjoint` has the target's two halves among its anchors, so that its values are exact; `anchors` has none of the target:
it serves any target that is seen later, as far as the anchors' gradients express it (`basis.py`).

A finished window leaves an influence checkpoint: the cotangent of the state at its start. A window before it, with the
same anchors and horizon, continues from there instead of walking back from the horizon again, to the same numbers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from curate.core.artifacts import MANIFEST, checked, read_json
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.progress import progress
from curate.core.writing import atomic_write
from curate.embeddings.adjoint import OwnStep, StepOptions, adjoint_step
from curate.embeddings.anchors import AnchorSet, anchor_gradients, document_anchors, stream_anchors
from curate.embeddings.basis import FILE as BASIS
from curate.embeddings.basis import AnchorBasis, choose_metric, load_basis, save_basis, solve
from curate.embeddings.dvemb_adam import denominator
from curate.embeddings.estimator import HALVES, Encoded, job_target
from curate.embeddings.products import Hessian, check_curvature
from curate.embeddings.states import StatePlan, limits, plan_states, states_backward
from curate.optimizers.state import TrainingState
from curate.training.replay import records
from curate.training.target import loss_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt
    from torch import Tensor
    from torch.optim import Optimizer

    from curate.core.artifacts import Json
    from curate.embeddings.estimator import WindowJob
    from curate.training.replay import Replay

_log = logging.getLogger(__name__)
_INFLUENCE = "influence.safetensors"
_METRIC_ROWS = 20_000  # rows that the metric of later targets is chosen on


class AdjointConfig(Config):
    """Settings of `adjoint` and `anchors`."""

    own_step: OwnStep = "exact"
    """The step that a sample was used in: exact (the update without it; needs per-sample gradients), exact for the rows
    of token embeddings only (embedding), or linear like all later steps."""
    hessian: Hessian = "exact"
    """Curvature of later steps: exact, or difference (of gradients; cheaper, and for models whose attention cannot be
    differentiated twice)."""
    anchors_per_domain: int = Field(default=0, ge=0)
    """Anchors from each domain's samples that the run did not train on, and one general anchor of all domains."""
    samples_per_anchor: int = Field(default=32, ge=1)
    """Sequences of such an anchor."""
    anchor_files: tuple[Path, ...] = ()
    """Document files (JSONL) that more anchors are made of."""
    anchors_per_file: int = Field(default=4, ge=1)
    """Anchors from each file."""
    min_anchor_tokens: int = Field(default=200, ge=1)
    """Fewest predicted tokens of an anchor from a file."""
    memory_bytes: int | None = Field(default=None, ge=0)
    """Memory for the states of steps (4 numbers per parameter and step); what does not fit is replayed twice. None:
    half of what is free on the device."""
    disk_bytes: int | None = Field(default=None, ge=0)
    """Disk for checkpoints of the steps that do not fit into memory, and for the influence checkpoint. None: what is
    free where the run lies."""
    save_seconds: float = Field(default=60.0, ge=0)
    """Time between saves of the progress that an interrupted window continues from."""


OWN_STEP_UNITS = {"exact": 2.8, "embedding": 1.6, "linear": 0.0}
"""What a sample's own step costs, beside the slopes that come with the curvature; measured, in passes of its batch."""


def curvature_units(config: AdjointConfig, anchors: int) -> float:
    """What the Hessian products of one step cost; measured factors."""
    per_anchor, once = {"exact": (2.0, 1.0), "difference": (1.1, 0.3)}[config.hessian]
    return per_anchor * anchors + once


class AdjointEstimator:
    """Exact first-order values for anchors: D = R.

    Args:
        config: anchors and how they are differentiated.
        with_target: whether the target's two halves are the first anchors.
        anchors: the anchors to use instead of the config's.
    """

    def __init__(self, config: AdjointConfig, *, with_target: bool = True, anchors: AnchorSet | None = None) -> None:
        self.config, self.with_target, self._given = config, with_target, anchors
        self.name = "adjoint" if with_target else "anchors"
        self._made: dict[tuple[str, str], AnchorSet] = {}

    def settings(self, job: WindowJob) -> Json:
        """The anchors, and how values are computed."""
        chosen = self.config.model_dump(include={"own_step", "hessian"})
        return {"anchors": self.anchors(job).fingerprint, **chosen}

    def anchors(self, job: WindowJob) -> AnchorSet:
        """The target's halves where it is one, then those of domains and files.

        Raises:
            UserError: there are none.
        """
        if self._given is not None:
            return self._given
        target, run = job.target, job.replay.run
        key = (run.fingerprint, target.fingerprint if target and self.with_target else "")
        if key not in self._made:
            self._made[key] = self._make_anchors(job)
        return self._made[key]

    def _make_anchors(self, job: WindowJob) -> AnchorSet:
        config, run = self.config, job.replay.run
        anchors = AnchorSet(names=[], batches=[])
        if self.with_target:
            halves = job_target(job, self.name).halves
            anchors += AnchorSet(names=["target half a", "target half b"], batches=list(halves))
        if config.anchors_per_domain:
            anchors += stream_anchors(run, config.anchors_per_domain, config.samples_per_anchor)
        for path in config.anchor_files:
            anchors += document_anchors(path, run.spec, config.anchors_per_file, config.min_anchor_tokens)
        if len(anchors) < HALVES:
            raise UserError(
                f"estimator anchors needs at least {HALVES} anchors, it has {len(anchors)}: set "
                "adjoint.anchors_per_domain (4, say) or adjoint.anchor_files, or use --estimator adjoint with a target"
            )
        return anchors

    def dimension(self, job: WindowJob) -> int:
        """One number per anchor."""
        return len(self.anchors(job))

    def cost_units(self, job: WindowJob) -> float:
        """Replay, products and own step of each step, and the anchors' own gradients; measured factors."""
        anchors = self.anchors(job)
        batch_size = max(next(records(job.replay.run, job.start, job.stop)).size, 1)
        window_steps, walked_steps = job.stop - job.start, job.horizon - job.start
        per_walked = self._plan(job, job.horizon).replays + curvature_units(self.config, len(anchors))
        own_steps = window_steps * OWN_STEP_UNITS[self.config.own_step]
        anchor_sequences = sum(len(each) for each in anchors.batches)
        return walked_steps * per_walked + own_steps + anchor_sequences / batch_size

    def encode(self, job: WindowJob) -> Encoded:
        """Unit vectors where its halves are anchors; else coordinates in the anchors' basis, with the residual.

        Raises:
            UserError: the basis is missing or damaged.
        """
        anchors, halves = self.anchors(job), job_target(job, self.name).halves
        places = [anchors.find(half) for half in halves]
        known = [place for place in places if place is not None]
        if len(known) == HALVES:
            vectors = np.eye(len(anchors), dtype=np.float32)[known]
            return Encoded(vectors=vectors, residual=None if self.with_target else 0.0)
        job.replay.model_at(job.horizon)
        gradients = loss_gradients(job.replay.task, job.replay.layout, halves, job.batch_size)
        chosen = read_json(job.folder / MANIFEST)["solver"]
        solution = solve(load_basis(job.folder), gradients, chosen["metric"], chosen["ridge"])
        return Encoded(vectors=solution.coordinates, residual=float(solution.residuals.max()))

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Push the anchors' gradients back from the horizon to the window's start; see `curate.embeddings.adjoint`.

        Raises:
            UserError: memory or disk limits are too small, or the model cannot be differentiated twice.
        """
        replay = job.replay
        if self.config.hessian != "difference":
            replay.load(replay.run.snapshots[0])
            first = next(records(replay.run, job.start, job.stop))
            check_curvature(replay.task, replay.layout, replay.batches(first)[0])
        step, cotangent = self._begin(job)
        plan = self._plan(job, step)
        _log.info("%s", plan.line)
        starts = _row_starts(job)
        saved = monotonic()
        states = states_backward(replay, plan, job.scratch / "states")
        for state in progress(states, total=step - job.start, what="adjoint"):
            at = state.record.step
            options = StepOptions(own_step=self.config.own_step, hessian=self.config.hessian, rows=at < job.stop)
            rows, cotangent = adjoint_step(
                replay.task, replay.layout, state, replay.run.spec.clip_norm, cotangent, options
            )
            if rows is not None:
                out[starts[at] : starts[at] + len(rows)] = rows.float().cpu().numpy()
            if monotonic() - saved > self.config.save_seconds:
                out.flush()  # type: ignore[attr-defined]
                save_cotangent(job.scratch / "cotangent.safetensors", at, cotangent)
                saved = monotonic()
        if 3 * cotangent.parameters.nbytes <= limits(replay, self.config.memory_bytes, self.config.disk_bytes)[1]:
            save_cotangent(job.folder / _INFLUENCE, job.start, cotangent)
        return {"anchors": self.anchors(job).names, "solver": self._choose_solver(job, out)}

    def _plan(self, job: WindowJob, stop: int) -> StatePlan:
        allowed = limits(job.replay, self.config.memory_bytes, self.config.disk_bytes)
        return plan_states(job.replay.layout.size, job.start, stop, *allowed)

    def _begin(self, job: WindowJob) -> tuple[int, TrainingState]:
        """The step whose state the cotangent belongs to, and the cotangent; leaves the basis where there is to be one.

        The anchors' gradients at the horizon are the cotangent of a walk that begins there, and the basis.
        """
        found = self._saved(job)
        if found is not None and (not self._has_basis or (job.folder / BASIS).exists()):
            return found
        replay, anchors = job.replay, self.anchors(job)
        optimizers = replay.optimizers_at(job.horizon)
        gradients = anchor_gradients(replay.task, replay.layout, anchors, job.batch_size)
        if self._has_basis:
            diagonal = optimizer_metric(replay, optimizers, job.horizon)
            save_basis(job.folder, AnchorBasis(names=anchors.names, gradients=gradients, diagonal=diagonal))
        return found or (job.horizon, TrainingState.zeros(gradients))

    def _saved(self, job: WindowJob) -> tuple[int, TrainingState] | None:
        """Where an interrupted call of this window, or a finished later window, left the cotangent."""
        saved = load_cotangent(job.scratch / "cotangent.safetensors", job.replay.device)
        later = self._later_window(job) if saved is None else None
        if later is not None:
            saved = load_cotangent(later / _INFLUENCE, job.replay.device)
            if saved is not None:
                _log.info("continuing from the influence checkpoint at step %d of %s", saved[0], later.name)
        return saved

    @property
    def _has_basis(self) -> bool:
        """Whether targets that are seen later can be solved into the anchors, beside the target's own halves."""
        return not self.with_target or bool(self.config.anchors_per_domain or self.config.anchor_files)

    def _later_window(self, job: WindowJob) -> Path | None:
        """The embedding of the same anchors and horizon whose window starts soonest after this one's end.

        The cotangent depends on neither window nor own step, but on all other settings.
        """
        wanted = {"run": job.replay.run.fingerprint, "horizon": job.horizon, "estimator": self.name}
        wanted |= self.settings(job)
        found = {}
        for path in sorted(job.folder.parent.glob(f"*/{MANIFEST}")):
            settings = {"own_step": None, **read_json(path)["settings"]}
            start = settings.pop("window")[0]
            same = settings | {"own_step": wanted["own_step"]} == wanted
            if same and job.stop <= start < job.horizon and (path.parent / _INFLUENCE).exists():
                found[start] = path.parent
        return found[min(found)] if found else None

    def _choose_solver(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any] | None:
        if not self._has_basis:
            return None
        stride = -(-len(out) // _METRIC_ROWS)
        choice = choose_metric(load_basis(job.folder), np.asarray(out[::stride]))
        return {"metric": choice.metric, "ridge": choice.ridge, "held_out_spearman": choice.scores}


def optimizer_metric(replay: Replay, optimizers: Sequence[Optimizer], horizon: int) -> Tensor | None:
    """`D = 1 / (sqrt(v_hat) + eps)` (P,) at the horizon, 0 where v is 0; None where a group has no second moment.

    Args:
        replay: of the run.
        optimizers: in their state before step `horizon`.
        horizon: the step.
    """
    import torch

    last = next(records(replay.run, horizon - 1, horizon))
    _, moment, updates = replay.moments(optimizers)
    metric = torch.zeros_like(moment)
    for place, settings, done in zip(replay.layout.group_slices, last.groups, updates, strict=True):
        if settings.optimizer not in ("AdamW", "Adam"):
            return None
        inverse = 1 / denominator(moment[place], max(done, 1), settings)
        metric[place] = inverse.where(moment[place] > 0, 0)
    return metric


def _row_starts(job: WindowJob) -> dict[int, int]:
    """First row of each step of the window."""
    starts, rows_before = {}, 0
    for record in records(job.replay.run, job.start, job.stop):
        starts[record.step] = rows_before
        rows_before += record.size
    return starts


def save_cotangent(path: Path, step: int, cotangent: TrainingState) -> None:
    """Write the cotangent of the state before `step`, atomically."""
    from safetensors.torch import save_file

    with atomic_write(path) as part:
        save_file({key: value.contiguous() for key, value in vars(cotangent).items()}, str(part), {"step": str(step)})


def load_cotangent(path: Path, device: Any) -> tuple[int, TrainingState] | None:
    """Step and cotangent, or None where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        with safe_open(str(checked(path)), framework="pt", device=str(device)) as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return int(file.metadata()["step"]), TrainingState(**tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupted ({error}); delete it: the values are then made without it") from None
