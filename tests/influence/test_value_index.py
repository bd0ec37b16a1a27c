"""The value index against brute force over its rows; groups that grow, and samples that changed."""

from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest
import torch

from curate.core.artifacts import MANIFEST, read_json
from curate.core.errors import UserError
from curate.index import build as index_build
from curate.index import exact
from curate.influence import rows as rows_module
from curate.influence import value_index
from curate.influence.rows import RowStore, open_rows
from curate.influence.space import RowSpace
from curate.influence.value_index import build_value_index, open_value_index
from curate.tables import Samples

NUMBERS = 24


@dataclass
class Made:
    """A space whose rows are random, of samples in two domains."""

    space: RowSpace
    samples: pl.DataFrame
    rows: np.ndarray

    def part(self, start, stop):
        return Samples.validate(self.samples[start:stop])

    def brute(self, vector, k, start=0, stop=None):
        """Content ids of the k largest products over the stored rows, best first."""
        part = self.samples[start:stop]
        ids = part["sample_id"].to_numpy()
        products = self.stored(ids) @ vector.astype(float)
        return ids[np.lexsort((ids, -products))[:k]]

    def stored(self, ids):
        return open_rows(self.space).take(ids).astype(float)


def make(folder, count=600, seed=0):
    random = np.random.default_rng(seed)
    norms = np.exp(0.5 * random.standard_normal((count, 1)))
    rows = (random.standard_normal((count, NUMBERS)) * 0.9 ** np.arange(NUMBERS) * norms).astype(np.float32)
    samples = pl.DataFrame(
        {
            "domain": ["a" if place % 3 else "b" for place in range(count)],
            "index": np.arange(count),
            "shard": np.arange(count) // 50,
            "sample_id": random.permutation(count * 10)[:count],
            "stored_tokens": np.full(count, 20),
            "predicted_tokens": random.integers(1, 20, count),
        }
    )
    space = RowSpace(
        folder=folder, fingerprint="x", projections={}, compression=torch.zeros(1, NUMBERS), fitted=np.zeros(0, int)
    )
    (folder / "rows").mkdir(parents=True)
    store = open_rows(space)
    for start in range(0, count, 250):
        store.write(samples["sample_id"].to_numpy()[start : start + 250], rows[start : start + 250])
    return Made(space=space, samples=samples, rows=rows)


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "index")


def vectors(count=3, seed=5):
    return np.random.default_rng(seed).standard_normal((count, NUMBERS)).astype(np.float32)


def sizes(index):
    return sorted(len(group.samples) for group in index.groups)


def assert_finds(index, made, k=40, **part):
    for vector in [*vectors(), *-vectors()]:
        found, recall = index.search(vector, k)
        assert found["sample_id"].to_list() == made.brute(vector, k, **part).tolist()
        products = made.stored(found["sample_id"].to_numpy()) @ vector.astype(float)
        np.testing.assert_allclose(found["product"], products, rtol=1e-4, atol=1e-5)
        own = found.join(made.samples, on=made.samples.columns, how="semi")
        assert len(own) == k
        assert recall == 1


def test_a_search_is_brute_force_over_the_rows(made):
    index = build_value_index(made.space, made.part(0, None))
    assert len(index) == len(made.samples)
    assert_finds(index, made)
    assert len(index.search(vectors()[0], 10**6)[0]) == len(made.samples)


def test_equal_products_come_in_the_order_of_content(tmp_path):
    made = make(tmp_path / "index", 60)
    ids = made.samples["sample_id"].to_numpy()
    flat = RowSpace(
        folder=tmp_path / "flat", fingerprint="x", projections={}, compression=torch.zeros(1, NUMBERS),
        fitted=np.zeros(0, int),
    )  # fmt: skip
    (flat.folder / "rows").mkdir(parents=True)
    open_rows(flat).write(ids, np.ones((60, NUMBERS), np.float32))
    found, _ = build_value_index(flat, made.part(0, None)).search(vectors()[0], 60)
    assert found["sample_id"].to_list() == sorted(ids.tolist())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_samples_that_come_later_are_found_as_if_all_had_come_together(made, order):
    starts = {0: (0, 300), 1: (300, 400), 2: (400, 600)}
    known = pl.DataFrame(schema=made.samples.schema)
    for number in order:
        known = pl.concat([known, made.part(*starts[number])])
        index = build_value_index(made.space, Samples.validate(known))
        assert len(index) == len(known)
    assert_finds(index, made)
    means = index.domain_means(vectors())
    together = make(made.space.folder.parent / "together")
    for domain, wanted in build_value_index(together.space, together.part(0, None)).domain_means(vectors()).items():
        np.testing.assert_allclose(means[domain], wanted, rtol=1e-9)


