"""The value of each image by each method, per epoch that used it, for the held-out loss at the end of a run.

Each returns a (epochs, N) float64 matrix: the value of image z's use in epoch e, in nats, positive = it helped.
Removing an image from every epoch is worth the sum of its column. A method that does not know when an image was used
says the same in every epoch. Equations in the docstrings; `c = 1 / B`, later steps stand on the left.

Shape legend: N images, S steps, B batch, P parameters.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from curate.embeddings.dvemb import recursion
from curate.gradients.projection import projection

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from pipelines.published.training import Mlp, Trajectory

    Values = npt.NDArray[np.float64]

_CHUNK = 100  # images whose gradients for every class are held at once


def sample_gradients(trajectory: Trajectory) -> Tensor:
    """`g_z(theta_k)` of every use of an image, in step order: (S B, P)."""
    import torch

    data = trajectory.data
    return torch.cat(
        [
            trajectory.model.sample_gradients(theta, data.images[batch], data.labels[batch])
            # not strict: there is one state more than batches, the final one
            for theta, batch in zip(trajectory.states, trajectory.batches, strict=False)
        ]
    )


def dvemb(trajectory: Trajectory, gradients: Tensor, blocks: list[slice], width: int | None = None) -> Values:
    """Data value embedding with the product's own float32 recursion: `<e_z, g_q>`, see `curate.embeddings.dvemb`.

    Args:
        trajectory: the run.
        gradients: (S B, P), see `sample_gradients`.
        blocks: ranges of the gradient that have an operator of their own; one range: the full operator.
        width: projected size of each side of a layer, or None for whole gradients.
    """
    model = trajectory.model
    compressed = _compress(model, gradients, width)
    embeddings = np.empty_like(compressed)
    recursion(
        compressed,
        np.full((len(compressed), len(blocks)), trajectory.lr * trajectory.weight),
        np.repeat(np.arange(len(trajectory.batches)), trajectory.batches.shape[1]),
        embeddings,
        blocks=blocks,
        rows_per_block=1000,
        device="cpu",
    )
    # the same projections for the target as for the samples: their products estimate products of whole gradients
    target = _compress(model, trajectory.target_gradient(trajectory.states[-1])[None], width)[0]
    return _by_image(trajectory, embeddings.astype(np.float64) @ target.astype(np.float64))


def projected_blocks(model: Mlp, width: int) -> list[slice]:
    """Place of each layer in a projected gradient."""
    sizes = [min(inputs + 1, width) * min(outputs, width) for inputs, outputs in model.layers]
    ends = np.cumsum([0, *sizes]).tolist()
    return [slice(start, stop) for start, stop in itertools.pairwise(ends)]


def tracin(trajectory: Trajectory, gradients: Tensor) -> Values:
    """Products along the run: `lr c <g_z(theta_k), g_q(theta_k)>`."""
    from torch.func import vmap

    # gradients before each step, as TracIn reads them (Pruthi et al. 2020)
    targets = vmap(trajectory.target_gradient)(trajectory.states[:-1])
    products = (gradients.view(len(targets), -1, gradients.shape[1]) @ targets[..., None]).flatten()
    return _by_image(trajectory, trajectory.lr * trajectory.weight * products.numpy())


def gradient_dot(trajectory: Trajectory) -> Values:
    """The product at the final model, the same in every epoch: `lr c <g_z(theta_S), g_q(theta_S)>`."""
    final = trajectory.states[-1]
    products = _final_gradients(trajectory) @ trajectory.target_gradient(final)
    return _every_epoch(trajectory, trajectory.lr * trajectory.weight * products)


def influence_function(trajectory: Trajectory, curvature: Tensor, damping: float) -> Values:
    """Influence functions at the final model; an epoch gets an equal part of an image's value."""
    target = trajectory.target_gradient(trajectory.states[-1])
    whole = influence(_final_gradients(trajectory), curvature, target, damping)
    # removal from all epochs is then worth the whole influence
    return _every_epoch(trajectory, whole / trajectory.epochs)


def influence(gradients: Tensor, curvature: Tensor, target: Tensor, damping: float) -> Tensor:
    """`1/N g_z^T (H + damping I)^-1 g_q`, solved exactly: (N,).

    Args:
        gradients: (N, P) of the samples at the minimum of `1/N sum_z l_z`.
        curvature: (P, P) H.
        target: (P,) `g_q`.
        damping: added to the diagonal.
    """
    import torch

    # Gauss-Newton alone may be singular; with damping it is positive definite, as Cholesky needs
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    solved: Tensor = torch.cholesky_solve(target[:, None], torch.linalg.cholesky(damped))[:, 0]
    return gradients @ solved / len(gradients)


