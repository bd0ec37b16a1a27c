"""Every "auto" of a selection is decided here, once. What follows reads the decisions and rewrites nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError

from curate.core.errors import UserError
from curate.core.escape import name_of
from curate.core.reading import read_yaml
from curate.core.validation import first_problem
from curate.domains.methods import ESTIMATORS, PREDICTING
from curate.embeddings.embed import EmbedConfig
from curate.evaluation.branch_record import read_branch_test
from curate.influence.current import NextStepOptions
from curate.mixture.constraints import DECAY_EPOCHS, MixtureConfig
from curate.mixture.decide import Objectives
from curate.training.samples import trained_tokens
from curate.training.source import CANDIDATES, CURRENT
from curate.training.token_accounting import seen_uses, stages, uses

if TYPE_CHECKING:
    import dataframely as dy

    from curate.evaluation.branch_record import BranchTest
    from curate.selection.config import SelectConfig
    from curate.tables import SampleUses, StageUses
    from curate.training.run import Run

SAMPLE_RETAIN_WEIGHT = 1.0
"""Weight of the retention target's values in the choice among samples, the targets' together being 1: where no sample
of a domain does much for the target, those are taken that are best for what must be retained."""
# Settings of `curate.embed` that a selection fills in itself; a file of values.embed_config must not have them.
_SET_BY_SELECT = ("run", "candidates", "target", "more_targets", "retain", "window", "device", "min_target_tokens")


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A selection with everything decided that its config left open.

    Attributes:
        config: as given.
        run: the finished stage.
        sources: what domains are scored by, in order: early, late, current or candidates; the last sets the mixture.
            Empty: the method values no samples.
        embedding: how windows are valued, and the device's limits.
        budget_tokens: stored tokens of the next stage.
        unseen_only: whether samples that were trained on are left out.
        branch_test: how far domain scores may be trusted, where that was tested.
    """

    config: SelectConfig
    run: Run
    sources: tuple[str, ...]
    embedding: EmbedConfig
    budget_tokens: int
    unseen_only: bool
    branch_test: BranchTest | None = None

    @property
    def mixture_source(self) -> str:
        """Name of the source that sets the mixture: early, late, current or candidates."""
        if self.sources:
            return self.sources[-1]
        # a method without values still needs a name for its rows
        return CURRENT if self.config.candidates is None else CANDIDATES

    @property
    def windows(self) -> tuple[str, ...]:
        """Windows of the run whose samples are valued."""
        return tuple(name for name in self.sources if name not in (CURRENT, CANDIDATES))

    @property
    def next_step_name(self) -> Literal["current", "candidates"]:
        """What values of the next step are called."""
        return CURRENT if self.config.candidates is None else CANDIDATES

    @property
    def measures_samples(self) -> bool:
        """Whether samples are chosen by what one more use of each would do now."""
        config = self.config
        return config.method == "curate" and config.takes_samples and config.values.ngram_share < 1

    @property
    def asks_next_step(self) -> bool:
        """Whether values of the next step are needed, for domains or for samples."""
        return self.next_step_name in self.sources or self.measures_samples

    @property
    def predicts_samples(self) -> bool:
        """Whether samples outside the window are chosen by predictions of the window's values."""
        return self.config.method in PREDICTING and self.config.takes_samples

    @property
    def ngram_share(self) -> float:
        """Share of n-gram ratios in scores and choice; baselines are what was published."""
        return self.config.values.ngram_share if self.config.method == "curate" else 0.0

    @property
    def decay_epochs(self) -> float:
        """How fast repeated data loses its worth; weights that a method gives are no gains and hold as they are."""
        return DECAY_EPOCHS if self.config.is_valued else math.inf

    @property
    def mixture(self) -> MixtureConfig:
        """Constraints, with the prior strength that a branch test allows."""
        mixture = self.config.mixture
        if self.branch_test is None:
            return mixture
        # scores that predict the next stage less well move the weights less
        return mixture.model_copy(update={"prior_strength": mixture.prior_strength * self.branch_test.strength_factor})

    @cached_property
    def objectives(self) -> Objectives:
        """What the mixture is for: targets by the names of their files."""
        config = self.config
        # the main target first: its name is the artifact's, and its halves tell how reliable values are
        targets = {name_of(config.target): 1.0}
        targets |= {name_of(Path(path)): weight for path, weight in config.more_targets.items()}
        return Objectives(targets=targets, retain=None if config.retain is None else name_of(config.retain))

    @property
    def sample_weights(self) -> dict[str, float]:
        """Weight of each target's values in the choice among samples, the retention target's last."""
        return self.objectives.weights(SAMPLE_RETAIN_WEIGHT)

    @property
    def next_step(self) -> NextStepOptions:
        """How values of the next step are measured."""
        return NextStepOptions(
            per_domain=self.config.values.measured_per_domain,
            seed=self.config.seed,
            device=self.config.device,
            batch_size=self.embedding.target_batch_size,
            tolerance=self.embedding.tolerance,
        )

    @cached_property
    def stages(self) -> list[Path]:
        """Folders of all stages up to the run, first stage first."""
        return stages(self.run, self.config.source.earlier_runs)

    @cached_property
    def uses(self) -> dy.DataFrame[StageUses]:
        """How often each sample was trained on in each stage, see `token_accounting.uses`."""
        return uses(self.stages)

    @cached_property
    def seen(self) -> dy.DataFrame[SampleUses]:
        """How often each sample was trained on in all stages."""
        return seen_uses(self.uses)

    @cached_property
    def trained(self) -> Mapping[str, int]:
        """Stored tokens of each domain that the run trained on."""
        return trained_tokens(self.run)


