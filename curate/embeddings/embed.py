"""Value embeddings of a run's windows, and their index: missing ones are computed, after a line that says the cost.

The cost is counted in passes: forward-backward passes of a training batch.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from curate.core.artifacts import MANIFEST, fingerprint, is_complete, read_json
from curate.core.config import Config, FileName
from curate.core.lock import locked
from curate.core.renamed import Renamed
from curate.core.validation import changed
from curate.embeddings.estimators import (
    AdjointConfig,
    BaselineConfig,
    DvembAdamConfig,
    DvembConfig,
    EstimatorName,
    make_estimator,
)
from curate.index.build import IndexConfig

if TYPE_CHECKING:
    from curate.embeddings.estimator import Estimator, WindowJob
    from curate.embeddings.store import Embedding, Horizon
    from curate.training.run import Run
    from curate.training.target import Target, Targets

_log = logging.getLogger(__name__)
_GONE = "is gone: "
RENAMED = Renamed(
    settings={
        "runs_root": "run",
        "guard": "retain",
        "window_every": _GONE + "skipped steps ranked domains less well",
        "adjoint.hessian_share": _GONE + "half of the samples cost fidelity and saved little",
        "adjoint.bridge_every": _GONE + "without the curvature of every step rank correlation fell from .95 to .18",
        "adjoint.at_once": _GONE + "only Gauss-Newton products read it",
        "index.recall_rows": _GONE + "256 rows",
    },
    values={
        "adjoint.hessian": {
            "fisher": "is gone: exact and difference are left",
            "gauss-newton": "is gone: exact and difference are left",
        },
    },
)
"""Old names, for the error that says which new name to use."""
WEAK_RESIDUAL = 0.5  # above it the anchors say less about a target than they leave open


# Settings that the value index reads; the others are of windows.
_OF_INDEX = {"run", "candidates", "streams", "tokenizer", "device", "tolerance"}


class EmbedConfig(Config):
    """What to embed, and how."""

    RENAMED: ClassVar[Renamed] = RENAMED

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    candidates: Path | None = None
    """Make the value index of data that was never trained on (MDS folders of domains, or a streams.yaml) instead of the
    run's own."""
    window: Literal["early", "late", "both"] | None = None
    """Value the samples of a recorded window, or of both, for `target`, each at the state of its step; none: make the
    value index, rows of all samples at the run's last state, which serve every target. The settings below are of
    windows, but for streams, tokenizer, device and tolerance."""
    windows: Literal["declared", "auto"] = "declared"
    """declared: the windows that the run was recorded with. auto: found from its loss, gradient norm and lr curves."""
    value_curve: Path | None = None
    """`phases.json` that `python -m pipelines.phases` wrote for the run: windows auto are found from it instead."""
    window_steps: int | None = Field(default=None, ge=1)
    """Value only the last steps of each window, as many as this; none: the whole window."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    horizon: Literal["window_end", "stage_end"] | int = "window_end"
    """Evaluation checkpoint: the state that the target's loss is read at. The end of each window or of the stage, or
    the state before a step between the two (a number)."""
    estimator: EstimatorName = "adjoint"
    """adjoint: exact values for the targets. anchors: exact values for other document sets; later targets are solved
    into them. dvemb: the published, cheaper, target-free embedding. dvemb-adam: the same for AdamW without momentum.
    grad-dot, less, shapley: baselines, see `curate.embeddings.baselines`."""
    target: Path | None = None
    """Target documents (JSONL); required by adjoint and the baselines."""
    more_targets: dict[FileName, Annotated[float, Field(gt=0)]] = {}
    """More targets (JSONL), valued in the same pass, each with the weight of its scores; that of `target` is 1."""
    retain: Path | None = None
    """Documents of what must not be lost, valued in the same pass."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of a target."""
    target_batch_size: int = Field(default=16, ge=1)
    """Sequences per pass over the target."""
    device: str = "cpu"
    """Device of replay and estimator, for example cuda."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest relative difference between recorded and replayed losses."""
    adjoint: AdjointConfig = AdjointConfig()
    """Settings of adjoint."""
    dvemb: DvembConfig = DvembConfig()
    """Settings of dvemb."""
    dvemb_adam: DvembAdamConfig = DvembAdamConfig()
    """Settings of dvemb-adam."""
    baseline: BaselineConfig = BaselineConfig()
    """Settings of the baselines."""
    index: IndexConfig = IndexConfig()
    """Settings of the FAISS index."""

    @model_validator(mode="after")
    def _every_setting_acts(self) -> Self:
        if self.window is None:
            idle = sorted(set(changed(self)) - _OF_INDEX)
            if idle:
                raise ValueError(
                    f"without a window these settings have no effect: {', '.join(idle)}; the value index serves every "
                    "target. Set --window late, early or both, or leave them out"
                )
        elif self.candidates is not None:
            raise ValueError("candidates have no effect with a window, which has what was trained on; leave one out")
        return self

    @model_validator(mode="after")
    def _curve_is_looked_at(self) -> Self:
        if self.value_curve is not None and self.windows == "declared":
            raise ValueError("value_curve has no effect here: windows declared are as recorded; set windows auto")
        return self

    @property
    def window_names(self) -> list[str]:
        """Names of the windows to embed."""
        if self.window is None:
            return []
        return ["early", "late"] if self.window == "both" else [self.window]