def test_small_groups_are_made_again_with_what_is_new_and_large_ones_kept(made):
    steps = [(100, [100]), (150, [50, 100]), (210, [210]), (211, [1, 210]), (212, [2, 210])]
    steps += [(324, [114, 210]), (600, [600])]
    for stop, wanted in steps:
        index = build_value_index(made.space, made.part(0, stop))
        assert sizes(index) == sorted(wanted), stop
        assert_finds(index, made, k=min(40, stop), stop=stop)
        opened = open_value_index(made.space.folder, made.space, made.part(0, stop), "command")
        assert sizes(opened) == sizes(index)


def test_what_is_indexed_is_not_indexed_again(made, monkeypatch):
    first = build_value_index(made.space, made.part(0, 400))
    before = {path: path.stat().st_mtime_ns for path in (made.space.folder / "groups").rglob("*") if path.is_file()}
    monkeypatch.setattr(value_index, "build", None)
    monkeypatch.setattr(RowStore, "take", None)
    again = build_value_index(made.space, made.part(0, 400))
    assert [group.folder for group in again.groups] == [group.folder for group in first.groups]
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()


def test_many_samples_are_indexed_in_groups(made, monkeypatch):
    monkeypatch.setattr(value_index, "_GROUP", 128)
    index = build_value_index(made.space, made.part(0, None))
    assert sizes(index) == [88, 128, 128, 128, 128]
    assert_finds(index, made)
    assert sizes(open_value_index(made.space.folder, made.space, made.part(0, None), "command")) == sizes(index)


def test_a_compressed_group_visits_as_many_lists_as_the_vector_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "EXACT_UP_TO", 100)
    made = make(tmp_path / "index", 5000)
    index = build_value_index(made.space, made.part(0, None))
    (group,) = index.groups
    assert read_json(group.folder / "faiss" / MANIFEST)["factory"].startswith("IVF")
    visited = set()
    for vector in vectors(6):
        found, said = index.search(vector, 100)
        share = len(set(found["sample_id"]) & set(made.brute(vector, 100).tolist())) / 100
        assert abs(share - said) < 0.02  # by the index's own rows of two bytes, or by these
        (path,) = set((group.folder / "recall").iterdir()) - visited
        visited.add(path)
        lists = read_json(path)
        assert lists["recall"] == said
        manifest = read_json(group.folder / "faiss" / MANIFEST)
        assert said >= 0.95 or lists["lists_visited"] == manifest["lists"]
        # what is found has the products of the rows, in their order
        products = made.stored(found["sample_id"].to_numpy()) @ vector.astype(float)
        assert (np.diff(products) <= 1e-5).all()
    # the exact search is done once for a vector
    wanted = [index.search(vector, 100) for vector in vectors(6)]
    monkeypatch.setattr(value_index, "exact_search", None)
    for vector, (found, recall) in zip(vectors(6), wanted, strict=True):
        again, said = open_value_index(tmp_path, made.space, made.part(0, None), "command").search(vector, 100)
        assert again.equals(found)
        assert said == recall


@pytest.mark.parametrize("change", ["shard", "index", "sample_id", "domain", "more"])
def test_samples_that_changed_are_named_with_the_command(made, change):
    build_value_index(made.space, made.part(0, 500))
    samples = made.part(0, 500)
    counts = {"a": 333, "b": 167}
    if change == "more":
        samples, counts = made.part(0, 510), {"a": 7, "b": 3}
    elif change == "domain":
        samples, counts = samples.with_columns(domain=pl.lit("c")), {"c": 500}
    else:
        samples = samples.with_columns(pl.col(change) + 10**7)
    with pytest.raises(UserError, match=r"python -m curate\.embed --run x") as caught:
        open_value_index(made.space.folder, made.space, Samples.validate(samples), "python -m curate.embed --run x")
    assert f"{sum(counts.values()):,} of {len(samples):,}" in str(caught.value)
    for domain, count in counts.items():
        assert f"{domain} {count}" in str(caught.value)


def test_a_sample_that_is_gone_takes_its_group_with_it(made):
    """Rows of other samples must not be found; the rows are there, so that indexing again costs no pass."""
    build_value_index(made.space, made.part(0, 500))
    with pytest.raises(UserError):
        open_value_index(made.space.folder, made.space, made.part(1, 500), "command")
    index = build_value_index(made.space, made.part(1, 500))
    assert_finds(index, made, start=1, stop=500)


def test_nothing_indexed_is_told(made):
    with pytest.raises(UserError, match="600 of 600"):
        open_value_index(made.space.folder, made.space, made.part(0, None), "command")


