"""Settings of the branch bench; the composition of its cases is fixed here, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from curate.core.config import Config
from curate.domains.methods import Method
from curate.evaluation.branches import BranchTestConfig
from curate.mixture.constraints import MixtureConfig, Schedule
from curate.selection.config import ValuesConfig
from pipelines.vocabulary import SMALLEST_VOCABULARY

Temperature = Annotated[float, Field(gt=0, allow_inf_nan=False)]
CaseName = Literal["inside", "foreign", "noisy", "two"]
BenchMethod = Method | Literal["indexed", "windowed", "values", "ngrams", "unretained", "oracle"]
# Read from the product, so that the bench always measures its defaults.
DEFAULT_STRENGTH = MixtureConfig().prior_strength
# Methods whose scores say something of domains.
SCORED: tuple[Method, ...] = ("curate", "dsir", "grad-dot", "less", "shapley", "shuffled")
OURS: tuple[BenchMethod, ...] = ("curate", "indexed", "windowed", "values", "ngrams", "unretained")
RETAINING = tuple(method for method in OURS if method != "unretained")  # they may not lose general text
NGRAM_SHARES: Mapping[BenchMethod, float] = {"values": 0.0, "ngrams": 1.0}  # where it is not the default
TARGETLESS: tuple[BenchMethod, ...] = ("proportional", "uniform", "random")  # one branch each, no word of the target
# A method that buys the target with general text is no better: all are compared within this limit.
GENERAL_LIMIT = 1.01  # general loss that a method may reach, as a share of proportional's


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained on and what for.

    Attributes:
        name: of the case.
        pool: `plain`: every domain but the foreign one; `noisy`: domains of natural text with noise inside each.
        targets: domains whose held-out documents are the target, equally many of each.
    """

    name: CaseName
    pool: Literal["plain", "noisy"]
    targets: tuple[str, ...]

    @property
    def target(self) -> str:
        """Name of the target."""
        return "-and-".join(self.targets)


def default_temperature(method: BenchMethod) -> float:
    """The temperature of a method's default row: the default prior strength, or 1 where scores have another unit."""
    return 1.0 if method in ("dsir", "oracle") else DEFAULT_STRENGTH


