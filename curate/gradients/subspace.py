"""The part of a model's gradients that its samples use: sides of layers, and whole rows, cut to few numbers.

A layer's gradient of a sample is `b^T a` (O, I). Of all k-dimensional subspaces those that its inputs `a` and output
gradients `b` lie in keep most of it: the leading eigenvectors of `sum a a^T` and `sum b b^T` over the tokens of some
samples. Those are read from one pass by a sketch `Y = C Omega`, `C` the sum and `Omega` Gaussian, so that `C` (F, F) is
never formed [Tropp et al., Fixed-rank approximation of a positive-semidefinite matrix from streaming data, algorithm
3]; where `Omega` has F columns they are exact. What the kept numbers of all layers hold together is cut once more, to
the leading right singular vectors of the rows of some samples.

Against random projections of the same width (`gradients.projection`): docs/benchmarks.md, "the value index".

F features, k width, n samples, S numbers of a row before compression, D after it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from curate.core.rng import derive_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_OVERSAMPLING = 4  # columns of a sketch for each vector that is wanted


class SideSketch:
    """Finds the leading eigenvectors of `sum_t y_t y_t^T` from one pass over the vectors `y_t` (F,).

    Args:
        features: F.
        width: k, eigenvectors wanted.
        seed: of the sketch.
        layer: name of the module: each layer and side has a sketch of its own.
        side: "input" or "output".
        device: where vectors are added.
    """

    def __init__(self, features: int, width: int, seed: int, layer: str, side: str, device: torch.device) -> None:
        import torch

        self._features, self._width = features, width
        columns = min(features, _OVERSAMPLING * width)
        # a sketch as wide as the side is the sum itself
        test = torch.eye(features)
        if columns < features:
            random = torch.Generator().manual_seed(derive_seed(seed, "sketch", layer, side))
            test = torch.linalg.qr(torch.randn(features, columns, generator=random, dtype=torch.float64))[0]
        self._test = test.double().to(device)
        self._sketch = torch.zeros(features, columns, dtype=torch.float64, device=device)

    def add(self, vectors: Tensor) -> None:
        """Add vectors (..., F)."""
        # in float32 the sum of vectors that leave out a direction (gradients below a norm) has negative eigenvalues
        rows = vectors.reshape(-1, self._features).double()
        self._sketch += rows.T @ (rows @ self._test)

    def leading(self) -> Tensor:
        """(F, min(F, k)) orthonormal float32 on the CPU, largest eigenvalue first; of sides of at most k features all.

        Raises:
            ValueError: a vector that was added is not finite.
        """
        import torch

        # rotating a side that already fits would cost time and change no inner product
        if self._features <= self._width:
            return torch.eye(self._features)
        sketch, test = self._sketch.cpu(), self._test.cpu()
        if not torch.isfinite(sketch).all():
            raise ValueError("not finite")
        # a little of the identity is added, or a sum of low rank has no Cholesky factor; eigenvectors are the same
        shifted = sketch + max(float(sketch.norm()), 1e-30) * 1e-12 * test
        core = test.T @ shifted
        factor = torch.linalg.cholesky((core + core.T) / 2 + 1e-30 * torch.eye(core.shape[0], dtype=core.dtype))
        vectors = torch.linalg.svd(torch.linalg.solve_triangular(factor, shifted.T, upper=False).T, full_matrices=False)
        return _signed(vectors.U[:, : self._width]).float()


def leading_rows(rows: Tensor, numbers: int) -> Tensor:
    """The leading right singular vectors of some rows: what a row is compressed onto.

    Args:
        rows: (n, S) float32.
        numbers: D.

    Returns:
        (S, min(D, rank)) orthonormal float32 on the CPU, largest singular value first.
    """
    import torch

    rows = rows.cpu().double()
    # through (n, n): there are fewer rows than numbers in them
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = values.flip(0)[:numbers], vectors.flip(1)[:, :numbers]
    # below it a direction is rounding
    kept = values > 1e-10 * values[0].clamp(min=1e-300)
    return _signed(rows.T @ (vectors[:, kept] / values[kept].sqrt())).float()


def _signed(vectors: Tensor) -> Tensor:
    """Columns whose entry of largest size is positive: an eigenvector has no sign of its own, a file has one."""
    largest = vectors.abs().argmax(dim=0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
