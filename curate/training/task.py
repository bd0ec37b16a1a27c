"""The one object that knows the model, the batch layout and the per-sample loss; everything above is model-agnostic.

Shapes: B samples, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from curate.core.artifacts import read_json
from curate.core.config import Config
from curate.core.errors import UserError
from curate.core.machine import usable_device
from curate.core.trust import trusted_function
from curate.training.model import refuse_random, unwrapped_name

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from curate.data.mds import Sample


class ModelSpec(Config):
    """Where the model's code comes from; its weights come from a snapshot."""

    hf_config: Path | None = None
    """Folder or JSON file with the config of a Hugging Face causal LM."""
    factory: str | None = None
    """`module:function` that returns any `nn.Module` mapping token ids (B, T) to logits (B, T, V), alone or first. It
    is run only where the module is trusted (`curate.core.trust`)."""
    kwargs: dict[str, Any] = {}
    """Arguments of the factory."""


class TaskSpec(Config):
    """Everything needed to recompute the loss of a training sample."""

    model: ModelSpec
    """The model."""
    autocast: Literal["bfloat16", "float16"] | None = None
    """Autocast type that the run trained with; none: float32."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Sequences with their weights in a loss `sum_z c_z l_z`.

    Attributes:
        tokens: (B, T) int64; shorter sequences are padded at the end.
        loss_mask: (B, T) bool, True where a token is predicted; column 0 is ignored; padding is False.
        weights: (B,) float32, `c_z`.
    """

    tokens: Tensor
    loss_mask: Tensor
    weights: Tensor

    def __len__(self) -> int:
        """Number of samples B."""
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return Batch(
            tokens=self.tokens.to(device), loss_mask=self.loss_mask.to(device), weights=self.weights.to(device)
        )

    def split(self, size: int) -> list[Batch]:
        """Consecutive batches of at most `size` samples with the weights that they have here."""
        slices = [slice(start, start + size) for start in range(0, len(self), size)]
        return [
            replace(self, tokens=self.tokens[rows], loss_mask=self.loss_mask[rows], weights=self.weights[rows])
            for rows in slices
        ]


def collate(samples: Sequence[Sample], weights: npt.NDArray[np.float32]) -> Batch:
    """Stack samples of possibly different length; padding is token 0 with loss mask False."""
    import torch

    # at the end: under causal attention no real token sees the padding, so no attention mask is needed
    length = max(len(sample.tokens) for sample in samples)
    tokens = np.zeros((len(samples), length), np.int64)
    mask = np.zeros((len(samples), length), bool)
    for row, sample in enumerate(samples):
        tokens[row, : len(sample.tokens)] = sample.tokens
        mask[row, : len(sample.tokens)] = sample.loss_mask
    return Batch(
        tokens=torch.from_numpy(tokens),
        loss_mask=torch.from_numpy(mask),
        weights=torch.from_numpy(np.asarray(weights, np.float32)),
    )


