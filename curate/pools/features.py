"""Cheap features of samples: the model's own mean hidden state, hashed n-grams, and how like the target a text is.

The hidden state is what the model's output layer reads, averaged over a sample's tokens: a forward pass without the
output layer, about a quarter of a forward+backward pass. The module that `get_output_embeddings()` gives is taken for
that layer, as of every Hugging Face causal LM; a model without one has n-grams only.

H hidden width, T targets, V buckets of `formats.bags`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from curate.formats.bags import bag, buckets_of
from curate.formats.ngrams import hashed_features
from curate.task import collate

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor, nn

    from curate.formats.mds import Sample
    from curate.target import Target
    from curate.task import Task

    Floats32 = npt.NDArray[np.float32]
    Floats64 = npt.NDArray[np.float64]

_MU = 2000.0


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


def log_ratios(targets: Sequence[Floats64], pool: Floats64) -> Floats64:
    """How much more likely each n-gram is in each target than in the pool: `log p_j - log q_j`, float64 (T, V).

    With n-grams j that occur c_j times among the n of a target and d_j times in the pool,

        q_j = (d_j + 1) / sum_j (d_j + 1)        p_j = (c_j + mu q_j) / (n + mu)        mu 2000

    the Dirichlet smoothing of Zhai and Lafferty (SIGIR 2001): what a small target does not have is as likely as in the
    pool, or a little less.

    Args:
        targets: (V,) counts of each target, see `formats.bags.bag`.
        pool: (V,) counts of the pool.
    """
    q = (pool + 1) / (pool + 1).sum()
    return np.stack([np.log((own + _MU * q) / (own.sum() + _MU)) - np.log(q) for own in targets])


def ratios_of(targets: Iterable[Target], batches: Iterable[Sequence[Sample]]) -> Floats64:
    """`log_ratios` of some targets; the samples of `batches` stand for the pool."""
    pool = bag((sample.tokens, sample.loss_mask) for samples in batches for sample in samples)
    return log_ratios([bag(target.sequences()) for target in targets], pool)


def likeness(samples: Sequence[Sample], ratios: Floats64) -> Floats32:
    """Mean of `log_ratios` over the n-grams of each sample, float32 (B, T); 0 where a sample predicts nothing."""
    found = np.zeros((len(samples), len(ratios)), np.float32)
    for row, sample in enumerate(samples):
        own = buckets_of(sample.tokens, sample.loss_mask)
        if len(own):
            found[row] = ratios[:, own].mean(axis=1)
    return found
