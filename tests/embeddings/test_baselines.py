"""Gradient dot products against slow float64 oracles: one sample at a time, plain autograd, torch's own Adam."""

import numpy as np
import pytest
import torch

from curate.core.errors import UserError
from curate.embeddings.baselines import BaselineConfig, BaselineEstimator
from curate.embeddings.store import embed_window, plan_job
from curate.training.replay import Replay, records
from curate.training.snapshots import load_state
from curate.training.target import load_target
from tests.tiny import build_optimizers, factory, record_tiny_run, write_tiny_target


@pytest.fixture(scope="module")
def job(folder):
    from curate.training.run import Run

    run = Run(folder / "run")
    target = load_target(folder / "target.jsonl", run.spec, 100)
    return plan_job(Replay(run), "late", "window_end", target, batch_size=5)


def loss(model, batch):
    nll = torch.nn.functional.cross_entropy(
        model(batch.tokens)[:, :-1].transpose(1, 2), batch.tokens[:, 1:], reduction="none"
    )
    mask = batch.loss_mask[:, 1:].double()
    return ((nll * mask).sum(1) / mask.sum(1).clamp(min=1) * batch.weights.double()).sum()


def gradient(model, batch):
    found = torch.autograd.grad(loss(model, batch), list(model.parameters()), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, model.parameters(), strict=True)]
    )


def whole_gradient(model, target):
    return sum(w * gradient(model, half) for w, half in zip(target.half_weights, target.halves, strict=True))


def samples(replay, record):
    """Each sample of a step alone, its loss with weight 1."""
    for batch in replay.batches(record):
        for one in batch.split(1):
            yield (
                float(one.weights),
                type(one)(tokens=one.tokens, loss_mask=one.loss_mask, weights=torch.ones_like(one.weights)),
            )


def values(job, name, **settings):
    embedding = embed_window(job, "late", "window_end", BaselineEstimator(name, BaselineConfig(**settings)))
    assert embedding.passes > 0
    return embedding.values(job.target)


def model_at(job, step):
    model = factory().double()
    optimizers = build_optimizers(model, "AdamW")
    load_state(job.replay.run.snapshot(step), model, optimizers)
    for buffers in optimizers[0].state.values():
        buffers.update({name: buffers[name].double() for name in ("exp_avg", "exp_avg_sq")})
    return model, optimizers[0]


def test_grad_dot_is_the_plain_inner_product_at_the_checkpoint(job):
    model, _ = model_at(job, job.horizon)
    wanted_of = whole_gradient(model, job.target)
    wanted = [
        float(gradient(model, one) @ wanted_of)
        for record in records(job.replay.run, job.start, job.stop)
        for _, one in samples(job.replay, record)
    ]
    np.testing.assert_allclose(values(job, "grad-dot"), wanted, rtol=2e-3, atol=1e-5)


def test_less_is_the_cosine_with_the_step_that_adam_takes_for_the_sample_alone(job):
    wanted = []
    for record in records(job.replay.run, job.start, job.stop):
        for _, one in samples(job.replay, record):
            model, adam = model_at(job, job.horizon)
            target = whole_gradient(model, job.target)
            for group, own in zip(adam.param_groups, record.groups, strict=True):
                group.update(own.as_group() | {"weight_decay": 0.0})
            before = torch.cat([p.detach().flatten() for p in model.parameters()])
            model.zero_grad()
            loss(model, one).backward()
            adam.step()
            lr = record.groups[0].lr
            update = (before - torch.cat([p.detach().flatten() for p in model.parameters()])) / lr
            wanted.append(float(update @ target / update.norm() / target.norm()))
    found = values(job, "less")
    assert np.abs(found).max() <= 1
    np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=2e-4)


def test_shapley_sums_what_each_step_took_off_the_target_to_first_order(job):
    wanted, predicted = [], 0.0
    for state in Replay(job.replay.run).steps(job.start, job.stop):
        record = state.record
        model = factory().double()
        model.load_state_dict({name: value.double() for name, value in state_of(job, record.step).items()})
        target = whole_gradient(model, job.target)
        for weight, one in samples(job.replay, record):
            value = record.groups[0].lr * record.clipped * weight * float(gradient(model, one) @ target)
            wanted.append(value)
            predicted += value
    found = values(job, "shapley")
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-8)
    assert found.sum() == pytest.approx(predicted, rel=1e-3)
    rarely = values(job, "shapley", target_every=10)
    first = sum(1 for _ in samples(job.replay, next(records(job.replay.run, job.start, job.stop))))
    np.testing.assert_allclose(rarely[:first], found[:first])
    assert not np.allclose(rarely[first:], found[first:])


def state_of(job, step):
    """The model's parameters before a step, replayed from the snapshot before it."""
    replay = Replay(job.replay.run)
    replay.model_at(step)
    return replay.model.state_dict()


def test_the_halves_add_up_and_the_sign_is_that_of_a_useful_sample(job):
    estimator = BaselineEstimator("grad-dot", BaselineConfig())
    embedding = embed_window(job, "late", "window_end", estimator)
    halves = embedding.vectors @ embedding.targets.T
    np.testing.assert_allclose(embedding.values(job.target), halves @ np.asarray(job.target.half_weights))
    model, _ = model_at(job, job.horizon)
    before = loss(model, job.target.halves[0]).item()
    best = int(np.argmax(halves[:, 0]))
    record = list(records(job.replay.run, job.start, job.stop))[best // 6]
    one = [one for _, one in samples(job.replay, record)][best % 6]
    step = gradient(model, one)
    at = 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * step[at : at + parameter.numel()].view_as(parameter)
            at += parameter.numel()
    assert loss(model, job.target.halves[0]).item() < before


def test_less_needs_the_moments_of_adam(tmp_path):
    run = record_tiny_run(tmp_path, optimizer="SGD")
    write_tiny_target(tmp_path / "target.jsonl")
    target = load_target(tmp_path / "target.jsonl", run.spec, 100)
    job = plan_job(Replay(run), "late", "window_end", target, batch_size=5)
    with pytest.raises(UserError, match=r"needs the moments of Adam or AdamW, .* was trained with SGD"):
        values(job, "less")
    assert np.isfinite(values(job, "grad-dot")).all()
