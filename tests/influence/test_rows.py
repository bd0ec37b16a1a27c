"""Rows on disk: the same bytes whatever was interrupted, and in whatever order and company samples come."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from curate.core.errors import UserError
from curate.data.mds import COLUMNS, write_stream
from curate.embed import EmbedConfig, embed
from curate.influence import rows as rows_module
from curate.influence.rows import RowStore, blocks_of, embed_samples, quantized
from curate.influence.space import captured_rows, open_space, row_capture
from curate.training.run import Run
from curate.training.samples import usable_samples
from curate.training.source import SampleSource
from tests.crash import crash_environment
from tests.tiny import STEPS, Training

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def fitted(run, replay):
    return open_space(run, replay)


@pytest.fixture
def space(fitted, tmp_path):
    """The fitted space, with a folder of its own and no rows."""
    return replace(fitted, folder=tmp_path / "index")


@pytest.fixture(scope="module")
def samples(run):
    return usable_samples(run.unique_samples)


@pytest.fixture(scope="module")
def exact(run, replay, fitted, samples):
    """(N, D) rows of all samples, one sample after the other."""
    replay.model_at(STEPS)
    with row_capture(fitted, replay) as capture:
        batches = run.source.read_batches(samples, 1)
        return torch.cat([captured_rows(replay, capture, batch) @ fitted.compression for batch in batches]).numpy()


def files(folder):
    """Name -> bytes of the files of rows."""
    return {path.name: path.read_bytes() for path in sorted((folder / "rows").glob("*.npy"))}


def embedded(run, replay, space, samples, source=None):
    return embed_samples(run, source or run.source, samples, space, replay)


def test_rows_are_those_of_the_samples_up_to_a_code(run, replay, space, samples, exact):
    store = embedded(run, replay, space, samples)
    assert store.sample_ids.tolist() == sorted(samples["sample_id"].to_list())
    found = store.take(samples["sample_id"].to_numpy())
    assert found.dtype == np.float32
    half_code = np.abs(exact).max(axis=1, keepdims=True) / 127 / 2
    assert (np.abs(found - exact) < 1.01 * half_code + 1e-12).all()
    # a row costs D bytes, its scale and its id
    expected = sum(len(block) for block in blocks_of(samples)) * (space.numbers + 12)
    assert sum(len(np.load(path)) for path in (space.folder / "rows").glob("*.npy")) == expected


def test_rows_are_taken_in_the_order_asked_for(run, replay, space, samples, exact):
    store = embedded(run, replay, space, samples)
    order = np.random.default_rng(0).integers(len(samples), size=300)  # some twice
    ids = samples["sample_id"].to_numpy()
    assert (store.take(ids[order]) == store.take(ids)[order]).all()
    vectors = np.random.default_rng(1).standard_normal((3, space.numbers)).astype(np.float32)
    products = store.products(ids[order], vectors)
    assert products.shape == (300, 3)
    np.testing.assert_allclose(products, store.take(ids)[order].astype(float) @ vectors.T, rtol=1e-4, atol=1e-6)
    assert store.products(ids[:0], vectors).shape == (0, 3)


def test_products_are_made_in_parts(run, replay, space, samples, monkeypatch):
    store = embedded(run, replay, space, samples)
    ids, vectors = samples["sample_id"].to_numpy(), np.eye(space.numbers, dtype=np.float32)[:2]
    whole, sizes, take = store.products(ids, vectors), [], RowStore.take
    monkeypatch.setattr(rows_module, "_CHUNK", 7)
    monkeypatch.setattr(RowStore, "take", lambda self, some: (sizes.append(len(some)), take(self, some))[1])
    np.testing.assert_allclose(store.products(ids, vectors), whole, rtol=1e-6)
    assert max(sizes) == 7
    assert sum(sizes) == len(ids)


def test_the_order_of_samples_changes_no_byte(run, replay, space, samples, tmp_path):
    embedded(run, replay, space, samples)
    other = replace(space, folder=tmp_path / "other")
    embedded(run, replay, other, samples.sample(fraction=1, shuffle=True, seed=1))
    assert files(space.folder) == files(other.folder)
    assert len(files(space.folder)) == samples.select("domain", "shard").n_unique()


def test_shards_and_domains_that_come_later_change_no_byte(run, replay, space, samples, tmp_path):
    embedded(run, replay, space, samples)
    other = replace(space, folder=tmp_path / "other")
    first = samples["domain"][0]
    kept = {}
    for part in (pl.col("domain") == first) & (pl.col("shard") == 1), pl.col("domain") == first, pl.lit(value=True):
        store = embedded(run, replay, other, samples.filter(part))
        assert set(samples.filter(part)["sample_id"]) == set(store.sample_ids.tolist())
        assert kept.items() <= files(other.folder).items()
        kept = files(other.folder)
    assert kept == files(space.folder)


def test_no_row_is_made_twice(run, replay, space, samples, tmp_path, monkeypatch):
    wanted = embedded(run, replay, space, samples)
    before = files(space.folder)
    streams = {}
    for domain, stream in run.streams.items():  # the same samples, in other shards
        write_stream(tmp_path / domain, COLUMNS, [stream.row(at) for at in range(len(stream))][::-1], shard_bytes=2000)
        streams[domain] = tmp_path / domain
    source = SampleSource(tmp_path, streams, run.spec.columns)
    monkeypatch.setattr(rows_module, "captured_rows", None)
    found = embedded(run, replay, space, usable_samples(source.unique_samples), source)
    assert files(space.folder) == before
    assert found.sample_ids.tolist() == wanted.sample_ids.tolist()


@pytest.mark.parametrize("size", [1, 7, 50])
def test_how_many_samples_go_through_the_model_together_does_not_count(
    run, replay, space, samples, exact, monkeypatch, size
):
    monkeypatch.setattr(rows_module, "read_together", lambda run, source, table: source.read_batches(table, size))
    store = embedded(run, replay, space, samples)
    vector = np.random.default_rng(0).standard_normal(space.numbers).astype(np.float32)
    found = store.products(samples["sample_id"].to_numpy(), vector[None])[:, 0]
    code = np.abs(exact).max(axis=1) / 127
    assert (np.abs(found - exact @ vector) < 0.51 * code * np.abs(vector).sum() + 1e-7).all()


def test_a_gradient_that_is_not_finite_names_the_sample_and_leaves_what_was_made(
    run, replay, space, samples, monkeypatch
):
    blocks = list(blocks_of(samples.sort("domain", "shard", "index")))
    (bad,) = next(iter(run.source.read_batches(blocks[2][1:2], 1)))
    losses = replay.task.sample_losses

    def spoiled(batch):
        here = (batch.tokens == torch.from_numpy(bad.tokens)).all(1)
        return losses(batch) * torch.where(here, torch.nan, 1.0)

    monkeypatch.setattr(replay.task, "sample_losses", spoiled)
    with pytest.raises(UserError, match=rf"\b{bad.sample_id}\b"):
        embedded(run, replay, space, samples)
    made = files(space.folder)
    assert len(made) == 2
    monkeypatch.undo()
    calls = []
    monkeypatch.setattr(
        rows_module, "captured_rows", lambda *words: (calls.append(len(words[2])), captured_rows(*words))[1]
    )
    embedded(run, replay, space, samples)
    assert made.items() <= files(space.folder).items()
    assert sum(calls) == len(samples) - len(blocks[0]) - len(blocks[1])


DAMAGES = {
    "bit": lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    "header": lambda content: b"\x00" + content[1:],
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_made_again_once_it_is_deleted(run, replay, space, samples, damage):
    embedded(run, replay, space, samples)
    before = files(space.folder)
    path = sorted((space.folder / "rows").glob("*.npy"))[1]
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(UserError, match=path.name):
        embedded(run, replay, space, samples)
    assert files(space.folder).keys() == before.keys()
    path.unlink()
    embedded(run, replay, space, samples)
    assert files(space.folder) == before


def test_a_file_of_another_name_is_told(run, replay, space, samples):
    """Of two files that were exchanged each has the other's bytes."""
    embedded(run, replay, space, samples)
    one, two = sorted((space.folder / "rows").glob("*.npy"))[:2]
    shutil.copy(one, two)
    with pytest.raises(UserError, match=two.name):
        embedded(run, replay, space, samples)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 4), st.integers(1, 9)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_codes_are_within_half_a_step(rows):
    codes, scales = quantized(rows)
    assert codes.dtype == np.int8
    assert scales.dtype == np.float32
    assert (np.abs(codes.astype(int)).max(axis=1) == np.where(scales > 0, 127, 0)).all()
    back = codes.astype(np.float64) * scales[:, None]
    # a scale below the least float32 is 0
    assert (np.abs(back - rows) <= scales[:, None] * 0.5001 + 127 * 1.5e-45).all()


