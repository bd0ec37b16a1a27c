import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from curate.core import artifacts
from curate.core.errors import UserError
from curate.index import exact, library
from curate.index.build import IndexConfig, auto_factory, build
from curate.index.exact import exact_search, recall
from curate.index.open import open_index


def embeddings(rows=3000, dim=12, seed=0, scale=1.0):
    """Rows like embeddings: correlated dimensions, heavy-tailed norms."""
    random = np.random.default_rng(seed)
    norms = np.exp(random.standard_normal((rows, 1)))
    return (random.standard_normal((rows, dim)) @ random.standard_normal((dim, dim)) * norms * scale).astype(np.float32)


QUERIES = np.random.default_rng(9).standard_normal((5, 12)).astype(np.float32)


def make(folder, config=IndexConfig(), *, rows=None, queries=QUERIES, seed=0):  # noqa: B008
    build(embeddings() if rows is None else rows, folder, config, queries=queries, seed=seed)
    return open_index(folder)


def brute(rows, queries, k):
    products = queries.astype(np.float64) @ rows.astype(np.float64).T
    return np.argsort(-products, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("chunk_numbers", [200, 10**6])
def test_exact_search_is_brute_force(monkeypatch, chunk_numbers):
    monkeypatch.setattr(exact, "CHUNK_NUMBERS", chunk_numbers)
    products, rows = exact_search(embeddings(), QUERIES, 100)
    assert (rows == brute(embeddings(), QUERIES, 100)).all()
    np.testing.assert_allclose(products, np.take_along_axis(QUERIES @ embeddings().T, rows, 1), rtol=1e-5)


def test_recall():
    assert recall(np.array([[1, 2], [3, -1]]), np.array([[2, 1], [3, 4]])) == 0.75


def test_small_is_exact_and_best_is_largest_product(tmp_path):
    index = make(tmp_path / "index")
    products, rows = index.search(QUERIES, 50)
    assert (rows == brute(embeddings(), QUERIES, 50)).all()
    assert (np.diff(products, axis=1) <= 0).all()
    assert index.recall == 1.0
    worst = index.search(-QUERIES, 50)[1]
    assert (worst == brute(-embeddings(), QUERIES, 50)).all()


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize("factory", ["IVF32,SQbf16", "PCA8,IVF8,Flat", "SQ8"])
def test_compressed_reaches_its_recall_at_any_scale(tmp_path, factory, scale):
    rows = embeddings(scale=scale)
    config = IndexConfig(factory=factory, recall_target=0.9 if "bf16" in factory else 0.5)
    index = make(tmp_path / "index", config, rows=rows)
    got = index.search(QUERIES, 100)[1]
    assert recall(got, brute(rows, QUERIES, 100)) > config.recall_target - 0.1
    assert index.recall >= config.recall_target


def test_more_lists_are_visited_for_more_recall(tmp_path):
    visited = []
    for target in (0.3, 0.99):
        make(tmp_path / str(target), IndexConfig(factory="IVF64,Flat", recall_target=target))
        visited.append(artifacts.read_json(tmp_path / str(target) / artifacts.MANIFEST)["lists_visited"])
    assert visited[0] < visited[1]


def test_recall_out_of_reach_is_said(tmp_path, caplog):
    index = make(tmp_path / "index", IndexConfig(factory="PQ2x4", recall_target=0.99))
    assert index.recall < 0.99
    assert "wanted 0.990" in caplog.text


@pytest.mark.parametrize("factory", ["Flat", "IVF16,SQbf16"])
def test_chunks_add_up_to_one_add_with_the_same_bytes(tmp_path, monkeypatch, factory):
    make(tmp_path / "one", IndexConfig(factory=factory))
    monkeypatch.setattr(exact, "CHUNK_NUMBERS", 12 * 700)
    make(tmp_path / "chunked", IndexConfig(factory=factory))
    for name in ("index.faiss", artifacts.MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "chunked" / name).read_bytes()


def test_more_results_than_rows(tmp_path):
    products, rows = make(tmp_path / "index", rows=embeddings(7)).search(QUERIES, 100)
    assert products.shape == rows.shape == (5, 7)
    assert (np.sort(rows, axis=1) == np.arange(7)).all()


def test_too_few_lists_visited_fills_up_with_minus_one(tmp_path):
    config = IndexConfig(factory="IVF64,Flat", recall_target=0.01)
    products, rows = make(tmp_path / "index", config).search(QUERIES, 3000)
    assert (products[rows < 0] == -np.inf).all()
    assert (rows < 0).any()


def test_memory_map_in_and_out(tmp_path):
    np.save(tmp_path / "e.npy", embeddings())
    mapped = np.load(tmp_path / "e.npy", mmap_mode="r")
    for factory in ("Flat", "IVF16,SQbf16"):
        index = make(tmp_path / factory, IndexConfig(factory=factory), rows=mapped)
        assert len(index) == 3000
        assert str(tmp_path / factory) in Path("/proc/self/maps").read_text(encoding="utf-8")
        del index


def test_no_target_queries(tmp_path):
    assert make(tmp_path / "index", queries=np.empty((0, 12), np.float32)).recall == 1.0


def test_complete_is_reused_and_other_settings_are_refused(tmp_path):
    make(tmp_path / "index")
    before = (tmp_path / "index" / "index.faiss").stat().st_mtime_ns
    make(tmp_path / "index")
    assert (tmp_path / "index" / "index.faiss").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="seed: 0 there, 1 now"):
        make(tmp_path / "index", seed=1)


