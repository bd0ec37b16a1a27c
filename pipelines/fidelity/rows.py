"""`python -m pipelines.fidelity.rows --run RUN --targets '[a.jsonl, b.jsonl]'`: how good rows of the value index are.

Samples that the space was not fitted on are drawn from every domain. Their rows' products with each target's vector are
held against exact values of the next step, domain by domain: alone, and beside what n-grams predict. The cost of a row
is measured beside the training's own forward+backward pass of the same samples, in turns, in one process.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import polars as pl
from pydantic import Field

from curate.core.arrays import write_table
from curate.core.artifacts import write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.progress import start_logging
from curate.core.rng import generator
from curate.influence.current import NextStepOptions, read_together, target_positions, value_next_step
from curate.influence.predict_next_step import fit_predictor
from curate.influence.row_values import calibrate, target_vectors
from curate.influence.rows import embed_samples
from curate.influence.space import DEFAULT, SpaceOptions, captured_rows, open_space, row_capture
from curate.selection.candidates import open_candidates
from curate.stats.rank_correlation import spearman
from curate.tables import Samples
from curate.training.replay import Replay
from curate.training.run import open_run
from curate.training.samples import usable_samples
from curate.training.source import CANDIDATES, CURRENT
from curate.training.target import load_target
from curate.training.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt

    from curate.data.mds import Sample
    from curate.influence.space import RowSpace
    from curate.training.run import Run

    Floats = npt.NDArray[np.floating[Any]]

_log = logging.getLogger(__name__)
_BATCHES = 4  # of each round: one alone is too short to time
_NUMBERS = ("spearman", "low", "high", "share_held", "ngrams", "with_ngrams")


class RowsConfig(Config):
    """What to measure."""

    run: Path = Path("runs")
    """Recorded run, or a folder of runs: the newest finished one is taken."""
    targets: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Target documents, one JSONL file for each target."""
    candidates: Path | None = None
    """Measure data that was never trained on (MDS folders of domains, or a streams.yaml) instead of the run's own."""
    samples_per_domain: int = Field(default=100, ge=8)
    """Samples of each domain that are measured."""
    seed: int = Field(default=1, ge=0)
    """Of the draw."""
    width: int = Field(default=DEFAULT.width, ge=1)
    """Numbers that each side of a layer keeps."""
    numbers: int = Field(default=DEFAULT.numbers, ge=1)
    """Numbers of a row."""
    side_samples: int = Field(default=DEFAULT.side_samples, ge=1)
    """Samples that the sides of layers are fitted on."""
    fit_samples: int = Field(default=DEFAULT.fit_samples, ge=1)
    """Samples that the compression is fitted on."""
    rounds: int = Field(default=12, ge=1)
    """Times that the cost of a row is measured."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of a target."""
    device: str = "cpu"
    """Device to run on."""
    out: Path | None = None
    """Folder of the table (rows.parquet) and of what it sums up to (rows.json); none: only print."""

    @property
    def space(self) -> SpaceOptions:
        """How the space is fitted."""
        return SpaceOptions(
            width=self.width, numbers=self.numbers, side_samples=self.side_samples, fit_samples=self.fit_samples
        )


