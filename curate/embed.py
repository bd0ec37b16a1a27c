"""`python -m curate.embed`: value embeddings of a run's windows, and their index."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from curate.artifacts import MANIFEST, fingerprint, is_complete, read_json
from curate.callable_module import calls_module
from curate.config import Config, FileName, parse_command, run_command
from curate.embeddings.estimators import (
    AdjointConfig,
    BaselineConfig,
    DvembAdamConfig,
    DvembConfig,
    EstimatorName,
    make_estimator,
)
from curate.errors import UserError
from curate.index.build import IndexConfig
from curate.lock import locked
from curate.progress import start_logging
from curate.trajectory.run import Run, find_run

if TYPE_CHECKING:
    from curate.embeddings.estimator import Estimator, WindowJob
    from curate.embeddings.store import Embedding, Horizon
    from curate.target import Target

_log = logging.getLogger(__name__)
WEAK_RESIDUAL = 0.5  # above it the anchors say less about a target than they leave open


class EmbedConfig(Config):
    """What to embed, and how."""

    run: Path | None = None
    """Recorded run; none: the newest finished one below `runs_root`."""
    runs_root: Path = Path("runs")
    """Where runs are looked for."""
    window: Literal["early", "late", "both", "none"] = "both"
    """Window or windows of the run to value. none: `curate.select` scores domains by what their samples would do in the
    next step, at a part of the cost; the report then says nothing of the steps that were taken."""
    windows: Literal["declared", "auto"] = "declared"
    """declared: the windows that the run was recorded with. auto: found from its loss, gradient norm and lr curves, or
    from a value curve of `python -m pipelines.phases` in its folder."""
    window_steps: int | None = Field(default=None, ge=1)
    """Value only the last steps of each window, as many as this; none: the whole window."""
    window_every: int = Field(default=1, ge=1)
    """Value the samples of every n-th step only (adjoint and anchors); all steps are replayed and walked back."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    horizon: Literal["window_end", "stage_end"] | int = "window_end"
    """State that the target's loss is read at: the end of each window or of the stage, or the state before a step
    from there (a number), for values with respect to any checkpoint in between."""
    estimator: EstimatorName = "adjoint"
    """adjoint: exact values for one target. anchors: exact values for other document sets; later targets are solved
    into them. dvemb: the published, cheaper, target-free embedding. dvemb-adam: the same for AdamW without momentum.
    grad-dot, less, shapley: baselines, see `curate.embeddings.baselines`."""
    target: Path | None = None
    """Target documents (JSONL); required by adjoint and the baselines."""
    more_targets: dict[FileName, Annotated[float, Field(gt=0)]] = {}
    """More targets (JSONL), valued in the same pass, each with the weight of its scores; that of `target` is 1."""
    guard: Path | None = None
    """Documents (JSONL) of what must not be lost, valued in the same pass; see mixture.guard_drop
    and shards.guard_weight."""
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

    @property
    def window_names(self) -> list[str]:
        """Names of the windows to embed."""
        return {"both": ["early", "late"], "none": []}.get(self.window, [self.window])


@calls_module
def embed(config: EmbedConfig, run: Run, target: Target | None) -> dict[str, Embedding]:
    """Embed and index every window of the config; complete ones are reused, missing ones are announced with their cost.

    Args:
        config: what to embed.
        run: the recorded run.
        target: the loaded target, or None where the estimator needs none.

    Returns:
        Window name -> embedding.

    Raises:
        UserError: bad run, target or settings.
    """
    from curate.embeddings.store import embed_window
    from curate.trajectory.windows import run_windows

    if config.windows == "auto":
        for part in run_windows(run).values():
            _log.info("%s", part.line)
    estimator, jobs = _plan(config, run, target)
    horizon: Horizon = config.horizon
    for window, job in jobs.items():
        if not _is_complete(config, window, job, estimator):
            units = estimator.cost_units(job)
            lead = job.start - run.snapshot_before(job.start)
            _log.info(
                "%s: the %s window (steps %d to %d, target read at %d) will cost about %.0f forward+backward passes, "
                "%.0f %% of the stage's %d%s",
                estimator.name, window, job.start, job.stop, job.horizon, units + lead,
                100 * (units + lead) / run.spec.steps, run.spec.steps,
                f" ({lead} of them to replay from the snapshot before it)" if lead else "",
            )  # fmt: skip
    embeddings = {window: embed_window(job, window, horizon, estimator) for window, job in jobs.items()}
    for embedding in embeddings.values():
        _index(embedding, config.index)
    for window, embedding in embeddings.items():
        _say_residual(config, window, jobs[window], embedding.residual)
    return embeddings


def embed_others(config: EmbedConfig, run: Run, target: Target) -> list[dict[str, Embedding]]:
    """The embeddings of `embed`, opened for each of the other targets in turn; see `other_targets`."""
    from curate.embeddings.store import embed_window

    estimator, jobs = _plan(config, run, target)
    return [
        {
            window: embed_window(replace(job, target=other), window, config.horizon, estimator)
            for window, job in jobs.items()
        }
        for other in other_targets(config, run, target)
    ]


def other_targets(config: EmbedConfig, run: Run, target: Target) -> list[Target]:
    """The further targets of the config in its order, the guard last.

    Raises:
        UserError: a file is bad, or two have one name: a target is called by its file's stem.
    """
    from curate.target import load_target

    paths = [*map(Path, config.more_targets), *([config.guard] if config.guard is not None else [])]
    others = [load_target(path, run.spec, config.min_target_tokens) for path in paths]
    names = [target.name, *(other.name for other in others)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"two targets are called {twice[0]!r}, by the names of their files: rename one, or leave it out"
        )
    return others