def test_auto_factory():
    assert auto_factory(200_000) == "Flat"
    assert auto_factory(1_000_000) == "IVF1024,SQbf16"


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="'nonsense' is not a FAISS factory string"):
        make(tmp_path / "index", IndexConfig(factory="nonsense"))
    with pytest.raises(UserError, match="row 3 is not finite"):
        make(tmp_path / "index", rows=np.where(np.arange(20)[:, None] == 3, np.nan, embeddings(20)))
    with pytest.raises(UserError, match="no embeddings"):
        make(tmp_path / "index", rows=embeddings(0))
    with pytest.raises(ValueError, match="need \\[Q, 12\\]"):
        make(tmp_path / "ok").search(QUERIES[:, :3], 1)
    assert {path.name for path in tmp_path.iterdir()} == {"ok"}


def test_truncated_index(tmp_path):
    make(tmp_path / "index")
    path = tmp_path / "index" / "index.faiss"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"index.faiss is corrupted"):
        open_index(tmp_path / "index")
    with pytest.raises(UserError, match="does not exist"):
        open_index(tmp_path / "nowhere")


def test_faiss_missing_or_doubled(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match=r"pip install \"curate\[cpu\]\""):
        library.load_faiss()
    monkeypatch.setattr(library, "_is_installed", lambda name: True)
    with pytest.raises(UserError, match="uninstall both"):
        library.load_faiss()


class FakeGpu:
    """A FAISS with a GPU, which this machine may not have."""

    class StandardGpuResources: ...

    def __init__(self, error=None):
        self.error = error

    def get_num_gpus(self):
        return 1

    def index_cpu_to_gpu(self, resources, device, index):
        if self.error:
            raise RuntimeError(self.error)
        return f"{index} on {device}"


def test_gpu_is_used_when_there_is_one(caplog):
    assert library.on_gpu(FakeGpu(), "index") == "index on 0"
    assert library.on_gpu(FakeGpu("not supported"), "index") == "index"
    assert "stays on the CPU: not supported" in caplog.text


def test_recall_is_that_of_the_targets_where_it_is_lower(tmp_path):
    far = 10 * np.eye(12, dtype=np.float32)  # directions that few rows take
    config = IndexConfig(factory="IVF64,Flat", recall_target=0.05)
    index = make(tmp_path / "index", config, queries=far)
    found = index.search(far, 100)[1]
    assert index.recall <= recall(found, brute(embeddings(), far, 100)) + 1e-9


def test_bench_script(tmp_path):
    np.save(tmp_path / "e.npy", embeddings())
    command = [
        sys.executable,
        "scripts/bench_index.py",
        "--embeddings",
        tmp_path / "e.npy",
        "--out",
        tmp_path / "o.json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    table = artifacts.read_json(tmp_path / "o.json")["table"]
    assert [row["factory"] for row in table] == ["Flat", "IVF64,SQbf16"]
    assert min(row["recall_at_100"] for row in table) >= 0.95
    assert "recall_at_100" in done.stdout
