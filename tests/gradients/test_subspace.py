"""The leading directions of gradients against eigenvectors and singular vectors in float64."""

import numpy as np
import pytest
import torch

from curate.gradients.subspace import SideSketch, leading_rows

CPU = torch.device("cpu")


def vectors(features, count=400, decay=0.3, seed=0):
    """Vectors whose covariance has eigenvalues that fall by `decay`^2 each, along random directions."""
    random = np.random.default_rng(seed)
    axes = np.linalg.qr(random.standard_normal((features, features)))[0]
    spectrum = np.maximum(decay ** np.arange(features), 1e-3)
    return torch.from_numpy((random.standard_normal((count, features)) * spectrum) @ axes.T).float()


def eigenvectors(rows, width):
    """Of the sum of outer products, largest eigenvalue first."""
    rows = rows.double().numpy()
    return np.linalg.eigh(rows.T @ rows)[1][:, ::-1][:, :width]


def leading(rows, width, parts=3, seed=0, name="layer", side="input"):
    sketch = SideSketch(rows.shape[1], width, seed, name, side, CPU)
    for part in rows.split(-(-len(rows) // parts)):
        sketch.add(part)
    return sketch.leading()


def assert_orthonormal(found, atol=1e-5):
    assert found.dtype == torch.float32
    np.testing.assert_allclose((found.T @ found).numpy(), np.eye(found.shape[1]), atol=atol)


@pytest.mark.parametrize(("features", "width"), [(12, 4), (40, 4), (40, 7)])
def test_they_are_the_leading_eigenvectors(features, width):
    rows = vectors(features)
    found = leading(rows, width)
    assert found.shape == (features, width)
    assert_orthonormal(found)
    # one by one while eigenvalues are apart: the largest first
    overlap = np.abs(eigenvectors(rows, width).T @ found.double().numpy())
    np.testing.assert_allclose(np.diag(overlap)[:4], 1, atol=1e-3)


def test_a_sketch_as_wide_as_the_side_is_exact_whatever_the_spectrum():
    rows = vectors(12, decay=0.95)
    wanted = eigenvectors(rows, 4)
    np.testing.assert_allclose(np.abs(wanted.T @ leading(rows, 4).double().numpy()), np.eye(4), atol=1e-3)


def test_they_keep_nearly_as_much_as_any_directions_could():
    rows = vectors(60, decay=0.9)
    wanted, found = eigenvectors(rows, 5), leading(rows, 5).double().numpy()
    kept, most = (np.square(rows.double().numpy() @ axes).sum() for axes in (found, wanted))
    random = np.linalg.qr(np.random.default_rng(1).standard_normal((60, 5)))[0]
    assert kept > 0.97 * most
    assert kept > 2 * np.square(rows.double().numpy() @ random).sum()


def test_neither_parts_nor_shape_of_what_is_added_count():
    rows = vectors(40)
    whole = leading(rows, 4, parts=1)
    torch.testing.assert_close(leading(rows, 4, parts=7), whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(leading(rows.flip(0), 4), whole, rtol=0, atol=1e-4)
    sketch = SideSketch(40, 4, 0, "layer", "input", CPU)
    sketch.add(rows.view(20, 20, 40))
    torch.testing.assert_close(sketch.leading(), whole, rtol=0, atol=1e-4)
    assert leading(-rows, 4, parts=1).equal(whole)  # an eigenvector has no sign of its own
    assert leading(rows, 4, parts=1).equal(whole)


def test_a_side_that_fits_is_kept_as_it_is():
    for features in (3, 4):
        assert leading(vectors(features), 4).equal(torch.eye(features))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_fewer_directions_than_wanted_are_no_error(rank):
    rows = torch.zeros(50, 40)
    rows[:, :rank] = torch.randn(50, rank, generator=torch.manual_seed(0))
    found = leading(rows, 4)
    assert_orthonormal(found)
    np.testing.assert_allclose((rows @ found @ found.T).numpy(), rows.numpy(), atol=1e-4)


@pytest.mark.parametrize("features", [8, 16, 40, 200])
def test_vectors_that_leave_out_a_direction_are_no_error(features):
    """Gradients below a layer norm sum to zero."""
    for seed in range(5):
        rows = vectors(features, 100, decay=0.95, seed=seed)
        rows = rows - rows.mean(1, keepdim=True)
        found = leading(rows, 5)
        assert_orthonormal(found)
        assert found.sum(0).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_vectors_does_not_count(scale):
    rows = vectors(40)
    torch.testing.assert_close(leading(rows * scale, 4), leading(rows, 4), rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("features", [12, 40])
def test_what_is_not_finite_is_refused(bad, features):
    rows = vectors(features)
    rows[3, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        leading(rows, 4)


@pytest.mark.parametrize(("count", "size", "numbers"), [(30, 100, 8), (100, 30, 8), (20, 50, 64)])
def test_rows_are_cut_to_their_leading_singular_vectors(count, size, numbers):
    rows = vectors(size, count, decay=0.9)
    found = leading_rows(rows, numbers)
    kept = min(numbers, count, size)
    assert found.shape == (size, kept)
    assert_orthonormal(found)
    wanted = np.linalg.svd(rows.double().numpy(), full_matrices=False)[2][:kept].T
    np.testing.assert_allclose(np.abs(np.diag(wanted.T @ found.double().numpy())), 1, atol=1e-3)
    # what is left out is what the best approximation of that rank leaves out
    left = rows.double().numpy() - rows.double().numpy() @ found.double().numpy() @ found.double().numpy().T
    best = np.square(np.linalg.svd(rows.double().numpy())[1][kept:]).sum()
    np.testing.assert_allclose(np.square(left).sum(), best, rtol=1e-3, atol=1e-6)
    assert leading_rows(-rows, numbers).equal(found)


def test_directions_that_are_rounding_are_left_out():
    rows = vectors(30, 40)
    low = rows[:, :3] @ rows[:3]
    assert leading_rows(low, 16).shape == (30, 3)
