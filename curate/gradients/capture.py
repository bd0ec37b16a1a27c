"""Projected per-sample gradients, captured by hooks in a model's own backward pass [LoGra, Ghost].

For a linear layer with inputs `a` (B, T, I) and output gradients `b` (B, T, O) the gradient of sample z is `b_z^T a_z`
(O, I); with projections `P_i`, `P_o` it is `(b_z P_o)^T (a_z P_i)` (k_o, k_i), and the full gradient is never formed.

Policy: the weights of `nn.Linear` and of transformers' `Conv1D` are captured, except modules whose name matches
    `exclude`
(the output head by default: its vocabulary side makes it the least informative per byte). Embeddings, norms and biases
are not captured; the `adjoint` estimator covers every parameter.

A scale `d_o d_i` of each weight goes into the two sides, `(b d_o P_o)^T (a d_i P_i)`; where it is known only after the
backward pass, `a` and `b` are kept until then.

Memory: per micro-batch and layer, B T k_i numbers between forward and backward and B k_o k_i after it. Kept factors:
B T (I + O) per layer and micro-batch of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from curate.errors import UserError
from curate.gradients.projection import LayerProjection

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CapturedFactors:
    """One backward pass of B samples.

    Attributes:
        rows: (B, D), the projected gradients.
        weights: (B,) `c_z`.
        factors: inputs `a` (B, ..., I) and output gradients `b` (B, ..., O) of each call of each layer.
    """

    rows: Tensor
    weights: Tensor
    factors: dict[str, list[tuple[Tensor, Tensor]]]


class GradientCapture:
    """Context manager that collects projected per-sample gradients of each backward pass; its hooks go when it is left.

    Args:
        model: the model.
        width: k_i and k_o, the projected size of each side; a layer contributes up to width^2 numbers.
        seed: of the projections.
        exclude: name patterns of modules to leave out.
        keep: keep the factors `a` and `b` of a pass for `take_factors`.

    Attributes:
        layers: names of the captured modules, in module order.
        blocks: slice of each layer in a row of length D.
        size: D.

    Raises:
        UserError: no layer is left to capture.
    """

    def __init__(
        self, model: nn.Module, width: int, seed: int, exclude: Sequence[str] = ("lm_head",), *, keep: bool = False
    ) -> None:
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
        self._keep = keep
        self._factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._handles: list[Any] = []

    @property
    def layers(self) -> list[str]:
        """Names of the captured modules."""
        return list(self._modules)

    def weight(self, layer: str) -> nn.Parameter:
        """The captured weight of a module, as the optimizer knows it."""
        weight: nn.Parameter = self._modules[layer].weight
        return weight

    def oriented(self, layer: str, tensor: Tensor) -> Tensor:
        """A tensor of the shape of a module's weight as (O, I); Conv1D stores (I, O)."""
        from torch import nn

        return tensor if isinstance(self._modules[layer], nn.Linear) else tensor.T

    def scale(self, scales: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """From the next entry on, capture gradients times `d_o d_i`: (O,) and (I,) of each layer."""
        self._projections = {name: layer.scaled(*scales[name]) for name, layer in self._projections.items()}

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
        self._gradients, self._factors = {}, {}

    def take(self, weights: Tensor) -> Tensor:
        """The gradients `g_z` of the last backward pass, which was of `sum_z c_z l_z`; the buffer is emptied.

        Args:
            weights: (B,) `c_z`, divided out here; a sample of weight 0 has gradient 0.

        Returns:
            (B, D) float32.
        """
        gradients, self._gradients, self._factors = self._gradients, {}, {}
        return self._rows(gradients, weights)

    def take_factors(self, weights: Tensor) -> CapturedFactors:
        """Like `take`, with what `scaled_rows` needs; only of a capture that keeps factors."""
        factors = self._factors
        return CapturedFactors(rows=self.take(weights), weights=weights, factors=factors)

    def scaled_rows(self, captured: CapturedFactors, scales: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        """The gradients of one backward pass, weight by weight times `d_o d_i`.

        Args:
            captured: of that pass.
            scales: (O,) `d_o` and (I,) `d_i` of each layer.

        Returns:
            (B, D) float32.
        """
        gradients = {
            name: _project_calls(calls, self._projections[name].scaled(*scales[name]))
            for name, calls in captured.factors.items()
        }
        return self._rows(gradients, captured.weights)

    def _rows(self, gradients: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """(B, D) from (B, k_o k_i) per layer, zeros where a layer has none, divided by the weights."""
        import torch

        sizes = {name: block.stop - block.start for name, block in self.blocks.items()}
        parts = [
            gradients[name] if name in gradients else weights.new_zeros(len(weights), size)
            for name, size in sizes.items()
        ]
        inverse = torch.where(weights != 0, 1 / weights, torch.zeros_like(weights))
        return torch.cat(parts, dim=1).float() * inverse[:, None]

    def _hook(self, name: str) -> Any:
        layer = self._projections[name]

        def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            projected_input = _rows(inputs[0].detach()) @ layer.input.to(inputs[0].dtype)  # (B, T, k_i)

            def backward_hook(gradient: Tensor) -> None:
                projected_output = _rows(gradient) @ layer.output.to(gradient.dtype)  # (B, T, k_o)
                captured = _contract(projected_output, projected_input.to(gradient.dtype))
                earlier = self._gradients.get(name)
                self._gradients[name] = captured if earlier is None else earlier + captured
                if self._keep:
                    self._factors.setdefault(name, []).append((inputs[0].detach(), gradient))

            output.register_hook(backward_hook)

        return forward_hook


def _contract(outputs: Tensor, inputs: Tensor) -> Tensor:
    """(B, T, k_o), (B, T, k_i) -> (B, k_o k_i), summed over T."""
    import torch

    return torch.einsum("bto,bti->boi", outputs, inputs).flatten(1)


def _project_calls(calls: list[tuple[Tensor, Tensor]], layer: LayerProjection) -> Tensor:
    """(B, k_o k_i) from the factors `a`, `b` of each call of a module; float32 or better, scales overflow half."""
    import torch

    def project(tensor: Tensor, projection: Tensor) -> Tensor:
        kind = torch.promote_types(tensor.dtype, projection.dtype)
        return _rows(tensor).to(kind) @ projection.to(kind)

    return torch.stack([_contract(project(b, layer.output), project(a, layer.input)) for a, b in calls]).sum(0)


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
