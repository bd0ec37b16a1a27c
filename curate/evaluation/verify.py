"""How far the values of a run can be trusted, by running its training again.

Samples are drawn from the early, the middle and the late window, the training is run again without each of them, and
the real effects on the targets are compared with the estimated values.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from curate.core.artifacts import SIGN, begin, finalize, fingerprint, making, write_json
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.embeddings.estimators import AdjointConfig, DvembAdamConfig, DvembConfig, EstimatorName, make_estimator
from curate.evaluation.draw import DrawConfig
from curate.evaluation.measure import HorizonName

if TYPE_CHECKING:
    from curate.evaluation.draw import Removal
    from curate.evaluation.measure import Estimates
    from curate.training.replay import Replay
    from curate.training.run import Run
    from curate.training.target import Target

_log = logging.getLogger(__name__)


class VerifyConfig(Config):
    """What to verify, and how thoroughly."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    target: tuple[Path, ...] = ()
    """Target documents (JSONL), one or several files; none: samples of each domain that the run did not train on."""
    min_target_tokens: int = Field(default=500, ge=1)
    """Fewest predicted tokens of a target."""
    target_batch_size: int = Field(default=16, ge=1)
    """Sequences per pass over a target."""
    out: Path | None = None
    """Folder to write to; none: a folder inside the run."""
    windows: tuple[str, ...] = ("early", "middle", "late")
    """Windows to draw from; a run without a middle window gets one of the late window's length."""
    horizons: tuple[HorizonName, ...] = ("window_end", "stage_end")
    """States that the targets are read at. Without stage_end the reruns of early samples end at their window's end."""
    estimator: EstimatorName = "adjoint"
    """Estimator to verify."""
    draw: DrawConfig = DrawConfig()
    """Reruns per window."""
    seed: int = 0
    """Seed of the draws."""
    device: str = "cpu"
    """Device of reruns and estimator."""
    tolerance: float = Field(default=1e-3, gt=0)
    """Largest relative difference between recorded and replayed losses."""
    adjoint: AdjointConfig = AdjointConfig()
    """Settings of adjoint."""
    dvemb: DvembConfig = DvembConfig()
    """Settings of dvemb."""
    dvemb_adam: DvembAdamConfig = Field(default=DvembAdamConfig())
    """Settings of dvemb-adam."""


def verify(config: VerifyConfig, run: Run) -> Path:
    """Rerun, estimate, compare.

    Returns:
        The folder with `verify.json` and `verify.html`; a complete one made with the same settings is returned as it
        is, an interrupted one is continued.

    Raises:
        UserError: bad run, target or settings.
    """
    from curate.training.replay import Replay
    from curate.training.target import check_vocabulary

    replay = Replay(run, config.device, config.tolerance)
    targets = load_targets(config, run)
    for target in targets:
        check_vocabulary(target, replay.task)
    settings = _settings(config, run, targets)
    out = config.out or run.folder / "verify" / fingerprint(settings)[:8]
    with making(out, settings) as missing:
        if missing:
            begin(out, settings)
            _make(config, replay, targets, out, settings)
        else:
            _log.info("this verification is complete already")
    return out


def _make(config: VerifyConfig, replay: Replay, targets: list[Target], out: Path, settings: dict[str, Any]) -> None:
    """Everything from the draw to the manifest."""
    from curate.evaluation.draw import draw
    from curate.evaluation.measure import compare
    from curate.evaluation.reruns import Reruns
    from curate.evaluation.truth import collect
    from curate.report.fidelity import verify_page

    run = replay.run
    windows = named_windows(run, config.windows)
    horizons = horizon_steps(run, windows, config.horizons)
    removals = draw(run, windows, config.draw, config.seed)
    passes = rerun_passes(removals, horizons)
    _log.info(
        "%d reruns will cost about %.0f forward+backward passes, %.1f times the stage's %d (fewer with draw.pairs, "
        "draw.groups, or --horizons '[window_end]')",
        len(removals),
        passes,
        passes / run.spec.steps,
        run.spec.steps,
    )
    reruns = Reruns(replay, targets, config.target_batch_size)
    # beside the result and by target and steps only: another estimator is held against the same reruns
    steps = {window: sorted(set(by_name.values())) for window, by_name in horizons.items()}
    kept = run.folder / "verify" / f"truth-{fingerprint([settings['targets'], steps])[:8]}.parquet"
    with locked(kept.parent, f".{kept.name}.lock", wait=True):
        truth = collect(kept, reruns, removals, steps, [target.name for target in targets])
    estimates = estimate(config, replay, targets, windows, horizons)
    result: dict[str, Any] = {**compare(truth, estimates, horizons, config.seed)}
    result["cost"] = {
        "reruns": len(removals),
        "rerun_units": passes,
        "estimate_units": sum(one.cost_units_per_step * len(one.values) * _length(windows, one) for one in estimates),
    }
    write_json(out / "verify.json", {"sign": SIGN, **result})
    verify_page(out / "verify.html", result)
    finalize(out, "verification", settings)


