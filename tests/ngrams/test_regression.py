"""Values of tokens, and what their n-grams predict of other samples."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curate.data.mds import Sample
from curate.ngrams import regression
from curate.ngrams.regression import FOLDS, fit, means, ngrams_of


def sample(tokens, mask=None):
    tokens = np.asarray(tokens, np.int32)
    mask = np.ones(len(tokens), bool) if mask is None else np.asarray(mask, bool)
    return Sample(tokens=tokens, loss_mask=mask, documents=[])


def named(tokens, mask):
    """What `ngrams_of` hashes, written out."""
    found = []
    for at in range(1, len(tokens)):
        if mask[at]:
            last, before = tokens[at], tokens[at - 1]
            earlier = tokens[at - 2] if at > 1 else None
            found.append(
                [
                    ("t", last),
                    ("b", before),
                    ("tb", last, before),
                    ("te", last, earlier),
                    ("tbe", last, before, earlier),
                ]
            )
    return found


def drawn(seed, samples=40, vocabulary=6):
    random = np.random.default_rng(seed)
    texts = [random.integers(0, vocabulary, random.integers(2, 30)) for _ in range(samples)]
    masks = [random.random(len(text)) < 0.8 for text in texts]
    for mask in masks:
        mask[-1] = True
    keys = [ngrams_of(sample(text, mask)) for text, mask in zip(texts, masks, strict=True)]
    counts = np.array([len(own) for own in keys])
    names = [row for text, mask in zip(texts, masks, strict=True) for row in named(text.tolist(), mask)]
    return texts, masks, np.concatenate(keys), names, random.standard_normal((counts.sum(), 2)), counts


def oracle(names, values, asked):
    """Dense ridge in float64: what each token of `asked` is predicted from those of `names`."""
    every = sorted({name for row in [*names, *asked] for name in row}, key=repr)
    place = {name: at for at, name in enumerate(every)}
    counted = np.zeros((len(names), len(every)))
    for row, own in enumerate(names):
        for name in own:
            counted[row, place[name]] += 1
    mean = values.mean(axis=0)
    weights = np.linalg.solve(counted.T @ counted + np.eye(len(every)), counted.T @ (values - mean))
    return np.array([mean + sum(weights[place[name]] for name in own) for own in asked]).reshape(-1, values.shape[1])


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=2, max_size=30))
def test_hashes_are_equal_where_the_n_grams_are(tokens):
    text, mask = ([pair[at] for pair in tokens] for at in (0, 1))
    keys, names = ngrams_of(sample(text, mask)), named(text, mask)
    assert keys.shape == (len(names), 5)
    flat, told = keys.ravel().tolist(), [name for row in names for name in row]
    assert len(set(flat)) == len(set(told)) == len(set(zip(flat, told, strict=True)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_fit_is_a_ridge_regression_on_tokens(seed, monkeypatch):
    monkeypatch.setattr(regression, "_TOLERANCE", 1e-10)
    texts, masks, keys, names, values, counts = drawn(seed)
    made, held_out = fit(keys, values, counts, seed)
    others = [np.random.default_rng(9).integers(0, 7, 25)]
    asked = named(others[0].tolist(), np.ones(25, bool))
    np.testing.assert_allclose(made.tokens(ngrams_of(sample(others[0]))), oracle(names, values, asked), atol=1e-7)
    batches = [[sample(text, mask) for text, mask in zip(texts[:7], masks[:7], strict=True)], [sample(others[0])]]
    found = np.concatenate([made.samples(batch) for batch in batches])
    wanted = means(oracle(names, values, [*names[: counts[:7].sum()], *asked]), np.append(counts[:7], len(asked)))
    np.testing.assert_allclose(found, wanted, atol=1e-7)
    assert held_out.shape == (len(texts), 2)


def test_held_out_samples_have_no_say_in_what_is_predicted_of_them(monkeypatch):
    monkeypatch.setattr(regression, "_TOLERANCE", 1e-10)
    _, _, keys, names, values, counts = drawn(2)
    _, before = fit(keys, values, counts, 5)
    starts = np.cumsum(counts) - counts
    fold_of = {}
    for at in range(0, len(counts), 7):
        own = slice(starts[at], starts[at] + counts[at])
        changed = values.copy()
        changed[own] += 3.0
        _, after = fit(keys, changed, counts, 5)
        same = np.flatnonzero(np.isclose(before, after, rtol=0, atol=1e-9).all(axis=1))
        assert at in same
        fold_of[at] = same
        assert abs(len(same) - len(counts) / FOLDS) <= 1
    out = np.isin(np.repeat(np.arange(len(counts)), counts), fold_of[0])
    rest = [row for row, gone in zip(names, out, strict=True) if not gone]
    asked = [row for row, gone in zip(names, out, strict=True) if gone]
    wanted = means(oracle(rest, values[~out], asked), counts[fold_of[0]])
    np.testing.assert_allclose(before[fold_of[0]], wanted, atol=1e-7)


def test_what_n_grams_say_is_found_and_chance_is_not():
    random = np.random.default_rng(0)
    texts = [random.integers(0, 50, 100) for _ in range(200)]
    keys = np.concatenate([ngrams_of(sample(text)) for text in texts])
    counts, effect = np.full(200, 99), random.standard_normal(50)
    said = np.concatenate([effect[text[1:]] for text in texts])
    noise = random.standard_normal(len(said))
    told, chance = fit(keys, np.stack([said + noise, noise], axis=1), counts, 0)[1].T
    assert np.corrcoef(told, means(said, counts))[0, 1] > 0.9
    assert abs(np.corrcoef(chance, means(noise, counts))[0, 1]) < 0.3


def test_only_some_of_very_many_tokens_are_fitted_to(monkeypatch):
    _, _, keys, _, values, counts = drawn(3, samples=400)
    whole, _ = fit(keys, values, counts, 0)
    monkeypatch.setattr(regression, "_MOST", len(values) // 2)
    some, held_out = fit(keys, values, counts, 0)
    assert not np.allclose(whole.weights, some.weights)
    assert np.isfinite(held_out).all()


def test_one_sample_is_held_out_of_nothing():
    keys = ngrams_of(sample([1, 2, 3, 1, 2]))
    made, held_out = fit(keys, np.ones((4, 1)), np.array([4]), 0)
    assert np.isnan(held_out).all()
    assert made.tokens(keys) == pytest.approx(np.ones((4, 1)))


def test_tokens_are_predicted_in_chunks(monkeypatch):
    _, _, keys, _, values, counts = drawn(4)
    whole, before = fit(keys, values, counts, 0)
    monkeypatch.setattr(regression, "_CHUNK", 7)
    some, after = fit(keys, values, counts, 0)
    np.testing.assert_array_equal(whole.tokens(keys), some.tokens(keys))
    np.testing.assert_array_equal(before, after)


@given(st.lists(st.integers(1, 5), max_size=8), st.integers(1, 3))
def test_means_are_those_of_each_sample(counts, columns):
    values = np.random.default_rng(0).standard_normal((sum(counts), columns))
    parts = np.split(values, np.cumsum(counts)[:-1]) if counts else []
    wanted = np.array([part.mean(axis=0) for part in parts]).reshape(len(counts), columns)
    np.testing.assert_allclose(means(values, np.array(counts, np.int64)), wanted, atol=1e-12)
