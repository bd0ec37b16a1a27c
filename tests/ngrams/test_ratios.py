import math

import numpy as np
import pytest

from curate.data.mds import Sample
from curate.ngrams.counts import buckets_of, ngram_counts
from curate.ngrams.ratios import log_ratios, mean_log_ratios, ngram_features

ALL = np.ones(64, bool)


@pytest.fixture(scope="module")
def samples():
    random = np.random.default_rng(0)
    lengths = (10, 4, 16)
    return [
        Sample(tokens=random.integers(0, 50, n, dtype=np.int32), loss_mask=np.ones(n, bool), documents=[])
        for n in lengths
    ]


def test_ngrams_do_not_depend_on_the_company(samples):
    found = ngram_features(samples)
    assert found.shape == (3, 4096)
    np.testing.assert_array_equal(ngram_features(samples[1:2])[0], found[1])
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_ratios_are_the_smoothed_log_ratios_of_a_plain_loop(samples):
    pool, other = (
        ngram_counts((sample.tokens, sample.loss_mask) for sample in samples),
        ngram_counts([(samples[2].tokens, ALL[:16])]),
    )
    found = mean_log_ratios(samples, log_ratios([pool, other], pool))
    for row, sample in zip(found, samples, strict=True):
        for place, target in enumerate((pool, other)):
            terms = []
            for bucket in buckets_of(sample.tokens, sample.loss_mask).tolist():
                q = (pool[bucket] + 1) / sum(count + 1 for count in pool)
                p = (target[bucket] + 2000 * q) / (sum(target) + 2000)
                terms.append(math.log(p) - math.log(q))
            assert row[place] == pytest.approx(math.fsum(terms) / len(terms), abs=1e-6)
    assert found[2, 1] == found[:, 1].max() > 0


def test_a_sample_that_predicts_nothing_is_like_nothing(samples):
    silent = Sample(tokens=samples[0].tokens, loss_mask=np.zeros(10, bool), documents=[])
    assert mean_log_ratios([silent], log_ratios([ngram_counts([])], ngram_counts([]))).tolist() == [[0.0]]
