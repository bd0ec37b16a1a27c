"""`dvemb-adam`: the blocked recursion against multiplied matrices, captured `D g` against autograd, the shortcut."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.embeddings import dvemb, dvemb_adam_estimator
from curate.embeddings.dvemb_adam import denominator, recursion, recursion_block, separable_inverse
from curate.embeddings.dvemb_adam_estimator import DvembAdamConfig, DvembAdamEstimator, check_adam, preconditioners
from curate.embeddings.store import embed_window, plan_job
from curate.optimizers.settings import GroupSettings
from curate.training.replay import Replay
from curate.training.run import Run
from curate.training.target import load_target
from tests.tiny import Training, record_tiny_run


class Problem:
    """Random gradients, and a diagonal D and a weight decay of each step."""

    def __init__(self, seed, sizes, dimension):
        random = np.random.default_rng(seed)
        self.steps = np.repeat(np.arange(3, 3 + len(sizes)), sizes)
        self.gradients = random.normal(size=(len(self.steps), dimension))
        self.scales = random.uniform(0, 0.15, size=len(self.steps))
        self.diagonals = dict(zip(np.unique(self.steps), random.uniform(0.3, 2, (len(sizes), dimension)), strict=True))
        self.rates = dict(zip(np.unique(self.steps), random.uniform(0, 0.4, len(sizes)), strict=True))
        self.preconditioned = self.gradients * np.array([self.diagonals[step] for step in self.steps])
        self.decays = np.array([self.rates[step] for step in self.steps])

    def explicit(self):
        """e_z = s_z prod_{j > k} [(1 - lr wd) I - D_j sum_z' s_z' g_z' g_z'^T] D_k g_z, later steps on the left."""
        identity, rows = np.eye(self.gradients.shape[1]), []
        for row, step in enumerate(self.steps):
            embedding = self.scales[row] * self.diagonals[step] * self.gradients[row]
            for later in np.unique(self.steps[self.steps > step]):
                members = self.gradients[self.steps == later]
                hessian = members.T @ np.diag(self.scales[self.steps == later]) @ members
                embedding = ((1 - self.rates[later]) * identity - np.diag(self.diagonals[later]) @ hessian) @ embedding
            rows.append(embedding)
        return np.array(rows)

    def solve(self, rows_per_block):
        """`recursion` in float32."""
        gradients, preconditioned = (array.astype(np.float32) for array in (self.gradients, self.preconditioned))
        out = np.zeros_like(gradients)
        recursion(
            gradients,
            preconditioned,
            self.scales[:, None],
            self.decays[:, None],
            self.steps,
            out,
            blocks=[slice(0, gradients.shape[1])],
            rows_per_block=rows_per_block,
            device="cpu",
        )
        return out


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    dimension=st.integers(1, 7),
    rows_per_block=st.integers(1, 12),
)
def test_recursion_equals_multiplied_matrices_whatever_the_block(seed, sizes, dimension, rows_per_block):
    problem = Problem(seed, sizes, dimension)
    np.testing.assert_allclose(problem.solve(rows_per_block), problem.explicit(), rtol=2e-3, atol=5e-5)


def test_float64_blocks_are_exact():
    problem = Problem(1, [2, 3, 1, 4, 2], 6)
    arrays = (problem.gradients, problem.preconditioned, problem.scales, problem.decays, problem.steps)
    latest_first = [torch.from_numpy(array[::-1].copy()) for array in arrays]
    operator = torch.zeros(6, 6, dtype=torch.float64)
    found = []
    for rows in (slice(0, 6), slice(6, 12)):
        embeddings, operator = recursion_block(*(array[rows] for array in latest_first), operator)
        found.append(embeddings)
    np.testing.assert_allclose(torch.cat(found).flip(0).numpy(), problem.explicit(), rtol=1e-10)
    product = np.eye(6)
    for step in np.unique(problem.steps):
        members = problem.gradients[problem.steps == step]
        hessian = members.T @ np.diag(problem.scales[problem.steps == step]) @ members
        product = ((1 - problem.rates[step]) * np.eye(6) - np.diag(problem.diagonals[step]) @ hessian) @ product
    np.testing.assert_allclose(np.eye(6) - operator.numpy(), product, rtol=1e-9, atol=1e-12)


def test_without_scale_and_decay_it_is_the_recursion_of_sgd():
    problem = Problem(2, [3, 3, 2], 5)
    latest_first = [torch.from_numpy(a[::-1].copy()) for a in (problem.gradients, problem.scales, problem.steps)]
    gradients, scales, steps = latest_first
    operator = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = recursion_block(gradients, gradients, scales, torch.zeros_like(scales), steps, operator)
    torch.testing.assert_close(found, dvemb.recursion_block(gradients, scales, steps, operator))


def test_the_frozen_scale_on_both_sides_is_the_same_recursion_in_other_coordinates():
    """With one D for all steps <D^1/2 e', g_q> of the symmetric form is <e, g_q>: both sides get the root."""
    problem = Problem(3, [2, 2, 3], 5)
    root = np.sqrt(next(iter(problem.diagonals.values())))
    problem.diagonals = dict.fromkeys(problem.diagonals, root**2)
    wanted = problem.explicit()
    arrays = (problem.gradients * root, problem.scales, problem.decays, problem.steps)
    rows, scales, decays, steps = (torch.from_numpy(array[::-1].copy()) for array in arrays)
    found, _ = recursion_block(rows, rows, scales, decays, steps, torch.zeros(5, 5, dtype=torch.float64))
    np.testing.assert_allclose(found.flip(0).numpy() * root, wanted, rtol=1e-10)


