"""The published experiment: reruns against a plain loop, estimates against what they must be, the whole command."""

import json
import sys

import numpy as np
import pytest
import torch

from curate.core.errors import UserError
from curate.report.charts import fidelity_figure
from pipelines.published import estimates
from pipelines.published.__main__ import PublishedConfig, method_values, published, show
from pipelines.published.agreement import bootstrap_ranks, interval
from pipelines.published.training import Mlp, batch_order, load_digits, removal_effects, train


def run(*, images=24, batch=6, epochs=3, lr=0.3, activation="gelu", seed=0):
    data = load_digits(seed, images, 40)
    return train(Mlp((5,), activation), data, batch_order(seed, images, batch, epochs), lr, seed)


def plain_loss_without(trajectory, image, epochs):
    """The same training written as a loop with modules and autograd, one image's weight 0 in some epochs."""
    (inputs, width), (_, outputs) = trajectory.model.layers
    network = torch.nn.Sequential(
        torch.nn.Linear(inputs, width), torch.nn.ReLU(), torch.nn.Linear(width, outputs)
    ).double()
    torch.nn.utils.vector_to_parameters(trajectory.states[0].clone(), network.parameters())
    optimizer = torch.optim.SGD(network.parameters(), lr=trajectory.lr)
    data, entropy = trajectory.data, torch.nn.functional.cross_entropy
    for epoch, batches in enumerate(trajectory.order):
        for batch in batches:
            kept = [not (epoch in epochs and z == image) for z in batch]
            weights = torch.tensor(kept, dtype=torch.float64) / len(batch)
            optimizer.zero_grad()
            losses = entropy(network(data.images[batch]), data.labels[batch], reduction="none")
            (weights * losses).sum().backward()
            optimizer.step()
    with torch.no_grad():
        return entropy(network(data.held_out_images), data.held_out_labels).item()


@pytest.mark.parametrize("epochs", [[0], [2], [0, 1, 2]])
def test_reruns_at_once_equal_a_plain_loop(epochs):
    trajectory = run(activation="relu")
    removed = np.array([0, 7, 23])
    effects = removal_effects(trajectory, removed, epochs)
    whole = plain_loss_without(trajectory, image=-1, epochs=[])
    expected = [plain_loss_without(trajectory, image, epochs) - whole for image in removed]
    assert trajectory.target_loss(trajectory.states[-1]).item() == pytest.approx(whole, abs=1e-12)
    assert effects.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-13)


def test_every_trajectory_method_is_the_gradient_product_where_there_is_one_step():
    trajectory = run(images=6, epochs=1, lr=1e-3)
    gradients = estimates.sample_gradients(trajectory)
    target = trajectory.target_gradient(trajectory.states[-1])
    order = trajectory.batches[0]
    expected = np.empty(6)
    expected[order] = (trajectory.lr / 6 * gradients @ target).numpy()
    model = trajectory.model
    for blocks in ([slice(0, model.size)], model.blocks):
        assert estimates.dvemb(trajectory, gradients, blocks)[0] == pytest.approx(expected, rel=1e-4)
    wide = estimates.dvemb(trajectory, gradients, estimates.projected_blocks(model, 65), 65)  # nothing left out
    assert wide[0] == pytest.approx(expected, rel=1e-4)
    assert estimates.adjoint(trajectory)[0] == pytest.approx(expected, rel=1e-9)


def test_dvemb_multiplies_by_the_later_steps():
    trajectory = run(images=12, batch=6, epochs=2)
    gradients = estimates.sample_gradients(trajectory)
    lr, weight, model = trajectory.lr, trajectory.weight, trajectory.model
    cotangent = trajectory.target_gradient(trajectory.states[-1])
    expected = []
    for rows in reversed(gradients.split(6)):
        expected.append(lr * weight * rows @ cotangent)
        cotangent = cotangent - lr * weight * rows.T @ (rows @ cotangent)
    values = estimates.dvemb(trajectory, gradients, [slice(0, model.size)])
    used = np.take_along_axis(values, trajectory.order.reshape(2, -1), axis=1).ravel()
    assert used == pytest.approx(torch.cat(expected[::-1]).numpy(), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_adjoint_is_autograd_through_the_whole_training(activation):
    trajectory = run(activation=activation)
    model, data = trajectory.model, trajectory.data
    weights = torch.full(trajectory.batches.shape, trajectory.weight, dtype=torch.float64, requires_grad=True)
    theta = trajectory.states[0]
    for row, batch in zip(weights, trajectory.batches, strict=True):
        theta = theta - trajectory.lr * torch.func.grad(model.weighted)(
            theta, row, data.images[batch], data.labels[batch]
        )
    (slopes,) = torch.autograd.grad(trajectory.target_loss(theta), weights)
    expected = -trajectory.weight * slopes.reshape(3, -1).numpy()
    values = np.take_along_axis(estimates.adjoint(trajectory), trajectory.order.reshape(3, -1), axis=1)
    assert values == pytest.approx(expected, rel=1e-8, abs=1e-15)


def test_removal_from_every_epoch_is_nearly_the_sum_of_its_values_where_training_is_smooth():
    trajectory = run(lr=0.05)
    effects = removal_effects(trajectory, np.arange(24), [0, 1, 2])
    assert np.corrcoef(effects, estimates.adjoint(trajectory).sum(0))[0, 1] > 0.95


def test_tracin_takes_both_gradients_at_the_step():
    trajectory = run()
    gradients = estimates.sample_gradients(trajectory)
    step = 5  # epoch 1
    target = trajectory.target_gradient(trajectory.states[step])
    expected = trajectory.lr * trajectory.weight * gradients[step * 6 : step * 6 + 6] @ target
    values = estimates.tracin(trajectory, gradients)
    assert values[1, trajectory.batches[step]] == pytest.approx(expected.numpy(), rel=1e-9)


def test_influence_is_exact_for_a_quadratic():
    """`l_z = 1/2 theta A theta - b_z theta` with a target linear in theta; only `b_z` goes when z goes."""
    random = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=random, dtype=torch.float64)
    curvature, linear = root @ root.T + torch.eye(4), torch.randn(9, 4, generator=random, dtype=torch.float64)
    target = torch.randn(4, generator=random, dtype=torch.float64)
    minimum = torch.linalg.solve(curvature, linear.mean(0))
    without = torch.stack([torch.linalg.solve(curvature, (linear.sum(0) - row) / 9) for row in linear])
    effects = (without - minimum) @ target
    found = estimates.influence(-linear, curvature - 0.25 * torch.eye(4), target, 0.25)
    assert found.tolist() == pytest.approx(effects.tolist(), rel=1e-9)