def measure(config: RowsConfig, run: Run) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Hold rows against exact values, and time them.

    Returns:
        The table of trust by target and domain; its mean and least rank correlation, and the cost of a row.
    """
    replay = Replay(run, config.device)
    source = run.source if config.candidates is None else open_candidates(config.candidates, run)
    name: Literal["current", "candidates"] = CURRENT if config.candidates is None else CANDIDATES
    space = open_space(run, replay, config.space)
    targets = [load_target(path, run.spec, config.min_target_tokens) for path in config.targets]
    held_out = usable_samples(source.unique_samples).filter(~pl.col("sample_id").is_in(space.fitted.tolist()))
    options = NextStepOptions(per_domain=config.samples_per_domain, seed=config.seed, device=config.device)
    next_step = value_next_step(run, source, Samples.validate(held_out), targets, options, name)
    vectors = target_vectors(run, replay, space, next_step)
    counts = dict(held_out.group_by("domain").len().sort("domain").iter_rows())
    tables = []
    for target, position in target_positions(next_step).items():
        exact = next_step.values.filter(target=target).with_columns(
            value_per_token=pl.col("value_total_nats") / pl.col("predicted_tokens")
        )
        if position == 0:
            samples = held_out.join(exact, on="sample_id", how="semi")
            store = embed_samples(run, source, Samples.validate(samples), space, replay)
        products = store.products(exact["sample_id"].to_numpy(), vectors[position, None])[:, 0]
        names = {"source": name, "target": target, "predictors": "rows"}
        trust = calibrate(exact, products[:, None], space.fitted, counts, names, config.seed).trust
        # as a selection reads them: what n-grams predict of the same samples beside the row
        predicted = fit_predictor(source, next_step, {target: 1.0}, config.seed).cross_validated
        both = calibrate(exact, np.column_stack([products, predicted]), space.fitted, counts, names, config.seed)
        alone = [spearman(*pair) for pair in _by_domain(exact, predicted, list(counts))]
        tables.append(trust.with_columns(ngrams=pl.Series(alone, dtype=pl.Float64), with_ngrams=both.trust["spearman"]))
    table = pl.concat(tables)
    ranks, with_ngrams = table["spearman"].drop_nulls(), table["with_ngrams"].drop_nulls()
    summary = {"run": run.fingerprint, "source": name, "numbers": space.numbers, "width": config.width}
    summary |= {"bytes": space.numbers + 4, "mean": ranks.mean(), "least": ranks.min()}
    summary |= {"mean_with_ngrams": with_ngrams.mean(), "least_with_ngrams": with_ngrams.min()}
    return table, summary | _cost(config, run, replay, space)


def _by_domain(exact: pl.DataFrame, predicted: Floats, domains: Sequence[str]) -> Iterator[tuple[Floats, Floats]]:
    """Predicted and exact values of each domain."""
    table = exact.with_columns(predicted=pl.Series(predicted))
    for domain in domains:
        known = table.filter(pl.col("predicted").is_finite(), domain=domain)
        yield known["predicted"].to_numpy(), known["value_per_token"].to_numpy()


def _cost(config: RowsConfig, run: Run, replay: Replay, space: RowSpace) -> dict[str, float]:
    """Time of rows in forward+backward passes of the same samples: the median of rounds, and its 95 % upper bound."""
    random = generator(config.seed, "row cost")
    shuffled = usable_samples(run.unique_samples)[random.permutation(len(usable_samples(run.unique_samples)))]
    batches = list(islice(read_together(run, run.source, shuffled[:4096]), _BATCHES))
    replay.model_at(run.spec.steps)
    compression = space.compression.to(replay.device)

    def rows() -> float:
        # the hooks are put up once for all rows of a source: not part of a row's cost
        with row_capture(space, replay) as capture:
            return _seconds(
                config.device,
                lambda: [(captured_rows(replay, capture, batch) @ compression).cpu() for batch in batches],
            )

    def passes() -> float:
        seconds = _seconds(config.device, lambda: _passes(replay, batches))
        replay.model.zero_grad(set_to_none=True)
        return seconds

    ratios = []
    for number in range(config.rounds + 1):
        # in turns: which of both comes first must not decide
        works = [rows, passes] if number % 2 else [passes, rows]
        seconds = {work: work() for work in works}
        ratios.append(seconds[rows] / seconds[passes])
    kept = np.array(ratios[1:])  # the first round warms up
    medians = np.median(random.choice(kept, (10_000, len(kept))), axis=1)
    return {"cost": float(np.median(kept)), "cost_at_most": float(np.quantile(medians, 0.95))}


def _passes(replay: Replay, batches: Sequence[Sequence[Sample]]) -> None:
    """Forward and backward passes with the gradients of all parameters, as training takes them."""
    for samples in batches:
        replay.model.zero_grad(set_to_none=True)
        batch = collate(samples, np.ones(len(samples), np.float32)).to(replay.device)
        replay.task.sample_losses(batch).sum().backward()


def _seconds(device: str, work: Callable[[], object]) -> float:
    """CPU time of the process, or time where the work is a GPU's."""
    import torch

    if device != "cpu":
        torch.cuda.synchronize(device)
    clock = process_time if device == "cpu" else perf_counter
    begin = clock()
    work()
    if device != "cpu":
        torch.cuda.synchronize(device)
    return clock() - begin


def main() -> None:
    """Entry point."""
    config = parse_command(RowsConfig, "python -m pipelines.fidelity.rows", "How good rows of the value index are.")
    start_logging()
    table, summary = measure(config, open_run(config.run))
    for row in table.iter_rows(named=True):
        # null where a domain has too few samples
        numbers = " ".join("    -" if row[name] is None else f"{row[name]:5.2f}" for name in _NUMBERS)
        sys.stdout.write(f"{row['target']:24}{row['domain']:24}{row['measured']:6} {numbers}\n")
    for key, value in summary.items():
        sys.stdout.write(f"{key}: {value:.3f}\n" if isinstance(value, float) else f"{key}: {value}\n")
    if config.out is not None:
        write_table(config.out / "rows.parquet", table)
        write_json(config.out / "rows.json", summary)
        _log.info("wrote %s", config.out)


if __name__ == "__main__":
    run_command(main)
