"""Projected per-sample gradients, captured by hooks in a model's own backward pass [LoGra, Ghost].

For a linear layer with inputs `a` (B, T, I) and output gradients `b` (B, T, O) the gradient of sample z is `b_z^T a_z`
(O, I); with projections `P_i`, `P_o` it is `(b_z P_o)^T (a_z P_i)` (k_o, k_i), and the full gradient is never formed.

Policy: the weights of `nn.Linear` and of transformers' `Conv1D` are captured, except modules whose name matches
`exclude` (the output head by default: its vocabulary side makes it the least informative per byte). Embeddings, norms
and biases are not captured; the `adjoint` estimator covers every parameter.

A scale `d_o d_i` of each weight goes into the two sides, `(b d_o P_o)^T (a d_i P_i)`; where it is known only after the
backward pass, `a` and `b` are kept until then, and each is multiplied once by the projections without and with it.

Factors of half precision are projected in it and contracted over T in float32. A module that activation checkpointing
runs twice is seen in the pass that is differentiated (`use_reentrant=True`), or in the first one (`False`).

Memory: per micro-batch and layer, B T k_i numbers between forward and backward and B k_o k_i after it. Kept factors:
B T (I + O) per layer and micro-batch of a step; with activation checkpointing that is what it saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from curate.core.errors import UserError
from curate.gradients.projection import LayerProjection
from curate.training.model import all_parameters, unwrapped_name

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CapturedFactors:
    """The factors of one backward pass of B samples, by layer.

    Attributes:
        weights: (B,) `c_z`.
        factors: inputs `a` (B, ..., I) and output gradients `b` (B, ..., O) of each call of each layer.
    """

    weights: Tensor
    factors: dict[str, list[tuple[Tensor, Tensor]]]


class GradientCapture:
    """Context manager that collects projected per-sample gradients of each backward pass; leaving it removes its hooks.

    Args:
        model: the model.
        width: k_i and k_o, the projected size of each side; a layer contributes up to width^2 numbers.
        seed: of the projections.
        exclude: name patterns of modules to leave out.
        keep: keep the factors `a` and `b` of a pass for `take_factors` instead of projecting them in the hooks.
        frozen: a model that is not trained: no parameter gets a gradient, and the backward pass ends at the first
            captured layer. A third of a forward and backward pass is saved.
        on_error: called with what a hook raises, instead of raising it inside the backward pass.

    Attributes:
        layers: names of the captured modules, in module order.
        blocks: slice of each layer in a row of length D.
        size: D.
        identity: what the coordinates of a row depend on (JSON): projections, layers, and the torch that drew them.

    Raises:
        UserError: no layer is left to capture, or one is sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        width: int,
        seed: int,
        exclude: Sequence[str] = ("lm_head",),
        *,
        keep: bool = False,
        frozen: bool = False,
        on_error: Callable[[Exception], None] | None = None,
    ) -> None:
        self._model = model
        # unwrapped names: the projections are seeded by them, so rows of a compiled and a plain model agree
        named = {unwrapped_name(name): module for name, module in model.named_modules()}
        self._modules = {
            name: module
            for name, module in named.items()
            if _is_linear(module)
            and module.weight.requires_grad
            and not any(fnmatch(name, pattern) for pattern in exclude)
        }
        # `_parameters`, because `parameters()` goes into children and names a tied weight once
        self._owners = Counter(id(p) for m in named.values() for p in m._parameters.values())  # noqa: SLF001
        import torch

        if not self._modules:
            raise UserError(
                f"the model has no Linear or Conv1D layer outside exclude={list(exclude)}; there is nothing to capture"
            )
        self._projections: dict[str, LayerProjection] = {}
        features = self.features
        # torch's version: the stream of its generator, and QR, may change with it
        self.identity: dict[str, Any] = {"width": width, "seed": seed, "torch": torch.__version__, "layers": features}
        for name, (inputs, outputs) in features.items():
            module = self._modules[name]
            self._projections[name] = LayerProjection.drawn(name, inputs, outputs, width, seed, module.weight.device)
        self._lay_out()
        self._gradients: dict[str, Tensor] = {}
        self._keep, self._frozen, self._on_error = keep, frozen, on_error
        self._thaw: list[nn.Parameter] = []
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

    def parameter_name(self, layer: str) -> str:
        """Name of the captured weight in `named_parameters`; a tied one has its first name."""
        weight = self.weight(layer)
        return next(name for name, parameter in all_parameters(self._model).items() if parameter is weight)

    def oriented(self, layer: str, tensor: Tensor) -> Tensor:
        """Orient a tensor of the shape of a module's weight as (O, I); Conv1D stores (I, O)."""
        from torch import nn

        return tensor if isinstance(self._modules[layer], nn.Linear) else tensor.T

    @property
    def features(self) -> dict[str, tuple[int, int]]:
        """(I, O) of each layer."""
        return {name: _features(module) for name, module in self._modules.items()}

    def project_onto(self, projections: Mapping[str, LayerProjection]) -> None:
        """From the next entry on, project each layer with these; `identity` still names the drawn ones."""
        device = self.weight(self.layers[0]).device
        self._projections = {
            name: LayerProjection(input=projections[name].input.to(device), output=projections[name].output.to(device))
            for name in self.layers
        }
        self._lay_out()

    def _lay_out(self) -> None:
        """Give each layer its place in a row."""
        ends = np.cumsum([layer.size for layer in self._projections.values()])
        self.blocks = {
            name: slice(int(end) - layer.size, int(end))
            for (name, layer), end in zip(self._projections.items(), ends, strict=True)
        }
        self.size = int(ends[-1])

    def scale(self, scales: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """From the next entry on, capture gradients times `d_o d_i`: (O,) and (I,) of each layer."""
        self._projections = {name: layer.scaled(*scales[name]) for name, layer in self._projections.items()}

    def __enter__(self) -> Self:
        """Install the hooks."""
        if self._frozen:
            # remember which ones, so that leaving does not unfreeze what the user froze
            self._thaw = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
            for parameter in self._thaw:
                parameter.requires_grad_(False)
        self._handles = [module.register_forward_hook(self._hook(name)) for name, module in self._modules.items()]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for parameter in self._thaw:
            parameter.requires_grad_(True)
        self._handles, self._thaw = [], []
        self._gradients, self._factors = {}, {}

    def take(self, weights: Tensor) -> Tensor:
        """The gradients `g_z` of the last backward pass, which was of `sum_z c_z l_z`; the buffer is emptied.

        Args:
            weights: (B,) `c_z`, divided out here; a sample of weight 0 has gradient 0.

        Returns:
            (B, D) float32.
        """
        if self._keep:
            return self.rows(self.take_factors(weights))
        # emptied on the way out: a module that the next pass does not reach must not show this one's gradient
        gradients, self._gradients = self._gradients, {}
        return self._rows(gradients, weights)

    def take_factors(self, weights: Tensor) -> CapturedFactors:
        """The factors of the last backward pass, for `rows` and `scaled_rows`; only for a capture with `keep`."""
        factors, self._factors = self._factors, {}
        return CapturedFactors(weights=weights, factors=factors)

    def rows(self, captured: CapturedFactors) -> Tensor:
        """The gradients of a backward pass whose factors were kept, (B, D) float32."""
        gradients = {
            name: _project_calls(calls, [self._projections[name]])[0] for name, calls in captured.factors.items()
        }
        return self._rows(gradients, captured.weights)

    def scaled_rows(
        self, captured: CapturedFactors, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The gradients of one backward pass, plain and with each weight's entry times `d_o d_i`.

        Args:
            captured: of that pass.
            scales: (O,) `d_o` and (I,) `d_i` of each layer.

        Returns:
            The plain and the scaled rows, (B, D) float32 each.
        """
        both = {
            name: _project_calls(calls, [self._projections[name], self._projections[name].scaled(*scales[name])])
            for name, calls in captured.factors.items()
        }
        plain = {name: layer_rows[0] for name, layer_rows in both.items()}
        scaled = {name: layer_rows[1] for name, layer_rows in both.items()}
        return self._rows(plain, captured.weights), self._rows(scaled, captured.weights)

    def sum_rows(self) -> Tensor:
        """(D,) float32, the gradient that lies in `.grad`, projected; NaN for weights that two modules share."""
        import torch

        parts = []
        for name, block in self.blocks.items():
            weight, layer = self.weight(name), self._projections[name]
            if self._owners[id(weight)] > 1:
                # `.grad` is the sum over both modules, a row only this module's: NaN says that they do not compare
                parts.append(torch.full((block.stop - block.start,), torch.nan, device=weight.device))
            elif weight.grad is None:
                parts.append(torch.zeros(block.stop - block.start, device=weight.device))
            else:
                gradient = self.oriented(name, weight.grad)
                parts.append(layer.of_gradient(gradient))
        return torch.cat(parts)

    def _rows(self, gradients: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """(B, D) from (B, k_o k_i) per layer, zeros where a layer has none, divided by the weights."""
        import torch

        sizes = {name: block.stop - block.start for name, block in self.blocks.items()}
        # a layer has none where the pass did not reach it, such as an expert that no token was routed to
        layer_rows = [
            gradients[name] if name in gradients else weights.new_zeros(len(weights), size)
            for name, size in sizes.items()
        ]
        # the pass was of sum c_z l_z, so each row is c_z g_z; c_z = 0 (padding rows) has no gradient to recover
        inverse = torch.where(weights != 0, 1 / weights, torch.zeros_like(weights))
        return torch.cat(layer_rows, dim=1).float() * inverse[:, None]

    def _hook(self, name: str) -> Any:
        """The forward hook of one layer; it hangs the backward hook on the layer's output."""
        layer = self._projections[name]

        def forward_hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            import torch

            # in a frozen model nothing before the first captured layer needs a gradient, so its output starts the graph
            starts_graph = self._frozen and torch.is_grad_enabled() and not output.requires_grad
            if starts_graph:
                output.requires_grad_()
            # torch.no_grad, or the first pass of reentrant checkpointing: no backward pass comes through here
            if not output.requires_grad:
                return None
            value = inputs[0].detach()
            # project at once: between forward and backward B T k_i numbers are kept instead of B T I
            projected_input = None if self._keep else _token_rows(value) @ layer.input.to(value.dtype)  # (B, T, k_i)

            def backward_hook(gradient: Tensor) -> None:
                if projected_input is None:
                    self._factors.setdefault(name, []).append((value, gradient))
                    return
                projected_output = _token_rows(gradient) @ layer.output.to(gradient.dtype)  # (B, T, k_o)
                captured = _contract(projected_output, projected_input)
                # a module that is called twice (shared layers) has the sum of both calls as its gradient
                earlier = self._gradients.get(name)
                self._gradients[name] = captured if earlier is None else earlier + captured

            # on the tensor: a module's full backward hook would forbid in-place changes of its output
            output.register_hook(self._guarded(backward_hook))
            # a leaf that needs gradients cannot be changed in place, which the model may do next
            return output.clone() if starts_graph else None

        return self._guarded(forward_hook)

    def _guarded(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a hook so that it gives what it raises to `on_error`, where there is one."""
        on_error = self._on_error
        if on_error is None:
            return hook

        def guarded(*arguments: Any) -> Any:
            try:
                return hook(*arguments)
            except Exception as error:  # noqa: BLE001 - `on_error` says it; the training goes on
                on_error(error)

        return guarded


def _contract(outputs: Tensor, inputs: Tensor) -> Tensor:
    """(B, T, k_o), (B, T, k_i) -> (B, k_o k_i), summed over T in float32 or better."""
    import torch

    # a sum over thousands of tokens in half precision would lose most of its digits; float64 oracles keep theirs
    dtype = torch.promote_types(torch.promote_types(outputs.dtype, inputs.dtype), torch.float32)
    return torch.bmm(outputs.to(dtype).transpose(1, 2), inputs.to(dtype)).flatten(1)


def _project_calls(calls: list[tuple[Tensor, Tensor]], layers: Sequence[LayerProjection]) -> list[Tensor]:
    """(B, k_o k_i) of each projection, from the factors `a`, `b` of each call of a module.

    Every factor is read once; float32 or better, because scales overflow half precision.
    """
    import torch

    def project(tensor: Tensor, projections: list[Tensor]) -> tuple[Tensor, ...]:
        dtype = torch.promote_types(tensor.dtype, projections[0].dtype)
        # side by side in one product, so that the factor, the largest array here, is read once for all projections
        projected = _token_rows(tensor).to(dtype) @ torch.cat(projections, dim=1).to(dtype)
        return projected.chunk(len(projections), dim=2)

    by_call = []
    for a, b in calls:
        inputs, outputs = project(a, [layer.input for layer in layers]), project(b, [layer.output for layer in layers])
        by_call.append([_contract(b_side, a_side) for b_side, a_side in zip(outputs, inputs, strict=True)])
    return [torch.stack(call_rows).sum(0) for call_rows in zip(*by_call, strict=True)]


def _token_rows(tensor: Tensor) -> Tensor:
    """(B, I) -> (B, 1, I); (B, T, I) stays; (B, S, T, I) -> (B, S T, I)."""
    return tensor.reshape(tensor.shape[0], -1, tensor.shape[-1])


def _is_linear(module: nn.Module) -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _features(module: nn.Module) -> tuple[int, int]:
    """Input and output features: Linear stores (O, I), Conv1D (I, O).

    Raises:
        UserError: the weight is a shard, whose gradients are not those of samples.
    """
    from torch import nn

    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    linear = isinstance(module, nn.Linear)
    # FSDP1 leaves a flat or empty weight, tensor parallelism one that is smaller than the features that it names
    if len(shape) != 2 or (linear and shape != (module.out_features, module.in_features)):
        raise UserError(
            f"a captured weight of shape {shape} is a shard of its layer (FSDP, tensor parallelism): capture needs "
            "whole weights, as DistributedDataParallel has them; replay the window instead"
        )
    first, second = shape
    return (second, first) if linear else (first, second)