def _length(windows: Mapping[str, tuple[int, int]], estimates: Estimates) -> int:
    first, stop = windows[estimates.window]
    return stop - first


def _settings(config: VerifyConfig, run: Run, targets: list[Target]) -> dict[str, Any]:
    # where things lie and how fast they are made decides no number; what lies there counts by its content
    elsewhere = ("run", "streams", "target", "out", "device", "tolerance", "target_batch_size")
    limits = {"memory_bytes", "disk_bytes", "save_seconds"}
    chosen = config.model_dump(mode="json", exclude={**dict.fromkeys(elsewhere, True), "adjoint": limits})
    return {"run": run.fingerprint, "targets": [target.fingerprint for target in targets], **chosen}


def load_targets(config: VerifyConfig, run: Run) -> list[Target]:
    """The targets of the config, or held-out samples of the run's own streams, one target per domain and a general one.

    Raises:
        UserError: a file is unreadable or too small, two have one name, or a domain has too few samples.
    """
    from curate.evaluation.heldout import heldout_targets
    from curate.training.target import load_target

    if config.target:
        targets = [load_target(path, run.spec, config.min_target_tokens) for path in config.target]
        twice = sorted({target.name for target in targets if [one.name for one in targets].count(target.name) > 1})
        if twice:
            raise UserError(f"two target files are called {twice[0]}; rename one")
        return targets
    return heldout_targets(run)


def named_windows(run: Run, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Declared windows; `middle`, where it is not declared, is as long as the last one and centred in the stage.

    Raises:
        UserError: a window that the run did not declare.
    """
    windows = {}
    for name in names:
        if name == "middle" and name not in run.spec.windows:
            first, stop = max(run.spec.windows.values())
            begin = (run.spec.steps - (stop - first)) // 2
            windows[name] = (begin, begin + stop - first)
        else:
            windows[name] = run.window(name)
    return windows


def horizon_steps(
    run: Run, windows: Mapping[str, tuple[int, int]], names: tuple[HorizonName, ...]
) -> dict[str, dict[HorizonName, int]]:
    """Window -> horizon name -> step."""
    ends: dict[str, dict[HorizonName, int]] = {
        window: {"window_end": stop, "stage_end": run.spec.steps} for window, (_, stop) in windows.items()
    }
    return {window: {name: by_name[name] for name in names} for window, by_name in ends.items()}


def rerun_passes(removals: list[Removal], horizons: Mapping[str, Mapping[HorizonName, int]]) -> float:
    """Steps that all reruns take."""
    return float(sum(max(horizons[removal.window].values()) - removal.step for removal in removals))


def estimate(
    config: VerifyConfig,
    replay: Replay,
    targets: list[Target],
    windows: Mapping[str, tuple[int, int]],
    horizons: Mapping[str, Mapping[HorizonName, int]],
) -> list[Estimates]:
    """Values of every sample of the windows for every target and horizon, by the product's own path.

    Late windows come first: earlier ones continue from their influence checkpoints.
    """
    # two names of one step are one job, called stage_end: the last one that is put in
    jobs = {
        (step, window): name
        for window, by_name in horizons.items()
        for name, step in sorted(by_name.items(), reverse=True)
    }
    estimates = []
    # by the first step of the window, last one first
    for (step, window), name in sorted(jobs.items(), key=lambda job: -windows[job[0][1]][0]):
        estimates.append(_estimate(config, replay, targets, window, (*windows[window], step), name))
    return estimates


def _estimate(
    config: VerifyConfig,
    replay: Replay,
    targets: list[Target],
    window: str,
    steps: tuple[int, int, int],
    horizon: HorizonName,
) -> Estimates:
    from dataclasses import replace

    from curate.embeddings.adjoint_estimator import AdjointEstimator
    from curate.embeddings.anchors import AnchorSet
    from curate.embeddings.estimator import HALVES, WindowJob
    from curate.embeddings.store import embed_window
    from curate.evaluation.measure import Estimates, keyed

    first, stop, end = steps
    job = WindowJob(replay=replay, start=first, stop=stop, horizon=end, batch_size=config.target_batch_size)
    estimator = make_estimator(config.estimator, config.adjoint, config.dvemb, config.dvemb_adam)
    if config.estimator == "adjoint":
        # every target is an anchor: one walk serves them all
        names = [f"{target.name} half {half}" for target in targets for half in range(HALVES)]
        anchors = AnchorSet(names=names, batches=[half for target in targets for half in target.halves])
        estimator = AdjointEstimator(config.adjoint, anchors=anchors)
    values = {}
    for target in targets:
        embedding = embed_window(replace(job, target=target), window, horizon, estimator)
        values[target.name] = keyed(embedding.rows["step"].to_list(), embedding.values(target))
    return Estimates(
        estimator=config.estimator,
        window=window,
        horizon=end,
        values=values,
        cost_units_per_step=embedding.passes / (stop - first) / len(targets),
        bytes_per_sample=float(embedding.vectors[:1].nbytes) / (len(targets) if config.estimator == "adjoint" else 1),
    )
