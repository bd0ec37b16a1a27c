"""`curate.select --pool`: the next stage's data from data that was never trained on."""

import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.data.dataset import open_dataset
from curate.data.mds import COLUMNS, MdsStream, iterate, write_stream
from curate.mixture.record import read_mixture
from curate.pools.values import ProbeConfig
from curate.select import select
from curate.selection import SelectConfig
from curate.core.tracking import TrackingConfig
from curate.training.run import Run
from tests.tiny import SEQ_LEN, record_tiny_run, write_tiny_target

PROBE = {"share": 0.5, "min_per_domain": 20, "steps": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a target, and pools: `data` overlaps what was trained on, `new` does not and has a domain of its own."""
    folder = tmp_path_factory.mktemp("pool")
    run = record_tiny_run(folder)
    write_tiny_target(folder / "target.jsonl")
    write_tiny_target(folder / "other.jsonl", documents=15)
    used = set(run.steps["sample_ids"].explode())
    for domain, name in (("json", "fresh"), ("dataclasses", "dataclasses")):
        stream = MdsStream(folder / "data" / domain)
        rows = [stream.row(i) for i in range(len(stream)) if stream[i].sample_id not in used]
        write_stream(folder / "new" / name, COLUMNS, rows, shard_bytes=3000)
    return folder


def run_select(folder, **settings):
    config = SelectConfig(
        **{
            "run": folder / "run", "target": folder / "target.jsonl", "min_target_tokens": 100, "pool": folder / "new",
            "budget_tokens": 40 * SEQ_LEN, "tracking": TrackingConfig(mode="none"), "probe": ProbeConfig(**PROBE),
            **settings,
        }
    )  # fmt: skip
    return select(config, Run(config.run))


def test_the_next_stage_draws_from_the_pool(folder):
    out = run_select(folder, mode="both")
    mixture = read_mixture(out / "mixture.yaml")
    assert (mixture.window, mixture.samples, set(mixture.domains)) == ("pool", 40, {"fresh", "dataclasses"})
    rows = list(iterate(out / "data" / "mds"))
    wanted = {name: part.samples for name, part in mixture.domains.items()}
    written = Counter(Path(row["documents"][0][0]).name.split("-")[0] for row in rows)
    assert written == {"json": wanted["fresh"], "dataclasses": wanted["dataclasses"]}
    served = Counter(row["domain"] for row in open_dataset(out / "data" / "streams.yaml", batch_size=5, seed=0))
    assert served == written
    values = pl.read_parquet(out / "pool_values.parquet")
    domains = pl.read_parquet(out / "domains.parquet")
    scores = pl.read_parquet(out / "scores.parquet")
    assert len(values) == 88
    assert len(scores) == 44 == values.filter(source="probe").height
    for name in wanted:
        own = scores.filter(domain=name)
        found = domains.filter(domain=name)["value_per_token"].item()
        assert found == pytest.approx(own["value"].sum() / own["tokens"].sum(), rel=1e-9)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "rank correlation" in page
    assert "probe pool" in page
    assert "finished stage:" not in page
    assert out == run_select(folder, mode="both")


def test_samples_of_low_value_are_left_out_and_those_without_a_value_stay(folder):
    shards = {"sample_temperature": 0.0, "drop_fraction": 0.25, "duplicate_overlap": 1.0, "likeness_share": 0.0}
    whole = {**PROBE, "min_per_domain": 1000}
    out = run_select(folder, mode="filter", probe=ProbeConfig(**whole), shards=shards)
    values = pl.read_parquet(out / "pool_values.parquet")
    low = pl.read_parquet(out / "data" / "mds" / "dropped.parquet").filter(reason="low_value")
    for name in ("fresh", "dataclasses"):
        own = values.filter(domain=name).sort("value")
        assert set(low.filter(domain=name)["sample_id"]) == set(own.head(11)["sample_id"])
    weak = ProbeConfig(**PROBE, rest="features", min_rank_correlation=1.0)
    out = run_select(folder, mode="filter", probe=weak, shards=shards)
    probed = pl.read_parquet(out / "pool_values.parquet").filter(source="probe")["sample_id"]
    low = pl.read_parquet(out / "data" / "mds" / "dropped.parquet").filter(reason="low_value")
    assert len(low) == 10
    assert set(low["sample_id"]) <= set(probed)


def test_what_was_trained_on_needs_filtered_data(folder):
    with pytest.raises(UserError, match=r"72 samples of the pool were trained on already.*--mode filter"):
        run_select(folder, pool=folder / "data", mode="reweight")
    out = run_select(folder, pool=folder / "data", mode="filter")
    used = set(Run(folder / "run").steps["sample_ids"].explode())
    assert not used & {row["sample_id"] for row in iterate(out / "data" / "mds")}
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert set(dropped.filter(reason="consumed")["sample_id"]) == used
    keep = ProbeConfig(**PROBE, overlap="keep")
    kept = run_select(folder, pool=folder / "data", mode="reweight", probe=keep, budget_tokens=None)
    assert kept != out
    assert read_mixture(kept / "mixture.yaml").tokens == 72 * SEQ_LEN  # as many as the last stage
    assert pl.read_parquet(kept / "ledger.parquet")["consumed_tokens"].sum() == 72 * SEQ_LEN


def test_several_targets_and_methods_without_values_serve_a_pool(folder):
    more = {str(folder / "other.jsonl"): 0.5}
    out = run_select(folder, more_targets=more)
    assert read_mixture(out / "mixture.yaml").targets == {"target": 1.0, "other": 0.5}
    assert set(pl.read_parquet(out / "pool_values.parquet")["target"]) == {"target", "other"}
    for method in ("proportional", "dsir"):
        mixture = read_mixture(run_select(folder, method=method, mode="both") / "mixture.yaml")
        assert (mixture.samples, set(mixture.domains)) == (40, {"fresh", "dataclasses"})
    with pytest.raises(ValueError, match="a pool is valued by its probes"):
        run_select(folder, method="less")
    with pytest.raises(ValueError, match="a pool is valued by its probes"):
        run_select(folder, branch_test=True)


def test_another_order_of_the_pools_shards_selects_the_same_samples(folder, tmp_path):
    random = np.random.default_rng(0)
    for name in ("fresh", "dataclasses"):
        stream = MdsStream(folder / "new" / name)
        order = random.permutation(len(stream)).tolist()
        write_stream(tmp_path / "pool" / name, COLUMNS, [stream.row(i) for i in order], shard_bytes=1500)
    one = run_select(folder, mode="filter", out=tmp_path / "one")
    for made in (folder / "run" / "pools").iterdir():
        shutil.rmtree(made)
    other = run_select(folder, mode="filter", out=tmp_path / "other", pool=tmp_path / "pool")
    ids = [Counter(row["sample_id"] for row in iterate(out / "data" / "mds")) for out in (one, other)]
    assert ids[0] == ids[1]


def test_as_on_the_command_line(folder, caplog):
    line = [
        "--run", str(folder / "run"), "--target", str(folder / "target.jsonl"), "--min_target_tokens", "100",
        "--pool", str(folder / "new"), "--probe.steps", "3", "--probe.share", "0.5", "--probe.min_per_domain", "20",
        "--budget-tokens", str(40 * SEQ_LEN), "--tracking.mode", "none",
    ]  # fmt: skip
    config = parse_command(SelectConfig, "select", "as a user types it", line)
    with caplog.at_level(logging.INFO):
        out = select(config, Run(config.run))
    assert "samples probed, rank correlation" in caplog.text
    assert read_mixture(out / "mixture.yaml").samples == 40
