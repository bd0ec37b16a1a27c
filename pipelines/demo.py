"""`python -m pipelines.demo`: the whole line on real text that the installation itself contains.

corpus -> MDS -> stage 1 with the recorder -> select for a target -> stage 2 twice from the same state, on the selected
data and on the proportional mixture -> held-out losses. Every part is the command that a user runs, with its config in
configs/demo/.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
from pydantic import Field

from curate.core.arrays import read_table
from curate.core.artifacts import read_json, write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.lock import locked
from curate.core.progress import progress, say, start_logging
from curate.core.reading import read_yaml
from curate.mixture.apportion import apportion
from curate.output.layout import SelectionFolder
from curate.output.write import write_weights
from curate.select import SelectConfig, select
from curate.training.run import Run
from pipelines.corpus.build import CorpusConfig, build
from pipelines.corpus.recipe import RETAIN
from pipelines.evaluate import document_loss, domain_losses, load_task
from pipelines.prepare import PrepareConfig, prepare
from pipelines.pretrain import PretrainConfig, train

if TYPE_CHECKING:
    from curate.mixture.record import Mixture

_log = logging.getLogger(__name__)
ConfigT = TypeVar("ConfigT", bound=Config)
PHASES = ("stage1", "values", "select", "stage2")
CURATED = "selection"  # folder of what is selected


class DemoConfig(Config):
    """The demo's only choices; everything else is in its YAML files."""

    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, data order and selection."""
    out: Path = Path("runs/demo")
    """Folder of corpus, data and runs; an interrupted demo continues in it."""
    configs: Path = Path("configs/demo")
    """Folder of stage1.yaml, select.yaml, stage2.yaml and prepare.yaml."""


class Stopwatch:
    """Seconds of each phase, added up over interruptions."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a phase; what an interruption leaves of it counts."""
        begin = perf_counter()
        _log.info("-- %s", name)
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - begin
            write_json(self._path, self.seconds)


def demo(config: DemoConfig) -> dict[str, Any]:
    """Run every phase that is not complete yet, and summarise.

    Returns:
        What is written to `summary.json`.

    Raises:
        UserError: what the phases refuse.
    """
    root = config.out / f"seed-{config.seed}"
    corpus, data = config.out / "corpus", config.out / "data"
    watch = Stopwatch(root / "seconds.json")
    with watch.phase("corpus"):
        build(CorpusConfig(out=corpus))
    with watch.phase("prepare"):
        prepare(_load(config, "prepare", PrepareConfig, out=data, domains=str(corpus / "train")))
    stage1 = _load(config, "stage1", PretrainConfig, out=root / "stage1", data=data, seed=config.seed)
    with watch.phase("stage1"):
        train(stage1)
    run = Run(stage1.out)
    selection = _load(
        config,
        "select",
        SelectConfig,
        run=run.folder,
        target=corpus / "target.jsonl",
        retain=corpus / RETAIN,
        out=root / CURATED,
        seed=config.seed,
    )
    with watch.phase("select"):
        select(selection, run)
    branches = _branches(config, root, run)
    with watch.phase("stage2"):
        for branch in branches.values():
            train(branch)
    states = {"before": stage1.out, **{name: branch.out for name, branch in branches.items()}}
    with watch.phase("evaluate"):
        losses = _losses(run, corpus, {name: folder / "checkpoint.safetensors" for name, folder in states.items()})
    summary = _summary(config, run, root, losses, watch.seconds)
    for path in (root / "summary.json", config.out / "summary.json"):
        write_json(path, summary)
    return summary


def _load(config: DemoConfig, name: str, kind: type[ConfigT], **changes: Any) -> ConfigT:
    raw = read_yaml(config.configs / f"{name}.yaml")
    return kind(**{**raw, **changes})


