"""The ledger against a slow count, over stages, resumes, moved runs and streams that were written anew."""

import shutil
from collections import Counter

import numpy as np
import polars as pl
import pytest

from curate.core.errors import UserError
from curate.data.mds import COLUMNS, MdsStream, write_stream
from curate.seen import main
from curate.training.recorder import RecorderConfig
from curate.training.run import Run
from curate.training.token_accounting import domains_seen, seen_uses, stages, uses
from tests.tiny import Training, write_tiny_streams

CONFIG = RecorderConfig(windows={"early": (0, 4), "late": (4, 8)}, flush_steps=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three stages of 8 steps over the same streams; the second was interrupted at step 4 and resumed."""
    base = tmp_path_factory.mktemp("ledger")
    streams = write_tiny_streams(base / "data")
    Training(streams, seed=0, steps=8).run(base / "one", CONFIG)
    Training(streams, seed=1, steps=8).run(base / "two", CONFIG, stop=6, previous=base / "one")
    Training(streams, seed=1, steps=8).run(base / "two", CONFIG, start=4, previous=base / "one")
    Training(streams, seed=2, steps=8).run(base / "three", CONFIG, previous=base / "two")
    return base


def slow_count(folder):
    """Uses of each sample in each stage by the training loop's own rule."""
    pools = [MdsStream(folder / "data" / name) for name in ("json", "dataclasses")]
    counts = [Counter(), Counter(), Counter()]
    for seed, count in enumerate(counts):
        for step in range(8):
            for i in range(6):
                count[pools[i % 2][(seed * 31 + step * 6 + i) % 80].sample_id] += 1
    return counts


def test_every_use_of_every_stage_counts_once(folder):
    run = Run(folder / "three")
    chain = stages(run)
    assert [path.name for path in chain] == ["one", "two", "three"]
    wanted = slow_count(folder)
    found = uses(chain)
    for stage, count in enumerate(wanted):
        assert dict(found.filter(stage=stage).select("sample_id", "uses").iter_rows()) == count
    assert dict(seen_uses(uses(chain)).iter_rows()) == sum(wanted, Counter())
    assert [path.name for path in stages(Run(folder / "one"))] == ["one"]


def test_domains_add_up(folder):
    run = Run(folder / "three")
    table = domains_seen(run.source, uses(stages(run)))
    assert table["domain"].to_list() == ["dataclasses", "json"]
    assert table["samples"].to_list() == [80, 80]
    total = sum(slow_count(folder), Counter())
    owner = dict(run.unique_samples.select("sample_id", "domain").iter_rows())
    for row in table.iter_rows(named=True):
        own = {sample: count for sample, count in total.items() if owner[sample] == row["domain"]}
        assert row["seen"] == len(own)
        assert row["most_uses"] == max(own.values())
        assert row["seen_tokens"] == 12 * sum(own.values()) == sum(row["seen_tokens_by_stage"])
        assert row["epochs"] == pytest.approx(sum(own.values()) / 80)


def test_it_survives_streams_that_are_written_anew_in_another_order(folder, tmp_path):
    run = Run(folder / "three")
    shards = {}
    for domain, stream in run.streams.items():
        order = np.random.default_rng(0).permutation(len(stream)).tolist()
        rows = [
            {
                "tokens": sample.tokens.astype(np.int32), "loss_mask": sample.loss_mask.astype(np.uint8),
                "sample_id": sample.sample_id, "domain": domain, "documents": [],
            }
            for sample in (stream[i] for i in order)
        ]  # fmt: skip
        write_stream(tmp_path / f"new-{domain}", COLUMNS, rows, shard_bytes=900)
        shards[domain] = tmp_path / f"new-{domain}"
    moved = Run(folder / "three", shards)
    assert domains_seen(moved.source, uses(stages(moved))).equals(domains_seen(run.source, uses(stages(run))))


def test_earlier_runs_can_be_named_where_they_lie(folder, tmp_path):
    shutil.copytree(folder / "one", tmp_path / "one")
    run = Run(folder / "three")
    assert seen_uses(uses(stages(run, [tmp_path / "one", folder / "two"]))).equals(seen_uses(uses(stages(run))))
    assert seen_uses(uses(stages(run, []))).equals(seen_uses(uses([run.folder])))
    with pytest.raises(UserError, match=r"nowhere, a stage before run .* is not there .* earlier_runs"):
        stages(run, [tmp_path / "nowhere"])


def test_an_earlier_run_that_is_gone_is_named(folder, tmp_path):
    streams = {name: folder / "data" / name for name in ("json", "dataclasses")}
    Training(streams, steps=8).run(tmp_path / "run", CONFIG, previous=tmp_path / "gone")
    with pytest.raises(UserError, match=r"gone, a stage before run"):
        stages(Run(tmp_path / "run"))


def test_the_chain_does_not_change_what_a_run_is(folder, tmp_path):
    streams = {name: folder / "data" / name for name in ("json", "dataclasses")}
    Training(streams, seed=2, steps=8).run(tmp_path / "three", CONFIG)
    assert Run(tmp_path / "three").fingerprint == Run(folder / "three").fingerprint


def test_the_command_prints_domains_and_stages(folder, monkeypatch, caplog):
    monkeypatch.setattr("sys.argv", ["ledger", "--run", str(folder / "three")])
    with caplog.at_level("INFO"):
        main()
    assert "stage 1: " in caplog.text
    (line,) = [line for line in caplog.messages if line.startswith("json")]
    run = Run(folder / "three")
    assert line.split()[1:3] == ["80", str(domains_seen(run.source, uses(stages(run)))["seen"][1])]


def test_an_unreadable_record_is_named(folder, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "steps.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"steps.parquet is corrupted"):
        uses([tmp_path / "bad"])
    assert isinstance(uses([folder / "one"]), pl.DataFrame)
