"""Anchors: the target's own parts, held-out samples of the run's streams, and their gradients."""

import json
import logging

import numpy as np
import pytest
import torch

from curate.core.errors import UserError
from curate.data.mds import content_id
from curate.embeddings.anchors import AnchorSet, anchor_gradients, document_anchors, stream_anchors
from curate.training.replay import Replay
from curate.training.target import load_target, loss_gradients
from tests.tiny import record_tiny_run, write_tiny_target

TRAINED = 36  # of the 80 samples of each domain: 12 steps of 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record_tiny_run(tmp_path_factory.mktemp("anchors"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_target(tmp_path_factory.mktemp("documents") / "target.jsonl", documents=13)


def ids(batch):
    return [content_id(t.numpy(), m.numpy()) for t, m in zip(batch.tokens, batch.loss_mask, strict=True)]


def trained(run):
    return set(run.steps["sample_ids"].explode().to_list())


def test_two_parts_of_a_file_are_the_halves_of_the_target(run, path):
    anchors, target = document_anchors(path, run.spec, 2, min_tokens=100), load_target(path, run.spec, min_tokens=100)
    assert anchors.names == ["target_0", "target_1"]
    for anchor, half in zip(anchors.batches, target.halves, strict=True):
        for name in ("tokens", "loss_mask", "weights"):
            assert torch.equal(getattr(anchor, name), getattr(half, name))


@pytest.mark.parametrize("parts", [1, 3, 13])
def test_parts_share_the_documents_out(run, path, parts):
    anchors = document_anchors(path, run.spec, parts, min_tokens=29)
    whole = document_anchors(path, run.spec, 1, min_tokens=29)
    found = [piece for batch in anchors.batches for piece in ids(batch)]
    assert sorted(found) == sorted(ids(whole.batches[0]))
    assert len(anchors) == parts
    for batch in anchors.batches:
        assert float(batch.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("parts", "minimum", "fits"), [(5, 100, "3 anchors fit"), (14, 1, "13 anchors fit"), (1, 400, "not even one fits")]
)
def test_parts_with_too_few_tokens_are_refused_and_what_fits_is_named(run, path, parts, minimum, fits):
    with pytest.raises(UserError, match=rf"377 predicted tokens in 13 documents.* at least {minimum} .*{fits}"):
        document_anchors(path, run.spec, parts, minimum)


def test_anchors_of_streams_hold_no_trained_sample_and_no_sample_twice(run, caplog):
    with caplog.at_level(logging.WARNING):
        anchors = stream_anchors(run, per_domain=3, samples_per_anchor=9)
    assert not caplog.records
    assert anchors.names == [f"{domain}/{i}" for domain in ("dataclasses", "json") for i in range(3)] + ["general"]
    found = [sample for batch in anchors.batches for sample in ids(batch)]
    assert len(trained(run)) == 2 * TRAINED
    assert not trained(run) & set(found)
    assert len(set(found)) == len(found) == 6 * 9 + 10
    domains = dict(run.unique_samples.select("sample_id", "domain").iter_rows())
    for name, batch in zip(anchors.names, anchors.batches, strict=True):
        found = [domains[sample] for sample in ids(batch)]
        assert sorted(found) == (["dataclasses"] * 5 + ["json"] * 5 if name == "general" else [name[:-2]] * 9)
        np.testing.assert_allclose(batch.weights, 1 / len(batch))


def test_anchors_are_the_same_each_time_and_more_of_them_leave_the_first_alone(run):
    first, second = (stream_anchors(run, 2, 4) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    for one, other in zip(first.batches, second.batches, strict=True):
        assert torch.equal(one.tokens, other.tokens)
    more = stream_anchors(run, 3, 4, general=False)
    assert [ids(more.batches[i]) for i in (0, 1, 3, 4)] == [ids(batch) for batch in first.batches[:4]]
    assert more.fingerprint != first.fingerprint


def test_the_fingerprint_follows_names_and_weights(run):
    anchors = stream_anchors(run, 1, 2, general=False)
    renamed = AnchorSet(names=["a", "b"], batches=anchors.batches)
    other = AnchorSet(names=anchors.names, batches=anchors.batches[::-1])
    assert len({anchors.fingerprint, renamed.fingerprint, other.fingerprint}) == 3


def test_a_domain_with_too_few_untrained_samples_is_filled_up_with_a_warning(run, caplog):
    with caplog.at_level(logging.WARNING):
        anchors = stream_anchors(run, per_domain=5, samples_per_anchor=10, general=False)
    assert [record.getMessage().partition(";")[0] for record in caplog.records] == [
        f"6 of the 50 samples in the anchors of domain {domain} were trained on: only 44 were not"
        for domain in ("dataclasses", "json")
    ]
    known = [len(trained(run) & set(ids(batch))) for batch in anchors.batches]
    assert known == [0, 0, 0, 0, 6] * 2


def test_more_samples_than_a_domain_has_are_refused(run):
    message = r"need 85 samples of domain dataclasses \(80 for its own, 5 for the general one\), it has 80"
    with pytest.raises(UserError, match=message):
        stream_anchors(run, per_domain=8, samples_per_anchor=10)


def test_anchor_sets_are_joined_and_names_are_unique(run, path):
    documents, streams = document_anchors(path, run.spec, 2, 100), stream_anchors(run, 1, 4)
    joined = documents + streams
    assert joined.names == ["target_0", "target_1", "dataclasses/0", "json/0", "general"]
    with pytest.raises(UserError, match="two anchors are called 'target_0'"):
        joined + documents


def test_gradients_are_those_of_the_anchors_losses(run, path):
    replay = Replay(run)
    replay.load(12)
    anchors = document_anchors(path, run.spec, 2, 100) + stream_anchors(run, 1, 4)
    gradients = anchor_gradients(replay.task, replay.layout, anchors, batch_size=3)
    target = load_target(path, run.spec, min_tokens=100)
    assert gradients.shape == (5, replay.layout.size)
    assert not gradients.requires_grad
    torch.testing.assert_close(gradients[:2], loss_gradients(replay.task, replay.layout, target.halves, 3))
    for batch, gradient in zip(anchors.batches, gradients, strict=True):
        replay.model.zero_grad()
        (replay.task.sample_losses(batch) * batch.weights).sum().backward()
        wanted = replay.layout.flatten({name: p.grad for name, p in replay.model.named_parameters()})
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


def test_a_file_of_unpredicted_tokens_holds_no_anchor(run, tmp_path):
    document = json.dumps({"tokens": [1, 2, 3], "loss_mask": [0, 0, 0]})
    (tmp_path / "t.jsonl").write_text(document + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"0 predicted tokens in 0 documents.*not even one fits"):
        document_anchors(tmp_path / "t.jsonl", run.spec, 1, min_tokens=0)
