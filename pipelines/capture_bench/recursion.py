"""Speed of the recursion of `dvemb`, from disk to disk."""

from __future__ import annotations

from time import process_time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.core.rng import generator

if TYPE_CHECKING:
    from pipelines.capture_bench.config import CaptureBenchConfig

Operator = Literal["block", "full"]
OPERATORS: tuple[Operator, ...] = ("block", "full")


def recursion_rows(config: CaptureBenchConfig, blocks: int, operator: Operator) -> dict[str, Any]:
    """Speed of the recursion of `dvemb` from disk to disk, against a square float32 matrix product of 2048.

    A block of n rows of D dimensions takes n D^2 (G M^T) + n^2 D / 2 (the later steps' half of K) + n^2 D / 2 (the
    triangular solve) + n D^2 (the operator) multiplications; the speed counts only these.
    """
    from curate.embeddings.dvemb import recursion, step_blocks
    from curate.embeddings.dvemb_estimator import DvembConfig

    size, rows = config.width**2 * blocks, config.recursion_rows
    folder = config.folder / "recursion"
    folder.mkdir(parents=True, exist_ok=True)
    gradients, out = (
        np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float32, (rows, size)) for name in ("rows", "out")
    )
    random = generator(0, "capture bench recursion")
    # in parts: float64 draws of all rows would need twice the memory of the file
    for start in range(0, rows, 512):
        gradients[start : start + 512] = random.normal(0, 0.01, gradients[start : start + 512].shape)
    steps = np.arange(rows) // config.batch_size
    per_block = DvembConfig(operator=operator).block_rows
    dimensions = config.width**2 if operator == "block" else size
    # one operator for each layer, or one for all
    columns = [slice(start, start + dimensions) for start in range(0, size, dimensions)]
    begin = process_time()
    recursion(
        gradients,
        np.full((rows, len(columns)), 1e-4),
        steps,
        out,
        blocks=columns,
        rows_per_block=per_block,
        device="cpu",
    )
    # pages that the system still holds are part of "to disk"
    out.flush()
    seconds = process_time() - begin
    counts = [block.stop - block.start for block in step_blocks(steps, per_block)]
    products = sum(2 * n * dimensions**2 + n**2 * dimensions for n in counts) * len(columns)
    return {
        "case": f"recursion-{operator}",
        "width": size,
        "rows_per_second": rows / seconds,
        "bytes_per_sample": 4 * size,
        "share_of_matrix_product": products / seconds / _matrix_product_speed(),
    }


def _matrix_product_speed() -> float:
    """Multiplications per second of CPU time, best of a few products of 2048 x 2048 in float32."""
    import torch

    left = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(0))
    best = float("inf")
    for _ in range(6):
        begin = process_time()
        # square and large: near the highest speed of the machine, with one thread as the recursion
        left @ left
        best = min(best, process_time() - begin)
    return 2048**3 / best
