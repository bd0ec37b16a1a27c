"""Targets: every token predicted once, documents weigh the same, bad files refused."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from curate.core.errors import UserError
from curate.training.layout import FlatLayout
from curate.training.run import RunSpec
from curate.training.target import check_vocabulary, load_target, loss_gradients, target_loss
from curate.training.task import Batch, ModelSpec, Task, TaskSpec
from pipelines.vocabulary import train_tokenizer
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
    target = load_target(write(tmp_path / "t.jsonl", [{"tokens": [1, 2, 3]}, {"tokens": [4, 5]}]), SPEC, min_tokens=1)
    task = Task(TASK)
    task.model.unused = torch.nn.Parameter(torch.ones(3))
    gradients = loss_gradients(task, FlatLayout(task.model, [["norm.bias", "unused"]]), target.halves, 8)
    assert gradients.shape == (2, 11)
    assert (gradients[:, :8] != 0).all()
    assert (gradients[:, 8:] == 0).all()


def test_a_mask_is_honoured(tmp_path):
    tokens = list(range(10, 26))
    masked = {"tokens": tokens, "loss_mask": [0] * 8 + [1] * 8}
    other = {**masked, "tokens": tokens[::-1]}
    target = load_target(write(tmp_path / "t.jsonl", [masked, other]), SPEC, min_tokens=1)
    assert target.tokens == 16


@pytest.mark.parametrize("documents", [[{"tokens": [1, 2, 3]}], [{"tokens": [1, 2, 3]}, {"tokens": [7, 8]}]])
def test_too_small_a_target_is_refused(tmp_path, documents):
    with pytest.raises(
        UserError, match=r"predicted tokens in \d documents; at least 100 tokens in 2 different documents"
    ):
        load_target(write(tmp_path / "t.jsonl", documents), SPEC, min_tokens=100)


def test_a_repeated_document_counts_once(tmp_path, caplog):
    """Halves that share documents would agree for no reason."""
    documents = [{"tokens": [1, 2, 3]}, {"id": "again", "tokens": [1, 2, 3]}, {"tokens": [7, 8]}, {"tokens": [9]}]
    target = load_target(write(tmp_path / "t.jsonl", documents), SPEC, min_tokens=1)
    assert (target.documents, target.tokens) == (2, 3)
    assert {tuple(tokens.tolist()) for tokens, _ in target.sequences()} == {(1, 2, 3), (7, 8)}
    assert "2 of 4 documents count; 1 repeat an earlier one, 1 have no token to predict" in caplog.text
    with pytest.raises(UserError, match="in 1 documents; at least 1 tokens in 2 different documents"):
        load_target(write(tmp_path / "t.jsonl", documents[:1] * 30), SPEC, min_tokens=1)


def test_a_target_is_any_file_of_documents(tmp_path):
    documents = [{"tokens": [1, 2, 3]}, {"tokens": [7, 8]}]
    write(tmp_path / "t.jsonl", documents)
    pl.DataFrame(documents).write_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.json.gz").write_bytes(gzip.compress((tmp_path / "t.jsonl").read_bytes()))
    targets = [load_target(tmp_path / name, SPEC, min_tokens=1) for name in ("t.jsonl", "t.parquet", "t.json.gz")]
    assert [target.tokens for target in targets] == [3, 3, 3]


def test_a_truncating_tokenizer_leaves_a_target_whole(tmp_path, caplog):
    tokenizer = train_tokenizer(["the cat sat on the mat"] * 9, 270)
    lengths = []
    for limit in (None, 2):
        if limit:
            tokenizer.enable_truncation(limit)
            tokenizer.enable_padding(length=99)
        tokenizer.save(str(tmp_path / "tokenizer.json"))
        spec = SPEC.model_copy(update={"tokenizer": tmp_path})
        documents = [{"text": "the cat sat on the mat"}, {"text": "a dog"}]
        lengths.append(load_target(write(tmp_path / "t.jsonl", documents), spec, min_tokens=1).tokens)
    assert lengths[0] == lengths[1] > 10
    assert not caplog.records


def test_token_ids_beyond_the_vocabulary_are_named(tmp_path):
    documents = [{"tokens": [1, 2, 99]}, {"tokens": [4, 5]}]
    target = load_target(write(tmp_path / "t.jsonl", documents), SPEC, min_tokens=1)
    task = Task(TASK)
    check_vocabulary(target, task)
    smaller = TaskSpec(model=ModelSpec(factory="tests.tiny:factory", kwargs={"vocabulary": 60}))
    with pytest.raises(UserError, match="has token id 99, the model's vocabulary is 60"):
        check_vocabulary(target, Task(smaller))
    task.model.config = SimpleNamespace(vocab_size=50)
    with pytest.raises(UserError, match="has token id 99, the model's vocabulary is 50"):
        check_vocabulary(target, task)


def test_text_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"t.jsonl: document 't.jsonl:1' is text and there is no tokenizer"):
        load_target(write(tmp_path / "t.jsonl", [{"text": "some words"}]), SPEC, min_tokens=1)
