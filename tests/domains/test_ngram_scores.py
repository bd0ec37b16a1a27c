"""N-gram ratios of domains and samples: a slow oracle over dictionaries of n-grams, and what it must not depend on."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from math import log

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from curate.data.mds import COLUMNS, Columns, content_id, write_stream
from curate.domains import ngram_scores as module
from curate.domains.ngram_scores import combined_ratios, ngram_ratios, with_ratios
from curate.ngrams.ratios import mean_log_ratios
from curate.tables import ValueScores
from curate.training.samples import usable_samples
from curate.training.source import SampleSource
from tests.frames import fill

PRIOR = {"a": 3.0, "b": 1.0}
MU = 2000


@dataclass
class Words:
    """A target of token sequences."""

    name: str
    rows: list

    def sequences(self):
        return [(row, np.arange(len(row)) > 0) for row in self.rows]


def source_of(base, tokens, shard_bytes=3000):
    """The samples of some streams on disk."""
    for name, rows in tokens.items():
        mask = np.ones(len(rows[0]), np.uint8)
        samples = [
            {"tokens": row, "loss_mask": mask, "sample_id": content_id(row, mask), "domain": name, "documents": []}
            for row in rows
        ]
        write_stream(base / name, COLUMNS, samples, shard_bytes=shard_bytes)
    return SampleSource(base, {name: base / name for name in tokens}, Columns())


def texts(seed=0):
    """Domain a uses the lower half of 40 tokens, b all; targets are like a, and like both."""
    random = np.random.default_rng(seed)
    tokens = {
        "a": random.integers(0, 20, (30, 24), dtype=np.int32),
        "b": random.integers(0, 40, (50, 24), dtype=np.int32),
    }
    targets = [
        Words("near", list(random.integers(0, 20, (6, 30), dtype=np.int32))),
        Words("far", list(random.integers(0, 40, (6, 30), dtype=np.int32))),
    ]
    return tokens, targets


def grams(row):
    """The n-grams whose last token is predicted: all but the first token's."""
    return [(token,) for token in row[1:]] + list(pairwise(row))


def oracle(tokens, targets):
    """target -> domain -> ratio of each sample and score of the domain, without hashing."""
    shares = {name: share / sum(PRIOR.values()) for name, share in PRIOR.items()}
    pool = Counter()
    for name, rows in tokens.items():
        own = Counter(gram for row in rows.tolist() for gram in grams(row))
        for gram, count in own.items():
            pool[gram] += 1e6 * shares[name] * count / sum(own.values())
    buckets, found = 10_000, {}
    whole = sum(pool.values()) + buckets
    for target in targets:
        own = Counter(gram for row in target.rows for gram in grams(row.tolist()))

        def ratio(gram, own=own):
            q = (pool[gram] + 1) / whole
            return log((own[gram] + MU * q) / (sum(own.values()) + MU)) - log(q)

        like = {
            name: np.array([np.mean([ratio(gram) for gram in grams(row)]) for row in rows.tolist()])
            for name, rows in tokens.items()
        }
        centre = sum(shares[name] * own.mean() for name, own in like.items())
        deviation = sum(shares[name] * ((own - centre) ** 2).mean() for name, own in like.items()) ** 0.5
        scores = {name: (own.mean() - centre) / deviation for name, own in like.items()}
        found[target.name] = (like, scores, deviation)
    return found


def test_against_the_oracle(tmp_path):
    tokens, targets = texts()
    source, wanted = source_of(tmp_path, tokens), oracle(tokens, targets)
    found = ngram_ratios(source, targets, PRIOR, 0)
    for target, domain, score in found.domains.iter_rows():
        assert score == pytest.approx(wanted[target][1][domain], abs=0.02)  # buckets are shared by a few n-grams
    assert found.domains.filter(target="near", domain="a")["ngram_ratio"].item() > 0.3
    values = of_all(source, found, {"near": 1.0, "far": 3.0})
    for name, rows in tokens.items():
        mask = np.ones(24, np.uint8)
        own = dict(values.filter(domain=name).select("sample_id", "ngram_ratio").iter_rows())
        mixed = sum(
            weight / 4 * wanted[target][0][name] / wanted[target][2] for target, weight in (("near", 1), ("far", 3))
        )
        got = [own[content_id(row, mask)] for row in rows]
        assert np.corrcoef(got, mixed)[0, 1] > 0.99
        np.testing.assert_allclose(got, mixed, atol=0.15)


