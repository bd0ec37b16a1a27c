"""What a trainer reads back with a plain StreamingDataset."""

import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import polars as pl
import pytest
import yaml
from streaming import Stream, StreamingDataset

from curate.core.errors import UserError
from curate.core.lock import locked
from curate.data.mds import COLUMNS, MdsStream, merge_indexes, write_stream
from curate.data.memory import construct
from curate.filter.choose import FilterConfig, choose
from curate.filter.overlap import contamination, held_out, scan
from curate.mixture.constraints import MixtureConfig
from curate.mixture.decide import Objectives, decide
from curate.output.check import check_samples, check_weights
from curate.output.layout import DROPPED, STREAMS
from curate.output.plan import SamplePlan, make_plan, make_pool, supply_of
from curate.output.write import columns_of, write_samples, write_weights
from curate.selection.config import SelectConfig
from curate.selection.resolve import resolve
from curate.selection.source import open_source
from curate.tables import DomainScores, SampleUses
from curate.training.run import Run
from tests.frames import fill
from tests.tiny import record_tiny_run, write_tiny_target


@pytest.fixture(scope="module")
def pool(streams, catalogue, values):
    made = make_pool(catalogue, values, SampleUses.create_empty())
    found = scan(made, streams, held_out([]))
    hits = contamination(found, held_out([]), 0.2)
    return choose(made, found, hits, FilterConfig(), 0, ngram_share=0.0, noise=0.0)


@pytest.fixture(scope="module")
def mixture(pool):
    """Repeats of a, a part of b, nothing of c."""
    names = ["a", "b", "c"]
    row = {"source": ["late"] * 3, "target": ["t"] * 3, "domain": names, "samples": [20] * 3}
    scores = {name: [1.0, 0.2, -1.0] for name in ("score", "score_low", "score_high", "shrunk")}
    config = MixtureConfig(prior_strength=0.25, ceilings={"a": 0.9, "c": 0.0})
    prior = dict.fromkeys(names, 1 / 3)
    objectives = Objectives(targets={"t": 1.0})
    return decide(
        fill(DomainScores, pl.DataFrame({**row, **scores})), prior, supply_of(pool), 8 * 101, config, objectives, "late"
    )


@pytest.fixture(scope="module")
def plan(pool, mixture):
    return make_plan(pool, {name: domain.samples for name, domain in mixture.domains.items()}, seed=0)


@pytest.fixture(scope="module")
def written(tmp_path_factory, streams, plan):
    folder = tmp_path_factory.mktemp("out") / "data"
    write_samples(folder, streams, plan, seed=0, shard_bytes=2000)
    return folder


SIZES = {"a": 40, "b": 25, "c": 10}


def read(streams=None, **arguments):
    def make():
        made = [Stream(**stream) for stream in streams] if streams else None
        return StreamingDataset(
            streams=made, batch_size=4, shuffle=True, shuffle_seed=5, num_canonical_nodes=1, **arguments
        )

    return list(construct(make))


def counts(rows):
    return Counter(row["domain"] for row in rows)


def test_the_mixture_of_this_test_repeats_and_leaves_out(mixture):
    samples = {name: domain.samples for name, domain in mixture.domains.items()}
    assert samples["a"] > 40
    assert 0 < samples["b"] < 21
    assert samples["c"] == 0
    assert mixture.samples == 101


def test_the_folders_are_the_mixture_exactly(written, mixture):
    rows = read(local=str(written))
    assert counts(rows) == {name: domain.samples for name, domain in mixture.domains.items() if domain.samples}
    for name, domain in mixture.domains.items():
        assert sum(len(row["tokens"]) for row in rows if row["domain"] == name) == domain.stored_tokens
        assert domain.stored_tokens / mixture.stored_tokens == domain.delivered_weight
    used, lost = {row["sample_id"] for row in rows}, set(pl.read_parquet(written / DROPPED)["sample_id"])
    assert used.isdisjoint(lost)
    assert len(used | lost) == sum(SIZES.values())
    check_samples(written, mixture)


