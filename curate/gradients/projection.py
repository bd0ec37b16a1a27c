"""Random projections of activations and output gradients.

`P` (F, k) has orthonormal columns scaled by sqrt(F / k): inner products of projected vectors are unbiased over seeds,
`E[P P^T] = I`. Each layer and side has a seed of its own. A side of at most k features is not projected at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from curate.core.rng import derive_seed

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def projection(features: int, width: int, seed: int, layer: str, side: str) -> Tensor:
    """The projection of one side of one layer.

    Args:
        features: F, size of the side.
        width: k, size after projection.
        seed: of the estimator.
        layer: name of the module.
        side: "input" or "output".

    Returns:
        (F, min(F, k)) float32 on the CPU, the same on every machine for one torch version.
    """
    import torch

    # rotating a side that already fits would cost time and change no inner product
    if features <= width:
        return torch.eye(features)
    # one seed for all layers would give layers of one shape the same projection, whose errors then add up
    random = torch.Generator().manual_seed(derive_seed(seed, "projection", layer, side))
    # on the CPU in float64: a GPU draws another stream, and float32 QR loses orthogonality for wide layers
    gaussian = torch.randn(features, width, generator=random, dtype=torch.float64)
    orthonormal, _ = torch.linalg.qr(gaussian)
    scaled: Tensor = orthonormal * (features / width) ** 0.5
    return scaled.float()


@dataclass(frozen=True, kw_only=True)
class LayerProjection:
    """Both projections of one layer, on its device.

    Attributes:
        input: (I, k_i).
        output: (O, k_o).
    """

    input: Tensor
    output: Tensor

    @classmethod
    def drawn(cls, layer: str, inputs: int, outputs: int, width: int, seed: int, device: torch.device) -> Self:
        """Random projections, see `projection`."""
        return cls(
            input=projection(inputs, width, seed, layer, "input").to(device),
            output=projection(outputs, width, seed, layer, "output").to(device),
        )

    @property
    def size(self) -> int:
        """k_o * k_i, length of the layer's projected gradient."""
        return self.input.shape[1] * self.output.shape[1]

    def scaled(self, outputs: Tensor, inputs: Tensor) -> LayerProjection:
        """Fold a scale of each feature into the projections: `b^T a` goes to the projection of `(b d_o)^T (a d_i)`.

        Args:
            outputs: (O,) `d_o`.
            inputs: (I,) `d_i`.
        """
        # diag(d) P once per step, instead of scaling every activation
        return LayerProjection(output=outputs[:, None] * self.output, input=inputs[:, None] * self.input)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        """Project a whole gradient (O, I) as rows are projected: (k_o k_i,) float32."""
        return (self.output.T @ gradient.float() @ self.input).flatten()
