"""Captured gradients against a plain loop over samples, in float64."""

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from transformers.pytorch_utils import Conv1D

from curate.core.errors import UserError
from curate.gradients.capture import GradientCapture
from curate.gradients.projection import projection
from curate.training.task import Batch, Task
from tests.tiny import TASK


def batch(count: int = 5, length: int = 7) -> Batch:
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(count, generator=random, dtype=torch.float64)
    mask = torch.rand(count, length, generator=random) > 0.3
    return Batch(tokens=torch.randint(0, 100, (count, length), generator=random), loss_mask=mask, weights=weights)


def one_by_one(task: Task, samples: Batch, names: list[str]) -> list[dict[str, torch.Tensor]]:
    parameters = dict(task.model.named_parameters())
    rows = []
    for sample in samples.split(1):
        gradients = torch.autograd.grad(
            task.sample_losses(sample).sum(), [parameters[f"{name}.weight"] for name in names]
        )
        rows.append(dict(zip(names, gradients, strict=True)))
    return rows


def captured(task: Task, samples: Batch, width: int) -> tuple[torch.Tensor, GradientCapture]:
    with GradientCapture(task.model, width, seed=3) as capture:
        (task.sample_losses(samples) * samples.weights).sum().backward()
        return capture.take(samples.weights), capture


@pytest.mark.parametrize("width", [64, 3])
def test_rows_are_the_projected_gradients_of_single_samples(width):
    task, samples = Task(TASK, dtype=torch.float64), batch()
    rows, capture = captured(task, samples, width)
    assert capture.layers == ["mix", "up", "down"]
    for z, gradients in enumerate(one_by_one(task, samples, capture.layers)):
        for name, gradient in gradients.items():
            left = projection(gradient.shape[0], width, 3, name, "output").double()
            right = projection(gradient.shape[1], width, 3, name, "input").double()
            wanted = (left.T @ gradient @ right).flatten()
            torch.testing.assert_close(rows[z, capture.blocks[name]].double(), wanted, rtol=1e-5, atol=1e-7)


def test_rows_do_not_depend_on_the_batch_split():
    task, samples = Task(TASK, dtype=torch.float64), batch()
    whole, _ = captured(task, samples, 4)
    parts = torch.cat([captured(task, part, 4)[0] for part in samples.split(2)])
    torch.testing.assert_close(whole, parts)


def test_a_sample_of_weight_zero_has_gradient_zero_and_changes_no_other():
    task, samples = Task(TASK, dtype=torch.float64), batch()
    whole, _ = captured(task, samples, 4)
    samples.weights[2] = 0
    rows, _ = captured(task, samples, 4)
    assert (rows[2] == 0).all()
    torch.testing.assert_close(rows[[0, 1, 3, 4]], whole[[0, 1, 3, 4]])


class Reused(nn.Module):
    """A Conv1D, and a Linear that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = Conv1D(6, 4), nn.Linear(6, 6)

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.linear(torch.tanh(self.conv(value))))).square().sum((1, 2))


def test_conv1d_and_a_module_called_twice():
    torch.manual_seed(0)
    model, values, weights = Reused(), torch.randn(3, 5, 4), torch.tensor([0.2, 0.5, 0.3])
    with GradientCapture(model, 16, seed=0) as capture:
        (model(values) * weights).sum().backward()
        rows = capture.take(weights)
    for z in range(3):
        conv, linear = torch.autograd.grad(model(values[z : z + 1]).sum(), [model.conv.weight, model.linear.weight])
        torch.testing.assert_close(rows[z, capture.blocks["conv"]], conv.T.flatten(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(rows[z, capture.blocks["linear"]], linear.flatten(), rtol=1e-4, atol=1e-4)


class Checkpointed(nn.Module):
    """Two blocks; activations are recomputed in the backward pass where asked."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6), nn.ReLU(inplace=True)) for _ in range(2)
        )
        self.reentrant = reentrant

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for block in self.blocks:
            if self.reentrant is None:
                hidden = hidden + block(hidden)
            else:
                hidden = hidden + torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=self.reentrant)
        return hidden.square().mean((1, 2))


def captured_rows(reentrant, keep, frozen=False):
    torch.manual_seed(0)
    model, tokens, weights = Checkpointed(reentrant), torch.randint(0, 20, (4, 5)), torch.rand(4)
    with GradientCapture(model, 3, seed=0, keep=keep, frozen=frozen) as capture:
        (model(tokens) * weights).sum().backward()
        return capture.take(weights), model


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_captures_the_same_and_leaves_gradients_as_they_are(reentrant, keep):
    rows, model = captured_rows(reentrant, keep)
    wanted, plain = captured_rows(None, keep)
    assert torch.equal(rows, wanted)
    assert wanted.abs().max() > 0
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("keep", [False, True])
def test_a_frozen_model_gives_the_same_rows_and_no_parameter_a_gradient(keep):
    rows, model = captured_rows(None, keep, frozen=True)
    wanted, _ = captured_rows(None, keep)
    assert torch.equal(rows, wanted)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_shard_of_a_weight_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(model[0].weight.detach()[:2])
    with pytest.raises(UserError, match=r"shape \(2, 4\) is a shard"):
        GradientCapture(model, 4, seed=0)


def test_hooks_are_gone_after_an_error():
    task = Task(TASK)
    with pytest.raises(RuntimeError, match="boom"), GradientCapture(task.model, 4, seed=0):
        raise RuntimeError("boom")
    assert not any(module._forward_hooks for module in task.model.modules())


def test_a_model_with_nothing_to_capture_is_refused():
    with pytest.raises(UserError, match="nothing to capture"):
        GradientCapture(Task(TASK).model, 4, seed=0, exclude=("*",))


def test_projection_has_orthogonal_columns_and_keeps_inner_products_on_average():
    one, other = torch.randn(40, generator=torch.Generator().manual_seed(1)), torch.ones(40)
    found = []
    for seed in range(400):
        matrix = projection(40, 8, seed, "layer", "input")
        torch.testing.assert_close(matrix.T @ matrix, torch.eye(8) * 5, rtol=1e-5, atol=1e-5)
        found.append(float((one @ matrix) @ (other @ matrix)))
    mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / 20
    assert abs(float(mean - one @ other)) < 4 * float(error)


def test_each_layer_and_side_has_its_own_projection():
    matrices = [projection(20, 4, 0, layer, side) for layer in ("a", "b") for side in ("input", "output")]
    for i in range(4):
        for j in range(i):
            assert not torch.allclose(matrices[i], matrices[j])
