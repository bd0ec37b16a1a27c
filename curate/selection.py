"""What a selection is: its settings, and what of them decides what is selected."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import Field, model_validator

from curate.artifacts import MANIFEST, file_fingerprint, read_json
from curate.config import TokenCount
from curate.embed import EmbedConfig, other_targets
from curate.errors import UserError
from curate.fidelity.branches import BranchTestConfig
from curate.mixture.constraints import MixtureConfig
from curate.mixture.schedule import StageSchedule
from curate.pools.ngram_slopes import PREDICTOR as NGRAM_PREDICTOR
from curate.pools.open import pool_fingerprint, pool_streams
from curate.pools.slopes import NEXT
from curate.pools.spread import PREDICTOR
from curate.pools.values import ProbeConfig
from curate.scores.methods import VALUED, Method, estimator_of
from curate.shards.choose import CHOICE, ShardsConfig
from curate.shards.deliver import Mode
from curate.shards.grain import GrainConfig
from curate.tracking import TrackingConfig
from curate.trajectory.ledger import ledger_identity, stages

if TYPE_CHECKING:
    from curate.artifacts import Json
    from curate.mixture.decide import Aims
    from curate.target import Target
    from curate.trajectory.run import Run

# What does not change what is selected.
_ELSEWHERE: dict[str, Any] = {
    **dict.fromkeys(
        ("run", "runs_root", "streams", "tokenizer", "target", "out", "device", "tracking", "earlier"), True
    ),
    **dict.fromkeys(("more_targets", "guard", "pool", "probe"), True),
    **dict.fromkeys(("tolerance", "target_batch_size"), True),
    "adjoint": {"memory_bytes", "disk_bytes", "at_once", "save_seconds"},
    "dvemb": {"rows_per_block"},
    "dvemb_adam": {"rows_per_block"},
}


class SelectConfig(EmbedConfig):
    """A selection: everything but the target has a default."""

    target: Path
    """Target documents (JSONL): what the next stage should get better at."""
    budget_tokens: TokenCount | None = None
    """Tokens of the next stage, e.g. 50M; none: as many as the last stage."""
    out: Path | None = None
    """Folder to write to; none: a folder inside the run."""
    method: Method = "curate"
    """Where scores come from. curate: values by the estimator. Baselines: proportional (what was trained on), uniform
    (over domains), random (samples), dsir (importance resampling over hashed n-grams), grad-dot, less and shapley
    (gradient dot products), shuffled (values dealt anew: a null control), given (the weights of `weights`)."""
    weights: dict[str, float] = {}
    """Weight of every domain, for method given."""
    importance_temperature: float = Field(default=1.0, gt=0)
    """Of method dsir: samples are drawn in proportion to importance ** (1 / importance_temperature). The logarithm is a
    sum over a sample's n-grams: only temperatures of its deviation's order, a hundred for hundreds of tokens, loosen
    the published draw."""
    mode: Mode = "reweight"
    """reweight: `streams.yaml`, the streams there are with an integer `choose` each; nothing is copied. filter: new MDS
    folders with exactly the mixture's samples, the best of each domain. both: the same mixture in both forms.
    With phases (`schedule.kind`) each form has a `schedule.yaml` instead of `streams.yaml` or beside the folders."""
    earlier: tuple[Path, ...] | None = None
    """Runs of the stages before the run, whose samples count as consumed; none: those that the runs name themselves."""
    pool: Path | None = None
    """Data that was never trained on, which the next stage draws from instead (MDS folders of domains, or a
    streams.yaml): a part of it is probed from the run's last state, `probe.rest` values the others."""
    probe: ProbeConfig = ProbeConfig()
    """How the pool is valued. Without a pool `steps`, `lr_share` and `min_per_domain` (how many samples of each domain
    have slopes that all others are predicted from) are those of the next step, and `min_rank_correlation` says where
    predictions are used."""
    branch_test: bool = False
    """Before the mixture, train short branches with a little more of one domain each, and stay near the prior where the
    scores do not predict what they do to the target."""
    branches: BranchTestConfig = BranchTestConfig()
    """Length and number of those branches."""
    seed: int = 0
    """Seed of bootstrap intervals and sample draws."""
    grain: GrainConfig = GrainConfig()
    """What gets a weight: domains, or parts of them."""
    mixture: MixtureConfig = MixtureConfig()
    """From scores to weights."""
    schedule: StageSchedule = StageSchedule()
    """Where in the next stage these weights hold."""
    shards: ShardsConfig = ShardsConfig()
    """How data is written."""
    tracking: TrackingConfig = TrackingConfig()
    """Weights & Biases."""

    @model_validator(mode="before")
    @classmethod
    def _estimator_of_method(cls, given: dict[str, Any]) -> dict[str, Any]:
        method = given.get("method", "curate")
        if bool(given.get("weights")) != (method == "given"):
            raise ValueError("weights are for method given, which needs them; set both or neither")
        if given.get("pool") is not None and (given.get("branch_test") or method in set(VALUED) - {"curate"}):
            raise ValueError("a pool is valued by its probes: leave out branch_test, and methods that value a window")
        if method not in VALUED and (given.get("guard") is not None or given.get("more_targets")):
            raise ValueError(
                f"method {method} scores domains for one target at most: leave out guard and more_targets, or put the "
                "documents of all targets into one file"
            )
        return {**given, "estimator": estimator_of(method, given.get("estimator", "adjoint"))}

    @model_validator(mode="after")
    def _grain_is_written(self) -> Self:
        other = self.pool is not None or self.branch_test or self.method not in VALUED
        if self.grain.by != "domains" and (self.mode != "filter" or other):
            raise ValueError(
                f"grain.by {self.grain.by} needs mode filter, which writes the parts anew, a method that values "
                "samples, and neither pool nor branch_test, which are about domains"
            )
        return self


