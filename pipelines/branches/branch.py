"""One branch: select with a method, train from stage 1's state, read the held-out losses. Each is kept when it is done.

A branch is a folder with `losses.json`, which has those on every target and on general text; its data and its state are
deleted once they are read. Branches that do not depend on a target are shared by the cases of a pool.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import polars as pl

from curate.core.arrays import read_table
from curate.core.artifacts import fingerprint, read_json, write_json
from curate.domains.methods import PREDICTING, VALUED, Method
from curate.embeddings.adjoint_estimator import AdjointConfig
from curate.evaluation.branches import agreement, realised_changes
from curate.filter.choose import CHOICE, FilterConfig
from curate.influence.extrapolate import PREDICTOR
from curate.mixture.apportion import apportion
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.ngrams.regression import PREDICTOR as NGRAM_PREDICTOR
from curate.output.layout import SelectionFolder
from curate.output.write import write_weights
from curate.select import select
from curate.selection.config import OutputConfig, SelectConfig, ValuesConfig
from curate.training.recorder import RecorderConfig
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.samples import trained_tokens
from curate.training.target import load_target, target_loss
from pipelines.branches.config import NGRAM_SHARES, OURS, RETAINING, TARGETLESS, default_temperature
from pipelines.branches.pools import SPLITS, general_file, target_file
from pipelines.checkpoints import FINAL
from pipelines.evaluate import BATCH_SIZE, domain_losses, load_task
from pipelines.optimizers import OptimizerConfig
from pipelines.pretrain import PretrainConfig, train

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from curate.mixture.constraints import Schedule
    from pipelines.branches.config import BenchMethod, BranchesConfig, Case

Losses = dict[str, float]  # <target>_<split> and general_<split>, nats per token


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
        shared: of those that are the same for every case of the pool.
    """

    config: BranchesConfig
    case: Case
    seed: int
    data: Path
    run: Run
    folder: Path
    shared: Path

    @property
    def proportional(self) -> Path:
        """Folder of the branch that all differences are taken from."""
        return self.shared / "proportional"

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
            out=folder / "run",
            data=data / case.pool,
            model=config.model,
            steps=steps,
            batch_size=config.batch_size,
            seed=seed,
            device=config.device,
            optimizer=OptimizerConfig(lr=config.lr, warmup_steps=steps // 10),
            recorder=RecorderConfig(windows={"early": (0, window), "late": (steps - window, steps)}),
        )
    )
    run = Run(folder / "run")
    names = {"branch_steps", "branch_lr", "batch_size", "target_documents", "excerpt_characters"}
    # What decides a branch is part of its folder's name, the product's defaults and rules too.
    common: list[Any] = [config.model_dump(mode="json", include=names), run.fingerprint, config.target_names]
    defaults = (ValuesConfig(), MixtureConfig(), FilterConfig(), AdjointConfig())
    common += [[settings.model_dump(mode="json") for settings in defaults], config.drop_fraction, PREDICTOR, CHOICE]
    case_key = fingerprint([*common, config.window, config.max_regression, config.measured_passes, NGRAM_PREDICTOR])[:8]
    return Arena(
        config=config,
        case=case,
        seed=seed,
        data=data,
        run=run,
        folder=folder / f"{case.name}-{case_key}",
        shared=folder / f"shared-{fingerprint(common)[:8]}",
    )