def embed(config: EmbedConfig, run: Run, targets: Targets | None = None) -> dict[str, list[Embedding]]:
    """Embed and index every window of the config; complete ones are reused, the cost of missing ones is logged first.

    Args:
        config: what to embed.
        run: the recorded run.
        targets: the loaded targets; None: load those that the config names.

    Returns:
        Window name -> its embedding, opened once for each target in their order, or without one.

    Raises:
        UserError: bad run, target or settings.
    """
    from curate.embeddings.store import embed_window
    from curate.training.windows import run_windows

    if config.windows == "auto":
        for window_found in run_windows(run, config.value_curve).values():
            _log.info("%s", window_found.line)
    targets = read_targets(config, run) if targets is None else targets
    estimator, jobs = _plan(config, run, targets)
    horizon: Horizon = config.horizon
    for window, job in jobs.items():
        if not _is_complete(config, window, job, estimator):
            # An estimator counts from the window's start; a replay begins at a snapshot, which may lie before it.
            lead = job.start - run.snapshot_before(job.start)
            passes = estimator.passes(job) + lead
            _log.info(
                "%s: the %s window (steps %d to %d, target read at %d) will cost about %.0f forward+backward passes, "
                "%.0f %% of the stage's %d%s",
                estimator.name,
                window,
                job.start,
                job.stop,
                job.horizon,
                passes,
                100 * passes / run.spec.steps,
                run.spec.steps,
                f" ({lead} of them to replay from the snapshot before it)" if lead else "",
            )
    embeddings: dict[str, list[Embedding]] = {}
    for window, job in jobs.items():
        first = embed_window(job, window, horizon, estimator)
        _index(first, config.index)
        _say_residual(config, window, job, first.residual)
        # The first job valued every target; opening the folder for another one encodes its vectors at most.
        others = [embed_window(replace(job, target=other), window, horizon, estimator) for other in targets.every[1:]]
        embeddings[window] = [first, *others]
    return embeddings


def is_embedded(config: EmbedConfig, run: Run, targets: Targets) -> bool:
    """Whether every window of the config is embedded already; see `embed`."""
    estimator, jobs = _plan(config, run, targets)
    return all(_is_complete(config, window, job, estimator) for window, job in jobs.items())


def embedding_passes(config: EmbedConfig, run: Run, targets: Targets) -> dict[str, float]:
    """Window -> forward-backward passes that embedding it costs, whether it is embedded already or not."""
    estimator, jobs = _plan(config, run, targets)
    return {window: estimator.passes(job) for window, job in jobs.items()}


