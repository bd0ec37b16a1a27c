"""Targets in terms of anchors: against dense least squares in float64, and what must not change the answer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.embeddings.basis import FILE, AnchorBasis, choose_metric, load_basis, save_basis, solve

ROUNDING = 2**-8  # of bfloat16, relative
METRICS = st.sampled_from(["euclidean", "optimizer"])


def make(gradients, diagonal=None):
    names = [f"a/{i}" for i in range(len(gradients))]
    diagonal = None if diagonal is None else torch.as_tensor(diagonal)
    return AnchorBasis(names=names, gradients=torch.as_tensor(gradients), diagonal=diagonal)


def draw(seed, r, p):
    """Anchors of very different length, targets, and a diagonal over many orders of magnitude with zeros, float64."""
    random = np.random.default_rng(seed)
    anchors = random.normal(size=(r, p)) * 10 ** random.uniform(-2, 2, (r, 1))
    diagonal = 10 ** random.uniform(-2, 2, p) * (random.uniform(size=p) > 0.1)
    return anchors, random.normal(size=(3, p)), diagonal


def dense(anchors, targets, weights, ridge):
    """Coordinates and relative residuals by least squares on the stacked system."""
    root = np.sqrt(weights)
    a, g = anchors * root, targets * root
    penalty = np.sqrt(ridge) * np.diag(np.linalg.norm(a, axis=1))
    right = np.vstack([g.T, np.zeros((len(a), len(g)))])
    t = np.linalg.lstsq(np.vstack([a.T, penalty]), right, rcond=None)[0].T
    return t, np.linalg.norm(t @ a - g, axis=1) / np.linalg.norm(g, axis=1)


@given(seed=st.integers(0, 1000), r=st.integers(1, 8), p=st.integers(20, 60), metric=METRICS, ridge=st.floats(1e-6, 10))
def test_coordinates_and_residuals_are_those_of_dense_least_squares(seed, r, p, metric, ridge):
    anchors, targets, diagonal = draw(seed, r, p)
    found = solve(make(anchors, diagonal), torch.from_numpy(targets), metric, ridge)
    wanted = dense(anchors, targets, diagonal if metric == "optimizer" else np.ones(p), ridge)
    size = np.abs(wanted[0]).max()
    np.testing.assert_allclose(found.coordinates, wanted[0], rtol=1e-5, atol=1e-6 * size)
    np.testing.assert_allclose(found.residuals, wanted[1], rtol=1e-6, atol=1e-7)
    assert found.coordinates.dtype == np.float32


@given(seed=st.integers(0, 1000), r=st.integers(1, 8), metric=METRICS)
def test_a_target_in_the_span_of_the_anchors_is_found_exactly(seed, r, metric):
    anchors, _, diagonal = draw(seed, r, 40)
    anchors /= np.linalg.norm(anchors, axis=1, keepdims=True)
    mixture = np.random.default_rng(seed).normal(size=(2, r))
    found = solve(make(anchors, diagonal), torch.from_numpy(mixture @ anchors), metric, 0.0)
    np.testing.assert_allclose(found.coordinates, mixture, rtol=1e-4, atol=1e-5)
    assert (found.residuals < 1e-6).all()


@given(seed=st.integers(0, 1000), metric=METRICS, chunk=st.integers(1, 60))
def test_the_chunk_size_changes_nothing(seed, metric, chunk):
    anchors, targets, diagonal = draw(seed, 4, 50)
    arguments = make(anchors, diagonal), torch.from_numpy(targets), metric, 1e-2
    one, other = solve(*arguments), solve(*arguments, chunk=chunk)
    np.testing.assert_allclose(one.coordinates, other.coordinates, rtol=1e-5)
    np.testing.assert_allclose(one.residuals, other.residuals, rtol=1e-9)


@given(
    seed=st.integers(0, 1000),
    metric=METRICS,
    ridge=st.sampled_from([1e-4, 0.1, 1.0]),
    exponents=st.lists(st.floats(-3, 3), min_size=4, max_size=4),
    order=st.permutations(range(4)),
)
def test_order_and_scale_of_the_anchors_change_no_predicted_value(seed, metric, ridge, exponents, order):
    anchors, targets, diagonal = draw(seed, 4, 50)
    embeddings = np.random.default_rng(seed + 1).normal(size=(20, 50)) @ anchors.T
    scale = 10 ** np.array(exponents)
    one = solve(make(anchors, diagonal), torch.from_numpy(targets), metric, ridge)
    changed = make((scale[:, None] * anchors)[order], 7 * diagonal)
    other = solve(changed, torch.from_numpy(targets), metric, ridge)
    wanted = embeddings @ one.coordinates.T
    found = (embeddings * scale)[:, order] @ other.coordinates.T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    np.testing.assert_allclose(one.residuals, other.residuals, rtol=1e-6)


@pytest.mark.parametrize("metric", ["euclidean", "optimizer"])
def test_after_storage_an_anchor_is_its_own_unit_vector_up_to_rounding(tmp_path, metric):
    anchors, _, diagonal = draw(0, 6, 500)
    gradients = torch.from_numpy(anchors).float()
    save_basis(tmp_path, make(gradients, diagonal))
    found = solve(load_basis(tmp_path), gradients, metric, 1e-8)
    norms = np.linalg.norm(anchors, axis=1)
    np.testing.assert_allclose(found.coordinates * norms / norms[:, None], np.eye(6), atol=2 * ROUNDING)
    assert (found.residuals < ROUNDING).all()


@pytest.mark.parametrize("diagonal", [None, [0.0, 1e8, 3.0]])
def test_what_is_stored_is_read_back_in_bfloat16(tmp_path, diagonal):
    basis = make([[1.0, 1 / 3, -2e-12], [0.0, 5.0, 1e30]], diagonal)
    save_basis(tmp_path, basis)
    found = load_basis(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert found.names == basis.names
    assert torch.equal(found.gradients, basis.gradients.bfloat16())
    assert found.metrics == (("euclidean",) if diagonal is None else ("euclidean", "optimizer"))
    assert diagonal is None or torch.equal(found.diagonal, torch.tensor(diagonal).bfloat16())


def test_equal_anchors_share_and_anchors_or_targets_without_gradient_get_nothing():
    basis = make([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    for ridge in (0.0, 1e-9):
        found = solve(basis, torch.tensor([[2.0, 0, 0], [0, 0, 0], [0, 1, 0], [3, 4, 0]]), "euclidean", ridge)
        np.testing.assert_allclose(found.coordinates[:, :2], [[1, 1], [0, 0], [0, 0], [1.5, 1.5]], atol=1e-6)
        np.testing.assert_array_equal(found.coordinates[:, 2], 0)
        np.testing.assert_allclose(found.residuals, [0, 0, 1, 0.8], atol=1e-6)


def in_the_optimizers_metric(seed=0, r=10, p=300, rows=200):
    """Parameters with a large second moment (small D) have large gradients that differ between anchors and move little.

    All anchors share 3 directions on the other parameters, and these alone carry the values.
    """
    random = np.random.default_rng(seed)
    diagonal = np.where(np.arange(p) < 60, 1.0, 1e-4)
    shared = random.normal(size=(r, 3)) @ random.normal(size=(3, p))
    anchors = np.where(diagonal == 1, shared, 20 * random.normal(size=(r, p)))
    moved = diagonal * random.normal(size=(rows, p))
    return make(anchors, diagonal), (moved @ anchors.T).astype(np.float32)


def test_the_metric_that_predicts_held_out_anchors_is_chosen():
    basis, embeddings = in_the_optimizers_metric()
    choice = choose_metric(basis, embeddings)
    assert choice.metric == "optimizer"
    assert choice.scores["optimizer"] > 0.99
    assert choice.scores["euclidean"] < 0.8
    assert set(choose_metric(make(basis.gradients), embeddings).scores) == {"euclidean"}


def test_the_score_is_the_mean_rank_correlation_of_held_out_anchors():
    from scipy.stats import spearmanr

    basis, embeddings = in_the_optimizers_metric(seed=1, r=5)
    choice = choose_metric(basis, embeddings, ridges=[0.03])
    scores = []
    for i in range(5):
        others = [j for j in range(5) if j != i]
        rest = make(basis.gradients[others], basis.diagonal)
        t = solve(rest, basis.gradients[[i]], "euclidean", 0.03).coordinates[0]
        scores.append(spearmanr(embeddings[:, others] @ t, embeddings[:, i]).statistic)
    assert choice.scores["euclidean"] == pytest.approx(np.mean(scores), abs=1e-6)
    assert choice.ridge == 0.03


@pytest.mark.parametrize(("noise", "ridge"), [(0.0, 1e-6), (3.0, 0.1)])
def test_values_that_gradients_explain_in_part_get_a_larger_ridge(noise, ridge):
    """As many anchors as parameters: solving each exactly takes large coordinates, which amplify noise."""
    random = np.random.default_rng(0)
    anchors = random.normal(size=(13, 12))
    embeddings = random.normal(size=(500, 12)) @ anchors.T + noise * random.normal(size=(500, 13))
    choice = choose_metric(make(anchors), embeddings.astype(np.float32), ridges=(0.1, 1e-6))
    assert choice.ridge == ridge


def test_values_that_do_not_vary_score_zero():
    basis = make(np.eye(3))
    choice = choose_metric(basis, np.ones((5, 3), np.float32))
    assert (choice.metric, choice.ridge, choice.scores) == ("euclidean", 0.1, {"euclidean": 0.0})


def test_what_cannot_be_solved_is_refused(tmp_path):
    basis = make([[1.0, 2.0], [np.nan, 1.0]])
    targets = torch.ones(1, 2)
    with pytest.raises(UserError, match="gradient of anchor a/1 is not finite"):
        solve(basis, targets, "euclidean", 0.1)
    with pytest.raises(UserError, match="gradient of target 0 is not finite"):
        solve(make([[1.0, 2.0]]), targets * torch.inf, "euclidean", 0.1)
    with pytest.raises(UserError, match="has no diagonal metric"):
        solve(basis, targets, "optimizer", 0.1)
    with pytest.raises(UserError, match="a/0 is the only anchor"):
        choose_metric(make([[1.0, 2.0]]), np.ones((4, 1), np.float32))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{FILE} is missing"):
        load_basis(tmp_path)
    save_basis(tmp_path, make(np.eye(3)))
    stored = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(stored[:-4])
    with pytest.raises(UserError, match=f"{FILE} is corrupted"):
        load_basis(tmp_path)
