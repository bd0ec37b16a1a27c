"""`adjoint` and `anchors` as estimators: anchors, replayed states, the recursion, and progress that survives a crash.

`adjoint` has the target's two halves among its anchors, so its values are exact. `anchors` has nothing of the target:
it serves any later target, as far as the gradients of the anchors express it (`basis.py`).

A job's `horizon` is its evaluation checkpoint: the step before which the target's loss is read, and where the walk
backward begins. A finished window leaves an influence checkpoint: the cotangent of the state at its start. An earlier
window with the same anchors and horizon continues from there instead of walking back again, to the same numbers.
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
_METRIC_ROWS = 20_000  # rows that the metric is chosen on; they are sorted 8 times for each anchor


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


OWN_STEP_PASSES = {"exact": 2.8, "embedding": 1.6, "linear": 0.0}
"""Forward-backward passes of the batch that the exact leave-one-out update of one step costs; measured."""


def curvature_passes(config: AdjointConfig, anchors: int) -> float:
    """Forward-backward passes of the batch that the Hessian products of one step cost; measured factors."""
    # The theory (products.py) is 2 R + 1 and R; `difference` also needs the losses at theta, a forward pass.
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
        # `settings`, `dimension` and `passes` all ask for the anchors: do not read the documents for each.
        self._anchor_sets: dict[tuple[str, str], AnchorSet] = {}

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
        if key not in self._anchor_sets:
            self._anchor_sets[key] = self._make_anchors(job)
        return self._anchor_sets[key]

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
        # `choose_metric` predicts each anchor from the others: one alone cannot be held out.
        if len(anchors) < HALVES:
            raise UserError(
                f"estimator anchors needs at least {HALVES} anchors, it has {len(anchors)}: set "
                "adjoint.anchors_per_domain (4, say) or adjoint.anchor_files, or use --estimator adjoint with a target"
            )
        return anchors

    def dimension(self, job: WindowJob) -> int:
        """One number per anchor."""
        return len(self.anchors(job))

    def passes(self, job: WindowJob) -> float:
        """Replay, products and exact updates of each step, and the gradients of the anchors; measured factors."""
        anchors = self.anchors(job)
        # The first step stands for all: batch sizes rarely change within a stage. max: a step may have no sample.
        batch_size = max(next(records(job.replay.run, job.start, job.stop)).size, 1)
        # The cotangent walks from the horizon through every step; only steps of the window are valued.
        window_steps, walked_steps = job.stop - job.start, job.horizon - job.start
        per_walked = self._plan(job, job.horizon).replays + curvature_passes(self.config, len(anchors))
        exact_updates = window_steps * OWN_STEP_PASSES[self.config.own_step]
        anchor_sequences = sum(len(batch) for batch in anchors.batches)
        return walked_steps * per_walked + exact_updates + anchor_sequences / batch_size

    def encode(self, job: WindowJob) -> Encoded:
        """Unit vectors where the target's halves are anchors; else coordinates in the anchors' basis, with residual.

        Raises:
            UserError: the basis is missing or damaged.
        """
        anchors, halves = self.anchors(job), job_target(job, self.name).halves
        positions = [anchors.find(half) for half in halves]
        anchor_positions = [position for position in positions if position is not None]
        if len(anchor_positions) == HALVES:
            vectors = np.eye(len(anchors), dtype=np.float32)[anchor_positions]
            # `anchors` states a residual for every target, also where it is 0; `adjoint` is always exact.
            return Encoded(vectors=vectors, residual=None if self.with_target else 0.0)
        job.replay.model_at(job.horizon)
        gradients = loss_gradients(job.replay.task, job.replay.layout, halves, job.batch_size)
        solver = read_json(job.folder / MANIFEST)["solver"]
        solution = solve(load_basis(job.folder), gradients, solver["metric"], solver["ridge"])
        return Encoded(vectors=solution.coordinates, residual=float(solution.residuals.max()))

    def embed(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any]:
        """Push the gradients of the anchors back from the horizon to the window's start; see `embeddings.adjoint`.

        Raises:
            UserError: memory or disk limits are too small, or the model cannot be differentiated twice.
        """
        replay = job.replay
        if self.config.hessian != "difference":
            # Any state will do; the first snapshot needs no replay.
            replay.load(replay.run.snapshots[0])
            first = next(records(replay.run, job.start, job.stop))
            check_curvature(replay.task, replay.layout, replay.batches(first)[0])
        step, cotangent = self._begin(job)
        plan = self._plan(job, step)
        _log.info("%s", plan.line)
        first_rows = _first_rows(job)
        saved = monotonic()
        # Below `scratch`: state checkpoints outlive a crash too, and the same call uses them.
        states = states_backward(replay, plan, job.scratch / "states")
        for state in progress(states, total=step - job.start, what="adjoint"):
            at = state.record.step
            options = StepOptions(own_step=self.config.own_step, hessian=self.config.hessian, rows=at < job.stop)
            rows, cotangent = adjoint_step(
                replay.task, replay.layout, state, replay.run.spec.clip_norm, cotangent, options
            )
            if rows is not None:
                out[first_rows[at] : first_rows[at] + len(rows)] = rows.float().cpu().numpy()
            if monotonic() - saved > self.config.save_seconds:
                # Rows before the cotangent: a job that is killed between the two repeats steps, but loses no row.
                out.flush()  # type: ignore[attr-defined]
                save_cotangent(job.scratch / "cotangent.safetensors", at, cotangent)
                saved = monotonic()
        # 3: parameters, momentum and second moment. The influence checkpoint only saves time, so no room is no error.
        if 3 * cotangent.parameters.nbytes <= limits(replay, self.config.memory_bytes, self.config.disk_bytes)[1]:
            save_cotangent(job.folder / _INFLUENCE, job.start, cotangent)
        return {"anchors": self.anchors(job).names, "solver": self._choose_solver(job, out)}

    def _plan(self, job: WindowJob, stop: int) -> StatePlan:
        allowed = limits(job.replay, self.config.memory_bytes, self.config.disk_bytes)
        return plan_states(job.replay.layout.size, job.start, stop, *allowed)

    def _begin(self, job: WindowJob) -> tuple[int, TrainingState]:
        """The step whose state the cotangent belongs to, and the cotangent; writes the basis where one is needed.

        The gradients of the anchors at the horizon are both: the first cotangent of the walk, and the basis.
        """
        saved = self._saved(job)
        if saved is not None and (not self._has_basis or (job.folder / BASIS).exists()):
            return saved
        replay, anchors = job.replay, self.anchors(job)
        optimizers = replay.optimizers_at(job.horizon)
        gradients = anchor_gradients(replay.task, replay.layout, anchors, job.batch_size)
        if self._has_basis:
            diagonal = optimizer_metric(replay, optimizers, job.horizon)
            save_basis(job.folder, AnchorBasis(names=anchors.names, gradients=gradients, diagonal=diagonal))
        # Moments have cotangent 0 there: the target's loss reads the parameters alone.
        return saved or (job.horizon, TrainingState.zeros(gradients))

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
        """Whether later targets can be solved into the anchors: there are others than the target's own halves."""
        return not self.with_target or bool(self.config.anchors_per_domain or self.config.anchor_files)

    def _later_window(self, job: WindowJob) -> Path | None:
        """The embedding of the same anchors and horizon whose window starts soonest after this one's end.

        The cotangent depends on neither window nor `own_step`, but on all other settings.
        """
        wanted = {"run": job.replay.run.fingerprint, "horizon": job.horizon, "estimator": self.name}
        wanted |= self.settings(job)
        folder_by_start = {}
        for path in sorted(job.folder.parent.glob(f"*/{MANIFEST}")):
            # Embeddings of other estimators lie here too, and have no `own_step`.
            settings = {"own_step": None, **read_json(path)["settings"]}
            start = settings.pop("window")[0]
            same = settings | {"own_step": wanted["own_step"]} == wanted
            # At job.stop or later: from inside this window the walk would skip steps that must be valued.
            if same and job.stop <= start < job.horizon and (path.parent / _INFLUENCE).exists():
                folder_by_start[start] = path.parent
        return folder_by_start[min(folder_by_start)] if folder_by_start else None

    def _choose_solver(self, job: WindowJob, out: npt.NDArray[np.float32]) -> dict[str, Any] | None:
        if not self._has_basis:
            return None
        # Every n-th row: rows of all steps, because early and late steps rank differently.
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
    for columns, settings, done in zip(replay.layout.group_slices, last.groups, updates, strict=True):
        if settings.optimizer not in ("AdamW", "Adam"):
            return None
        # A group that never stepped has v = 0 everywhere; 1 only keeps the bias correction from dividing by 0.
        inverse = 1 / denominator(moment[columns], max(done, 1), settings)
        # 1 / eps would let weights that no sample ever moved outweigh all others.
        metric[columns] = inverse.where(moment[columns] > 0, 0)
    return metric


def _first_rows(job: WindowJob) -> dict[int, int]:
    """First row of each step of the window."""
    first_rows, rows_before = {}, 0
    for record in records(job.replay.run, job.start, job.stop):
        first_rows[record.step] = rows_before
        rows_before += record.size
    return first_rows


def save_cotangent(path: Path, step: int, cotangent: TrainingState) -> None:
    """Write the cotangent of the state before `step`, atomically."""
    from safetensors.torch import save_file

    tensors = {key: value.contiguous() for key, value in vars(cotangent).items()}  # safetensors takes no views
    with atomic_write(path) as partial:
        save_file(tensors, str(partial), {"step": str(step)})


def load_cotangent(path: Path, device: Any) -> tuple[int, TrainingState] | None:
    """Step and cotangent, or None where there is no file.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    try:
        # `checked`: a damaged cotangent would give wrong values without any error.
        with safe_open(str(checked(path)), framework="pt", device=str(device)) as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            return int(file.metadata()["step"]), TrainingState(**tensors)
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupted ({error}); delete it: the values are then made without it") from None
