"""Every estimator of the bench on one run: values of all samples of the windows for all targets, at both horizons."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.core.arrays import read_arrays, write_arrays
from curate.core.artifacts import fingerprint
from curate.embeddings import baselines
from curate.embeddings.adjoint_estimator import optimizer_metric
from curate.embeddings.anchors import GENERAL, AnchorSet, anchor_gradients, document_anchors
from curate.embeddings.basis import AnchorBasis, choose_metric, solve
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator
from curate.embeddings.dvemb_estimator import DvembConfig, DvembEstimator
from curate.embeddings.estimator import WindowJob
from curate.embeddings.store import embed_window
from curate.evaluation.measure import Estimates, HorizonName, keyed
from curate.training.replay import Replay, records
from curate.training.target import load_target, read_pieces, weighted
from pipelines.fidelity.walk import Walk, walk_back

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.embeddings.products import Hessian
    from curate.training.run import Run
    from pipelines.fidelity.config import BenchConfig

_log = logging.getLogger(__name__)
_OWN = {"linear": "adjoint", "exact": "adjoint-own-step", "embedding": "adjoint-own-embedding"}
_TRACIN_EVERY = 10  # steps between checkpoints at which the targets' gradients are taken


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What every estimator reads."""

    config: BenchConfig
    run: Run
    data: Path
    folder: Path
    targets: AnchorSet
    pool: AnchorSet
    pool_domains: list[str]

    def replay(self) -> Replay:
        """A fresh replay, so that each estimator's cost has a unit of its own time."""
        return Replay(self.run)

    def steps(self, window: str) -> list[int]:
        """Step of each row of a window."""
        batches = records(self.run, *self.config.windows[window])
        return [record.step for record in batches for _ in range(record.size)]

    def cells(self) -> Iterator[tuple[str, HorizonName, int]]:
        """Window, name of the horizon, its step; once where both horizons are one step."""
        for window, (_, stop) in self.config.windows.items():
            yield window, "stage_end", self.config.steps
            if stop < self.config.steps:
                yield window, "window_end", stop


def open_bench(config: BenchConfig, run: Run, data: Path, folder: Path) -> Bench:
    """Targets as anchors (each one a mean over its documents), and a pool of anchors from other documents."""
    split = data / "split"
    names = [*config.targets, GENERAL]
    batches = [weighted(read_pieces(split / "targets" / f"{name}.jsonl", run.spec)) for name in names]
    pool, domains = AnchorSet(names=[], batches=[]), []
    for path in sorted((split / "anchors").glob("*.jsonl")):
        domain_anchors = document_anchors(path, run.spec, config.anchors_per_domain, 1)
        pool += domain_anchors
        domains += [path.stem] * len(domain_anchors)
    targets = AnchorSet(names=names, batches=batches)
    # values are kept by what they depend on
    folder = folder / f"values-{fingerprint([run.fingerprint, targets.fingerprint, pool.fingerprint])[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    return Bench(
        config=config,
        run=run,
        data=data,
        folder=folder,
        targets=targets,
        pool=pool,
        pool_domains=domains,
    )


def estimates(bench: Bench) -> Iterator[Estimates]:
    """All estimators, cheap ones first; what an earlier call finished is opened."""
    yield from _products(bench)
    yield from _published(bench)
    yield from _adjoint(bench, "exact", _OWN)
    yield from _anchored(bench)
    if bench.config.levers:
        yield from _adjoint(bench, "difference", {"exact": "adjoint-difference"})


def _products(bench: Bench) -> Iterator[Estimates]:
    for window, _, horizon in bench.cells():
        for name in ("grad-dot", "less", "tracin"):
            file = f"products-{name}-{window}-{horizon}"
            # defaults bind the loop's variables now; a plain lambda would read the last ones
            product = _kept(bench, file, lambda n=name, w=window, h=horizon: _product(bench, n, w, h))
            yield _estimates(bench, name, window, horizon, product["values"], float(product["units"]))