def test_gauss_newton_is_the_hessian_where_the_network_is_linear():
    data = load_digits(0, 24, 10)
    trajectory = train(Mlp(()), data, batch_order(0, 24, 6, 1), 0.1, 0)
    hessian = torch.func.hessian(lambda theta: trajectory.model.losses(theta, data.images, data.labels).mean())
    assert torch.allclose(estimates.gauss_newton(trajectory), hessian(trajectory.states[-1]), atol=1e-12)


def test_methods_without_time_say_the_same_in_every_epoch():
    values = method_values(run(), 4, (0.1,))
    for name in ("influence function, damping 0.1", "gradient dot product"):
        assert (values[name] == values[name][0]).all()
    assert {found.shape for found in values.values()} == {(3, 24)}


def test_rank_agreement():
    effects = [0.1, 0.4, 0.2, 0.9, 0.5]
    found = bootstrap_ranks(effects, {"same": [1, 4, 2, 9, 5], "flat": [1] * 5, "noise": [3, 1, 2, 5, 4]}, 50, 0)
    assert found["same"] == pytest.approx(1.0)
    assert found["flat"] == pytest.approx(0.0)
    assert found["noise"][0] == pytest.approx(0.6)
    assert interval(found["noise"])["low"] < found["noise"][0] < interval(found["noise"])["high"]


SMALL = {
    "seeds": 2, "lrs": [0.1], "activations": ["gelu"], "hidden": [4], "train": 40, "held_out": 30, "batch_size": 10,
    "epochs": 3, "removed": 12, "width": 4, "resamples": 20,
}  # fmt: skip


def test_the_command(tmp_path):
    config = PublishedConfig(out=tmp_path / "out", **SMALL)
    result = published(config)
    assert len(result["rows"]) == 2 * 4 * 8  # seeds, removals, methods
    assert len(result["summary"]) == 4 * 8
    first = result["rows"][0]
    assert set(first) == {"method", "removal", "epoch", "activation", "lr", "seed", "n", "spearman", "low", "high"}
    assert json.loads((config.out / "published.json").read_text()) == json.loads(json.dumps(result))
    page = (config.out / "published.html").read_text()
    assert "gradient dot product" in page
    shown = []
    show(result, shown.append)
    assert "every epoch" in shown[0]
    drawn = json.loads(fidelity_figure(result["summary"]))
    assert [len(trace["y"]) for trace in drawn["data"]] == [8] * 4
    assert drawn["layout"]["yaxis"]["range"] == [-0.6, 7.6]  # no method falls outside
    again = published(config.model_copy(update={"out": tmp_path / "again"}))
    assert again["rows"] == result["rows"]


def test_an_interrupted_experiment_keeps_its_parts(tmp_path, monkeypatch):
    config = PublishedConfig(out=tmp_path, **SMALL)
    published(config)
    (tmp_path / "published.json").unlink()
    monkeypatch.setattr("pipelines.published.__main__.make_part", None)
    assert published(config)["runs"]
    with pytest.raises(UserError, match="epochs: 3 there, 4 now"):
        published(config.model_copy(update={"epochs": 4}))


def test_bad_settings(tmp_path, monkeypatch):
    config = PublishedConfig(out=tmp_path / "out", **SMALL)
    with pytest.raises(UserError, match="not a multiple of batch_size 9"):
        published(config.model_copy(update={"batch_size": 9, "out": tmp_path / "a"}))
    with pytest.raises(UserError, match="there are 1797 digits images"):
        published(config.model_copy(update={"train": 1790, "out": tmp_path / "b"}))
    with pytest.raises(UserError, match="removed 41 is more than"):
        published(config.model_copy(update={"removed": 41}))
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="pip install 'scikit-learn"):
        published(config.model_copy(update={"out": tmp_path / "c"}))
