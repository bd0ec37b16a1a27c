"""Projected per-sample gradients, captured by hooks in a model's own backward pass [LoGra, Ghost].

For a linear layer with inputs `a` (B, T, I) and output gradients `b` (B, T, O) the gradient of sample z is `b_z^T a_z`
(O, I); with projections `P_i`, `P_o` it is `(b_z P_o)^T (a_z P_i)` (k_o, k_i), and the full gradient is never formed.

Policy: the weights of `nn.Linear` and of transformers' `Conv1D` are captured, except modules whose name matches
    `exclude`
(the output head by default: its vocabulary side makes it the least informative per byte). Embeddings, norms and biases
are not captured; the `adjoint` estimator covers every parameter.

Memory: per micro-batch and layer, B T k_i numbers between forward and backward and B k_o k_i after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatch
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from curate.errors import UserError
from curate.gradients.projection import LayerProjection

if TYPE_CHECKING:
    from torch import Tensor, nn


class GradientCapture:
    """Context manager that collects projected per-sample gradients of each backward pass; its hooks go when it is left.

    Args:
        model: the model.
        width: k_i and k_o, the projected size of each side; a layer contributes up to width^2 numbers.
        seed: of the projections.
        exclude: name patterns of modules to leave out.

    Attributes:
        layers: names of the captured modules, in module order.
        blocks: slice of each layer in a row of length D.
        size: D.

    Raises:
        UserError: no layer is left to capture.
    """

    def __init__(self, model: nn.Module, width: int, seed: int, exclude: Sequence[str] = ("lm_head",)) -> None:
        self._modules = {
            name: module
            for name, module in model.named_modules()
            if _is_linear(module)
            and module.weight.requires_grad
            and not any(fnmatch(name, pattern) for pattern in exclude)
        }
        if not self._modules:
            raise UserError(
                f"the model has no Linear or Conv1D layer outside exclude={list(exclude)}; there is nothing to capture"
            )
        self._projections: dict[str, LayerProjection] = {}
        self.blocks: dict[str, slice] = {}
        self.size = 0
        for name, module in self._modules.items():
            inputs, outputs = _features(module)
            layer = LayerProjection(name, inputs, outputs, width, seed, module.weight.device)
            self._projections[name] = layer
            self.blocks[name] = slice(self.size, self.size + layer.size)
            self.size += layer.size
        self._gradients: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    @property
    def layers(self) -> list[str]:
        """Names of the captured modules."""
        return list(self._modules)

    def __enter__(self) -> Self:
        """Install the hooks."""
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._gradients = {}

    def take(self, weights: Tensor) -> Tensor:
        """The gradients `g_z` of the last backward pass, which was of `sum_z c_z l_z`; the buffer is emptied.

        Args:
            weights: (B,) `c_z`, divided out here; a sample of weight 0 has gradient 0.

        Returns:
            (B, D) float32.
        """
        import torch

        sizes = {name: block.stop - block.start for name, block in self.blocks.items()}
        parts = [
            self._gradients[name] if name in self._gradients else weights.new_zeros(len(weights), size)
            for name, size in sizes.items()
        ]
        self._gradients = {}
        inverse = torch.where(weights != 0, 1 / weights, torch.zeros_like(weights))
        return torch.cat(parts, dim=1).float() * inverse[:, None]

    def _hook(self, name: str) -> Any:
        import torch

        layer = self._projections[name]

        def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            projected_input = _rows(inputs[0].detach()) @ layer.input.to(inputs[0].dtype)  # (B, T, k_i)

            def backward_hook(gradient: Tensor) -> None:
                projected_output = _rows(gradient) @ layer.output.to(gradient.dtype)  # (B, T, k_o)
                captured = torch.einsum("bto,bti->boi", projected_output, projected_input.to(gradient.dtype)).flatten(1)
                earlier = self._gradients.get(name)
                self._gradients[name] = captured if earlier is None else earlier + captured

            output.register_hook(backward_hook)

        return forward_hook


def _rows(tensor: Tensor) -> Tensor:
    """(B, I) -> (B, 1, I); (B, T, I) stays; (B, S, T, I) -> (B, S T, I)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output features: Linear stores (O, I), Conv1D (I, O)."""
    from torch import nn

    first, second = module.weight.shape  # type: ignore[misc]
    return (int(second), int(first)) if isinstance(module, nn.Linear) else (int(first), int(second))