def _product(bench: Bench, name: str, window: str, horizon: int) -> dict[str, Any]:
    replay, (start, stop) = bench.replay(), bench.config.windows[window]
    begin = perf_counter()
    if name == "tracin":
        values = baselines.along_trajectory(replay, bench.targets.batches, (start, stop), 48, _TRACIN_EVERY)
    else:
        optimizers = replay.optimizers_at(horizon)
        targets = anchor_gradients(replay.task, replay.layout, bench.targets, 48)
        if name == "grad-dot":
            values = baselines.grad_dot(replay, targets, (start, stop))
        else:
            # LESS compares by cosine (Xia et al. 2024); `less` normalises the samples' side
            lengths = targets.norm(dim=1, keepdim=True)
            values = baselines.less(replay, targets / lengths, (start, stop), optimizers)
    seconds = perf_counter() - begin
    # some products never replay the window: its passes are timed here, for the unit alone
    if replay.pass_seconds is None:
        deque(replay.steps(start, stop), maxlen=0)
    unit = (replay.pass_seconds or 1.0) * (stop - start) * len(bench.targets)
    return {"values": values, "units": seconds / unit}


def _published(bench: Bench) -> Iterator[Estimates]:
    """`dvemb` and `dvemb-adam` with the product's defaults; as a lever, the latter with one vector for all steps."""
    loaded = [
        load_target(bench.data / "split" / "targets" / f"{name}.jsonl", bench.run.spec, 1)
        for name in bench.targets.names
    ]
    estimators: dict[str, DvembEstimator | DvembAdamEstimator] = {
        "dvemb": DvembEstimator(DvembConfig()),
        "dvemb-adam": DvembAdamEstimator(DvembAdamConfig()),
    }
    if bench.config.levers:
        estimators["dvemb-adam-shortcut"] = DvembAdamEstimator(DvembAdamConfig(shortcut=True))
    for name, estimator in estimators.items():
        for window, horizon_name, horizon in bench.cells():
            first, stop = bench.config.windows[window]
            job = WindowJob(replay=bench.replay(), start=first, stop=stop, horizon=horizon, batch_size=48)
            columns = []
            for target in loaded:
                embedding = embed_window(replace(job, target=target), window, horizon_name, estimator)
                columns.append(embedding.values(target))
            units = embedding.passes / (stop - first) / len(loaded)
            size = float(embedding.vectors[:1].nbytes)
            yield _estimates(bench, name, window, horizon, np.stack(columns, 1), units, size)


def _adjoint(bench: Bench, hessian: Hessian, names: dict[str, str]) -> Iterator[Estimates]:
    """The targets as anchors, one walk per horizon.

    Args:
        bench: what is read.
        hessian: curvature of the walks.
        names: own step -> the estimator's name in the table.
    """
    words = [hessian, *(() if "linear" in names else names)]
    for walk in _walks(bench, f"targets-{'-'.join(words)}", hessian, tuple(names)):
        values = walk_back(bench.replay(), bench.targets, walk, bench.folder)
        for window, arrays in values.items():
            for own_step, name in names.items():
                units = float(arrays[f"units {own_step}"]) / len(bench.targets)
                yield _estimates(bench, name, window, walk.horizon, arrays[own_step], units, 8.0)


def _walks(bench: Bench, name: str, hessian: Hessian, own_steps: tuple[str, ...]) -> Iterator[Walk]:
    """All windows from the stage's end, and each other window from its own."""
    windows, steps = bench.config.windows, bench.config.steps
    yield Walk(name=f"{name}-stage", horizon=steps, windows=windows, hessian=hessian, own_steps=own_steps)
    for window, (start, stop) in windows.items():
        if stop < steps:
            yield Walk(
                name=f"{name}-{window}",
                horizon=stop,
                windows={window: (start, stop)},
                hessian=hessian,
                own_steps=own_steps,
            )