def resolve(config: SelectConfig, run: Run) -> Resolved:
    """Decide what a config leaves open.

    Raises:
        UserError: a setting does not fit the run, or the method.
    """
    sources = _sources(config)
    # asked here, before anything is read or measured
    for name in sources:
        if name not in (CURRENT, CANDIDATES) and name not in run.spec.windows:
            raise UserError(
                f"run {run.folder} has no window {name!r} (it declared {sorted(run.spec.windows)}): set values.sources"
            )
    budget, branch_test_file = config.budget_tokens, config.mixture.branch_test
    unseen_only = config.filter.unseen_only
    return Resolved(
        config=config,
        run=run,
        sources=sources,
        embedding=_embedding(config, run, sources),
        budget_tokens=sum(trained_tokens(run).values()) if budget is None else int(budget),
        # the run's own data is repeated up to mixture.max_epochs; candidates are given for being new
        unseen_only=config.candidates is not None if unseen_only is None else unseen_only,
        branch_test=None if branch_test_file is None else read_branch_test(branch_test_file, run.fingerprint),
    )


def _sources(config: SelectConfig) -> tuple[str, ...]:
    if not config.is_valued:
        return ()
    if config.candidates is not None:
        return (CANDIDATES,)
    if config.values.sources:
        return tuple(config.values.sources)
    # the published baselines value what a window trained on
    return (CURRENT,) if config.method == "curate" else ("late",)


def _embedding(config: SelectConfig, run: Run, sources: tuple[str, ...]) -> EmbedConfig:
    """The settings of `curate.embed` that value the windows."""
    path = config.values.embed_config
    given: dict[str, Any] = {} if path is None else _read_settings(path)
    windows = [name for name in sources if name in ("early", "late")]
    # a method that is an estimator and the file of settings must not name two different ones
    if config.method in ESTIMATORS:
        if given.get("estimator", config.method) != config.method:
            raise UserError(f"{path}: estimator {given['estimator']} does not go with method {config.method}")
        given["estimator"] = config.method
    elif given.get("estimator") in ESTIMATORS:
        raise UserError(f"{path}: estimator {given['estimator']} is a method of its own: set --method instead")
    set_here: dict[str, Any] = {
        "run": run.folder,
        "target": config.target,
        "more_targets": config.more_targets,
        "retain": config.retain,
        "device": config.device,
        "min_target_tokens": config.values.min_target_tokens,
        # a selection without windows embeds nothing; "late" only makes the settings complete
        "window": "both" if len(windows) == 2 else windows[0] if windows else "late",
    }
    try:
        return EmbedConfig(**given, **set_here)
    except ValidationError as error:
        raise UserError(f"{path or 'curate.embed'}: {first_problem(error)}") from None


def _read_settings(path: Path) -> dict[str, Any]:
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, expected a mapping of settings of curate.embed")
    twice = sorted(set(raw) & set(_SET_BY_SELECT))
    if twice:
        raise UserError(f"{path}: {', '.join(twice)} are set by curate.select itself; leave them out")
    return raw
