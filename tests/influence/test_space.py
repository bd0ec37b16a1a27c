"""The space of rows against gradients of single samples in float64, projected explicitly."""

import json
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from curate.core.errors import UserError
from curate.gradients.capture import GradientCapture
from curate.gradients.projection import LayerProjection
from curate.influence import space as spaces
from curate.influence.current import read_together
from curate.influence.space import (
    DEFAULT,
    RowSpace,
    SpaceOptions,
    captured_rows,
    existing_space,
    open_space,
    row_capture,
)
from curate.training.layout import FlatLayout
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.samples import usable_samples
from curate.training.task import ModelSpec, Task, TaskSpec
from tests.tiny import STEPS, VOCABULARY, Training, factory

GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": VOCABULARY, "n_embd": 8, "n_layer": 1,
    "n_head": 2, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


class Shared(nn.Module):
    """Two layers of one weight, and one that is called twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 6)
        self.first, self.second, self.twice = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.lm_head = nn.Linear(6, VOCABULARY)

    def forward(self, tokens):
        hidden = torch.tanh(self.second(torch.tanh(self.first(self.embedding(tokens)))))
        return self.lm_head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


def shared():
    return Shared()


def task_of(name, folder):
    torch.manual_seed(0)
    if name == "GPT-2":
        (folder / "config.json").write_text(json.dumps(GPT2))
        return Task(TaskSpec(model=ModelSpec(hf_config=folder / "config.json")))
    module, function = ("tests.influence.test_space", "shared") if name == "shared" else ("tests.tiny", "factory")
    kwargs = {} if name == "shared" else {"tied": name == "tied"}
    return Task(TaskSpec(model=ModelSpec(factory=f"{module}:{function}", kwargs=kwargs)))


@pytest.fixture(scope="module")
def samples(run):
    """Two batches of different domains."""
    table = usable_samples(run.unique_samples)
    return [sample for batch in read_together(run, run.source, table[::20]) for sample in batch]


@pytest.fixture(scope="module")
def space(run, replay):
    return open_space(run, replay, replace(DEFAULT, width=5, numbers=40))


def gradients(model, sample):
    """Parameter -> gradient of a sample's mean loss, float64, of a model in float64."""
    tokens = torch.from_numpy(sample.tokens.astype(np.int64))[None]
    logits = model(tokens)
    logits = (logits if isinstance(logits, torch.Tensor) else logits.logits)[0, :-1]
    losses = nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none")
    model.zero_grad()
    losses[torch.from_numpy(sample.loss_mask[1:])].mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_a_row_is_the_gradient_projected_explicitly(run, replay, space, samples):
    with row_capture(space, replay) as capture:
        replay.model_at(STEPS)
        rows = torch.cat([captured_rows(replay, capture, batch) for batch in (samples[:3], samples[3:])])
    model = deepcopy(replay.model).double()
    for row, sample in zip(rows, samples, strict=True):
        of = gradients(model, sample)
        parts = []
        for name in ("mix", "up", "down"):
            layer = space.projections[name]
            outputs, inputs = of[f"{name}.weight"].shape
            assert layer.output.shape == (outputs, min(5, outputs))
            assert layer.input.shape == (inputs, min(5, inputs))
            parts.append((layer.output.double().T @ of[f"{name}.weight"] @ layer.input.double()).flatten())
        wanted = torch.cat(parts)
        torch.testing.assert_close(row.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.norm()))
        compressed = row @ space.compression
        torch.testing.assert_close(
            compressed.double(), wanted @ space.compression.double(), rtol=1e-3, atol=1e-5 * float(wanted.norm())
        )
    assert all(parameter.requires_grad for parameter in replay.model.parameters())


@pytest.mark.parametrize("name", ["tied", "untied", "GPT-2", "shared"])
def test_products_are_derivatives_where_the_space_is_complete(tmp_path, samples, name):
    task = task_of(name, tmp_path)
    names = [each for each, _ in task.model.named_parameters()]
    replay = SimpleNamespace(
        task=task, model=task.model, device=torch.device("cpu"), layout=FlatLayout(task.model, [names])
    )
    features = GradientCapture(task.model, 1, 0).features
    projections = {
        layer: LayerProjection(input=torch.eye(inputs), output=torch.eye(outputs))
        for layer, (inputs, outputs) in features.items()
    }
    size = sum(inputs * outputs for inputs, outputs in features.values())
    complete = RowSpace(
        folder=tmp_path, fingerprint="", projections=projections, compression=torch.eye(size), fitted=np.zeros(0, int)
    )
    directions = torch.randn(3, replay.layout.size, generator=torch.Generator().manual_seed(1))
    vectors = complete.vectors(directions, replay)
    with row_capture(complete, replay) as capture:
        rows = captured_rows(replay, capture, samples).numpy()
        weights = {capture.parameter_name(layer) for layer in features}
    model = deepcopy(task.model).double()
    for row, sample in zip(rows, samples, strict=True):
        of = gradients(model, sample)
        for direction, vector in zip(directions, vectors, strict=True):
            parts = replay.layout.views(direction.double())
            # a tied weight once: its gradient is the sum over the layers that have it
            exact = sum(float((of[weight] * parts[weight]).sum()) for weight in weights)
            scale = sum(float(of[weight].norm() * parts[weight].norm()) for weight in weights)
            assert abs(float(row @ vector) - exact) < 1e-5 * scale
    # all linear layers, and neither embeddings nor head
    assert len(features) == {"tied": 3, "untied": 3, "GPT-2": 4, "shared": 3}[name]


