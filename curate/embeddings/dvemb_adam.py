"""`dvemb-adam`: the recursion of `dvemb` [DVEmb, arXiv 2412.09538, section 4] for AdamW without momentum.

A step of AdamW (arXiv 1711.05101, algorithm 2) whose first moment is the gradient itself moves a perturbation by
`(1 - lr_k wd_k) I - lr_k D_k H_k`, with `D_k = 1 / (sqrt(v_hat_k) + eps)` after update k, held fixed. With the
empirical Fisher as H_k, walking back from the last step with an operator M that starts at 0:

    e_z = lr_k c_z (I - M) D_k g_z                    for all z in B_k, all with the same M
    M  <- (1 - lr_k wd_k) M + lr_k wd_k I + sum_{z in B_k} e_z g_z^T

With clipping, `clip_k lr_k` replaces the lr of e_z, but not the lr of the decay. M is not symmetric: it needs both
`g_z` (rows of G) and `u_z = D_k g_z` (rows of U), projected.

Many steps at once: I - M shrinks by `1 - lr wd` per step, so with `a_k` the product of `1 - lr_j wd_j` over the later
steps j > k of the block and `f_k = a_k (1 - lr_k wd_k)`, the operator that step k meets is

    I - M_k = a_k (I - M0) - sum_{z' of later steps} a_k / f_{k(z')} e_z' g_z'^T

and with s = clip lr c the block is again matrix products and one triangular solve (F the f of its earliest step):

    (I + diag(s) K) E = diag(s a) (U - U M0^T),  K[z, z'] = a_z / f_z' <u_z, g_z'> where z' is of a strictly later step,
    M0 <- F M0 + (1 - F) I + sum_z F / f_z e_z g_z^T                                                          else 0

N rows, D dimensions. Memory of a block: n D numbers for G, U and E each, n^2 for K and D^2 for M.

Segments chain as those of `dvemb` (`dvemb.chain`). The recursion of M is affine, that of I - M is a product:

    I - [(1 - lr wd) M + lr wd I + sum_z e_z g_z^T] = (I - M) [(1 - lr wd) I - D_k sum_z lr c_z g_z g_z^T]
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.embeddings.dvemb import on_device, walk_back

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from curate.optimizers.settings import GroupSettings


def recursion_block(
    gradients: Tensor, preconditioned: Tensor, scales: Tensor, decays: Tensor, steps: Tensor, operator: Tensor
) -> tuple[Tensor, Tensor]:
    """Embed one block of consecutive steps.

    Args:
        gradients: (n, D) `g_z`, latest step first.
        preconditioned: (n, D) `D_k g_z`.
        scales: (n,) `clip_k lr_k c_z`.
        decays: (n,) `lr_k wd_k` of each row's step, below 1.
        steps: (n,) step of each row, not increasing.
        operator: (D, D) M after the block.

    Returns:
        (n, D) embeddings and (D, D) the operator before the block; the arguments are not changed.
    """
    import torch

    # Logarithms: a and f are products over many steps, and only their ratios are needed. lr wd is near 1e-5: log1p.
    shrinkage = torch.log1p(-decays)
    first_of_step = steps.diff(prepend=steps[:1] + 1) != 0  # a step shrinks once, not once per sample
    log_f = shrinkage.where(first_of_step, 0).cumsum(0)
    log_a = log_f - shrinkage
    later = steps[None, :] > steps[:, None]  # (n, n): z' strictly later than z
    # `where` before exp: for rows that are not later the ratio grows with the block instead of shrinking.
    ratio = (log_a[:, None] - log_f[None, :]).where(later, 0).exp()
    kernel = (preconditioned @ gradients.T * ratio).where(later, 0)
    system = kernel * scales[:, None]  # `unitriangular` below adds the identity
    right = (scales * log_a.exp())[:, None] * (preconditioned - preconditioned @ operator.T)
    embeddings = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    shrunk = embeddings * (log_f[-1] - log_f).exp()[:, None]
    before = torch.addmm(operator * log_f[-1].exp(), shrunk.T, gradients)
    before.diagonal().sub_(torch.expm1(log_f[-1]))  # + (1 - F) I; float32 1 - exp(-1e-5) keeps 2 digits
    return embeddings, before


def recursion(
    gradients: npt.NDArray[np.float32],
    preconditioned: npt.NDArray[np.float32],
    scales: npt.NDArray[np.float64],
    decays: npt.NDArray[np.float64],
    steps: npt.NDArray[np.int64],
    out: npt.NDArray[np.float32],
    *,
    blocks: list[slice],
    rows_per_block: int,
    device: str,
) -> list[Tensor]:
    """Embed a whole range of steps, streaming both gradients from and embeddings to disk.

    Args:
        gradients: (N, D) memory-mapped, in step order.
        preconditioned: (N, D) memory-mapped, `D_k g_z`.
        scales: (N, len(blocks)) `clip_k lr_k c_z`; the lr is that of each block's parameter group.
        decays: (N, len(blocks)) `lr_k wd_k`.
        steps: (N,) step of each row, not decreasing.
        out: (N_out, D) memory-mapped; receives the embeddings of the first N_out rows.
        blocks: columns that share an operator.
        rows_per_block: rows solved at once, rounded to whole steps.
        device: where to compute.

    Returns:
        The operator before the range, of each block, in CPU memory.
    """

    def solve(stored: Sequence[Tensor], rows: slice, index: int, operator: Tensor) -> tuple[Tensor, Tensor]:
        plain, scaled = stored
        return recursion_block(
            plain,
            scaled,
            on_device(scales[rows, index], device).float(),
            on_device(decays[rows, index], device).float(),
            on_device(steps[rows], device),
            operator,
        )

    stored = [gradients, preconditioned]
    return walk_back(solve, stored, steps, out, blocks=blocks, rows_per_block=rows_per_block, device=device)


def denominator(second_moment: Tensor, updates: int, settings: GroupSettings) -> Tensor:
    """`sqrt(v_hat) + eps`, the inverse of D.

    Args:
        second_moment: `v` after some updates.
        updates: how many they were, at least 1.
        settings: of the parameter's group, at the last of them.
    """
    return (second_moment / (1 - settings.beta2**updates)).sqrt_().add_(settings.eps)


def separable_inverse(second_moment: Tensor, updates: int, settings: GroupSettings) -> tuple[Tensor, Tensor]:
    """A scale of each row and of each column with `D ~ outer(rows, columns)`, exact where `1 / D` has rank one.

    The squares of `1 / D` are averaged, as Adafactor does with a second moment (arXiv 1804.04235, algorithm 1): with r
    and c the row and column means of `w = (sqrt(v_hat) + eps)^2`, `w_oi ~ r_o c_i / mean(w)`. Sums of w are those of v
    and of its root, `w = v_hat + 2 eps sqrt(v_hat) + eps^2`: one pass that writes, and products with a vector of ones.

    Args:
        second_moment: (O, I) `v` after some updates.
        updates: how many they were, at least 1.
        settings: of the parameter's group, at the last of them.

    Returns:
        (O,) and (I,).
    """
    import torch

    # float32 at least: v is the square of a gradient, and half precision would flush it to 0.
    moment = second_moment.to(torch.promote_types(second_moment.dtype, torch.float32))
    root, corrected, eps = moment.sqrt(), 1 - settings.beta2**updates, settings.eps

    def means(matrix: Tensor, its_root: Tensor) -> Tensor:
        """Mean of w over the second dimension."""
        # Products with ones instead of `mean`: no (O, I) temporary for w, which is made for every layer and step.
        count = matrix.shape[1]
        ones = matrix.new_ones(count)
        return torch.addmv(matrix @ ones, its_root, ones, alpha=2 * eps * corrected**0.5) / (corrected * count) + eps**2

    rows, columns = means(moment, root), means(moment.T, root.T)
    # mean(w), divided out of both sides alike: all of it on one side could leave the range of float32.
    middle = rows.mean().sqrt()
    return (rows / middle).rsqrt(), (columns / middle).rsqrt()
