"""What is removed in the reruns: samples, groups, repeats and parts, drawn uniformly and never by effect size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from curate.core.artifacts import fingerprint
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.rng import generator
from curate.training.replay import records

if TYPE_CHECKING:
    from curate.training.run import Run

Kind = Literal["pair", "group", "repeat", "part"]


class DrawConfig(Config):
    """How many reruns of each kind, per window."""

    pairs: int = Field(default=12, ge=1)
    """(sample, step) pairs removed one at a time; drawn as `pairs_per_step` samples of uniformly drawn steps."""
    pairs_per_step: int = Field(default=4, ge=1)
    """Samples drawn from one step, so that values can also be ranked within a step."""
    groups: int = Field(default=4, ge=0)
    """Groups of samples removed together."""
    group_share: float = Field(default=0.1, gt=0, le=1)
    """Share of a window's samples in each group."""
    repeats: int = Field(default=2, ge=0)
    """Pairs run once more with the samples of every batch in another order: the same training but for rounding."""
    parts: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (0.1, 0.5)
    """Parts of a sample's weight removed instead of all of it, to see how smooth training is in its data weights."""
    part_pairs: int = Field(default=2, ge=0)
    """Pairs that the parts are removed of."""


@dataclass(frozen=True, kw_only=True)
class Removal:
    """One rerun.

    Attributes:
        kind: "pair" and "group" are ground truth; "repeat" and "part" say how far to trust it.
        window: name of the window that was drawn from.
        samples: (step, position) of each removed sample, ascending; position counts over the step's micro-batches.
        part: share of the samples' weight that is removed.
        order: seed of another order of the samples inside micro-batches, or None for the recorded one.
    """

    kind: Kind
    window: str
    samples: tuple[tuple[int, int], ...]
    part: float = 1.0
    order: int | None = None

    @property
    def step(self) -> int:
        """The first step that differs."""
        return self.samples[0][0]

    @property
    def name(self) -> str:
        """Identity of the rerun in files."""
        # one sample by itself, readable; a group's list would be longer than a name may be
        which = fingerprint(self.samples) if len(self.samples) > 1 else str(self.samples[0])
        return f"{self.kind} {self.window} {which} part {self.part} order {self.order}"


def draw(run: Run, windows: dict[str, tuple[int, int]], config: DrawConfig, seed: int) -> list[Removal]:
    """All reruns of some windows.

    Args:
        run: the run.
        windows: name -> first step and step after the last.
        config: how many.
        seed: of the draws; the same seed draws the same samples.

    Raises:
        UserError: a window has fewer steps than the draw asks for.
    """
    return [
        removal for name, (start, stop) in windows.items() for removal in _window(run, name, start, stop, config, seed)
    ]


def _window(run: Run, name: str, start: int, stop: int, config: DrawConfig, seed: int) -> list[Removal]:
    sizes = {record.step: record.size for record in records(run, start, stop)}
    pairs = _pairs(sizes, name, config, seed)
    removals = [Removal(kind="pair", window=name, samples=(pair,)) for pair in pairs]
    removals += [Removal(kind="group", window=name, samples=group) for group in _groups(sizes, name, config, seed)]
    # repeats and parts are of pairs that are run whole too: each is compared with its pair
    order = generator(seed, "fidelity repeats", name).permutation(len(pairs))
    chosen = [pairs[i] for i in order.tolist()]
    removals += [
        Removal(kind="repeat", window=name, samples=(pair,), order=seed + 1) for pair in chosen[: config.repeats]
    ]
    removals += [
        Removal(kind="part", window=name, samples=(pair,), part=part)
        for pair in chosen[: config.part_pairs]
        for part in config.parts
    ]
    return removals


def _pairs(sizes: dict[int, int], window: str, config: DrawConfig, seed: int) -> list[tuple[int, int]]:
    random = generator(seed, "fidelity pairs", window)
    smallest = min(sizes.values())
    per_step = min(config.pairs_per_step, smallest)
    wanted = -(-config.pairs // per_step)
    if wanted > len(sizes):
        raise UserError(
            f"window {window} has {len(sizes)} steps of {smallest} samples; {config.pairs} pairs at "
            f"{per_step} per step need {wanted} steps: lower draw.pairs or raise draw.pairs_per_step"
        )
    # whole steps first: pairs of one step can be ranked without what differs between steps
    steps = sorted(random.choice(list(sizes), wanted, replace=False).tolist())
    drawn = [
        (step, position) for step in steps for position in sorted(random.permutation(sizes[step])[:per_step].tolist())
    ]
    return drawn[: config.pairs]


def _groups(sizes: dict[int, int], window: str, config: DrawConfig, seed: int) -> list[tuple[tuple[int, int], ...]]:
    every: Sequence[tuple[int, int]] = [(step, position) for step, size in sizes.items() for position in range(size)]
    count = max(1, round(config.group_share * len(every)))
    groups = []
    for index in range(config.groups):
        # a generator for each group: more groups leave the first ones as they are, and their reruns count
        chosen = generator(seed, "fidelity groups", window, index).permutation(len(every))[:count]
        groups.append(tuple(every[i] for i in sorted(chosen.tolist())))
    return groups