def settings_of(config: SelectConfig, run: Run, target: Target) -> Json:
    """What a selection is known by: with the same settings it would have the same bytes."""
    chosen = config.model_dump(mode="json", exclude=_ELSEWHERE)
    files = config.adjoint.anchor_files
    chosen["adjoint"]["anchor_files"] = [file_fingerprint(path) if path.is_file() else str(path) for path in files]
    screened = config.shards.screen.files
    chosen["shards"]["screen"]["files"] = [file_fingerprint(Path(path)) for path in screened if Path(path).is_file()]
    earlier = ledger_identity(stages(run, config.earlier)[:-1])
    weights: list[float | str] = [*config.more_targets.values(), *([] if config.guard is None else ["guard"])]
    others = [other.fingerprint for other in other_targets(config, run, target)]
    more: dict[str, Any] = {"more_targets": dict(zip(others, weights, strict=True))} if others else {}
    if config.pool is not None:
        more |= {"pool": pool_fingerprint(pool_streams(config.pool)), "probe": config.probe.model_dump()}
        more["predictor"] = [*PREDICTOR, *NGRAM_PREDICTOR]
    elif config.mode != "reweight" and config.method in VALUED:
        unvalued = chosen["shards"]["unvalued"] = unvalued_of(config)
        if unvalued == "predict":
            more |= {"min_rank_correlation": config.probe.min_rank_correlation, "predictor": list(PREDICTOR)}
    if looks_ahead(config):
        probe = config.probe
        more["ahead"] = [probe.steps, probe.lr_share, probe.min_per_domain]
    if takes_slopes(config):
        more["predictor"] = [*NGRAM_PREDICTOR, config.probe.min_rank_correlation]
    if config.method == "curate" or config.mode != "reweight":
        more["choice"] = list(CHOICE)
    return {"run": run.fingerprint, "target": target.fingerprint, "earlier": earlier, **more, **chosen}


def check_data(selection: Path, data: str | None) -> None:
    """Refuse a complete selection from streams that have other samples now.

    Args:
        selection: its folder.
        data: fingerprint of those samples now; None: it drew from a pool, which its settings name.

    Raises:
        UserError: the samples differ.
    """
    if read_json(selection / MANIFEST).get("data", data) != data:
        raise UserError(
            f"{selection} was selected from other samples than the run's streams hold now; choose another --out, or "
            "delete it to select again"
        )


def unvalued_of(config: SelectConfig) -> str:
    """`shards.unvalued`; slopes are of method curate with estimator adjoint, others predict instead."""
    unvalued, own = config.shards.unvalued, (config.method, config.estimator) == ("curate", "adjoint")
    return "predict" if unvalued == "slopes" and not own else unvalued


def takes_slopes(config: SelectConfig) -> bool:
    """Whether samples are chosen by what one more use of each would do now."""
    chosen = config.mode != "reweight" and config.pool is None and config.shards.likeness_share < 1
    return chosen and unvalued_of(config) == "slopes"


def looks_ahead(config: SelectConfig) -> bool:
    """Whether anything depends on the next step."""
    scored = config.pool is None and config.method in VALUED and window_of(config) == NEXT
    return scored or takes_slopes(config)


def window_of(config: SelectConfig) -> str:
    """`mixture.window`, where it is left open: the last valued one, else the next step.

    Raises:
        UserError: it is not valued.
    """
    window, ahead = config.mixture.window, (config.method, config.estimator) == ("curate", "adjoint")
    if config.method not in VALUED:
        return window
    if window == "auto":
        window = config.window_names[-1] if config.window_names else NEXT
    if window == NEXT and not ahead:
        raise UserError(
            f"method {config.method} with estimator {config.estimator} values windows only: set window to early, late "
            "or both, or take method curate with estimator adjoint"
        )
    if window not in (*config.window_names, NEXT):
        raise UserError(
            f"mixture.window {window!r} is not among the valued windows {config.window_names}; set window or "
            "mixture.window"
        )
    return window


def aims_of(config: SelectConfig, target: Target) -> Aims:
    """What the mixture is for: targets by the names of their files."""
    from curate.mixture.decide import Aims

    weights = {target.name: 1.0} | {Path(path).stem: weight for path, weight in config.more_targets.items()}
    return Aims(targets=weights, guard=None if config.guard is None else config.guard.stem)


def sample_weights(config: SelectConfig, target: Target) -> dict[str, float]:
    """Weight of each target's values in the choice among samples, the guard's last."""
    aims, share = aims_of(config, target), config.shards.guard_weight
    guard = {} if aims.guard is None or share == 0 else {aims.guard: share * sum(aims.targets.values())}
    return dict(aims.targets) | guard