def test_of_samples_that_it_was_fitted_on_a_space_of_enough_numbers_loses_nothing(run, replay):
    space = open_space(run, replay, SpaceOptions(width=64, numbers=4096))
    table = usable_samples(run.unique_samples)
    fitted = table.filter(table["sample_id"].is_in(space.fitted.tolist()))
    assert len(fitted) >= space.numbers
    replay.model_at(STEPS)
    direction = torch.randn(1, replay.layout.size, generator=torch.Generator().manual_seed(2))
    vector = space.vectors(direction, replay)[0]
    with row_capture(space, replay) as capture:
        rows = torch.cat([captured_rows(replay, capture, batch) for batch in read_together(run, run.source, fitted)])
    whole = torch.cat(
        [replay.layout.views(direction[0])[f"{name}.weight"].flatten() for name in ("mix", "up", "down")]
    ).double()
    exact = (rows.double() @ whole).numpy()
    found = (rows @ space.compression).numpy() @ vector
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-3 * np.abs(exact).max())


def test_it_is_fitted_on_at_most_half_of_every_domain(run, replay):
    table = usable_samples(run.unique_samples)
    for wanted in (20, 10**6):
        fitted = open_space(run, replay, SpaceOptions(width=3, numbers=8, fit_samples=wanted)).fitted
        assert len(set(fitted.tolist())) == len(fitted)
        counts = table.filter(table["sample_id"].is_in(fitted.tolist()))["domain"].value_counts()
        for domain, count in counts.iter_rows():
            half = len(table.filter(domain=domain)) / 2
            assert count == min(-(-wanted // table["domain"].n_unique()), int(np.ceil(half)))


def test_it_is_fitted_once_to_the_same_bytes(run, replay, space, tmp_path, monkeypatch):
    options = replace(DEFAULT, width=5, numbers=40)
    Training(run.spec.streams).run(tmp_path / "run")
    again = Run(tmp_path / "run")
    made = open_space(again, Replay(again), options)
    assert (made.folder / "space.npz").read_bytes() == (space.folder / "space.npz").read_bytes()
    monkeypatch.setattr(spaces, "captured_rows", None)  # what is there is read
    assert open_space(again, Replay(again), options).compression.equal(made.compression)


@pytest.mark.parametrize("what", ["width", "numbers", "torch", "fitted_on", "layers"])
def test_another_space_is_refused_and_what_differs_is_named(run, tmp_path, monkeypatch, what):
    Training(run.spec.streams).run(tmp_path / "run")
    own = Run(tmp_path / "run")
    replay = Replay(own)
    with pytest.raises(UserError, match=rf"python -m curate.embed --run {own.folder}"):
        existing_space(own, replay)
    made = open_space(own, replay)
    assert existing_space(own, replay).fingerprint == made.fingerprint
    if what == "torch":
        monkeypatch.setattr(torch, "__version__", "0.1")
    elif what == "layers":
        replay.model.up.weight.requires_grad_(False)
    else:
        changed = {"fitted_on": {"fit_samples": 20}}.get(what, {what: 7})
        monkeypatch.setattr(spaces, "DEFAULT", replace(DEFAULT, **changed))
    with pytest.raises(UserError, match=rf"{what}.*python -m curate.embed --run {own.folder}") as caught:
        existing_space(own, replay)
    assert str(made.folder) in str(caught.value)


def test_a_damaged_space_is_told(run, tmp_path):
    Training(run.spec.streams).run(tmp_path / "run")
    own = Run(tmp_path / "run")
    made = open_space(own, Replay(own))
    path = made.folder / "space.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for read in (existing_space, open_space):
        with pytest.raises(UserError, match=r"space\.npz"):
            read(own, Replay(own))


def test_a_gradient_that_is_not_finite_names_its_sample(run, replay, samples, monkeypatch):
    projections = {
        name: LayerProjection(input=torch.eye(inputs), output=torch.eye(outputs))
        for name, (inputs, outputs) in GradientCapture(factory(), 1, 0).features.items()
    }
    space = RowSpace(
        folder=run.folder, fingerprint="", projections=projections, compression=torch.eye(320), fitted=np.zeros(0, int)
    )
    bad, losses = samples[2], replay.task.sample_losses

    def spoiled(batch):
        return losses(batch) * torch.where((batch.tokens == torch.from_numpy(bad.tokens)).all(1), torch.inf, 1.0)

    replay.model_at(STEPS)
    monkeypatch.setattr(replay.task, "sample_losses", spoiled)
    with row_capture(space, replay) as capture, pytest.raises(UserError, match=rf"\b{bad.sample_id}\b"):
        captured_rows(replay, capture, samples[:4])


def test_a_run_that_diverged_is_told(run, tmp_path):
    Training(run.spec.streams).run(tmp_path / "run")
    own = Run(tmp_path / "run")
    replay = Replay(own)
    original = replay.task.sample_losses
    replay.task.sample_losses = lambda batch: original(batch) * torch.inf
    with pytest.raises(UserError, match="finite"):
        open_space(own, replay)
    del replay.task.sample_losses
    assert open_space(own, replay).numbers > 0