def test_means_of_domains_are_weighted_by_tokens(made):
    build_value_index(made.space, made.part(0, 350))
    index = build_value_index(made.space, made.part(0, None))
    means = index.domain_means(vectors())
    for domain in ("a", "b"):
        own = made.samples.filter(domain=domain)
        products = made.stored(own["sample_id"].to_numpy()) @ vectors().T.astype(float)
        wanted = np.average(products, axis=0, weights=own["predicted_tokens"].to_numpy())
        np.testing.assert_allclose(means[domain], wanted, rtol=1e-6, atol=1e-9)


def test_no_more_than_a_chunk_of_rows_is_in_memory(made, monkeypatch):
    taken, take = [], RowStore.take
    monkeypatch.setattr(rows_module, "_CHUNK", 64)
    monkeypatch.setattr(exact, "CHUNK_NUMBERS", 64 * NUMBERS)
    monkeypatch.setattr(index_build, "_RECALL_ROWS", 16)
    monkeypatch.setattr(RowStore, "take", lambda self, ids: (taken.append(len(ids)), take(self, ids))[1])
    index = build_value_index(made.space, made.part(0, None))
    index.search(vectors()[0], 200)
    index.domain_means(vectors())
    assert max(taken) <= 64
    assert sum(taken) >= 2 * len(made.samples)


def test_the_index_is_the_same_bytes_whatever_the_order_of_samples(made):
    one = build_value_index(made.space, made.part(0, None))
    other = make(made.space.folder.parent / "other")
    two = build_value_index(other.space, Samples.validate(other.samples.sample(fraction=1, shuffle=True, seed=0)))
    for name in ("samples.parquet", "sums.npz", "faiss/index.faiss", "manifest.json"):
        assert (one.groups[0].folder / name).read_bytes() == (two.groups[0].folder / name).read_bytes()


def test_a_damaged_group_is_told(made):
    def ask(index):
        index.search(vectors()[0], 5)
        index.domain_means(vectors())

    (group,) = build_value_index(made.space, made.part(0, None)).groups
    for name in ("samples.parquet", "sums.npz", "faiss/index.faiss", "manifest.json"):
        content = (group.folder / name).read_bytes()
        (group.folder / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=f"{group.folder.name}"):
            ask(build_value_index(made.space, made.part(0, None)))
        (group.folder / name).write_bytes(content)


def test_a_row_that_is_gone_is_refused_and_never_another_sample_s(made):
    build_value_index(made.space, made.part(0, None))
    ids = made.samples["sample_id"].to_numpy()
    next((made.space.folder / "rows").iterdir()).unlink()
    store = open_rows(made.space)
    gone = ids[~np.isin(ids, store.sample_ids)]
    assert 0 < len(gone) < len(ids)
    for asked in (gone[:1], ids):
        with pytest.raises(UserError, match=rf"\b{gone[0]}\b"):
            store.take(asked)
    np.testing.assert_array_equal(store.take(store.sample_ids[:3]), open_rows(made.space).take(store.sample_ids[:3]))
    with pytest.raises(UserError, match="made by this"):
        open_value_index(made.space.folder, made.space, made.part(0, None), "made by this")


def test_a_compressed_group_is_measured_at_as_many_samples_as_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(index_build, "EXACT_UP_TO", 100)
    made = make(tmp_path / "index", 5000)
    index = build_value_index(made.space, made.part(0, None))
    for vector in vectors(2):
        found, said = index.search(vector, 2000)
        share = len(set(found["sample_id"]) & set(made.brute(vector, 2000).tolist())) / 2000
        assert len(found) == 2000
        assert share >= 0.93
        assert abs(share - said) < 0.02


def test_many_small_additions_leave_few_groups(made):
    for stop in range(20, 601, 20):
        index = build_value_index(made.space, made.part(0, stop))
        assert len(index.groups) <= np.log2(stop) + 1


def test_more_files_than_may_be_open_at_once_are_read(made):
    resource = pytest.importorskip("resource")
    store = open_rows(made.space)
    ids = made.samples["sample_id"].to_numpy()
    whole = store.take(ids)
    spread = RowStore(made.space.folder / "many", NUMBERS)
    spread.folder.mkdir()
    for place in range(len(ids)):
        spread.write(ids[place : place + 1], whole[place : place + 1])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # the next number that a file would get: of what the process has open already nothing is known
    with (made.space.folder / "probe").open("w") as probe:
        limit = probe.fileno() + 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    try:
        taken = RowStore(spread.folder, NUMBERS).take(ids)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    np.testing.assert_allclose(taken, whole, rtol=1e-2, atol=1e-2 * np.abs(whole).max())
