"""The gradients of the anchors at the evaluation checkpoint, kept to express later targets.

A are the gradients (R, P) of R anchors, g is that of a target, W is a metric: I, or D = 1 / (sqrt(v_hat) + eps) of the
optimizer at the evaluation checkpoint. A target's coordinates

    t = argmin |W^(1/2) (A^T t - g)|^2 + ridge sum_i G_ii t_i^2,        G = A W A^T

solve `(G + ridge diag(G)) t = A W g`, and `<E[z], t>` values z for the target. The penalty is the ridge of anchors
scaled to unit norm: a short document set has a longer, noisier gradient, and its length must not make it cheaper to
use. So predicted values do not change when an anchor (A_i and E_i), the metric or the loss is rescaled.

The relative residual `|W^(1/2) (A^T t - g)| / |W^(1/2) g|` is the share of the target that the anchors cannot
express: 0 where values are exact, 1 where they say nothing. Gradients are stored as bfloat16, which rounds each number
by at most 2^-8: that is the residual of a target that is itself an anchor, with a small ridge.

Gram matrices are accumulated in float64 over chunks of P: (R + Q) x chunk numbers in memory for Q targets.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from curate.core.artifacts import checked
from curate.core.errors import UserError
from curate.core.writing import atomic_write

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    Floats = npt.NDArray[np.float64]

Metric = Literal["euclidean", "optimizer"]
FILE = "anchors.safetensors"
CHUNK = 1 << 18  # parameters at a time: 2 MiB of float64 for each anchor and target
RIDGES = (1e-1, 1e-2, 1e-3, 1e-4)  # of equal scores the first is taken: the strongest ridge


@dataclass(frozen=True, kw_only=True)
class AnchorBasis:
    """R anchors' gradients over P parameters.

    Attributes:
        names: of the anchors.
        gradients: (R, P), nats per token and unit of the parameter.
        diagonal: (P,) D >= 0, or None where the optimizer has none (SGD). It must be 0, not 1 / eps, where `v_hat`
            is 0: no sample ever moved that parameter, so no value depends on it.
    """

    names: list[str]
    gradients: Tensor
    diagonal: Tensor | None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics that targets can be solved in."""
        return ("euclidean",) if self.diagonal is None else ("euclidean", "optimizer")


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Targets in terms of anchors.

    Attributes:
        coordinates: (Q, R) float32, the vectors t.
        residuals: (Q,) float64, relative, in the metric of the solution; 0 for a target whose gradient is 0.
    """

    coordinates: npt.NDArray[np.float32]
    residuals: Floats


@dataclass(frozen=True, kw_only=True)
class MetricChoice:
    """How to solve later targets.

    Attributes:
        metric: the better one.
        ridge: its best ridge.
        scores: metric -> mean rank correlation of left-out anchors at the metric's best ridge.
    """

    metric: Metric
    ridge: float
    scores: dict[Metric, float]


def save_basis(folder: Path, basis: AnchorBasis) -> None:
    """Write `anchors.safetensors` atomically, in bfloat16; solve from what `load_basis` reads back."""
    import torch
    from safetensors.torch import save_file

    tensors = {"gradients": basis.gradients}
    if basis.diagonal is not None:
        tensors["diagonal"] = basis.diagonal
    # Half the disk of float32; the rounding is far below the residual of any target that is no anchor itself.
    stored = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in tensors.items()}
    with atomic_write(folder / FILE) as partial:
        save_file(stored, str(partial), {"names": json.dumps(basis.names)})


def load_basis(folder: Path) -> AnchorBasis:
    """Open what `save_basis` wrote.

    Raises:
        UserError: the file is missing, truncated, or not one of anchors.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / FILE
    try:
        with safe_open(str(checked(path)), framework="pt") as file:
            names = json.loads(file.metadata()["names"])
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
        return AnchorBasis(names=names, gradients=tensors["gradients"], diagonal=tensors.get("diagonal"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: these embeddings serve their own target only; make them again") from None
    except (SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{path} is corrupted ({error}); delete the folder to make it again") from None


def solve(basis: AnchorBasis, gradients: Tensor, metric: Metric, ridge: float, chunk: int = CHUNK) -> Solution:
    """Express targets by anchors.

    Args:
        basis: R anchors.
        gradients: (Q, P), of the targets' losses at the same checkpoint, on the device to compute on.
        metric: of the least squares problem.
        ridge: relative to the squared norm of each anchor; 0 gives the shortest solution.
        chunk: parameters at a time.

    Raises:
        UserError: a gradient is not finite, or the metric is the optimizer's and it has none.
    """
    r = len(basis.names)
    products = _products(basis, gradients, metric, chunk)
    gram, cross, squares = products[:r, :r], products[:r, r:], products[r:, r:].diagonal()
    t = _minimise(gram, cross, ridge)
    # |A^T t - g|^2 from inner products alone: no second pass over P. Cancellation can make it slightly negative.
    missed = squares - 2 * (t * cross).sum(0) + (t * (gram @ t)).sum(0)
    ratio = np.divide(missed.clip(min=0), squares, out=np.zeros_like(squares), where=squares > 0)
    return Solution(coordinates=t.T.astype(np.float32), residuals=np.sqrt(ratio))


def choose_metric(
    basis: AnchorBasis, embeddings: npt.NDArray[np.float32], ridges: Sequence[float] = RIDGES, chunk: int = CHUNK
) -> MetricChoice:
    """Choose metric and ridge by how well each anchor's values are predicted from the other anchors.

    Each anchor is solved from the others. Spearman's rank correlation compares the values that its coordinates predict
    with its column of the embeddings; the score is the mean over anchors. Of equal scores the first is taken: the
    Euclidean metric, the ridge that stands first.

    Args:
        basis: R >= 2 anchors.
        embeddings: (N, R), exact values of N rows for each anchor.
        ridges: to choose from.
        chunk: parameters at a time.

    Raises:
        UserError: one anchor alone, or a gradient that is not finite.
    """
    from scipy.stats import rankdata

    r = len(basis.names)
    assert embeddings.shape[1] == r
    if r < 2:
        raise UserError(f"{basis.names[0]} is the only anchor: none is left to predict it from; use at least 2")
    solved: dict[tuple[Metric, float], npt.NDArray[np.float32]] = {}
    for metric in basis.metrics:
        # One Gram matrix per metric serves every ridge and every anchor left out; no target, so [:0].
        gram = _products(basis, basis.gradients[:0], metric, chunk)
        solved |= {(metric, ridge): _solve_from_others(gram, ridge).astype(np.float32) for ridge in ridges}
    scores = dict.fromkeys(solved, 0.0)
    for anchor in range(r):
        truth = rankdata(embeddings[:, anchor])
        for key, coordinates in solved.items():
            scores[key] += _correlation(truth, rankdata(embeddings @ coordinates[anchor])) / r
    best_ridge = {metric: max(ridges, key=lambda ridge: scores[metric, ridge]) for metric in basis.metrics}
    best_score = {metric: scores[metric, ridge] for metric, ridge in best_ridge.items()}
    metric = max(basis.metrics, key=lambda name: best_score[name])
    return MetricChoice(metric=metric, ridge=best_ridge[metric], scores=best_score)


def _products(basis: AnchorBasis, gradients: Tensor, metric: Metric, chunk: int) -> Floats:
    """`X W X^T` of anchors and targets stacked, X = [A; g]: (R + Q, R + Q)."""
    import torch

    if metric not in basis.metrics:
        raise UserError("the optimizer of this run has no diagonal metric; use the euclidean one")
    weights = basis.diagonal if metric == "optimizer" else None
    rows, columns = len(basis.names) + len(gradients), basis.gradients.shape[1]
    assert gradients.shape[1] == columns
    # float64: the Gram matrix of similar anchors is nearly singular, and P float32 products would drown its rank.
    products = torch.zeros(rows, rows, dtype=torch.float64, device=gradients.device)
    for start in range(0, columns, chunk):
        part = slice(start, start + chunk)
        stacked = torch.cat([matrix[:, part].detach().to(products) for matrix in (basis.gradients, gradients)])
        if weights is not None:
            stacked *= weights[part].to(products).sqrt()
        products.addmm_(stacked, stacked.T)
    # A row with a number that is not finite has a squared norm that is not: the diagonal names it.
    broken = (~products.diagonal().isfinite()).nonzero().flatten().tolist()
    if broken:
        first = broken[0]
        name = f"anchor {basis.names[first]}" if first < len(basis.names) else f"target {first - len(basis.names)}"
        raise UserError(
            f"the gradient of {name} is not finite at the evaluation checkpoint: training had diverged there"
        )
    result: Floats = products.cpu().numpy()
    return result


def _minimise(gram: Floats, cross: Floats, ridge: float) -> Floats:
    """`(G + ridge diag(G))^-1 cross` for anchors scaled to unit norm; an anchor of norm 0 gets 0. (R, Q)."""
    norms = np.sqrt(gram.diagonal())
    norms = np.where(norms > 0, norms, 1.0)
    scaled = gram / np.outer(norms, norms) + ridge * np.eye(len(gram))
    # lstsq, not solve: with ridge 0 and equal or empty anchors the system is singular, and the shortest t is wanted.
    t: Floats = np.linalg.lstsq(scaled, cross / norms[:, None])[0] / norms[:, None]
    return t


def _solve_from_others(gram: Floats, ridge: float) -> Floats:
    """Row i: coordinates of anchor i in terms of the others, 0 at i; (R, R)."""
    r = len(gram)
    coordinates = np.zeros((r, r))
    for anchor in range(r):
        others = np.arange(r) != anchor
        t = _minimise(gram[np.ix_(others, others)], gram[others, anchor, None], ridge)
        coordinates[anchor, others] = t[:, 0]
    return coordinates


def _correlation(a: Floats, b: Floats) -> float:
    """Pearson correlation; 0 where a side does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0
