"""`python -m pipelines.index_query --run RUN --targets '[a.jsonl]' --out DIR`: a large value index, and its queries.

The rows of a run are drawn again and again, each mixed with another one of its domain and moved by noise, until there
are as many as asked for; they are written, indexed and opened as real ones are. Called again, only queries are timed:
the peak of memory is then theirs.
"""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import polars as pl
from pydantic import Field

from curate.core.arrays import read_arrays, read_table, write_arrays, write_table
from curate.core.artifacts import read_json, write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.progress import progress, start_logging
from curate.core.rng import generator
from curate.influence.current import NextStepOptions, value_next_step
from curate.influence.row_values import target_vectors
from curate.influence.rows import RowStore, open_rows
from curate.influence.space import existing_space
from curate.influence.value_index import build_value_index, open_value_index
from curate.tables import Samples
from curate.training.replay import Replay
from curate.training.run import open_run
from curate.training.samples import usable_samples
from curate.training.target import load_target

if TYPE_CHECKING:
    import dataframely as dy
    import numpy.typing as npt

    from curate.training.run import Run

    Floats = npt.NDArray[np.float32]

_BLOCK = 4096  # rows of a file, as `influence.rows` has them
_NOISE = 0.3  # of the deviation of each number within the domain
_VECTORS, _SAMPLES, _BUILD = "vectors.npz", "samples.parquet", "build.json"


class QueryConfig(Config):
    """What to make and ask."""

    run: Path = Path("runs")
    """Recorded run with a value index, or a folder of runs: the newest finished one is taken."""
    targets: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Target documents, one JSONL file for each target."""
    out: Path
    """Folder of the index; one that is complete is asked again."""
    rows: int = Field(default=1_000_000, ge=1)
    """Rows of the index."""
    domains: int = Field(default=50, ge=1)
    """Domains of the index, each made of the rows of one domain of the run."""
    top: int = Field(default=10_000, ge=1)
    """Samples of most value that a query asks for, and as many of least."""
    measured_per_domain: int = Field(default=8, ge=1)
    """Samples of each domain that are measured beside a target's direction."""
    min_target_tokens: int = Field(default=1000, ge=1)
    """Fewest predicted tokens of a target."""
    seed: int = Field(default=0, ge=0)
    """Of the drawn rows."""


def measure(config: QueryConfig, run: Run) -> dict[str, Any]:
    """Make the index where it is missing, and time queries.

    Returns:
        `build`: seconds and bytes; `queries`: seconds of each target's first and second query and of the domain means,
        with recall; `open_seconds`; `peak_bytes`: of this process.
    """
    import torch

    if not (config.out / _BUILD).exists():
        _build(config, run)
    vectors: Floats = read_arrays(config.out / _VECTORS)["vectors"]
    samples = Samples.validate(read_table(config.out / _SAMPLES))
    space = replace(existing_space(run, Replay(run)), folder=config.out, compression=torch.zeros(1, vectors.shape[1]))
    begin = perf_counter()
    index = open_value_index(config.out, space, samples, "this bench")
    opened = perf_counter() - begin
    queries = []
    for vector in vectors:
        row: dict[str, Any] = {}
        for name in ("first", "second"):
            begin = perf_counter()
            ends = [index.search(sign * vector, config.top) for sign in (np.float32(1), np.float32(-1))]
            row[f"{name}_seconds"] = perf_counter() - begin
        begin = perf_counter()
        means = index.domain_means(vector[None])
        row["means_seconds"] = perf_counter() - begin
        queries.append(row | {"domains": len(means), "found": len(ends[0][0]), "recall": min(end[1] for end in ends)})
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    build = read_json(config.out / _BUILD)
    return {"build": build, "open_seconds": opened, "queries": queries, "peak_bytes": peak}


def _build(config: QueryConfig, run: Run) -> None:
    replay = Replay(run)
    space = existing_space(run, replay)
    samples = usable_samples(run.unique_samples)
    targets = [load_target(path, run.spec, config.min_target_tokens) for path in config.targets]
    options = NextStepOptions(per_domain=config.measured_per_domain)
    next_step = value_next_step(run, run.source, samples, targets, options)
    config.out.mkdir(parents=True, exist_ok=True)
    write_arrays(config.out / _VECTORS, {"vectors": target_vectors(run, replay, space, next_step)})
    here = replace(space, folder=config.out)
    begin = perf_counter()
    table = _write_rows(config, samples, open_rows(space), open_rows(here))
    written = perf_counter()
    build_value_index(here, table, config.seed)
    built = perf_counter()
    write_table(config.out / _SAMPLES, table)
    sizes = {name: _bytes(config.out / name) for name in ("rows", "groups")}
    seconds = {"write_seconds": written - begin, "index_seconds": built - written}
    write_json(config.out / _BUILD, {"rows": len(table), "numbers": space.numbers, **seconds, "bytes": sizes})


def _write_rows(
    config: QueryConfig, samples: dy.DataFrame[Samples], real: RowStore, store: RowStore
) -> dy.DataFrame[Samples]:
    """Write the drawn rows, a block of one domain after the other; returns their samples."""
    have = samples.join(pl.DataFrame({"sample_id": real.sample_ids}), on="sample_id", how="semi")
    of_domain = [table["sample_id"].to_numpy() for table in have.partition_by("domain", maintain_order=True)]
    random, tables, first = generator(config.seed, "large index"), [], 0
    sizes = np.diff(np.linspace(0, config.rows, config.domains + 1).astype(int))
    for domain, size in enumerate(progress(sizes, total=len(sizes), what="write rows", unit="domain")):
        known = real.take(of_domain[domain % len(of_domain)])
        for shard, start in enumerate(range(0, size, _BLOCK)):
            count = min(_BLOCK, size - start)
            ids = np.arange(first, first + count)
            store.write(ids, _drawn(known, count, random))
            tokens = random.integers(16, 129, count)
            table = {"index": np.arange(start, start + count), "shard": np.full(count, shard), "sample_id": ids}
            table |= {"stored_tokens": tokens, "predicted_tokens": tokens}
            tables.append(pl.DataFrame(table).select(pl.lit(f"domain-{domain:02d}").alias("domain"), pl.all()))
            first += count
    return Samples.validate(pl.concat(tables))


def _drawn(known: Floats, count: int, random: np.random.Generator) -> Floats:
    """(count, D) rows between two rows of a domain, mostly near the first, with noise."""
    one, other = known[random.integers(len(known), size=(2, count))]
    share = random.beta(1, 4, (count, 1)).astype(np.float32)
    noise = random.standard_normal(one.shape, np.float32) * known.std(axis=0) * np.float32(_NOISE)
    drawn: Floats = (1 - share) * one + share * other + noise
    return drawn


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Entry point."""
    config = parse_command(QueryConfig, "python -m pipelines.index_query", "A large value index, and its queries.")
    start_logging()
    found = measure(config, open_run(config.run))
    for name, value in found.items():
        for row in value if isinstance(value, list) else [value]:
            sys.stdout.write(f"{name}: {row}\n")
    write_json(config.out / "queries.json", found)


if __name__ == "__main__":
    run_command(main)