def test_a_row_of_zeros_stays_one():
    codes, scales = quantized(np.zeros((2, 3), np.float32))
    assert not codes.any()
    assert not scales.any()


def made_of(folder):
    """What an index consists of, without times and locks."""
    patterns = ("rows/*.npy", "space.npz", "groups/*/samples.parquet", "groups/*/sums.npz", "groups/*/faiss/*.faiss")
    paths = [path for pattern in patterns for path in folder.glob(f"index/*/{pattern}")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(run, tmp_path):
    for name in ("whole", "killed"):
        Training(run.spec.streams).run(tmp_path / name)
    index = embed(EmbedConfig(run=tmp_path / "whole"), Run(tmp_path / "whole"))
    assert len(index) == len(usable_samples(run.unique_samples))
    command = [sys.executable, "-m", "curate.embed", "--run", str(tmp_path / "killed")]
    rows = []
    for before, at in ((r"rows/.*\.npy", 3), (r"sums\.npz", 1)):
        crash = crash_environment(before, at, alone=True)
        killed = subprocess.run(command, env=crash, check=False, capture_output=True)
        assert killed.returncode == -signal.SIGKILL, (before, killed.stderr)
        rows.append(len(list(tmp_path.glob("killed/index/*/rows/*.npy"))))
    assert rows[0] == 2 < rows[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    again = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert made_of(tmp_path / "killed") == made_of(tmp_path / "whole")
    assert len(made_of(tmp_path / "whole")) == rows[1] + 4


def test_codes_of_the_smallest_numbers_keep_their_signs():
    rows = np.array([[1.9e-43, -1.9e-43, 1e-43, 0.0]], np.float32)
    codes, scales = quantized(rows)
    assert (np.sign(codes) == np.sign(rows)).all()
    assert np.isfinite(codes * scales[:, None]).all()
