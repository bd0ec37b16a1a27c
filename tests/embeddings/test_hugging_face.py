"""Hugging Face models as they come: curvature products and captures against a plain loop over samples."""

import json

import pytest
import torch

from curate.embeddings.products import check_curvature, exact_products
from curate.gradients.capture import GradientCapture
from curate.training.layout import FlatLayout
from curate.training.task import Batch, ModelSpec, Task, TaskSpec

MODELS = {
    "llama": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 50, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 16, "tie_word_embeddings": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 2,
        "n_head": 4, "n_positions": 16, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
}  # fmt: skip


@pytest.fixture(params=MODELS)
def task(request, tmp_path):
    torch.manual_seed(0)
    (tmp_path / "config.json").write_text(json.dumps(MODELS[request.param]))
    return Task(TaskSpec(model=ModelSpec(hf_config=tmp_path / "config.json")))


@pytest.fixture
def batch():
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (3, 10), generator=random)
    return Batch(tokens=tokens, loss_mask=torch.ones(3, 10, dtype=torch.bool), weights=torch.tensor([0.2, 0.5, 0.3]))


def gradients(task, batch):
    """Gradient of each sample's loss by name, one at a time."""
    names = [name for name, _ in task.model.named_parameters()]
    rows = []
    for sample in batch.split(1):
        parts = torch.autograd.grad(task.sample_losses(sample).sum(), list(task.model.parameters()))
        rows.append(dict(zip(names, parts, strict=True)))
    return rows


def test_products_are_those_of_a_plain_loop(task, batch):
    names = [name for name, _ in task.model.named_parameters()]
    layout = FlatLayout(task.model, [names])
    flat = layout.flatten(dict(task.model.named_parameters())).detach()
    check_curvature(task, layout, batch)
    directions = torch.randn(2, layout.size, generator=torch.Generator().manual_seed(2))
    products, curvature = exact_products(task, layout, batch, flat, directions)
    for z, gradient in enumerate(gradients(task, batch)):
        torch.testing.assert_close(products[:, z], directions @ layout.flatten(gradient), rtol=1e-3, atol=1e-4)

    def batch_gradient(shift):
        values = layout.views(flat + shift)
        loss = lambda parameters: (task.sample_losses(batch, parameters) * batch.weights).sum()  # noqa: E731
        return layout.flatten(torch.func.grad(loss)(values))

    for r in range(2):
        difference = (batch_gradient(1e-3 * directions[r]) - batch_gradient(-1e-3 * directions[r])) / 2e-3
        assert torch.nn.functional.cosine_similarity(curvature[r], difference, dim=0) > 0.999


def test_captured_gradients_are_those_of_a_plain_loop(task, batch):
    with GradientCapture(task.model, 1000, seed=0) as capture:
        (task.sample_losses(batch) * batch.weights).sum().backward()
        rows = capture.take(batch.weights)
    assert not any("lm_head" in layer for layer in capture.layers)
    for z, gradient in enumerate(gradients(task, batch)):
        for layer, block in capture.blocks.items():
            wanted = gradient[f"{layer}.weight"]
            wanted = wanted.T if "Conv1D" in type(task.model.get_submodule(layer)).__name__ else wanted
            torch.testing.assert_close(rows[z, block], wanted.flatten(), rtol=1e-3, atol=1e-5)