class Task:
    """Builds the model and computes per-sample losses.

    Args:
        spec: see `TaskSpec`.
        device: where the model lives.
        dtype: type of the parameters; float64 serves oracles.
    """

    def __init__(self, spec: TaskSpec, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        import torch

        self.spec = spec
        self.device = usable_device(device)
        self.dtype = dtype or torch.float32
        self.model = build_model(spec.model).to(device=self.device, dtype=self.dtype)
        # a factory may return a wrapped model, whose functional call wants its own names
        self._wrapped_names = {unwrapped_name(name): name for name, _ in self.model.named_parameters()}

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has."""
        import torch

        known = getattr(getattr(self.model, "config", None), "vocab_size", None)
        if isinstance(known, int):
            return known
        # a model of the user's own has no config to ask: run token 0, which every vocabulary has, look at the logits
        tokens = torch.zeros((1, 2), dtype=torch.long, device=self.device)
        batch = Batch(tokens=tokens, loss_mask=tokens == 0, weights=torch.ones(1, device=self.device))
        with torch.no_grad():
            return int(self.logits(batch).shape[-1])

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision context that the run trained in."""
        import torch

        if self.spec.autocast is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.spec.autocast))

    def sample_losses(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """`l_z`: mean cross-entropy over the predicted tokens of each sample, nats per token.

        Args:
            batch: B samples.
            parameters: values to use instead of the model's own (name -> tensor), for functional transforms.

        Returns:
            (B,) losses; 0 for a sample without predicted tokens.
        """
        return self.losses_of(self.logits(batch, parameters), batch)

    def logits(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """What the model predicts for every token but the first of each sequence.

        Args:
            batch: B samples.
            parameters: values to use instead of the model's own.

        Returns:
            (B, T-1, V), float32 at least.
        """
        import torch

        # a key-value cache would cost memory, and is not made for vmap and for checkpointing
        arguments: dict[str, Any] = {"use_cache": False} if _is_hugging_face(self.model) else {}
        with self.autocast():
            if parameters is None:
                output = self.model(batch.tokens, **arguments)
            else:
                values = {self._wrapped_names.get(name, name): value for name, value in parameters.items()}
                output = torch.func.functional_call(self.model, values, (batch.tokens,), arguments)
        output = output[0] if isinstance(output, tuple) else getattr(output, "logits", output)
        # the logits at token t predict token t + 1: the last ones have nothing to predict
        logits: Tensor = output[:, :-1]
        # a cross-entropy in half precision would be off in the third digit; float64 of the oracles stays
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def losses_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """`l_z` (B,) of logits (B, T-1, V); 0 for a sample without predicted tokens."""
        nll = self.token_losses_of(logits, batch)
        mask = batch.loss_mask[:, 1:].to(nll.dtype)
        # clamp: 0 / 1 and not 0 / 0 for a sample that predicts nothing
        return (nll * mask).sum(1) / mask.sum(1).clamp(min=1)

    def token_losses_of(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy (B, T-1) of every token but the first, predicted or not, from logits (B, T-1, V)."""
        from torch.nn import functional

        # one row per token: with the vocabulary in the middle, (B, V, T), the same sums take five times as long
        tokens = batch.tokens[:, 1:]
        losses = functional.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none")
        return losses.view(tokens.shape)


def build_model(spec: ModelSpec) -> nn.Module:
    """An untrained model in training mode.

    Raises:
        UserError: no or two sources, a source that cannot be loaded, or a model that replay could not repeat.
    """
    if (spec.hf_config is None) == (spec.factory is None):
        raise UserError("the model needs exactly one of model.hf_config and model.factory")
    model = _from_hugging_face(spec.hf_config) if spec.hf_config else _from_factory(str(spec.factory), spec.kwargs)
    refuse_random(model)
    # as in training: some modules (activation checkpointing, routers) look at the mode
    return model.train()


# attentions that come with torch; others are imported, or fetched from the hub as kernels
_ATTENTION = (None, "eager", "sdpa")
# settings that make transformers read another config, or replace the layers
_REFUSED_SETTINGS = ("configuration_files", "quantization_config")


def _from_hugging_face(path: Path) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    # before transformers sees the file: loading alone may import what a config names
    attention = _attention(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        chosen = {} if attention is None else {"attn_implementation": attention}
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **chosen)
    except (OSError, ValueError) as error:
        raise UserError(f"model.hf_config {path} is not a Hugging Face config: {error}") from None
    return model


def _attention(path: Path) -> str | None:
    """The attention that a config asks for; None: transformers' default.

    Raises:
        UserError: the config asks, at any depth, for something that transformers would fetch or import.
    """
    file = path / "config.json" if path.is_dir() else path
    config = read_json(file)
    # at any depth: the parts of a composite model have configs of their own
    for key, value in _entries(config):
        if "attn_implementation" in key and value not in _ATTENTION:
            raise UserError(
                f"{file} sets {key} to {value!r}; curate builds eager and sdpa only and fetches no kernel: set one of "
                "them, or leave it out"
            )
        if key in _REFUSED_SETTINGS and value:
            raise UserError(f"{file} sets {key}, which a replayed model cannot have; leave it out")
    # transformers writes the name with an underscore in front, users write it without
    attention: str | None = config.get("attn_implementation") or config.get("_attn_implementation")
    return attention


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a JSON value at any depth, with its value."""
    if isinstance(value, dict):
        yield from value.items()
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(inner)


def _from_factory(source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = trusted_function(source, "model.factory")(**kwargs)
    return model


def _is_hugging_face(model: nn.Module) -> bool:
    from transformers import PreTrainedModel

    return isinstance(model, PreTrainedModel)