class BranchesConfig(Config):
    """One bench: cases, methods, temperatures, seeds, training."""

    out: Path | None = None
    """JSON file of the rows, with a page of plots beside it; none: branches.json in the folder."""
    folder: Path = Path("runs/branches")
    """Folder of everything that the bench makes; an interrupted bench continues in it."""
    small: bool = False
    """A version of a few minutes that runs every part: short stages, two cases, one seed."""
    cases: tuple[CaseName, ...] = ("inside", "foreign", "noisy", "two")
    """inside: the target is one of the domains trained on. foreign: a domain never trained on. noisy: as inside, with
    noise in every domain. two: both targets at once."""
    methods: tuple[BenchMethod, ...] = (
        "curate", "indexed", "windowed", "values", "ngrams", "unretained", "proportional", "uniform", "random", "dsir",
        "grad-dot", "less", "shapley", "shuffled", "oracle",
    )  # fmt: skip
    """Methods of `curate.select`. curate has its defaults, and general text to retain; indexed is the same with
    the value index of the whole pool; windowed is the same, domains
    scored by a recorded window; unretained is curate without text to retain; values and ngrams are its two parts, each
    alone. oracle: a regression over a swarm of branches, or the pool without its noise."""
    prior_strengths: tuple[Temperature, ...] = (0.5, 0.35, 0.25, 0.15)
    """Prior strengths of methods that value samples, see `mixture.prior_strength`; the default is always run."""
    dsir_temperatures: tuple[Temperature, ...] = (128.0, 64.0, 32.0, 1.0)
    """Temperatures of dsir's draw. Log importance is a sum over a sample's n-grams and differs by hundreds: below 32
    nothing but the largest are drawn, as at 1, the published setting."""
    oracle_temperatures: tuple[Temperature, ...] = (2.0, 1.0, 0.5)
    """Temperatures of the oracle's scores, in their deviations between domains."""
    max_regression: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    """How far the expected score of general text may fall, see `mixture.max_regression`."""
    drop_fraction: float = Field(default=0.6, ge=0, lt=1)
    """Share of the samples of each domain that are left out, see `filter.drop_fraction`."""
    measured_passes: float = Field(default=ValuesConfig().measured_passes, ge=0, allow_inf_nan=False)
    """Passes that measuring single samples may cost, see `values.measured_passes`."""
    schedules: tuple[Schedule, ...] = ("early-and-late",)
    """Schedules that `curate` is run with at its default prior strength, beside the constant one."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Seeds of initial weights, data order and draws."""
    model: Path = Path("configs/bench/fidelity.json")
    """Config of the Hugging Face causal LM."""
    corpus: Path | None = None
    """Folder with one JSONL file of documents per domain; none: the demo's corpus, built from installed packages."""
    inside: str = "docstrings"
    """Domain trained on that is a target."""
    foreign: str = "headers"
    """Domain that is a target and never trained on."""
    junk: tuple[str, ...] = ("minified_js", "endpoint_rules")
    """Domains that are no natural text: trained on as domains of their own, or, in the noisy case, inside the others;
    never part of the general loss."""
    noise_share: float = Field(default=0.4, gt=0, lt=1)
    """Share of noise in the text of each domain of the noisy pool, in equal parts junk, shuffled, minified and repeated
    documents."""
    vocab_size: int = Field(default=2048, ge=SMALLEST_VOCABULARY)
    """BPE vocabulary, trained on the training domains."""
    domain_megabytes: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Training text of each domain."""
    target_documents: int = Field(default=60, ge=2)
    """Held-out documents of each target and split: for selecting, for choosing a temperature, for reporting."""
    excerpt_characters: int = Field(default=400, ge=1)
    """Length of the excerpt taken of each."""
    window: Literal["early", "late"] = "late"
    """Window whose samples `windowed` and the gradient baselines value."""
    window_steps: int = Field(default=30, ge=1)
    """Steps of each window."""
    steps: int = Field(default=400, ge=2)
    """Optimizer steps of stage 1 (AdamW, warm-up of a tenth, cosine)."""
    branch_steps: int = Field(default=150, ge=1)
    """Optimizer steps of a branch, at constant lr after the same warm-up."""
    continued: int = Field(default=4, ge=1)
    """Proportional goes on to this many times the tokens of a branch, for the token speed-up."""
    lr: float = Field(default=2e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate of stage 1."""
    branch_lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Learning rate of a branch."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per step."""
    seq_len: int = Field(default=128, ge=2)
    """Tokens of a sequence."""
    swarm: int = Field(default=16, ge=4)
    """Branches that the oracle's regression is fitted to."""
    branch_test: BranchTestConfig = BranchTestConfig(steps=30, repeats=2)
    """Short branches with a little more of one domain each, which the methods' domain scores are held against."""
    device: str = "cpu"
    """Device of training and values."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 2 * self.window_steps > self.steps:
            raise ValueError(f"two windows of {self.window_steps} steps do not fit into {self.steps} steps")
        if "proportional" not in self.methods:
            raise ValueError("methods must hold proportional: all differences are taken from it")
        if {self.inside, self.foreign} & set(self.junk) or self.inside == self.foreign:
            raise ValueError("inside, foreign and junk must be different domains")
        return self

    def case(self, name: CaseName) -> Case:
        """The composition of a case."""
        return {
            "inside": Case(name="inside", pool="plain", targets=(self.inside,)),
            "foreign": Case(name="foreign", pool="plain", targets=(self.foreign,)),
            "noisy": Case(name="noisy", pool="noisy", targets=(self.inside,)),
            "two": Case(name="two", pool="plain", targets=(self.inside, self.foreign)),
        }[name]

    @property
    def target_names(self) -> list[str]:
        """Every target that a case may have; one document set each."""
        return [self.inside, self.foreign]

    def sweep(self, method: BenchMethod) -> list[float]:
        """Temperatures that a method is run at, the default among them."""
        default = default_temperature(method)
        if method in TARGETLESS:
            return [default]
        temperatures = {"dsir": self.dsir_temperatures, "oracle": self.oracle_temperatures}.get(
            method, self.prior_strengths
        )
        return sorted({*temperatures, default}, reverse=True)


def small(config: BranchesConfig) -> BranchesConfig:
    """The same bench in a few minutes: short stages, a case of each pool, no parts of curate; only dsir is swept."""
    parts_of_curate = {"indexed", "windowed", "values", "ngrams", "unretained"}
    return config.model_copy(
        update={
            "methods": tuple(method for method in config.methods if method not in parts_of_curate),
            "folder": config.folder / "small", "seeds": config.seeds[:1], "cases": ("foreign", "noisy"),
            "prior_strengths": (), "dsir_temperatures": (128.0,), "oracle_temperatures": (1.0,),
            "steps": 60, "branch_steps": 30,
            "window_steps": 8, "continued": 2,
            "target_documents": 12, "domain_megabytes": 0.06, "swarm": 4,
            "branch_test": BranchTestConfig(steps=5, repeats=1),
        }
    )  # fmt: skip
