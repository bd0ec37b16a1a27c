"""`dvemb`: data value embedding as published [DVEmb, arXiv 2412.09538, section 4].

For SGD with the empirical Fisher `H_k ~ sum_z c_z g_z g_z^T` as Hessian, walking back from the last step with an
operator M that starts at 0:

    e_z = lr_k c_z (g_z - M g_z)              for all z in B_k, all with the same M
    M  <- M + sum_{z in B_k} e_z g_z^T

Many steps at once (rows latest first, G their gradients, M0 the operator after the block) are matrix products and one
triangular solve:

    (I + diag(s) K) E = diag(s) (G - G M0^T),    s = lr c,    K[z, z'] = <g_z, g_z'> where z' is of a strictly later
    step, else 0
    M0 <- M0 + E^T G

N rows, D dimensions. Memory: n D numbers for G and E of a block, n^2 for K, and D^2 for the M of every layer.

Influence checkpoints [DVEmb, section 4]: a window cut into segments, each walked back by itself from M = 0, gives
embeddings with respect to the end of its own segment. `I - M` is the product of the steps' operators, so with M_later
of the steps between that end and a later checkpoint

    e = (I - M_later) e_segment,    I - M_both = (I - M_later) (I - M_segment)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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

    # Strictly: samples of one step do not act on each other. Latest first makes the system lower triangular.
    later = steps[None, :] > steps[:, None]  # (n, n): z' strictly later than z
    kernel = (gradients @ gradients.T).where(later, 0)
    system = kernel * scales[:, None]  # `unitriangular` below adds the identity
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
) -> list[Tensor]:
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

    Returns:
        The operator before the range, of each block, in CPU memory.
    """

    def solve(stored: Sequence[Tensor], rows: slice, index: int, operator: Tensor) -> tuple[Tensor, Tensor]:
        return recursion_block(
            stored[0], on_device(scales[rows, index], device).float(), on_device(steps[rows], device), operator
        )

    return walk_back(solve, [gradients], steps, out, blocks=blocks, rows_per_block=rows_per_block, device=device)


def walk_back(
    solve: Callable[[Sequence[Tensor], slice, int, Tensor], tuple[Tensor, Tensor]],
    stored: Sequence[npt.NDArray[np.float32]],
    steps: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
    *,
    blocks: list[slice],
    rows_per_block: int,
    device: str,
) -> list[Tensor]:
    """Apply a recursion from the last block of steps to the first; every file is read once, from its end.

    Args:
        solve: (what is stored of some rows, latest step first, in the columns of one operator; the rows; index of the
            operator; (D, D) operator after the rows) -> their (n, D) embeddings and the operator before them.
        stored: memory-mapped (N, sum of D) each.
        steps: see `recursion`.
        out: see `recursion`.
        blocks: see `recursion`.
        rows_per_block: see `recursion`.
        device: see `recursion`.

    Returns:
        See `recursion`.
    """
    import torch

    sizes = [columns.stop - columns.start for columns in blocks]
    operators = [torch.zeros(size, size, device=device) for size in sizes]
    for rows in step_blocks(steps, rows_per_block):
        # A reversed slice to row 0 must end at None: -1 would mean the last row.
        latest_first = slice(rows.stop - 1, rows.start - 1 if rows.start else None, -1)
        block = [on_device(array[latest_first], device) for array in stored]
        embeddings = torch.empty_like(block[0])
        for index, columns in enumerate(blocks):
            layer = [array[:, columns].contiguous() for array in block]
            embeddings[:, columns], operators[index] = solve(layer, latest_first, index, operators[index])
        # Steps between window and evaluation checkpoint move the operators, but their rows are not kept.
        kept = slice(rows.start, min(rows.stop, len(out)))
        if kept.start < kept.stop:
            out[kept] = embeddings.flip(0)[: kept.stop - kept.start].cpu().numpy()
    return [operator.cpu() for operator in operators]


def chain(segments: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Join consecutive segments into one, whose end is the last one's.

    `chain(segments[:k])` is with respect to the influence checkpoint after the k-th. Joining is associative: what is
    joined may itself be joined.

    Args:
        segments: (n, D) embeddings with respect to the segment's own end, rows in the order of steps, and its (D, D)
            operator; earliest segment first.

    Returns:
        The embeddings of all rows with respect to the last segment's end, and the operator of all.
    """
    import torch

    embeddings, later = segments[-1]
    latest_first = [embeddings]
    for embeddings, operator in reversed(segments[:-1]):
        # Before `later` takes in the segment: its embeddings hold the operators of its own steps already.
        latest_first.append(carried(embeddings, later))
        later = joined(operator, later)
    return torch.cat(latest_first[::-1]), later


def carried(embeddings: Tensor, later: Tensor) -> Tensor:
    """`(I - M_later) e` of each row [DVEmb, influence checkpoints]."""
    return embeddings - embeddings @ later.T


def joined(operator: Tensor, later: Tensor) -> Tensor:
    """M of two consecutive segments, `I - M = (I - M_later) (I - M_segment)` [DVEmb, influence checkpoints]."""
    return later + operator - later @ operator


def carry(
    out: npt.NDArray[np.float32], later: Sequence[Tensor], *, blocks: list[slice], rows_per_block: int, device: str
) -> None:
    """`carried` for a segment's embeddings on disk, in place.

    Args:
        out: (n, D) memory-mapped.
        later: operator of each block.
        blocks: see `recursion`.
        rows_per_block: rows at once.
        device: where to compute.
    """
    for columns, operator in zip(blocks, later, strict=True):
        operator_there = operator.to(device)
        for start in range(0, len(out), rows_per_block):
            rows = slice(start, start + rows_per_block)
            out[rows, columns] = carried(on_device(out[rows, columns], device), operator_there).cpu().numpy()


def on_device(array: npt.NDArray[Any], device: str) -> Tensor:
    """A copy of (a view of) an array that lies on disk or in memory."""
    import torch

    # copy: torch has no negative strides, and warns about memory that is mapped read-only.
    return torch.from_numpy(array.copy()).to(device)


def step_blocks(steps: npt.NDArray[np.int64], rows_per_block: int) -> Iterator[slice]:
    """Row ranges of whole steps, last first, of at most `rows_per_block` rows where a step is not larger."""
    import numpy as np

    starts = np.flatnonzero(np.diff(steps, prepend=steps[0] - 1)).tolist()  # first row of each step
    stop = len(steps)
    while stop:
        fitting = [start for start in starts if stop - start <= rows_per_block and start < stop]
        # A step that is larger than a block is solved whole: all its samples meet the same operator.
        start = fitting[0] if fitting else max(start for start in starts if start < stop)
        yield slice(start, stop)
        stop = start
