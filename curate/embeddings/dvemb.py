"""`dvemb`: data value embedding as published [DVEmb, arXiv 2412.09538, section 4].

For SGD with the empirical Fisher `H_k ~ sum_z c_z g_z g_z^T` as Hessian, walking back from the last step with an
operator M that starts at 0:

    e_z = lr_k c_z (g_z - M g_z)              for all z in B_k, all with the same M
    M  <- M + sum_{z in B_k} e_z g_z^T

Many steps at once (rows latest first, G their gradients, M0 the operator after the block) are matrix products and one
triangular solve:

    (I + diag(s) K) E = diag(s) (G - G M0^T),    s = lr c,    K[z, z'] = <g_z, g_z'> where z' is of a strictly later
    step, else 0 M0 <- M0 + E^T G

N rows, D dimensions. Memory of a block: n D numbers for G and E, n^2 for K and D^2 for M.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor


def recursion_block(gradients: Tensor, scales: Tensor, steps: Tensor, operator: Tensor) -> tuple[Tensor, Tensor]:
    """Embed one block of consecutive steps.

    Args:
        gradients: (n, D) `g_z`, latest step first.
        scales: (n,) `clip_k lr_k c_z`.
        steps: (n,) step of each row, not increasing.
        operator: (D, D) M after the block.

    Returns:
        (n, D) embeddings and (D, D) the operator before the block; the arguments are not changed.
    """
    import torch

    later = steps[None, :] > steps[:, None]  # (n, n): z' strictly later than z
    kernel = (gradients @ gradients.T).where(later, 0)
    system = kernel * scales[:, None]  # unit lower triangular once the identity is added
    right = scales[:, None] * (gradients - gradients @ operator.T)
    embeddings = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    return embeddings, torch.addmm(operator, embeddings.T, gradients)


def recursion(
    gradients: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float64],
    steps: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
    *,
    blocks: list[slice],
    rows_per_block: int,
    device: str,
) -> None:
    """Embed a whole range of steps, streaming gradients from and embeddings to disk.

    Args:
        gradients: (N, D) memory-mapped, in step order.
        scales: (N, len(blocks)) `clip_k lr_k c_z`; the lr is that of each block's parameter group.
        steps: (N,) step of each row, not decreasing.
        out: (N_out, D) memory-mapped; receives the embeddings of the first N_out rows.
        blocks: columns that share an operator: one slice per layer (block-diagonal, as published), or one for all
            (full).
        rows_per_block: rows solved at once, rounded to whole steps.
        device: where to compute.
    """

    def solve(rows: slice, columns: slice, index: int, operator: Tensor) -> tuple[Tensor, Tensor]:
        return recursion_block(
            on_device(gradients[rows, columns], device),
            on_device(scales[rows, index], device).float(),
            on_device(steps[rows], device),
            operator,
        )

    walk_back(solve, steps, out, blocks=blocks, rows_per_block=rows_per_block, device=device)


def walk_back(
    solve: Callable[[slice, slice, int, Tensor], tuple[Tensor, Tensor]],
    steps: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
    *,
    blocks: list[slice],
    rows_per_block: int,
    device: str,
) -> None:
    """Apply a recursion from the last block of steps to the first, for each operator by itself.

    Args:
        solve: (rows, latest step first; columns; index of the operator; (D, D) operator after the rows) -> their (n, D)
            embeddings and the operator before them.
        steps: see `recursion`.
        out: see `recursion`.
        blocks: see `recursion`.
        rows_per_block: see `recursion`.
        device: see `recursion`.
    """
    import torch

    for index, columns in enumerate(blocks):
        size = columns.stop - columns.start
        operator = torch.zeros(size, size, device=device)
        for rows in step_blocks(steps, rows_per_block):
            latest_first = slice(rows.stop - 1, rows.start - 1 if rows.start else None, -1)
            embeddings, operator = solve(latest_first, columns, index, operator)
            kept = slice(rows.start, min(rows.stop, len(out)))
            if kept.start < kept.stop:
                out[kept, columns] = embeddings.flip(0)[: kept.stop - kept.start].cpu().numpy()


def on_device(array: npt.NDArray[Any], device: str) -> Tensor:
    """A copy of (a view of) an array that lies on disk or in memory."""
    import torch

    return torch.from_numpy(array.copy()).to(device)


def step_blocks(steps: npt.NDArray[np.int64], rows_per_block: int) -> Iterator[slice]:
    """Row ranges of whole steps, last first, of at most `rows_per_block` rows where a step is not larger."""
    import numpy as np

    starts = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1)).tolist()
    stop = len(steps)
    while stop:
        fitting = [start for start in starts if stop - start <= rows_per_block and start < stop]
        start = fitting[0] if fitting else max(start for start in starts if start < stop)
        yield slice(start, stop)
        stop = start
