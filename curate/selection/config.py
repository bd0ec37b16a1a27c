"""Settings of `curate.select`, in five groups, and which of them do not go together.

A setting that would change nothing is refused: what stands in a config is what happens.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from curate.core.config import Config, FileName, TokenCount
from curate.core.renamed import Renamed
from curate.core.tracking import TrackingConfig, TrackingMode
from curate.core.validation import changed
from curate.domains.methods import VALUED, Method
from curate.filter.choose import FilterConfig
from curate.mixture.constraints import MixtureConfig
from curate.output.export import Mode
from curate.selection.renamed import SELECT

SourceName = Literal["early", "late", "current"]


class SourceConfig(Config):
    """Where the run's data lies, and what was trained on before it."""

    streams: dict[str, Path] = {}
    """Where the run's streams lie now, by domain, if they were moved since."""
    tokenizer: Path | None = None
    """`tokenizers` JSON file that made the run's tokens, where the run was recorded without one."""
    earlier_runs: tuple[Path, ...] | None = None
    """Runs of the stages before the run, whose samples count as seen; none: those that the runs name themselves."""


class ValuesConfig(Config):
    """What samples and domains are worth."""

    sources: tuple[SourceName, ...] | None = None
    """Whose samples domains are scored by; the last one sets the mixture, all are reported, none are averaged. current:
    samples of every domain at the run's last state, for one more step. early, late: the samples of a recorded window at
    the state of their step. none: current; with a method that values a window, late."""
    embed_config: Path | None = None
    """YAML file with settings of `python -m curate.embed`: how windows are valued (estimator, horizon, window_steps),
    and the device's memory, tolerance and batch size; none: its defaults."""
    ngram_share: float = Field(default=0.5, ge=0, le=1)
    """Share of n-gram log-likelihood ratios in the scores of domains and in the choice of samples, the rest is value's.
    Both count in their standard deviations. 0: values alone; 1: n-grams alone."""
    measured_per_domain: int = Field(default=100, ge=1)
    """Samples of each domain that are measured at the current state for every target: domains are scored by them, and
    all other samples predicted from them. The error of a rank correlation over n samples is about 1 / sqrt(n)."""
    rows: bool = False
    """Value every sample by its row of the value index too (`python -m curate.embed`): rows that are missing are made,
    at a cost that is logged before. A further target on the same rows costs no pass over the data but the measured
    samples'."""
    measured_passes: float = Field(default=100.0, ge=0)
    """Forward+backward passes of a training batch that measuring single samples may cost beside that: the most
    promising of each domain, 1.25 for each one that the stage takes of it."""
    dsir_temperature: float = Field(default=1.0, gt=0)
    """Of method dsir: samples are drawn in proportion to importance ** (1 / dsir_temperature). The logarithm is a sum
    over a sample's n-grams: only temperatures of its deviation's order, a hundred for hundreds of tokens, loosen the
    published draw."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of a target; fewer have a gradient that is mostly noise."""


class OutputConfig(Config):
    """How data is written, and who is told."""

    shard_bytes: int = Field(default=1 << 26, ge=1 << 10)
    """Size limit of a shard that is written."""
    wandb: TrackingMode = "auto"
    """Weights & Biases. auto: online where a key is set (WANDB_API_KEY or ~/.netrc), else offline. WANDB_PROJECT,
    WANDB_ENTITY and WANDB_TAGS say where to."""
    wandb_texts: bool = False
    """Whether texts of training samples go there too (the examples of a report)."""

    @property
    def tracking(self) -> TrackingConfig:
        """The same as settings of a tracker."""
        return TrackingConfig(mode=self.wandb, texts=self.wandb_texts)


class SelectConfig(Config):
    """A selection: everything but the target has a default."""

    RENAMED: ClassVar[Renamed] = SELECT

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    target: Path
    """Target documents (JSONL): what the next stage should get better at."""
    retain: Path | None = None
    """Documents of what must not be lost, such as held-out general text; see mixture.max_regression."""
    more_targets: dict[FileName, Annotated[float, Field(gt=0)]] = {}
    """More targets (JSONL), each with the weight of its scores; that of `target` is 1."""
    budget_tokens: TokenCount | None = None
    """Tokens of the next stage, e.g. 50M; none: as many as the last stage."""
    candidates: Path | None = None
    """Data that was never trained on, which the next stage draws from instead (MDS folders of domains, or a
    streams.yaml)."""
    mode: Mode = "samples"
    """samples: new MDS folders with exactly the mixture's samples, the best of each domain. weights: `streams.yaml`,
    the streams there are with an integer `choose` each; nothing is copied. both: the same mixture in both forms."""
    method: Method = "curate"
    """Where scores come from. curate: values and n-grams. Baselines: proportional (what was trained on), uniform (over
    domains), random (samples), dsir (importance resampling over hashed n-grams), grad-dot, less and shapley (gradient
    dot products), shuffled (values dealt anew: a null control)."""
    out: Path | None = None
    """Folder to write to; none: a folder inside the run."""
    seed: int = 0
    """Seed of bootstrap intervals and sample draws."""
    device: str = "cpu"
    """Device of replay and values, for example cuda."""
    source: SourceConfig = SourceConfig()
    """Where the run's data lies, and what was trained on before it."""
    values: ValuesConfig = ValuesConfig()
    """What samples and domains are worth."""
    mixture: MixtureConfig = MixtureConfig()
    """From scores to weights."""
    filter: FilterConfig = FilterConfig()
    """Which samples the data holds."""
    output: OutputConfig = OutputConfig()
    """How data is written, and who is told."""

    @model_validator(mode="after")
    def _every_setting_acts(self) -> Self:
        given = changed(self)  # a default that does nothing is no mistake of the user
        for setting, reason in _without_effect(self):
            if setting in given:
                raise ValueError(f"{setting} {_shown(given[setting])} has no effect here: {reason}; leave it out")
        return self

    @property
    def is_valued(self) -> bool:
        """Whether the method values samples."""
        return self.method in VALUED

    @property
    def takes_samples(self) -> bool:
        """Whether samples are chosen one by one."""
        return self.mode != "weights"


