"""The blocked recursion against explicitly multiplied matrices in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.embeddings.dvemb import recursion, recursion_block, step_blocks


def explicit(gradients, scales, steps):
    """e_z = s_z [prod_{j > k} (I - sum_z' s_z' g_z' g_z'^T)] g_z with the later steps on the left, multiplied out."""
    size = gradients.shape[1]
    rows = []
    for row, step in enumerate(steps):
        product = np.eye(size)
        for later in sorted({int(s) for s in steps if s > step}):
            members = [i for i, s in enumerate(steps) if s == later]
            hessian = sum(scales[i] * np.outer(gradients[i], gradients[i]) for i in members)
            product = (np.eye(size) - hessian) @ product
        rows.append(scales[row] * product @ gradients[row])
    return np.array(rows)


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    dimension=st.integers(1, 7),
    rows_per_block=st.integers(1, 12),
)
def test_recursion_equals_multiplied_matrices(seed, sizes, dimension, rows_per_block):
    random = np.random.default_rng(seed)
    steps = np.repeat(np.arange(3, 3 + len(sizes)), sizes)
    gradients = random.normal(size=(len(steps), dimension)).astype(np.float32)
    scales = random.uniform(0, 0.2, size=len(steps))
    out = np.zeros_like(gradients)
    recursion(
        gradients,
        scales[:, None],
        steps,
        out,
        blocks=[slice(0, dimension)],
        rows_per_block=rows_per_block,
        device="cpu",
    )
    np.testing.assert_allclose(out, explicit(gradients.astype(np.float64), scales, steps), rtol=2e-3, atol=2e-5)


def test_block_diagonal_is_the_recursion_of_each_layer_with_its_own_lr():
    random = np.random.default_rng(0)
    steps = np.repeat(np.arange(4), 3)
    gradients = random.normal(size=(12, 5)).astype(np.float32)
    scales = random.uniform(0, 0.2, size=(12, 2))
    blocks = [slice(0, 2), slice(2, 5)]
    out = np.zeros_like(gradients)
    recursion(gradients, scales, steps, out, blocks=blocks, rows_per_block=5, device="cpu")
    for index, columns in enumerate(blocks):
        wanted = explicit(gradients[:, columns].astype(np.float64), scales[:, index], steps)
        np.testing.assert_allclose(out[:, columns], wanted, rtol=1e-3, atol=1e-5)


def test_float64_block_is_exact():
    random = np.random.default_rng(1)
    steps = np.repeat(np.arange(5), 2)
    gradients, scales = random.normal(size=(10, 6)), random.uniform(0, 0.3, size=10)
    latest_first = [torch.from_numpy(array[::-1].copy()) for array in (gradients, scales, steps)]
    embeddings, operator = recursion_block(*latest_first, torch.zeros(6, 6, dtype=torch.float64))
    wanted = explicit(gradients, scales, steps)
    np.testing.assert_allclose(embeddings.flip(0).numpy(), wanted, rtol=1e-10)
    np.testing.assert_allclose(operator.numpy(), wanted.T @ gradients, rtol=1e-9, atol=1e-12)


def test_only_the_first_rows_are_kept_when_the_horizon_lies_behind_the_window():
    random = np.random.default_rng(2)
    steps = np.repeat(np.arange(6), 2)
    gradients = random.normal(size=(12, 3)).astype(np.float32)
    scales = np.full((12, 1), 0.1)
    whole, window = np.zeros((12, 3), np.float32), np.zeros((4, 3), np.float32)
    for out in (whole, window):
        recursion(gradients, scales, steps, out, blocks=[slice(0, 3)], rows_per_block=4, device="cpu")
    np.testing.assert_array_equal(window, whole[:4])


@pytest.mark.parametrize(
    ("rows", "wanted"), [(4, [(4, 7), (0, 4)]), (1, [(6, 7), (4, 6), (1, 4), (0, 1)]), (99, [(0, 7)])]
)
def test_blocks_are_whole_steps(rows, wanted):
    steps = np.array([0, 1, 1, 1, 2, 2, 3])
    assert [(block.start, block.stop) for block in step_blocks(steps, rows)] == wanted