def gauss_newton(trajectory: Trajectory) -> Tensor:
    """Gauss-Newton matrix of the mean training loss at the final model: (P, P).

    For cross-entropy it is `1/N sum_z sum_y p_y g_zy g_zy^T`, `g_zy` the gradient of image z with label y.
    """
    import torch
    from torch.func import vmap

    model, data, final = trajectory.model, trajectory.data, trajectory.states[-1]
    total = torch.zeros(model.size, model.size, dtype=torch.float64)
    every_class = vmap(model.sample_gradients, in_dims=(None, None, 0), out_dims=1)
    for images in data.images.split(_CHUNK):
        labels = torch.arange(model.layers[-1][1])[:, None].expand(-1, len(images))
        # sum_y p_y g g^T is R^T R with rows sqrt(p_y) g_y
        roots = model.logits(final, images).softmax(-1).sqrt()
        rows = (every_class(final, images, labels) * roots[..., None]).flatten(0, 1)
        total = torch.addmm(total, rows.T, rows)
    return total / len(data.images)


def adjoint(trajectory: Trajectory) -> Values:
    """The exact derivative through SGD: `value = lr c <g_z(theta_k), u_{k+1}>`.

    `u_S = g_q` and `u_k = (I - lr H_k) u_{k+1}`, H_k the Hessian of the batch loss. Both products of a step come out
    of one forward-mode pass over the gradient.
    """
    import torch
    from torch.func import grad, jvp

    model, data, lr = trajectory.model, trajectory.data, trajectory.lr
    weights = torch.full((trajectory.batches.shape[1],), trajectory.weight, dtype=torch.float64)
    cotangent = trajectory.target_gradient(trajectory.states[-1])
    products: list[Tensor] = []
    for batch, theta in zip(reversed(trajectory.batches), trajectory.states[:-1].flip(0), strict=True):
        images, labels = data.images[batch], data.labels[batch]

        def both(theta: Tensor, images: Tensor = images, labels: Tensor = labels) -> tuple[Tensor, Tensor]:
            return grad(model.weighted)(theta, weights, images, labels), model.losses(theta, images, labels)

        curved, changes = jvp(both, (theta,), (cotangent,))[1]
        products.append(lr * trajectory.weight * changes)
        # after the products: the values of step k use u_{k+1}
        cotangent = cotangent - lr * curved
    return _by_image(trajectory, torch.cat(products[::-1]).numpy())


def _final_gradients(trajectory: Trajectory) -> Tensor:
    """`g_z(theta_S)` of every image: (N, P)."""
    return trajectory.model.sample_gradients(trajectory.states[-1], trajectory.data.images, trajectory.data.labels)


def _compress(model: Mlp, gradients: Tensor, width: int | None) -> npt.NDArray[np.float32]:
    """float32 gradients (B, D): whole, or `P_o^T [dW db] P_i` of each layer, the bias as one more input."""
    import torch

    if width is None:
        return gradients.float().numpy()
    blocks = []
    for index, ((inputs, outputs), block) in enumerate(zip(model.layers, model.blocks, strict=True)):
        weight, bias = gradients[:, block].float().split([inputs * outputs, outputs], dim=1)
        matrix = torch.cat([weight.view(-1, outputs, inputs), bias[..., None]], dim=2)
        left = projection(outputs, width, 0, f"layer{index}", "output")
        right = projection(inputs + 1, width, 0, f"layer{index}", "input")
        blocks.append((left.T @ matrix @ right).flatten(1))
    return torch.cat(blocks, dim=1).numpy()


def _by_image(trajectory: Trajectory, values: Values) -> Values:
    """Values in the order of their use -> (epochs, N) in the order of the images."""
    order = trajectory.order.reshape(trajectory.epochs, -1)
    result = np.empty(order.shape)
    np.put_along_axis(result, order, values.reshape(order.shape), axis=1)
    return result


def _every_epoch(trajectory: Trajectory, values: Tensor) -> Values:
    return np.tile(values.numpy(), (trajectory.epochs, 1))
