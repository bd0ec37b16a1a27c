"""`python -m pipelines.published --out FOLDER`: the published experiment on small images, held against retraining.

An MLP on scikit-learn's digits images, plain SGD at a constant lr. Some images are left out of one epoch (the first,
the middle, the last) or of every epoch, and training is repeated exactly; each method's values are ranked against what
that did to the held-out loss. A finished run (activation, lr, seed) is kept in `parts/` and not made again.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from curate.core.artifacts import SIGN, begin, read_json, write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.core.lock import locked
from curate.core.progress import progress, say, start_logging
from curate.core.rng import generator
from pipelines.published.agreement import bootstrap_ranks, interval

if TYPE_CHECKING:
    import numpy.typing as npt

    from pipelines.published.training import Trajectory

_log = logging.getLogger(__name__)


class PublishedConfig(Config):
    """The setting; the defaults take about six minutes on one core."""

    out: Path
    """Folder for published.json, published.html and parts/."""
    seeds: int = Field(default=3, ge=1)
    """Runs of each setting, seeds 0, 1, ...: split, weights, batch order and removed images."""
    lrs: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (0.02, 0.1)
    """Learning rates, one run each: with the first the network is still learning at the end, with the second done."""
    activations: tuple[Literal["relu", "gelu", "tanh"], ...] = ("relu", "gelu")
    """Activations, one run each: training with relu is not smooth in its data weights, with gelu it is."""
    hidden: tuple[Annotated[int, Field(ge=1)], ...] = (24,)
    """Widths of the hidden layers."""
    train: int = Field(default=1000, ge=1)
    """Training images."""
    held_out: int = Field(default=500, ge=1)
    """Images whose mean loss is the target."""
    batch_size: int = Field(default=20, ge=1)
    """Images of a step."""
    epochs: int = Field(default=10, ge=1)
    """Passes over the training images."""
    removed: int = Field(default=150, ge=10)
    """Images that are left out, one by one."""
    width: int = Field(default=16, ge=1)
    """Size of each side of a layer in the projected embedding."""
    damping: tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...] = (0.01, 0.1)
    """Damping of the influence functions, one method each."""
    resamples: int = Field(default=1000, ge=1)
    """Bootstrap resamples of the removed images."""


def published(config: PublishedConfig) -> dict[str, Any]:
    """Make every part that is missing, and put them together.

    Returns:
        What is written to `published.json`.

    Raises:
        UserError: bad settings, or scikit-learn is not installed.
    """
    from curate.report.charts import fidelity_figure, write_page

    if config.removed > config.train:
        raise UserError(f"removed {config.removed} is more than the {config.train} training images")
    # what tells parts apart (seed, lr, activation) is in their names: more of them may be added to the folder
    begin(config.out, config.model_dump(mode="json", exclude={"out", "seeds", "lrs", "activations", "resamples"}))
    settings = list(itertools.product(config.activations, config.lrs, range(config.seeds)))
    parts = []
    for activation, lr, seed in progress(settings, total=len(settings), what="published", unit="run"):
        path = config.out / "parts" / f"{activation}-lr{lr:g}-seed{seed}.json"
        if not path.exists():
            write_json(path, make_part(config, activation, lr, seed))
        parts.append(read_json(path))
    replicates = [row for part in parts for row in _replicates(part, config.resamples)]
    result: dict[str, Any] = {
        "sign": SIGN,
        "settings": config.model_dump(mode="json", exclude={"out"}),
        "runs": [part["run"] for part in parts],
        "rows": [{**key, "spearman": float(values[0]), **interval(values)} for key, values in replicates],
        "summary": _summary(replicates),
    }
    write_json(config.out / "published.json", result)
    lede = (
        f"Spearman of values with the effect of retraining without the image, {config.removed} images each, mean over "
        f"{config.seeds} seeds; bars: 95 % bootstrap interval over images."
    )
    write_page(
        config.out / "published.html",
        "Values against retraining",
        lede,
        {"Rank agreement of each method": fidelity_figure(result["summary"])},
    )
    return result


def make_part(config: PublishedConfig, activation: str, lr: float, seed: int) -> dict[str, Any]:
    """One run: train, leave out and train again, value by every method.

    Returns:
        `run`: what the run was and how well it learnt; `removals`: for each removal the measured effects and each
        method's values, in the order of the removed images.
    """
    import torch

    # torch is imported with the first part that is missing: putting finished parts together needs none
    from pipelines.published.training import Mlp, batch_order, load_digits, removal_effects, train

    data = load_digits(seed, config.train, config.held_out)
    order = batch_order(seed, config.train, config.batch_size, config.epochs)
    trajectory = train(Mlp(config.hidden, activation), data, order, lr, seed)
    # sorted: parts list effects and values in the order of the images
    removed = np.sort(generator(seed, "removed").choice(config.train, config.removed, replace=False))
    values = method_values(trajectory, config.width, config.damping)
    removals = []
    # a set: with few epochs the middle one is also the first or the last
    for epoch in [*sorted({0, config.epochs // 2, config.epochs - 1}), None]:
        epochs = range(config.epochs) if epoch is None else [epoch]
        removals.append(
            {
                "removal": "all" if epoch is None else "single",
                "epoch": epoch,
                "effects": removal_effects(trajectory, removed, epochs).tolist(),
                "values": {name: method[epochs].sum(0)[removed].tolist() for name, method in values.items()},
            }
        )
    final = trajectory.states[-1]
    with torch.no_grad():
        right = trajectory.model.logits(final, data.held_out_images).argmax(-1) == data.held_out_labels
        run = {
            "activation": activation,
            "lr": lr,
            "seed": seed,
            "parameters": trajectory.model.size,
            "steps": len(trajectory.batches),
            "train_loss": trajectory.model.losses(final, data.images, data.labels).mean().item(),
            "held_out_loss": trajectory.target_loss(final).item(),
            "held_out_accuracy": right.double().mean().item(),
        }
    return {"run": run, "removed": removed.tolist(), "removals": removals}


def method_values(trajectory: Trajectory, width: int, damping: tuple[float, ...]) -> dict[str, npt.NDArray[np.float64]]:
    """Values of every method: name -> (epochs, images)."""
    from pipelines.published import estimates

    model = trajectory.model
    gradients = estimates.sample_gradients(trajectory)
    curvature = estimates.gauss_newton(trajectory)
    return {
        "adjoint": estimates.adjoint(trajectory),
        "dvemb": estimates.dvemb(trajectory, gradients, [slice(0, model.size)]),
        "dvemb, per layer": estimates.dvemb(trajectory, gradients, model.blocks),
        "dvemb, per layer, projected": estimates.dvemb(
            trajectory, gradients, estimates.projected_blocks(model, width), width
        ),
        **{
            f"influence function, damping {strength:g}": estimates.influence_function(trajectory, curvature, strength)
            for strength in damping
        },
        "TracIn": estimates.tracin(trajectory, gradients),
        "gradient dot product": estimates.gradient_dot(trajectory),
    }


def _replicates(part: dict[str, Any], resamples: int) -> list[tuple[dict[str, Any], npt.NDArray[np.float64]]]:
    """Key and Spearman of each removal and method of a part, the sample's first, then the resamples'."""
    run = part["run"]
    replicates = []
    for removal in part["removals"]:
        key = {
            "removal": removal["removal"],
            "epoch": removal["epoch"],
            **{name: run[name] for name in ("activation", "lr", "seed")},
            "n": len(part["removed"]),
        }
        spearman = bootstrap_ranks(removal["effects"], removal["values"], resamples, run["seed"])
        replicates += [({"method": name, **key}, values) for name, values in spearman.items()]
    return replicates


def _summary(replicates: list[tuple[dict[str, Any], npt.NDArray[np.float64]]]) -> list[dict[str, Any]]:
    """Mean over seeds of each method and removal; the interval is over images, `lowest` to `highest` over seeds."""
    groups: dict[str, tuple[dict[str, Any], list[npt.NDArray[np.float64]]]] = {}
    for row, values in replicates:
        key = {name: value for name, value in row.items() if name not in {"seed", "n"}}
        groups.setdefault(str(key), (key, []))[1].append(values)
    rows = []
    for key, seeds in groups.values():
        # resample by resample, over seeds: the interval of the mean, not the mean of intervals
        mean = np.mean(seeds, axis=0)
        # [0] is the sample itself, the others are resamples
        singles = [float(values[0]) for values in seeds]
        rows.append(
            {
                **key,
                "seeds": len(seeds),
                "spearman": float(mean[0]),
                **interval(mean),
                "lowest": min(singles),
                "highest": max(singles),
            }
        )
    return rows


def show(result: dict[str, Any], write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the summary for a reader: a row per method, a column per removal."""
    summary = result["summary"]
    for activation, lr in dict.fromkeys((row["activation"], row["lr"]) for row in summary):
        rows = [row for row in summary if (row["activation"], row["lr"]) == (activation, lr)]
        removals = list(dict.fromkeys(row["epoch"] for row in rows))
        names = ["every epoch" if epoch is None else f"epoch {epoch}" for epoch in removals]
        write(f"{f'{activation}, lr {lr:g}':36}" + "".join(f"{name:>22}" for name in names) + "\n")
        for method in dict.fromkeys(row["method"] for row in rows):
            cells = [row for row in rows if row["method"] == method]
            text = [f"{row['spearman']:.2f} ({row['low']:.2f} to {row['high']:.2f})" for row in cells]
            write(f"{method:36}" + "".join(f"{cell:>22}" for cell in text) + "\n")


def main() -> None:
    """Entry point."""
    config = parse_command(
        PublishedConfig, "python -m pipelines.published", "The published experiment, held against retraining."
    )
    start_logging()
    with locked(config.out):
        show(published(config))
    say(f"wrote {config.out / 'published.json'} and {config.out / 'published.html'}")


if __name__ == "__main__":
    run_command(main)
