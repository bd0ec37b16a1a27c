"""Cheap features of samples: the model's own mean hidden state, and hashed n-grams.

The hidden state is what the model's output layer reads, averaged over a sample's tokens: a forward pass without the
output layer, about a quarter of a forward+backward pass. The module that `get_output_embeddings()` gives is taken for
that layer, as of every Hugging Face causal LM; a model without one has n-grams only.

H hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.formats.ngrams import hashed_features
from curate.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    from curate.formats.mds import Sample
    from curate.task import Task

    Floats32 = npt.NDArray[np.float32]


class _ReachedError(Exception):
    """The output layer was reached; carries what it was to read."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


def output_layer(model: nn.Module) -> nn.Module | None:
    """The module that turns hidden states into logits, where the model says which it is."""
    find = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find() if callable(find) else None
    return found


def mean_hidden_states(task: Task, samples: Sequence[Sample]) -> Floats32:
    """Mean over a sample's tokens of what the output layer reads: float32 (B, H).

    Args:
        task: its model has an output layer.
        samples: B samples, as they go through the model together; their padding is left out.
    """
    import torch

    layer = output_layer(task.model)
    assert layer is not None
    batch = collate(samples, np.ones(len(samples), np.float32)).to(task.device)
    lengths = torch.tensor([len(sample.tokens) for sample in samples], device=task.device)

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        raise _ReachedError(inputs[0])

    handle = layer.register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            task.logits(batch)
    except _ReachedError as reached:
        hidden = reached.hidden
    finally:
        handle.remove()
    real = torch.arange(hidden.shape[1], device=task.device) < lengths[:, None]
    means: Floats32 = ((hidden.float() * real[..., None]).sum(1) / lengths[:, None]).cpu().numpy()
    return means


def ngram_features(samples: Sequence[Sample]) -> Floats32:
    """Hashed counts of tokens and token pairs, float32 (B, 4096); see `formats.ngrams.hashed_features`."""
    return np.stack([hashed_features(sample.tokens) for sample in samples])
