"""Settings of the fidelity bench; the composition of its data is fixed here, before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, model_validator

from curate.core.config import Config
from curate.embeddings.products import Hessian
from curate.evaluation.draw import DrawConfig
from pipelines.vocabulary import SMALLEST_VOCABULARY

Window = Literal["early", "middle", "late"]


class BenchConfig(Config):
    """One bench: data, training runs, reruns, estimators."""

    out: Path | None = None
    """JSON file of the rows, with a page of plots beside it; none: fidelity.json in the folder."""
    folder: Path = Path("runs/fidelity")
    """Folder of everything that the bench makes; an interrupted bench continues in it."""
    small: bool = False
    """A version of a few minutes that runs every part: fewer steps, pairs and anchors, one seed."""
    levers: bool = True
    """Also measure what two cheaper ways cost in fidelity: adjoint with curvature by differences, and dvemb-adam with
    one scale for all steps."""
    anchors_hessian: Hessian = "difference"
    """Curvature of the walks with all anchors, which are most of the time."""
    anchors_at_stage_end: bool = True
    """Also walk all anchors from the stage's end through every window (by far the longest part)."""
    corpus: Path | None = None
    """Folder with one JSONL file of documents per domain; none: the demo's corpus, built from installed packages."""
    foreign: tuple[str, ...] = ("headers", "minified_js")
    """Domains that are never trained on."""
    targets: tuple[str, ...] = ("python", "api_prose", "docstrings", "headers", "minified_js")
    """Domains whose held-out documents are the targets."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2)
    """Seeds of initial weights, data order and draws."""
    model: Path = Path("configs/bench/fidelity.json")
    """Config of the Hugging Face causal LM."""
    vocab_size: int = Field(default=2048, ge=SMALLEST_VOCABULARY)
    """BPE vocabulary, trained on the training domains."""
    steps: int = Field(default=300, ge=30)
    """Optimizer steps (AdamW, warm-up of a tenth, cosine, weight decay 0.1, clipping at 1)."""
    lr: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Peak learning rate."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences per step."""
    seq_len: int = Field(default=32, ge=2)
    """Tokens of a sequence."""
    window_steps: int = Field(default=30, ge=1)
    """Steps of the early, the middle and the late window."""
    valued: tuple[Window, ...] = get_args(Window)
    """Which of them are valued; fewer for a question about one."""
    draw: DrawConfig = DrawConfig(pairs=50, pairs_per_step=5, groups=8, repeats=4, part_pairs=2)
    """Reruns per window."""
    domain_megabytes: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Training text of each domain."""
    target_documents: int = Field(default=20, ge=2)
    """Held-out documents of each target, an excerpt of each."""
    excerpt_characters: int = Field(default=200, ge=1)
    """Length of an excerpt."""
    anchors_per_domain: int = Field(default=5, ge=1)
    """Anchors made of other held-out documents of each domain, also of the foreign ones."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if 3 * self.window_steps > self.steps:
            raise ValueError(f"three windows of {self.window_steps} steps do not fit into {self.steps} steps")
        return self

    @property
    def windows(self) -> dict[str, tuple[int, int]]:
        """The windows that are valued: first step and step after the last."""
        return {name: borders for name, borders in self.recorded_windows.items() if name in self.valued}

    @property
    def recorded_windows(self) -> dict[str, tuple[int, int]]:
        """Early, middle and late window: first step and step after the last."""
        middle = (self.steps - self.window_steps) // 2
        return {
            "early": (0, self.window_steps),
            "middle": (middle, middle + self.window_steps),
            "late": (self.steps - self.window_steps, self.steps),
        }


def small(config: BenchConfig) -> BenchConfig:
    """The same bench in a few minutes: its own steps, draws and number of anchors, the first seed."""
    return config.model_copy(
        update={
            "folder": config.folder / "small", "seeds": config.seeds[:1], "steps": 30, "window_steps": 5,
            "draw": DrawConfig(pairs=6, pairs_per_step=3, groups=3, repeats=1, part_pairs=1, parts=(0.5,)),
            "target_documents": 5, "targets": config.targets[:1] + config.targets[-1:],
            "anchors_per_domain": 2, "levers": False, "anchors_at_stage_end": False, "domain_megabytes": 0.1,
        }
    )  # fmt: skip
