"""An MLP on scikit-learn's digits images, trained by plain SGD, and trained again without some of its samples.

Everything is a pure function of a flat float64 parameter vector `theta` (P,), so that per-sample gradients, products
with the Hessian and many reruns at once are `torch.func` transforms of the same loss. float64 because one sample of one
step moves the held-out loss by about 1e-6 nats, which float32 reruns do not resolve.

Shape legend: N images, S steps, B batch, P parameters, R reruns.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from curate.core.errors import UserError
from curate.core.rng import derive_seed, generator

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

PIXELS, CLASSES = 64, 10


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Images in [0, 1] and labels; `held_out` is what the target's loss is read on."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


@dataclass(frozen=True)
class Mlp:
    """A fully connected network whose parameters are one flat vector, each layer's weight then its bias.

    Attributes:
        hidden: widths of the hidden layers.
        activation: between layers, a function of `torch.nn.functional`.
    """

    hidden: tuple[int, ...]
    activation: str = "relu"

    @property
    def layers(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of each layer."""
        sizes = [PIXELS, *self.hidden, CLASSES]
        return list(itertools.pairwise(sizes))

    @property
    def blocks(self) -> list[slice]:
        """Place of each layer, weight and bias, in the flat vector."""
        ends = np.cumsum([0, *((inputs + 1) * outputs for inputs, outputs in self.layers)]).tolist()
        return [slice(start, stop) for start, stop in itertools.pairwise(ends)]

    @property
    def size(self) -> int:
        """P."""
        size: int = self.blocks[-1].stop
        return size

    def initial(self, seed: int) -> Tensor:
        """He's normal weights and zero biases."""
        import torch

        random = torch.Generator().manual_seed(derive_seed(seed, "weights"))
        layers = []
        for inputs, outputs in self.layers:
            weights = torch.randn(outputs * inputs, generator=random, dtype=torch.float64)
            layers += [weights * (2 / inputs) ** 0.5, torch.zeros(outputs, dtype=torch.float64)]
        return torch.cat(layers)

    def logits(self, theta: Tensor, images: Tensor) -> Tensor:
        """(..., 10) of images (..., 64)."""
        import torch

        activation = getattr(torch.nn.functional, self.activation)
        hidden = images
        for index, ((inputs, outputs), block) in enumerate(zip(self.layers, self.blocks, strict=True)):
            # before each layer but the first, so that the last one gives plain logits
            hidden = activation(hidden) if index else hidden
            weight, bias = theta[block].split([inputs * outputs, outputs])
            hidden = hidden @ weight.view(outputs, inputs).T + bias
        return hidden

    def losses(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy `l_z` of each image, nats: (B,)."""
        logits = self.logits(theta, images)
        picked = logits.gather(-1, labels[..., None])[..., 0]
        # by hand: works for any leading dimensions, as vmap adds them
        result: Tensor = logits.logsumexp(-1) - picked
        return result

    def weighted(self, theta: Tensor, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`sum_z c_z l_z`."""
        return (weights * self.losses(theta, images, labels)).sum()

    def sample_gradients(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """`g_z` of each image: (B, P)."""
        from torch.func import grad, vmap

        result: Tensor = vmap(grad(self.losses), in_dims=(None, 0, 0))(theta, images, labels)
        return result


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One run of plain SGD at a constant lr.

    Attributes:
        model: the network.
        data: what it was trained on.
        order: (epochs, steps of an epoch, B) image of each place; an epoch uses every image once.
        lr: of every step.
        states: (S + 1, P) `theta_0` to `theta_S`.
    """

    model: Mlp
    data: Digits
    order: npt.NDArray[np.int64]
    lr: float
    states: Tensor

    @property
    def epochs(self) -> int:
        """Passes over the images."""
        return len(self.order)

    @property
    def batches(self) -> npt.NDArray[np.int64]:
        """(S, B) images of each step."""
        return self.order.reshape(-1, self.order.shape[2])

    @property
    def weight(self) -> float:
        """`c_z = 1 / B`."""
        return 1 / int(self.order.shape[2])

    def target_loss(self, theta: Tensor) -> Tensor:
        """`l_q`: mean held-out loss."""
        return self.model.losses(theta, self.data.held_out_images, self.data.held_out_labels).mean()

    def target_gradient(self, theta: Tensor) -> Tensor:
        """`g_q`: (P,)."""
        from torch.func import grad

        result: Tensor = grad(self.target_loss)(theta)
        return result


def load_digits(seed: int, train: int, held_out: int) -> Digits:
    """A random split of the images that scikit-learn contains.

    Raises:
        UserError: scikit-learn is not installed, or the split asks for more images than there are.
    """
    import torch

    try:
        from sklearn import datasets
    except ImportError:
        raise UserError(
            "this recipe reads scikit-learn's digits images: pip install 'scikit-learn>=1.6' (the extra `recipes`)"
        ) from None
    images, labels = datasets.load_digits(return_X_y=True)
    if train + held_out > len(images):
        raise UserError(
            f"there are {len(images)} digits images, train + held_out asks for {train + held_out}: lower one of them"
        )
    order = generator(seed, "split").permutation(len(images))
    # grey levels are 0 to 16
    (train_images, train_labels), (held_out_images, held_out_labels) = (
        (torch.from_numpy(images[rows] / 16.0), torch.from_numpy(labels[rows].astype(np.int64)))
        for rows in (order[:train], order[train : train + held_out])
    )
    return Digits(
        images=train_images,
        labels=train_labels,
        held_out_images=held_out_images,
        held_out_labels=held_out_labels,
    )


def batch_order(seed: int, images: int, batch_size: int, epochs: int) -> npt.NDArray[np.int64]:
    """A permutation of the images for each epoch, cut into batches: (epochs, images / batch_size, batch_size).

    Raises:
        UserError: the batches do not divide the images.
    """
    if images % batch_size:
        raise UserError(
            f"train {images} is not a multiple of batch_size {batch_size}: every epoch uses each image once"
        )
    permuted = [generator(seed, "order", epoch).permutation(images) for epoch in range(epochs)]
    return np.stack(permuted).reshape(epochs, -1, batch_size)


def train(model: Mlp, data: Digits, order: npt.NDArray[np.int64], lr: float, seed: int) -> Trajectory:
    """Train, keeping every state."""
    import torch
    from torch.func import grad

    theta = model.initial(seed)
    # every state: a few hundred steps of a few thousand float64 parameters
    states = [theta]
    weights = torch.full(order.shape[2:], 1 / order.shape[2], dtype=torch.float64)
    for batch in order.reshape(-1, order.shape[2]):
        theta = theta - lr * grad(model.weighted)(theta, weights, data.images[batch], data.labels[batch])
        states.append(theta)
    return Trajectory(model=model, data=data, order=order, lr=lr, states=torch.stack(states))


def removal_effects(trajectory: Trajectory, removed: npt.NDArray[np.int64], epochs: Sequence[int]) -> Tensor:
    """Leave-one-out by training again: `l_q(theta_S without z) - l_q(theta_S)`, all reruns at once.

    Batches, order and normalisation stay; the removed image has `c_z = 0` in the given epochs. What comes before the
    first of them is not run again.

    Args:
        trajectory: the run.
        removed: (R,) images, one per rerun.
        epochs: where they are removed.

    Returns:
        (R,) nats; positive = the image helped.
    """
    import torch
    from torch.func import grad, vmap

    model, data = trajectory.model, trajectory.data
    # all reruns see the same batches: weights and parameters differ
    gradient = vmap(grad(model.weighted), in_dims=(0, 0, None, None))
    per_epoch = trajectory.order.shape[1]
    first = min(epochs) * per_epoch
    # states before the first removal are the same with and without the image
    thetas = trajectory.states[first].expand(len(removed), -1).clone()
    for step, batch in enumerate(trajectory.batches[first:], first):
        # the batch is not refilled and 1/B stays: leave-one-out of a weight, as the estimators define it
        kept = torch.ones(len(removed), len(batch), dtype=torch.float64)
        # an image is used once per epoch: the comparison finds its one place
        if step // per_epoch in epochs:
            kept = torch.from_numpy(removed[:, None] != batch[None, :]).double()
        weights = kept * trajectory.weight
        thetas = thetas - trajectory.lr * gradient(thetas, weights, data.images[batch], data.labels[batch])
    without: Tensor = vmap(trajectory.target_loss)(thetas)
    return without - trajectory.target_loss(trajectory.states[-1])