def test_separable_inverse_is_exact_where_the_second_moment_has_rank_one():
    random = torch.Generator().manual_seed(0)
    rows, columns = (torch.rand(count, generator=random, dtype=torch.float64) + 0.01 for count in (7, 5))
    settings = GroupSettings(optimizer="AdamW", lr=0.1, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=0.0)
    moment = torch.outer(rows, columns)
    exact = 1 / (moment / (1 - 0.95**3)).sqrt()
    torch.testing.assert_close(torch.outer(*separable_inverse(moment, 3, settings)), exact)


@given(seed=st.integers(0, 1000), exponent=st.integers(-20, 0), updates=st.integers(1, 50))
def test_separable_inverse_averages_the_squares_of_the_denominator(seed, exponent, updates):
    moment = torch.rand(6, 4, generator=torch.Generator().manual_seed(seed)) ** 4 * 10.0**exponent
    settings = GroupSettings(optimizer="AdamW", lr=0.1, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8)
    wanted = averaged(denominator(moment.double(), updates, settings))
    found = torch.outer(*separable_inverse(moment, updates, settings))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)


def averaged(denominators):
    """The inverse of the matrix of rank one whose squares have the row and column means of the given one's."""
    squares = denominators.square()
    return squares.mean().sqrt() / torch.outer(squares.mean(1), squares.mean(0)).sqrt()


def test_separable_inverse_of_a_weight_never_touched_is_finite():
    settings = GroupSettings(optimizer="AdamW", lr=0.1, weight_decay=0.0, beta1=0.9, beta2=0.95, eps=1e-8)
    found = torch.outer(*separable_inverse(torch.zeros(3, 4), 1, settings))
    torch.testing.assert_close(found, torch.full((3, 4), 1e8))


@pytest.fixture
def run(folder, tmp_path):
    """A run of its own for tests that write below it."""
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    return Run(tmp_path / "run")


def job_of(run, folder, window="late", window_steps=None):
    target = load_target(folder / "target.jsonl", run.spec, min_tokens=100)
    return plan_job(Replay(run), window, "window_end", target, batch_size=8, window_steps=window_steps)


def values(job, **settings):
    embedding = embed_window(job, "late", "window_end", DvembAdamEstimator(DvembAdamConfig(**settings)))
    return embedding.vectors @ embedding.targets.T @ np.array(job.target.half_weights)


def recorder():
    """`separable_inverse`, and a list of the denominators of the moments that it is given."""
    seen = []

    def recording(*given):
        seen.append(denominator(*given))
        return separable_inverse(*given)

    return seen, recording