def _plan(config: EmbedConfig, run: Run, targets: Targets) -> tuple[Estimator, dict[str, WindowJob]]:
    """The estimator, and the job of each window."""
    from curate.embeddings.store import plan_job
    from curate.training.replay import Replay
    from curate.training.target import check_vocabulary
    from curate.training.windows import run_windows

    # One replay for all windows: they share the model, and its time of a pass is measured over all of them.
    replay = Replay(run, config.device, config.tolerance)
    for target in targets.every:
        check_vocabulary(target, replay.task)
    found_windows = {} if config.windows == "declared" else run_windows(run, config.value_curve)
    jobs = {
        window: plan_job(
            replay,
            window,
            config.horizon,
            targets.main if targets.named else None,
            batch_size=config.target_batch_size,
            window_steps=config.window_steps,
            borders=(found_windows[window].start, found_windows[window].stop) if found_windows else None,
        )
        for window in config.window_names
    }
    estimator = make_estimator(config.estimator, config.adjoint, config.dvemb, config.dvemb_adam, config.baseline)
    # Other estimators need nothing: a target-free embedding serves any target.
    if targets.every[1:] and config.estimator == "adjoint":
        estimator = _with_anchors(config, next(iter(jobs.values())), targets.every[1:])
    return estimator, jobs


def _with_anchors(config: EmbedConfig, job: WindowJob, others: list[Target]) -> Estimator:
    """`adjoint` with the halves of every target among its anchors, so that one pass values all of them exactly."""
    from curate.embeddings.adjoint_estimator import AdjointEstimator
    from curate.embeddings.anchors import AnchorSet

    # The main target's halves stay first, as without other targets; a retention target is one of the others.
    halves = AnchorSet(
        names=[f"{other.name} half {half}" for other in others for half in "ab"],
        batches=[half for other in others for half in other.halves],
    )
    return AdjointEstimator(config.adjoint, anchors=AdjointEstimator(config.adjoint).anchors(job) + halves)


def _is_complete(config: EmbedConfig, window: str, job: WindowJob, estimator: Estimator) -> bool:
    from curate.embeddings.store import embedding_folder

    return is_complete(*embedding_folder(job, window, config.horizon, estimator))


def _say_residual(config: EmbedConfig, window: str, job: WindowJob, residual: float | None) -> None:
    """Log how far to trust the values of a target that was solved into anchors, and what exact values would cost."""
    if residual is None:
        return
    _log.info("%s window: the anchors leave %.0f %% of the target's gradient unexplained", window, 100 * residual)
    if residual <= WEAK_RESIDUAL:
        return
    # The target's two halves alone: the anchors are done already.
    alone = config.adjoint.model_copy(update={"anchors_per_domain": 0, "anchor_files": ()})
    passes = make_estimator("adjoint", alone, config.dvemb, config.dvemb_adam).passes(job)
    _log.warning(
        "values of the %s window are approximate for this target (relative residual %.2f, exact at 0): add it as an "
        "anchor (--estimator adjoint), which would cost about %.0f forward+backward passes (%.0f %% of the stage), or "
        "more anchors that resemble it (adjoint.anchor_files)",
        window,
        residual,
        passes,
        100 * passes / job.replay.run.spec.steps,
    )


def _index(embedding: Embedding, config: IndexConfig) -> None:
    """Build the FAISS index of one embedding inside its folder."""
    import numpy as np

    from curate.index.build import build

    # The targets' own vectors as queries: recall is measured on what will be asked.
    queries = np.zeros((0, embedding.vectors.shape[1]), np.float32) if embedding.targets is None else embedding.targets
    parents = {"embeddings": read_json(embedding.folder / MANIFEST)["fingerprint"]}
    folder = index_folder(embedding, config)
    # A complete index needs no lock: `build` only opens it, also where the folder cannot be written.
    with nullcontext() if (folder / MANIFEST).exists() else locked(embedding.folder, wait=True):
        build(embedding.vectors, folder, config, queries=queries, seed=0, parents=parents)


def index_folder(embedding: Embedding, config: IndexConfig) -> Path:
    """Folder of an embedding's index; other settings have another folder."""
    return embedding.folder / f"index-{fingerprint(config.model_dump())[:8]}"


def read_targets(config: EmbedConfig, run: Run) -> Targets:
    """Load the targets of the config, if it names any.

    Raises:
        UserError: see `curate.training.target.load_targets`.
    """
    from curate.training.target import load_targets

    paths = [] if config.target is None else [config.target, *map(Path, config.more_targets)]
    return load_targets(paths, config.retain, run.spec, config.min_target_tokens)