def test_shards_and_batches_change_nothing(tmp_path, monkeypatch):
    tokens, targets = texts()
    moved = {name: rows[::-1] for name, rows in tokens.items()}
    one, other = source_of(tmp_path / "one", tokens), source_of(tmp_path / "other", moved, shard_bytes=900)
    monkeypatch.setattr(module, "_DRAWN", 20)
    first = ngram_ratios(one, targets, PRIOR, 0)
    monkeypatch.setattr(module, "_BATCH", 7)
    second = ngram_ratios(other, targets, PRIOR, 0)
    assert_frame_equal(first.domains, second.domains, rel_tol=1e-12, abs_tol=1e-12)
    weights = {"near": 1.0}
    tables = [of_all(*pair, weights).sort("domain", "sample_id") for pair in ((one, first), (other, second))]
    assert_frame_equal(*tables, rel_tol=1e-6, abs_tol=1e-9)


def test_large_domains_are_read_in_part(tmp_path, monkeypatch):
    tokens, targets = texts()
    source = source_of(tmp_path, tokens)
    whole = ngram_ratios(source, targets, PRIOR, 0)
    monkeypatch.setattr(module, "_DRAWN", 20)
    part, again, other = (ngram_ratios(source, targets, PRIOR, seed) for seed in (0, 0, 1))
    assert_frame_equal(part.domains, again.domains)
    assert part.domains["ngram_ratio"].to_list() != other.domains["ngram_ratio"].to_list()
    np.testing.assert_allclose(part.domains["ngram_ratio"], whole.domains["ngram_ratio"], atol=0.4)


def test_texts_that_are_all_alike_have_no_scores(tmp_path):
    rows = {name: np.full((3, length), 7, np.int32) for name, length in (("a", 24), ("b", 30))}
    source = source_of(tmp_path, rows)
    found = ngram_ratios(source, [Words("near", [np.arange(24, dtype=np.int32)])], PRIOR, 0)
    assert found.domains["ngram_ratio"].to_list() == [0.0, 0.0]
    assert of_all(source, found, {"near": 1.0})["ngram_ratio"].to_list() == pytest.approx([0.0] * 2)


def of_all(source, found, weights):
    samples = usable_samples(source.unique_samples)
    means = [mean_log_ratios(batch, found.ratios) for batch in source.read_batches(samples, 9)]
    return combined_ratios(samples, np.concatenate(means), found, weights)


def test_n_grams_have_their_share_of_scores():
    domains = pl.DataFrame(
        {"target": ["t", "t"], "domain": ["a", "b"], "score": [1.0, -1.0], "score_low": [0.5, None],
         "score_high": [1.5, None], "shrunk": [0.8, 0.0], "prior": [0.75, 0.25]}
    )  # fmt: skip
    domains = fill(ValueScores, domains)
    table = pl.DataFrame({"target": ["t", "t"], "domain": ["b", "a"], "ngram_ratio": [2.0, -1.0]})
    found = module.TargetRatios(targets=["t"], ratios=np.zeros((1, 1)), deviations=np.ones(1), domains=table)
    mixed = with_ratios(domains, found, 0.25)
    assert mixed["domain"].to_list() == ["a", "b"]
    assert mixed["shrunk"].to_list() == pytest.approx([0.75 * 0.8 - 0.25, 0.5])
    assert mixed["score"].to_list() == pytest.approx([0.5, -0.25])
    assert mixed["score_low"].to_list() == [pytest.approx(0.125), None]
    assert mixed["value_score"].to_list() == [1.0, -1.0]
    assert mixed["ngram_ratio"].to_list() == [-1.0, 2.0]
    alone = with_ratios(domains, found, 0.0)
    assert alone["score"].to_list() == domains["score"].to_list()
    without = with_ratios(domains, None, 0.5)
    assert without["score"].to_list() == domains["score"].to_list()
    assert without["ngram_ratio"].null_count() == 2
    assert set(without.columns) == set(mixed.columns)