def run_branch(
    arena: Arena,
    folder: Path,
    method: BenchMethod,
    temperature: float | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    schedule: Schedule = "constant",
    keep_state: bool = False,
) -> dict[str, Any]:
    """A branch on the data of a method.

    Args:
        arena: the case and seed.
        folder: of the branch.
        method: of `curate.select`, or a variant of curate; the oracle's is proportional, to weights of its own.
        temperature: prior strength of the mixture, or of dsir's draw; none: the method's default.
        weights: share of each domain, for method proportional; none: what was trained on.
        schedule: where in the branch the mixture holds.
        keep_state: leave `stage/` there.

    Returns:
        Losses, `kl_to_prior`, `tokens`, `selection_cost_units`, and `weights` and `scores` of the domains.
    """
    if not (folder / "losses.json").exists():
        config = _selection(
            arena, folder / "selection", method, temperature, weights=weights, schedule=schedule, seed=arena.seed
        )
        written = SelectionFolder(select(config, arena.run))
        mixture = read_mixture(written.mixture)
        losses = train_and_read(arena, folder / "stage", written.training_data)
        facts = {"kl_to_prior": mixture.kl_to_prior, "tokens": mixture.stored_tokens}
        domains = {
            "weights": {domain: solved.delivered_weight for domain, solved in mixture.domains.items()},
            "scores": {domain: solved.score for domain, solved in mixture.domains.items()},
        }
        units = 0.0 if NGRAM_SHARES.get(method) == 1 else _passes(written)  # n-grams alone need no values
        write_json(folder / "losses.json", {**losses, **facts, "selection_cost_units": units, **domains})
        # after losses.json: hundreds of branches would not fit onto the disk
        for done in ("selection",) if keep_state else ("selection", "stage"):
            shutil.rmtree(folder / done)
    return read_json(folder / "losses.json")


def case_losses(arena: Arena, losses: Mapping[str, Any]) -> dict[str, float]:
    """`target_<split>` of the case, the mean over its targets, which have as many documents each; `general_<split>`."""
    general = {f"general_{split}": losses[f"general_{split}"] for split in SPLITS[1:]}
    targets = arena.case.targets
    return general | {
        f"target_{split}": sum(losses[f"{target}_{split}"] for target in targets) / len(targets) for split in SPLITS
    }


def _selection(
    arena: Arena,
    out: Path,
    method: BenchMethod,
    temperature: float | None = None,
    *,
    weights: Mapping[str, float] | None = None,
    schedule: Schedule = "constant",
    seed: int,
) -> SelectConfig:
    """Settings of a method's selection: what the method has no use for is left at its default."""
    config = arena.config
    # the targets of a bench may be small; its seeds show what that does
    values: dict[str, Any] = {"min_target_tokens": 1}
    mixture: dict[str, Any] = {"prior": dict(weights or {}), "schedule": schedule}
    strength = default_temperature(method) if temperature is None else temperature
    if method == "dsir":
        values["dsir_temperature"] = strength
    elif method not in TARGETLESS:
        mixture["prior_strength"] = strength
    if method in OURS:
        values["ngram_share"] = NGRAM_SHARES.get(method, ValuesConfig().ngram_share)
        if values["ngram_share"] < 1:  # n-grams alone measure no samples
            values["measured_passes"] = config.measured_passes
            # the run has rows once `indexed` has made them, and the others must not change with it
            values["rows"] = method == "indexed"
    if method == "windowed" or method in PREDICTING:
        values["sources"] = (config.window,)
    if method in RETAINING:
        mixture["max_regression"] = config.max_regression
    product_method = cast("Method", "curate" if method in OURS else method)
    # a method that values no samples knows no worst ones: the product refuses the setting
    worst: dict[str, Any] = {"drop_fraction": config.drop_fraction} if product_method in VALUED else {}
    # contamination off: held-out documents share no document with training, and a scan costs the same for every method
    return SelectConfig(
        target=target_file(arena.data, arena.case.target, "select"),
        out=out,
        retain=general_file(arena.data, "select") if method in RETAINING else None,
        method=product_method,
        budget_tokens=arena.budget_tokens,
        seed=seed,
        device=config.device,
        values=ValuesConfig(**values),
        mixture=MixtureConfig(**mixture),
        filter=FilterConfig(contamination_overlap=None, **worst),
        output=OutputConfig(wandb="none"),
    )


def _passes(selection: SelectionFolder) -> float:
    """Forward+backward passes of a selection's values, which its temperatures share; 0 where it values nothing."""
    costs = selection.table("costs")
    if not costs.exists():
        return 0.0
    return float(read_table(costs).filter(pl.col("phase") != "training")["passes"].sum())


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
            out=out,
            data=data,
            model=config.model,
            steps=config.branch_steps,
            batch_size=config.batch_size,
            seed=arena.seed,
            init_from=state or arena.run.folder / FINAL,
            device=config.device,
            recorder=None,
            optimizer=OptimizerConfig(lr=config.branch_lr, min_lr_ratio=1.0, warmup_steps=warmup),
        )
    )
    return read_losses(arena, out / FINAL)


