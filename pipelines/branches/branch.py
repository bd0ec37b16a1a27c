"""One branch: select with a method, train from stage 1's state, read the held-out losses. Each is kept when it is done.

A branch is a folder with `mixture.yaml` and `losses.json`; its data and its state are deleted once the losses are read.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curate.artifacts import fingerprint, read_json, write_json
from curate.fidelity.branches import agreement, realised_changes
from curate.mixture.apportion import apportion
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.scores.methods import VALUED, Method
from curate.select import SelectConfig, select
from curate.shards.write import write_reweight
from curate.target import load_target, target_loss
from curate.tracking import TrackingConfig
from curate.trajectory.recorder import RecorderConfig
from curate.trajectory.replay import Replay
from curate.trajectory.run import Run
from curate.trajectory.samples import trained_tokens
from pipelines.branches.config import DEFAULT_TEMPERATURE
from pipelines.branches.pools import SPLITS, general_file, target_file
from pipelines.evaluate import BATCH_SIZE, domain_losses, load_task
from pipelines.pretrain import OptimizerConfig, PretrainConfig, train

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from pipelines.branches.config import BranchesConfig, Case

FINAL = "checkpoint.safetensors"
PROPORTIONAL = f"proportional-{DEFAULT_TEMPERATURE:g}"
Losses = dict[str, float]  # target_<split> and general_<split>, nats per token


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What the branches of one case and seed share.

    Attributes:
        config: of the bench.
        case: what is trained on and what for.
        seed: of initial weights, data order and draws.
        data: folder of `make_pools`.
        run: stage 1.
        folder: of the branches.
    """

    config: BranchesConfig
    case: Case
    seed: int
    data: Path
    run: Run
    folder: Path

    @property
    def budget_tokens(self) -> int:
        """Stored tokens of a branch."""
        return self.config.branch_steps * self.config.batch_size * self.config.seq_len