def _anchored(bench: Bench) -> Iterator[Estimates]:
    """Targets in the coordinates of anchors: among them, their domain's other documents among them, or neither."""
    both = bench.targets + bench.pool
    kind = f"anchors-{bench.config.anchors_hessian}"
    for window, horizon_name, horizon in bench.cells():
        at_end = bench.config.anchors_at_stage_end
        # the late window ends with the stage: without the long walk its own walk serves both horizons
        alone = horizon_name == "window_end" or (window == "late" and not at_end)
        if not alone and not at_end:
            continue
        borders = bench.config.windows[window]
        name = f"{kind}-{horizon}-{window}" if alone else f"{kind}-stage"
        windows = {window: borders} if alone else bench.config.windows
        walk = Walk(
            name=name,
            horizon=horizon,
            windows=windows,
            hessian=bench.config.anchors_hessian,
            own_steps=("exact",),
        )
        arrays = walk_back(bench.replay(), both, walk, bench.folder)[window]
        units = float(arrays["units exact"]) / len(both)
        agreement = _agreement(bench, arrays["exact"])
        _log.info("%s read at %d: anchors of one domain rank samples %.2f like each other", window, horizon, agreement)
        solved = _kept(
            bench,
            f"solved-{kind}-{window}-{horizon}",
            lambda v=arrays["exact"], h=horizon: _solve(bench, v, h),
        )
        for chosen, size in (("r8", 8), ("r32", 32), ("r32-heldout", 32), ("r32-foreign", 32)):
            yield _estimates(bench, f"adjoint-{chosen}", window, horizon, solved[chosen], units, 4.0 * size)


def _agreement(bench: Bench, values: npt.NDArray[np.float32]) -> float:
    """Mean Spearman of the values for two anchors of one target's domain: what a target of that size can agree to."""
    from scipy.stats import spearmanr

    ranks = spearmanr(values[:, len(bench.targets) :]).statistic
    domains = np.asarray(bench.pool_domains)
    same_domain = (domains[:, None] == domains) & np.isin(domains, bench.config.targets)[:, None]
    # without the diagonal, where an anchor agrees with itself
    return float(ranks[same_domain & ~np.eye(len(domains), dtype=bool)].mean())


def _solve(bench: Bench, values: npt.NDArray[np.float32], horizon: int) -> dict[str, Any]:
    """Values (N, Q) of every kind of anchor set, and the relative residuals (Q,)."""
    replay, both = bench.replay(), bench.targets + bench.pool
    diagonal = optimizer_metric(replay, replay.optimizers_at(horizon), horizon)
    gradients = anchor_gradients(replay.task, replay.layout, both, 48)
    solved: dict[str, Any] = {}
    for kind in ("r8", "r32", "r32-heldout", "r32-foreign"):
        columns, residuals = [], []
        for index in range(len(bench.targets)):
            chosen = _anchors_of(bench, index, kind)
            basis = AnchorBasis(names=[both.names[i] for i in chosen], gradients=gradients[chosen], diagonal=diagonal)
            # by the anchors' values, as the product chooses it
            choice = choose_metric(basis, values[:, chosen])
            solution = solve(basis, gradients[index : index + 1], choice.metric, choice.ridge)
            columns.append(values[:, chosen] @ solution.coordinates[0])
            residuals.append(float(solution.residuals[0]))
        solved[kind], solved[f"residual {kind}"] = np.stack(columns, 1), np.asarray(residuals)
    return solved


def _anchors_of(bench: Bench, target: int, kind: str) -> list[int]:
    """Which anchors stand for a target: indexes into targets and pool together."""
    first = len(bench.targets)
    pool = list(range(first, first + len(bench.pool)))
    # one of each domain, then the second of each, ...
    order = sorted(pool, key=lambda i: ((i - first) % bench.config.anchors_per_domain, i))
    if kind == "r8":
        return [target, *order[:7]]
    if kind == "r32":
        return [target, *order[:31]]
    if kind == "r32-heldout":
        return order[:32]
    # r32-foreign: neither the target nor any other text of its domain
    domain = bench.targets.names[target]
    foreign = [i for i in order if bench.pool_domains[i - first] != domain]
    others = [i for i in range(first) if i != target and bench.targets.names[i] not in (domain, GENERAL)]
    return (foreign + others)[:32]


def _kept(bench: Bench, name: str, make: Any) -> dict[str, Any]:
    """Arrays that are computed once."""
    path = bench.folder / f"{name}.npz"
    if not path.exists():
        write_arrays(path, make())
    return read_arrays(path)


def _estimates(
    bench: Bench, name: str, window: str, horizon: int, values: Any, units: float, size: float = 0.0
) -> Estimates:
    steps: Sequence[int] = bench.steps(window)
    return Estimates(
        estimator=name,
        window=window,
        horizon=horizon,
        cost_units_per_step=units,
        bytes_per_sample=size,
        values={
            target: keyed(steps, np.asarray(values)[:, column].astype(np.float64))
            for column, target in enumerate(bench.targets.names)
        },
    )