# The rules below mirror what the code reads: who adds a setting that another one can silence adds a rule here.
def _without_effect(config: SelectConfig) -> Iterator[tuple[str, str]]:
    """Settings that the others leave nothing to decide, and why."""
    yield from _by_method(config)
    yield from _by_mode(config)
    yield from _by_mixture(config)
    if config.output.wandb == "none" or not config.is_valued:
        yield "output.wandb_texts", "nothing is logged (output.wandb none, or a method without values)"
    yield from _by_source(config)


def _by_method(config: SelectConfig) -> Iterator[tuple[str, str]]:
    method, why = config.method, f"method {config.method}"
    if method != "dsir":
        yield "values.dsir_temperature", f"{why} draws no samples by importance"
    if method != "curate":
        yield "values.ngram_share", f"{why} is what was published, without n-grams beside it"
        yield "values.measured_per_domain", f"{why} measures nothing at the current state"
        yield "values.measured_passes", f"{why} measures nothing at the current state"
    if config.values.ngram_share == 1:
        yield "values.measured_passes", "values.ngram_share 1 leaves values no say in the choice of samples"
        yield "values.rows", "values.ngram_share 1 leaves values no say in scores and choice"
    if not config.is_valued:
        for setting in ("values.sources", "values.embed_config", "mixture.branch_test"):
            yield setting, f"{why} values no samples"
        for setting in ("more_targets", "retain"):
            yield setting, f"{why} scores domains for one target at most (one file may hold the documents of several)"
        yield "filter.drop_fraction", f"{why} values no samples: none are the worst"
        if config.output.wandb != "none":  # "none" is what happens here, so that saying it is no mistake
            yield "output.wandb", f"{why} values no samples, so that there is no report to log"
    elif method != "curate":
        yield "candidates", f"{why} values the samples of a window"
        if "current" in (config.values.sources or ()):
            yield "values.sources", f"{why} values windows: early, late"


def _by_source(config: SelectConfig) -> Iterator[tuple[str, str]]:
    # candidates were never trained on: no window has them, and branches do not draw from them
    if config.candidates is not None:
        yield "values.sources", "candidates are measured at the current state"
        yield "mixture.branch_test", "it is about domains that were trained on"
    scores_current = config.candidates is not None or "current" in (config.values.sources or ("current",))
    chooses_current = config.takes_samples and config.values.ngram_share < 1
    if config.method != "curate" or not (scores_current or chooses_current):
        yield "values.rows", "nothing is valued at the current state"


def _by_mode(config: SelectConfig) -> Iterator[tuple[str, str]]:
    # `false` is what these modes do; only `true` asks for what they cannot do
    if config.mode != "samples" and config.filter.unseen_only:
        yield "filter.unseen_only", f"the streams of mode {config.mode} hold every sample"
    if config.takes_samples:
        return
    why = "mode weights keeps every sample of a stream"
    for setting in ("filter.drop_fraction", "filter.duplicate_overlap", "values.measured_passes", "output.shard_bytes"):
        yield setting, why


def _by_mixture(config: SelectConfig) -> Iterator[tuple[str, str]]:
    mixture = config.mixture
    if config.retain is None:
        yield "mixture.max_regression", "nothing is to be retained (retain)"
    if not mixture.replay_domains:
        yield "mixture.replay_share", "no domains are named (mixture.replay_domains)"
    if mixture.replay_share == 0:
        yield "mixture.replay_domains", "mixture.replay_share is 0"
    if mixture.schedule != "early-and-late":
        yield "mixture.early_share", f"mixture.schedule {mixture.schedule} has no early part"
    if mixture.schedule == "constant":
        yield "mixture.late_share", "mixture.schedule constant has no late part"
    if config.filter.contamination_overlap is None:
        yield "filter.held_out", "filter.contamination_overlap none looks for nothing"
    if config.method in ("proportional", "uniform", "random"):
        yield "mixture.prior_strength", f"the weights of method {config.method} are its own"


def _shown(value: Any) -> str:
    """A value as a message has it; a mapping (of files, say) would be longer than the sentence."""
    if isinstance(value, dict):
        return ""
    return "null" if value is None else str(value)