def open_arena(config: BranchesConfig, case: Case, seed: int, data: Path) -> Arena:
    """Train stage 1 of a pool and seed, or open it."""
    folder = config.folder / case.pool / f"seed-{seed}"
    steps, window = config.steps, config.window_steps
    train(
        PretrainConfig(
            out=folder / "run", data=data / case.pool, model=config.model, steps=steps, batch_size=config.batch_size,
            seed=seed, device=config.device,
            optimizer=OptimizerConfig(lr=config.lr, warmup_steps=steps // 10),
            recorder=RecorderConfig(windows={"early": (0, window), "late": (steps - window, steps)}),
        )
    )  # fmt: skip
    chosen = config.model_dump(
        mode="json",
        include={"mode", "window", "branch_steps", "branch_lr", "batch_size", "target_documents", "excerpt_characters"},
    )
    run = Run(folder / "run")
    own = folder / f"{case.name}-{fingerprint([chosen, run.fingerprint])[:8]}"
    return Arena(config=config, case=case, seed=seed, data=data, run=run, folder=own)


def run_branch(
    arena: Arena,
    name: str,
    method: Method,
    temperature: float,
    *,
    weights: Mapping[str, float] | None = None,
    keep_state: bool = False,
) -> dict[str, Any]:
    """A branch on the data of a method.

    Args:
        arena: the case and seed.
        name: folder of the branch.
        method: of `curate.select`.
        temperature: of the mixture.
        weights: for method given.
        keep_state: leave `stage/` there.

    Returns:
        Losses, `kl_to_prior`, `tokens`, `selection_cost_units`, and `weights` and `scores` of the domains.
    """
    folder = arena.folder / name
    if not (folder / "losses.json").exists():
        made = select(_selection(arena, folder / "selection", method, temperature, weights, arena.seed), arena.run)
        mixture = read_mixture(made / "mixture.yaml")
        losses = train_and_read(arena, folder / "stage", data_of(made))
        facts = {"kl_to_prior": mixture.kl_to_prior, "tokens": mixture.tokens}
        domains = {
            "weights": {domain: part.delivered_weight for domain, part in mixture.domains.items()},
            "scores": {domain: part.score for domain, part in mixture.domains.items()},
        }
        units = _cost_units(arena, method)
        write_json(folder / "losses.json", {**losses, **facts, "selection_cost_units": units, **domains})
        for part in ("selection",) if keep_state else ("selection", "stage"):
            shutil.rmtree(folder / part)
    return read_json(folder / "losses.json")


def _selection(
    arena: Arena, out: Path, method: Method, temperature: float, weights: Mapping[str, float] | None, seed: int
) -> SelectConfig:
    config = arena.config
    return SelectConfig(
        target=target_file(arena.data, arena.case, "select"), min_target_tokens=1, window=config.window, out=out,
        method=method, weights=dict(weights or {}), mode=config.mode, budget_tokens=arena.budget_tokens, seed=seed,
        mixture=MixtureConfig(temperature=temperature, window=config.window), tracking=TrackingConfig(mode="none"),
        device=config.device,
    )  # fmt: skip


def data_of(selection: Path) -> Path:
    """What `curate.select` wrote for a trainer."""
    mds = selection / "data" / "mds"
    return mds if mds.exists() else selection / "data" / "streams.yaml"


def _cost_units(arena: Arena, method: Method) -> float:
    """Forward+backward passes that the method's values cost, shared by its temperatures; 0 where it values nothing."""
    if method not in VALUED:
        return 0.0
    estimator = "adjoint" if method in ("curate", "shuffled") else method
    wanted = f"{arena.config.window}-window_end-{estimator}-*/timings.json"
    target = load_target(target_file(arena.data, arena.case, "select"), arena.run.spec, 1).fingerprint
    for path in sorted((arena.run.folder / "embeddings").glob(wanted)):
        if (path.parent / f"target-{target}.npz").exists():
            return float(read_json(path)["cost_units"])
    raise FileNotFoundError(wanted)


def train_and_read(arena: Arena, out: Path, data: Path, state: Path | None = None, *, warm: bool = True) -> Losses:
    """Train the steps of a branch and read the held-out losses.

    Args:
        arena: the case and seed.
        out: folder of the stage.
        data: streams.yaml or MDS folder.
        state: to start from; none: stage 1's.
        warm: whether lr warms up; not where training goes on.
    """
    config = arena.config
    warmup = config.steps // 10 if warm else 0
    train(
        PretrainConfig(
            out=out, data=data, model=config.model, steps=config.branch_steps, batch_size=config.batch_size,
            seed=arena.seed, init_from=state or arena.run.folder / FINAL, device=config.device, recorder=None,
            optimizer=OptimizerConfig(lr=config.branch_lr, min_lr_ratio=1.0, warmup_steps=warmup),
        )
    )  # fmt: skip
    return read_losses(arena, out / FINAL)


def read_losses(arena: Arena, state: Path) -> Losses:
    """Losses of a state on the target's splits (mean over documents) and on general text (mean over domains)."""
    spec = arena.run.spec
    task = load_task(spec, state, arena.config.device)
    found = {}
    for split in SPLITS:
        target = load_target(target_file(arena.data, arena.case, split), spec, 1)
        found[f"target_{split}"] = target_loss(task, target, BATCH_SIZE)
    for split in SPLITS[1:]:
        general = domain_losses(task, spec, general_file(arena.data, split))
        found[f"general_{split}"] = sum(general.values()) / len(general)
    return found


def continued(arena: Arena) -> list[Losses]:
    """Losses of proportional after 0, 1, ... times the tokens of a branch, at constant lr; the first is its branch."""
    path, folder = arena.folder / "continued.json", arena.folder / "continued"
    first = arena.folder / PROPORTIONAL
    if not path.exists():
        if not (first / "stage" / FINAL).exists():
            shutil.rmtree(first, ignore_errors=True)
        branch = run_branch(arena, PROPORTIONAL, "proportional", DEFAULT_TEMPERATURE, keep_state=True)
        losses, state = [read_losses(arena, arena.run.folder / FINAL), branch], first / "stage" / FINAL
        for part in range(1, arena.config.continued):
            seed = arena.seed + 1000 * part  # other samples and another order each time
            selection = _selection(arena, folder / f"data-{part}", "proportional", DEFAULT_TEMPERATURE, None, seed)
            stage = folder / f"stage-{part}"
            losses.append(train_and_read(arena, stage, data_of(select(selection, arena.run)), state, warm=False))
            state = stage / FINAL
        write_json(path, {"losses": losses})
    for done in (folder, first / "stage"):
        shutil.rmtree(done, ignore_errors=True)
    found: list[Losses] = read_json(path)["losses"]
    return found


def clean_branch(arena: Arena) -> dict[str, Any]:
    """The oracle of the noisy case: the same domains in the same proportions, without the noise."""
    folder = arena.folder / "oracle"
    if not (folder / "losses.json").exists():
        clean = Run(arena.run.folder, {name: arena.data / "clean" / name for name in arena.run.spec.streams})
        sizes = {name: len(stream) for name, stream in clean.streams.items()}
        prior = read_json(arena.folder / PROPORTIONAL / "losses.json")["weights"]
        wanted = apportion(prior, arena.config.branch_steps * arena.config.batch_size, dict.fromkeys(sizes, 10**9))
        write_reweight(folder / "streams.yaml", clean.spec.streams, wanted)
        losses = train_and_read(arena, folder / "stage", folder / "streams.yaml")
        facts = {"kl_to_prior": 0.0, "tokens": arena.budget_tokens, "selection_cost_units": 0.0, "weights": prior}
        write_json(folder / "losses.json", {**losses, **facts})
        shutil.rmtree(folder / "stage")
    return read_json(folder / "losses.json")


def domain_agreement(arena: Arena, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Spearman of each method's domain scores with what a little more of one domain did to the target."""
    config, run = arena.config, arena.run
    target = load_target(target_file(arena.data, arena.case, "select"), run.spec, 1)
    prior = {domain: float(tokens) for domain, tokens in trained_tokens(run).items()}
    changes = realised_changes(
        Replay(run, config.device), target, prior, config.branch_test, seed=arena.seed, batch_size=BATCH_SIZE
    )
    rows = []
    for method in methods:
        scores = run_branch(arena, f"{method}-{DEFAULT_TEMPERATURE:g}", method, DEFAULT_TEMPERATURE)["scores"]
        found = asdict(agreement(scores, changes, arena.seed))
        rows.append({"case": arena.case.name, "method": method, "seed": arena.seed, **found})
    return rows
