"""Targets: every token predicted once, documents weigh the same, bad files refused."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from curate.errors import UserError
from curate.target import check_vocabulary, load_target, loss_gradients, target_loss
from curate.task import Batch, Task
from curate.trajectory.flat import FlatLayout
from curate.trajectory.run import RunSpec
from tests.tiny import TASK

SPEC = RunSpec(task=TASK, streams={}, seq_len=8, steps=1, windows={}, optimizers=[], groups=[], clip_norm=None)


def write(path, documents):
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def test_the_loss_is_the_mean_over_documents_of_their_token_means(tmp_path):
    """Documents of 5, 20 and 40 tokens: split, padded, each weighing the same whatever its length."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 100, size).tolist() for size in (5, 20, 40, 9)]
    target = load_target(write(tmp_path / "t.jsonl", [{"tokens": tokens} for tokens in documents]), SPEC, min_tokens=1)
    assert target.tokens == sum(len(tokens) - 1 for tokens in documents)
    assert target.half_weights == (0.5, 0.5)
    for half in target.halves:
        assert float(half.weights.sum()) == pytest.approx(1)
    task = Task(TASK, dtype=torch.float64)

    def document_mean(tokens):
        total = 0.0
        for begin in range(0, len(tokens) - 1, 7):
            piece = torch.tensor([tokens[begin : begin + 8]])
            mask = torch.ones_like(piece, dtype=torch.bool)
            loss = task.sample_losses(Batch(tokens=piece, loss_mask=mask, weights=torch.ones(1)))
            total += float(loss.detach()) * (piece.shape[1] - 1)
        return total / (len(tokens) - 1)

    wanted = np.mean([document_mean(tokens) for tokens in documents])
    assert target_loss(task, target, 3) == pytest.approx(wanted, rel=1e-5)


def test_gradients_of_the_halves_average_to_the_gradient_and_ignore_the_batch_size(tmp_path):
    documents = [{"tokens": np.random.default_rng(i).integers(0, 100, 15).tolist()} for i in range(7)]
    target = load_target(write(tmp_path / "t.jsonl", documents), SPEC, min_tokens=1)
    task = Task(TASK, dtype=torch.float64)
    layout = FlatLayout(task.model, [[name for name, _ in task.model.named_parameters()]])
    halves = loss_gradients(task, layout, target.halves, 2)
    torch.testing.assert_close(halves, loss_gradients(task, layout, target.halves, 100), rtol=1e-6, atol=1e-9)
    assert target.half_weights == (4 / 7, 3 / 7)
    loss = sum(
        weight * (task.sample_losses(half) * half.weights).sum()
        for weight, half in zip(target.half_weights, target.halves, strict=True)
    )
    gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(task.model.parameters()))])
    mean = torch.tensor(target.half_weights, dtype=torch.float64) @ halves
    torch.testing.assert_close(mean, gradient, rtol=1e-6, atol=1e-9)


def test_a_parameter_that_the_loss_does_not_use_has_gradient_zero(tmp_path):
    target = load_target(write(tmp_path / "t.jsonl", [{"tokens": [1, 2, 3]}] * 2), SPEC, min_tokens=1)
    task = Task(TASK)
    task.model.unused = torch.nn.Parameter(torch.ones(3))
    gradients = loss_gradients(task, FlatLayout(task.model, [["norm.bias", "unused"]]), target.halves, 8)
    assert gradients.shape == (2, 11)
    assert (gradients[:, :8] != 0).all()
    assert (gradients[:, 8:] == 0).all()


def test_a_mask_is_honoured(tmp_path):
    tokens = list(range(10, 26))
    masked = {"tokens": tokens, "loss_mask": [0] * 8 + [1] * 8}
    target = load_target(write(tmp_path / "t.jsonl", [masked, masked]), SPEC, min_tokens=1)
    assert target.tokens == 16


@pytest.mark.parametrize("documents", [[{"tokens": [1, 2, 3]}], [{"tokens": [1, 2, 3]}, {"tokens": [7, 8]}]])
def test_too_small_a_target_is_refused(tmp_path, documents):
    with pytest.raises(UserError, match=r"predicted tokens in \d documents; at least 100 tokens in 2 documents"):
        load_target(write(tmp_path / "t.jsonl", documents), SPEC, min_tokens=100)


def test_token_ids_beyond_the_vocabulary_are_named(tmp_path):
    target = load_target(write(tmp_path / "t.jsonl", [{"tokens": [1, 2, 99]}] * 2), SPEC, min_tokens=1)
    task = Task(TASK)
    check_vocabulary(target, task)  # this model does not say how many ids it has
    task.model.config = SimpleNamespace(vocab_size=50)
    with pytest.raises(UserError, match="has token id 99, the model's vocabulary is 50"):
        check_vocabulary(target, task)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer"):
        load_target(write(tmp_path / "t.jsonl", [{"text": "some words"}] * 2), SPEC, min_tokens=1)