def read_losses(arena: Arena, state: Path) -> Losses:
    """Losses of a state on the splits of every target (mean over documents) and of general text (mean over domains)."""
    spec = arena.run.spec
    task = load_task(spec, state, arena.config.device)
    losses = {}
    for split in SPLITS:
        for name in arena.config.target_names:
            target = load_target(target_file(arena.data, name, split), spec, 1)
            losses[f"{name}_{split}"] = target_loss(task, target, BATCH_SIZE)
    # general text of the first split is what methods may retain: its loss would be a loss on seen text
    for split in SPLITS[1:]:
        general = domain_losses(task, spec, general_file(arena.data, split))
        losses[f"general_{split}"] = sum(general.values()) / len(general)
    return losses


def continued(arena: Arena) -> list[dict[str, float]]:
    """`case_losses` of proportional after 0, 1, ... times the tokens of a branch, at constant lr; 1 is its branch."""
    path, folder = arena.shared / f"continued-{arena.config.continued}.json", arena.shared / "continued"
    first = arena.proportional
    if not path.exists():
        # an earlier call may have kept the losses without the state: the branch is run again
        if not (first / "stage" / FINAL).exists():
            shutil.rmtree(first, ignore_errors=True)
        branch = run_branch(arena, first, "proportional", keep_state=True)
        losses, state = [read_losses(arena, arena.run.folder / FINAL), branch], first / "stage" / FINAL
        for extension in range(1, arena.config.continued):
            seed = arena.seed + 1000 * extension  # other samples and another order each time
            selection = _selection(arena, folder / f"data-{extension}", "proportional", seed=seed)
            stage = folder / f"stage-{extension}"
            data = SelectionFolder(select(selection, arena.run)).training_data
            losses.append(train_and_read(arena, stage, data, state, warm=False))
            state = stage / FINAL
        write_json(path, {"losses": losses})
    for done in (folder, first / "stage"):
        shutil.rmtree(done, ignore_errors=True)
    return [case_losses(arena, losses) for losses in read_json(path)["losses"]]


def clean_branch(arena: Arena) -> dict[str, Any]:
    """The oracle of the noisy case: the same domains in the same proportions, without the noise."""
    folder = arena.folder / "oracle"
    if not (folder / "losses.json").exists():
        clean = Run(arena.run.folder, {name: arena.data / "clean" / name for name in arena.run.spec.streams})
        sizes = {name: len(stream) for name, stream in clean.streams.items()}
        prior = read_json(arena.proportional / "losses.json")["weights"]
        # 10**9 samples: the clean pool has no cap, whole samples are all that matters
        wanted = apportion(prior, arena.config.branch_steps * arena.config.batch_size, dict.fromkeys(sizes, 10**9))
        write_weights(folder / "streams.yaml", clean.spec.streams, wanted)
        losses = train_and_read(arena, folder / "stage", folder / "streams.yaml")
        facts = {"kl_to_prior": 0.0, "tokens": arena.budget_tokens, "selection_cost_units": 0.0, "weights": prior}
        write_json(folder / "losses.json", {**losses, **facts})
        shutil.rmtree(folder / "stage")
    return read_json(folder / "losses.json")


def domain_agreement(arena: Arena, methods: Sequence[Method]) -> list[dict[str, Any]]:
    """Spearman of each method's domain scores with what a little more of one domain did to the target."""
    config, run = arena.config, arena.run
    target = load_target(target_file(arena.data, arena.case.target, "select"), run.spec, 1)
    prior = {domain: float(tokens) for domain, tokens in trained_tokens(run).items()}
    # once for all methods: what more of a domain does depends on no method
    changes = realised_changes(
        Replay(run, config.device), target, prior, config.branch_test, seed=arena.seed, batch_size=BATCH_SIZE
    )
    rows = []
    for method in methods:
        temperature = default_temperature(method)
        folder = arena.folder / f"{method}-{temperature:g}"
        scores = run_branch(arena, folder, method, temperature)["scores"]
        compared = asdict(agreement(scores, changes, arena.seed))
        rows.append({"case": arena.case.name, "method": method, "seed": arena.seed, **compared})
    return rows