def test_captured_rows_are_the_gradients_of_single_samples_times_the_scale_after_the_update(folder, run, monkeypatch):
    """Width above every side, so nothing is projected; D against the moments that the optimizer really has afterwards.

    The window's last two of four steps: replay passes over the first two without keeping anything of them.
    """
    job = job_of(run, folder, window_steps=2)
    estimator = DvembAdamEstimator(DvembAdamConfig(width=64))
    capture = estimator._capture(job)
    seen, recording = recorder()
    monkeypatch.setattr(dvemb_adam_estimator, "separable_inverse", recording)
    expected, denominators, optimizer = [], [], None
    with capture:
        for replayed in job.replay.steps(job.start, job.horizon, capture.take_factors):
            if optimizer is not None:
                denominators.append(_denominators(capture, optimizer, replayed.record.groups[0], replayed.record.step))
            rows = estimator._rows(job, capture, replayed)
            expected.append((_one_by_one(job, capture, replayed), rows, list(seen)))
            seen.clear()
            optimizer, last = replayed.optimizers[0], replayed.record
    denominators.append(_denominators(capture, optimizer, last.groups[0], last.step + 1))
    assert [len(rows[1]) for _, rows, _ in expected] == [6, 6]
    for (single, (plain, scaled), used), real in zip(expected, denominators, strict=True):
        for layer, inverse, true in zip(capture.layers, used, real, strict=True):
            torch.testing.assert_close(inverse, true, rtol=1e-4, atol=1e-10)
            columns = capture.blocks[layer]
            torch.testing.assert_close(plain[:, columns], single[layer].flatten(1), rtol=1e-4, atol=1e-6)
            wanted = single[layer] * averaged(true)
            torch.testing.assert_close(scaled[:, columns], wanted.flatten(1), rtol=1e-3, atol=1e-3)


def _denominators(capture, optimizer, settings, updates):
    states = [optimizer.state[capture.weight(layer)] for layer in capture.layers]
    assert all(int(state["step"]) == updates for state in states)
    return [(state["exp_avg_sq"] / (1 - settings.beta2**updates)).sqrt() + settings.eps for state in states]


def _one_by_one(job, capture, replayed):
    rows = {layer: [] for layer in capture.layers}
    for batch in replayed.batches:
        for sample in batch.split(1):
            loss = job.replay.task.sample_losses(sample).sum()
            weights = [capture.weight(layer) for layer in capture.layers]
            for layer, gradient in zip(capture.layers, torch.autograd.grad(loss, weights), strict=True):
                rows[layer].append(gradient)
    capture.take_factors(replayed.batches[-1].weights)  # what the hooks caught of this
    return {layer: torch.stack(found) for layer, found in rows.items()}


def test_rows_per_block_and_micro_batches_change_nothing(folder, run, monkeypatch):
    wanted = values(job_of(run, folder), width=4)
    job = job_of(run, folder)
    whole = job.replay.batches
    monkeypatch.setattr(
        job.replay, "batches", lambda record: [one for batch in whole(record) for one in batch.split(2)]
    )
    for path in (run.folder / "embeddings").rglob("*"):
        if path.is_file():
            path.unlink()
    np.testing.assert_allclose(values(job, width=4, rows_per_block=7), wanted, rtol=2e-3, atol=1e-7)


@pytest.mark.slow
def test_the_shortcut_and_the_separable_scale_lose_little_against_the_exact_scale(folder, run, monkeypatch):
    """Late window of the tiny run, nothing projected; `pytest -s` prints the losses."""
    losses = {}
    separable = values(job_of(run, folder), width=64)
    shortcut = values(job_of(run, folder), width=64, shortcut=True)

    def exact_rows(self, job, capture, replayed):
        seen, recording = recorder()
        monkeypatch.setattr(dvemb_adam_estimator, "separable_inverse", recording)
        preconditioners(job, capture, replayed.record, replayed.optimizers, updated=False)
        plain = torch.cat([capture.rows(captured) for captured in replayed.captured])
        return [plain, plain / torch.cat([inverse.flatten() for inverse in seen])]

    monkeypatch.setattr(DvembAdamEstimator, "_rows", exact_rows)
    wanted = values(job_of(run, folder), width=64, seed=1)  # another folder, the same rows
    for name, found in {"separable": separable, "shortcut": shortcut}.items():
        losses[name] = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        ranks = [np.argsort(np.argsort(array)) for array in (found, wanted)]
        print(f"{name}: relative error {losses[name]:.3f}, Spearman {np.corrcoef(*ranks)[0, 1]:.3f}")  # noqa: T201
        assert np.corrcoef(*ranks)[0, 1] > 0.97
    assert max(losses.values()) < 0.2


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [("SGD", r"follows AdamW.*trained with SGD.*--estimator dvemb"), ("Adam", "decoupled weight decay")],
)
def test_a_run_of_another_optimizer_is_refused(folder, tmp_path, optimizer, message):
    with pytest.raises(UserError, match=message):
        check_adam(job_of(record_tiny_run(tmp_path, optimizer=optimizer), folder))