def test_every_domain_folder_is_valid_alone_and_rows_are_unchanged(written, streams, mixture, plan):
    rows = read(local=str(written / "a"))
    assert counts(rows) == {"a": mixture.domains["a"].samples}
    stored = {streams["a"].row(index)["sample_id"]: streams["a"].row(index) for index in range(len(streams["a"]))}
    for row in rows:
        original = stored[row["sample_id"]]
        assert row["tokens"].tolist() == original["tokens"].tolist()
        assert row["tokens"].dtype == original["tokens"].dtype
        assert row["documents"] == original["documents"]
    uses = Counter(row["sample_id"] for row in rows)
    assert sorted(uses.values()) == sorted(plan.uses.filter(domain="a")["uses"])
    assert MdsStream(written / "a").encodings == streams["a"].encodings


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_written_twice_has_the_same_bytes(tmp_path, written, streams, plan):
    write_samples(tmp_path / "again", streams, plan, seed=0, shard_bytes=2000)
    assert files(tmp_path / "again") == files(written)
    write_samples(tmp_path / "again", streams, plan, seed=1, shard_bytes=2000)
    assert files(tmp_path / "again") != files(written)


def test_an_error_half_way_leaves_nothing(tmp_path, streams, plan):
    class Broken(MdsStream):
        def row(self, index):
            raise UserError("shard is corrupted")

    with pytest.raises(UserError, match="corrupted"):
        write_samples(tmp_path / "out", {**streams, "b": Broken(streams["b"].folder)}, plan, seed=0, shard_bytes=2000)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_kill_half_way_leaves_nothing_and_it_can_be_redone(tmp_path, folders, written, streams, plan):
    out = tmp_path / "out"
    code = """
import os, sys
from pathlib import Path
import polars as pl
from curate.data.mds import MdsStream
from curate.core.lock import locked
from curate.output.plan import SamplePlan
from curate.output.write import write_samples

class Killed(MdsStream):
    def row(self, index):
        if list(Path(sys.argv[2]).parent.rglob("shard.*.mds")):
            os.kill(os.getpid(), 9)
        return super().row(index)

uses = pl.DataFrame({"domain": ["a"] * 40, "index": range(40), "stored_tokens": [8] * 40, "uses": [50] * 40})
plan = SamplePlan(uses=uses, dropped=pl.DataFrame())
with locked(Path(sys.argv[2]).parent):
    write_samples(Path(sys.argv[2]), {"a": Killed(Path(sys.argv[1]))}, plan, seed=0, shard_bytes=2000)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(folders["a"]), str(out)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list(tmp_path.rglob("shard.*.mds"))
    assert not out.exists()
    with locked(tmp_path):
        write_samples(out, streams, plan, seed=0, shard_bytes=2000)
    assert files(out) == files(written)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "samples", [{"a": 40, "b": 25, "c": 10}, {"a": 7, "b": 63, "c": 0}, {"a": 81, "b": 1, "c": 20}]
)
def test_choose_is_exact_in_a_streaming_dataset(tmp_path, folders, samples):
    """Whole rounds and a part more, checked at world size 1."""
    path = tmp_path / STREAMS
    write_weights(path, folders, samples)
    rows = read(streams=yaml.safe_load(path.read_text()))
    assert counts(rows) == {name: count for name, count in samples.items() if count}
    uses = Counter((row["domain"], row["sample_id"]) for row in rows)
    for (domain, _), count in uses.items():
        rounds = samples[domain] // SIZES[domain]
        assert count in {rounds, rounds + 1}


def test_weights_are_checked(tmp_path, folders, mixture):
    path = tmp_path / STREAMS
    samples = {name: domain.samples for name, domain in mixture.domains.items()}
    write_weights(path, folders, samples)
    check_weights(path, folders, mixture)
    write_weights(path, folders, {**samples, "b": samples["b"] + 1})
    with pytest.raises(UserError, match=STREAMS):
        check_weights(path, folders, mixture)


def test_check_finds_what_is_missing(tmp_path, streams, pool, mixture):
    other = make_plan(pool, {"a": 80, "b": 20, "c": 0}, seed=0)
    write_samples(tmp_path / "out", streams, other, seed=0, shard_bytes=2000)
    with pytest.raises(UserError, match=r"\b80\b.*\b640\b.*\b90\b.*\b720\b"):
        check_samples(tmp_path / "out", mixture)


def test_check_finds_a_truncated_shard(tmp_path, streams, plan, mixture):
    write_samples(tmp_path / "out", streams, plan, seed=0, shard_bytes=2000)
    shard = next((tmp_path / "out" / "a").glob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=shard.name):
        check_samples(tmp_path / "out", mixture)


def plan_of(stream):
    """Every sample once."""
    count = len(stream)
    uses = {"domain": ["m"] * count, "index": range(count), "stored_tokens": [8] * count, "uses": [1] * count}
    return SamplePlan(uses=pl.DataFrame(uses), dropped=pl.DataFrame())


def merged(folder, kinds, rows):
    """One stream of one shard for each kind of columns."""
    for place, (columns, stored) in enumerate(zip(kinds, rows, strict=True)):
        write_stream(folder / str(place), columns, stored)
    merge_indexes(folder, [str(place) for place in range(len(kinds))])
    return MdsStream(folder)


@pytest.mark.parametrize(
    ("encoding", "stored"),
    [
        ("ndarray:uint16", lambda tokens: tokens.astype(np.uint16)),
        ("ndarray:int64:8", lambda tokens: tokens.astype(np.int64)),
        ("bytes", lambda tokens: tokens.astype(np.int64).tobytes()),
        ("json", lambda tokens: tokens.tolist()),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_merged_stream_of_several_encodings_is_written_with_one(tmp_path, encoding, stored):
    samples = [np.arange(index, index + 8, dtype=np.int32) for index in range(10)]
    labels = [np.where(np.arange(8) < 3, -100, tokens).astype(np.int64) for tokens in samples]
    first = [{"tokens": tokens, "loss_mask": mask} for tokens, mask in zip(samples[:5], labels[:5], strict=True)]
    second = [{"tokens": stored(tokens), "documents": [["d", 0, 8]]} for tokens in samples[5:]]
    kinds = [{"tokens": "ndarray:int32", "loss_mask": "ndarray:int64"}, {"tokens": encoding, "documents": "json"}]
    stream = merged(tmp_path / "m", kinds, [first, second])
    write_samples(tmp_path / "out", {"m": stream}, plan_of(stream), seed=0, shard_bytes=2000)
    written = MdsStream(tmp_path / "out" / "m")
    assert len(written.encodings) == 1
    found, wanted = ([sample[index] for index in range(10)] for sample in (written, stream))
    assert sorted(sample.sample_id for sample in found) == sorted(sample.sample_id for sample in wanted)
    assert sorted(len(sample.documents) for sample in found) == [0] * 5 + [1] * 5
    masks = [written.row(index)["loss_mask"] for index in range(10)]
    assert sum(-100 in mask for mask in masks) == 5  # labels stay labels


def test_columns_that_no_one_encoding_holds_are_refused_at_the_start(tmp_path):
    kinds = [{"tokens": "ndarray:int32", "source": "str"}, {"tokens": "ndarray:int32", "source": "int"}]
    rows = [[{"tokens": np.arange(8, dtype=np.int32), "source": value}] for value in ("web", 5)]
    stream = merged(tmp_path / "m", kinds, rows)
    with pytest.raises(UserError, match=r"'source'.*--mode weights"):
        columns_of(stream)
    with pytest.raises(UserError, match="column 'source'"):
        write_samples(tmp_path / "out", {"m": stream}, plan_of(stream), seed=0, shard_bytes=2000)
    assert not (tmp_path / "out").exists()


def test_a_selection_refuses_such_columns_before_it_values_anything(tmp_path):
    run = record_tiny_run(tmp_path)
    rows = [run.streams["json"].row(index) for index in range(80)]
    halves = [[{**row, "source": value} for row in half] for value, half in (("web", rows[:40]), (5, rows[40:]))]
    merged(tmp_path / "m", [{**COLUMNS, "source": kind} for kind in ("str", "int")], halves)
    moved = Run(run.folder, {"json": tmp_path / "m"})
    config = SelectConfig(target=write_tiny_target(tmp_path / "t.jsonl"))
    with pytest.raises(UserError, match="column 'source'"):
        open_source(resolve(config, moved))
    assert open_source(resolve(config.model_copy(update={"mode": "weights"}), moved)).prior_tokens