def is_embedded(config: EmbedConfig, run: Run, target: Target | None) -> bool:
    """Whether every window of the config is embedded already; see `embed`."""
    estimator, jobs = _plan(config, run, target)
    return all(_is_complete(config, window, job, estimator) for window, job in jobs.items())


def cost_units(config: EmbedConfig, run: Run, target: Target | None) -> dict[str, float]:
    """Forward+backward passes that embedding each window of a run costs, done or not."""
    estimator, jobs = _plan(config, run, target)
    return {window: estimator.cost_units(job) for window, job in jobs.items()}


def _plan(config: EmbedConfig, run: Run, target: Target | None) -> tuple[Estimator, dict[str, WindowJob]]:
    """The estimator, and the job of each window."""
    from curate.embeddings.store import plan_job
    from curate.target import check_vocabulary
    from curate.trajectory.replay import Replay
    from curate.trajectory.windows import run_windows

    replay = Replay(run, config.device, config.tolerance)
    others = [] if target is None else other_targets(config, run, target)
    for each in [] if target is None else [target, *others]:
        check_vocabulary(each, replay.task)
    if config.window_every > 1 and config.estimator not in ("adjoint", "anchors"):
        raise UserError(f"estimator {config.estimator} values every step; window_every needs adjoint or anchors")
    found = {} if config.windows == "declared" else run_windows(run)
    jobs = {
        window: plan_job(
            replay,
            window,
            config.horizon,
            target,
            batch_size=config.target_batch_size,
            window_steps=config.window_steps,
            every=config.window_every,
            borders=(found[window].start, found[window].stop) if found else None,
        )
        for window in config.window_names
    }
    estimator = make_estimator(config.estimator, config.adjoint, config.dvemb, config.dvemb_adam, config.baseline)
    if others and jobs and config.estimator == "adjoint":
        estimator = _with_anchors(config, next(iter(jobs.values())), others)
    return estimator, jobs


def _with_anchors(config: EmbedConfig, job: WindowJob, others: list[Target]) -> Estimator:
    """`adjoint` with the halves of every target among its anchors, so that one pass values all of them exactly."""
    from curate.embeddings.adjoint_estimator import AdjointEstimator
    from curate.embeddings.anchors import AnchorSet

    halves = AnchorSet(
        names=[f"{other.name} half {half}" for other in others for half in "ab"],
        batches=[half for other in others for half in other.halves],
    )
    return AdjointEstimator(config.adjoint, anchors=AdjointEstimator(config.adjoint).anchors(job) + halves)


def _is_complete(config: EmbedConfig, window: str, job: WindowJob, estimator: Estimator) -> bool:
    from curate.embeddings.store import embedding_folder

    return is_complete(*embedding_folder(job, window, config.horizon, estimator))


def _say_residual(config: EmbedConfig, window: str, job: WindowJob, residual: float | None) -> None:
    """Say how far values can be trusted for a target that was solved into anchors, and what exact ones would cost."""
    if residual is None:
        return
    _log.info("%s window: the anchors leave %.0f %% of the target's gradient unexplained", window, 100 * residual)
    if residual <= WEAK_RESIDUAL:
        return
    alone = config.adjoint.model_copy(update={"anchors_per_domain": 0, "anchor_files": ()})
    units = make_estimator("adjoint", alone, config.dvemb, config.dvemb_adam).cost_units(job)
    _log.warning(
        "values of the %s window are approximate for this target (relative residual %.2f, exact at 0): add it as an "
        "anchor (--estimator adjoint), which would cost about %.0f forward+backward passes (%.0f %% of the stage), or "
        "more anchors that resemble it (adjoint.anchor_files)",
        window, residual, units, 100 * units / job.replay.run.spec.steps,
    )  # fmt: skip


def _index(embedding: Embedding, config: IndexConfig) -> None:
    """Build the FAISS index of one embedding inside its folder."""
    import numpy as np

    from curate.index.build import build

    queries = np.zeros((0, embedding.vectors.shape[1]), np.float32) if embedding.targets is None else embedding.targets
    parents = {"embeddings": read_json(embedding.folder / MANIFEST)["fingerprint"]}
    folder = index_folder(embedding, config)
    with nullcontext() if (folder / MANIFEST).exists() else locked(embedding.folder, wait=True):
        build(embedding.vectors, folder, config, queries=queries, seed=0, parents=parents)


def index_folder(embedding: Embedding, config: IndexConfig) -> Path:
    """Where the index of an embedding lies; other settings, another folder."""
    return embedding.folder / f"index-{fingerprint(config.model_dump())[:8]}"


def read_target(config: EmbedConfig, run: Run) -> Target | None:
    """Load the target of the config, if it names one."""
    from curate.target import load_target

    return None if config.target is None else load_target(config.target, run.spec, config.min_target_tokens)


def main() -> None:
    """Entry point."""
    config = parse_command(
        EmbedConfig, "python -m curate.embed", "Value embeddings of a run's windows, and their index."
    )
    start_logging()
    if not config.window_names:
        raise UserError("window none leaves nothing to embed; set window to early, late or both")
    run = Run(config.run or find_run(config.runs_root), config.streams, config.tokenizer)
    embeddings = embed(config, run, read_target(config, run))
    for window, embedding in embeddings.items():
        _log.info("%s: %d rows x %d -> %s", window, *embedding.vectors.shape, embedding.folder)


if __name__ == "__main__":
    run_command(main)