def _branches(config: DemoConfig, root: Path, run: Run) -> dict[str, PretrainConfig]:
    """Stage 2 on the two mixtures: same tokens, start, schedule, batch size and seed."""
    mixture = _mixture(root)
    prior = {name: domain.prior for name, domain in mixture.domains.items()}
    sizes = {name: len(run.streams[name]) for name in prior}
    proportional = root / "proportional" / "streams.yaml"
    write_weights(proportional, run.spec.streams, apportion(prior, mixture.samples, sizes))
    data = {"proportional": proportional, "curated": SelectionFolder(root / CURATED).training_data}
    state = run.folder / "checkpoint.safetensors"
    return {
        name: _load(
            config, "stage2", PretrainConfig, out=root / f"stage2-{name}", data=path, init_from=state, seed=config.seed
        )
        for name, path in data.items()
    }


def _mixture(root: Path) -> Mixture:
    from curate.mixture.record import read_mixture

    return read_mixture(SelectionFolder(root / CURATED).mixture)


def _losses(run: Run, corpus: Path, states: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Held-out losses of each state: the target's, the natural-text domains' (equal weight), and the junk domains'."""
    found: dict[str, dict[str, float]] = {"target_loss": {}, "general_loss": {}, "junk_loss": {}}
    for name, state in progress(states.items(), total=len(states), what="evaluate", unit="state"):
        task = load_task(run.spec, state, "cpu")
        found["target_loss"][name] = document_loss(task, run.spec, corpus / "heldout" / "target.jsonl")
        for key in ("general", "junk"):
            losses = domain_losses(task, run.spec, corpus / "heldout" / f"{key}.jsonl")
            found[f"{key}_loss"][name] = sum(losses.values()) / len(losses)
    return found


def _summary(
    config: DemoConfig, run: Run, root: Path, losses: dict[str, dict[str, float]], seconds: dict[str, float]
) -> dict[str, Any]:
    """Losses, tokens, costs (forward+backward passes of a training batch) and paths."""
    selection = SelectionFolder(root / CURATED)
    valuing = read_table(selection.table("costs")).filter(~pl.col("phase").is_in(["training", "select"]))
    value_seconds = float(valuing["seconds"].sum())
    select_seconds = max(seconds["select"] - value_seconds, 0.0)
    return {
        **losses,
        "stage2_tokens": _mixture(root).stored_tokens,
        "passes": {
            "stage1": float(run.spec.steps),
            "values": float(valuing["passes"].sum()),
            # selecting runs no passes: as many as the first stage ran in that time
            "select": select_seconds * run.spec.steps / seconds["stage1"],
            "stage2": float(_load(config, "stage2", PretrainConfig).steps),
        },
        "seconds": {
            "stage1": seconds["stage1"],
            "values": value_seconds,
            "select": select_seconds,
            "stage2": seconds["stage2"] / 2,
        },
        "paths": {
            "run": str(run.folder),
            "mixture": str(selection.mixture),
            "data": str(selection.data),
            "report": str(selection.report),
        },
        "seed": config.seed,
    }


def show(summary: dict[str, Any], write: Callable[[str], object] = sys.stdout.write) -> None:
    """Print the summary for a reader."""
    write(f"{'nats per token, held out':28}{'before':>10}{'proportional':>14}{'curated':>10}\n")
    for name in ("target_loss", "general_loss", "junk_loss"):
        row = summary[name]
        write(f"{name:28}{row['before']:10.4f}{row['proportional']:14.4f}{row['curated']:10.4f}\n")
    write(f"{'':28}" + "".join(f"{phase:>10}" for phase in PHASES) + "\n")
    for key in ("seconds", "passes"):
        write(f"{key:28}" + "".join(f"{summary[key][phase]:10.0f}" for phase in PHASES) + "\n")
    write(json.dumps(summary["paths"], indent=2) + "\n")


def main() -> None:
    """Entry point."""
    config = parse_command(
        DemoConfig, "python -m pipelines.demo", "The whole line on real text, about ten minutes on two cores."
    )
    start_logging()
    with locked(config.out):
        show(demo(config))
    say(f"wrote {config.out / 'summary.json'}")


if __name__ == "__main__":
    run_command(main)
