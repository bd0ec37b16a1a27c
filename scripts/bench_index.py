"""Recall@100, size and speed of exact and compressed indexes over a file of embeddings.

python scripts/bench_index.py --embeddings FILE.npy [--queries TARGETS.npy] [--out FILE.json]
"""

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from curate.core.artifacts import MANIFEST, read_json, write_json
from curate.core.config import Config, parse_command, run_command
from curate.core.errors import UserError
from curate.index.build import RECALL_AT, IndexConfig, build, compressed_factory
from curate.index.exact import Floats
from curate.index.open import open_index


class BenchConfig(Config):
    """What is measured."""

    embeddings: Path
    """A .npy file of float32 rows [N, D]; it is memory-mapped."""
    queries: Path | None = None
    """A .npy file of target vectors [Q, D]; without it 256 of the rows are the queries."""
    out: Path | None = None
    """Where the table is written as JSON."""
    seed: int = 0
    """Seed of the sampled queries and of the training rows."""


def measure(embeddings: Floats, queries: Floats, factory: str, seed: int) -> dict[str, Any]:
    """Build one index in a temporary folder, search it, and return its row of the table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "index"
        start = time.perf_counter()
        build(embeddings, folder, IndexConfig(factory=factory), queries=queries, seed=seed)
        built = time.perf_counter()
        # build measures recall against the exact search
        facts = read_json(folder / MANIFEST)
        index = open_index(folder)
        # out of the memory map, so that reading from disk is not timed
        searched_rows = np.ascontiguousarray(embeddings[: min(64, len(embeddings))])
        searching = time.perf_counter()
        index.search(searched_rows, RECALL_AT)
        searched = time.perf_counter()
    return {
        "factory": factory,
        "rows": len(embeddings),
        "dim": embeddings.shape[1],
        "recall_at_100": facts["recall_at_100"],
        "lists_visited": f"{facts['lists_visited']}/{facts['lists']}",
        "bytes": facts["bytes"],
        "bytes_share": facts["bytes"] / (4 * embeddings.size),
        "build_seconds": built - start,
        "query_milliseconds": 1000 * (searched - searching) / len(searched_rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text."""
    cells = [list(rows[0]), *[[f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + "\n" for line in cells
    )


def main() -> None:
    """Measure the exact index and the compressed one for this many rows."""
    config = parse_command(BenchConfig, "bench_index", "Recall, size and speed of exact and compressed indexes.")
    embeddings = _load(config.embeddings)
    queries = _load(config.queries) if config.queries else np.empty((0, embeddings.shape[1]), np.float32)
    factories = ["Flat", compressed_factory(len(embeddings))]
    rows = [measure(embeddings, queries, factory, config.seed) for factory in factories]
    sys.stdout.write(table(rows))
    if config.out:
        write_json(config.out, {"embeddings": config.embeddings.name, "table": rows})
        sys.stdout.write(f"wrote {config.out}\n")


def _load(path: Path) -> Floats:
    try:
        # millions of rows need not fit into memory
        array: Floats = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable .npy file: {error}") from None
    if array.ndim != 2 or array.dtype != np.float32:
        raise UserError(f"{path} holds {array.dtype} {array.shape}; it must hold float32 rows [N, D]")
    return array


if __name__ == "__main__":
    run_command(main)
