"""`curate.select --candidates`: the next stage's data from data that was never trained on."""

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
from curate.select import SelectConfig, select
from curate.training.run import Run
from tests.tiny import SEQ_LEN, record_tiny_run, write_tiny_target

VALUES = {"min_target_tokens": 100, "measured_per_domain": 22}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, a target and candidates: `data` overlaps what was trained on, `new` does not and has a new domain."""
    folder = tmp_path_factory.mktemp("candidates")
    run = record_tiny_run(folder)
    write_tiny_target(folder / "target.jsonl")
    write_tiny_target(folder / "other.jsonl", documents=15)
    used = set(run.steps["sample_ids"].explode())
    for domain, name in (("json", "fresh"), ("dataclasses", "dataclasses")):
        stream = MdsStream(folder / "data" / domain)
        rows = [stream.row(i) for i in range(len(stream)) if stream[i].sample_id not in used]
        write_stream(folder / "new" / name, COLUMNS, rows, shard_bytes=3000)
    return folder


def run_select(folder, *, values=None, **settings):
    if values is None:
        values = VALUES if settings.get("method", "curate") == "curate" else {"min_target_tokens": 100}
    config = SelectConfig(
        **{
            "run": folder / "run", "target": folder / "target.jsonl", "candidates": folder / "new",
            "budget_tokens": 40 * SEQ_LEN, "output": {"wandb": "none"}, "values": values, **settings,
        }
    )  # fmt: skip
    return select(config, Run(config.run))


def test_the_next_stage_draws_from_the_candidates(folder):
    out = run_select(folder, mode="both")
    mixture = read_mixture(out / "mixture.yaml")
    assert (mixture.source, mixture.samples, set(mixture.domains)) == ("candidates", 40, {"fresh", "dataclasses"})
    rows = list(iterate(out / "data" / "mds"))
    wanted = {name: part.samples for name, part in mixture.domains.items()}
    written = Counter(Path(row["documents"][0][0]).name.split("-")[0] for row in rows)
    assert written == {"json": wanted["fresh"], "dataclasses": wanted["dataclasses"]}
    served = Counter(row["domain"] for row in open_dataset(out / "data" / "streams.yaml", batch_size=5, seed=0))
    assert served == written
    domains = pl.read_parquet(out / "domains.parquet")
    scores = pl.read_parquet(out / "scores.parquet")
    predicted = pl.read_parquet(out / "predicted.parquet")
    assert len(scores) == 44 == predicted["measured"].sum()
    assert predicted["samples"].sum() == 88
    for name in wanted:
        own = scores.filter(domain=name)
        found = domains.filter(domain=name)["value_per_token"].item()
        assert found == pytest.approx(own["value_total_nats"].sum() / own["predicted_tokens"].sum(), rel=1e-9)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "rank correlation" in page
    assert "finished stage:" not in page
    assert out == run_select(folder, mode="both")


def test_samples_of_low_value_are_left_out(folder):
    filtering = {"drop_fraction": 0.25, "duplicate_overlap": 1.0, "contamination_overlap": None}
    out = run_select(folder, values={**VALUES, "ngram_share": 0.0, "measured_per_domain": 1000}, filter=filtering)
    scores = pl.read_parquet(out / "scores.parquet").with_columns(
        x=pl.col("value_total_nats") / pl.col("predicted_tokens")
    )
    low = pl.read_parquet(out / "data" / "mds" / "dropped.parquet").filter(reason="low_value")
    for name in ("fresh", "dataclasses"):
        own = scores.filter(domain=name).sort("x")
        left = low.filter(domain=name)["sample_id"]
        assert len(left) == 11
        assert not set(left) & set(own.tail(11)["sample_id"])  # noise of a tenth of a deviation is drawn by


def test_what_was_trained_on_needs_written_samples(folder):
    for mode in ("weights", "both"):
        with pytest.raises(UserError, match=r"72 of the candidates were trained on already.*--mode samples"):
            run_select(folder, candidates=folder / "data", mode=mode)
    out = run_select(folder, candidates=folder / "data")
    used = set(Run(folder / "run").steps["sample_ids"].explode())
    assert not used & {row["sample_id"] for row in iterate(out / "data" / "mds")}
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert set(dropped.filter(reason="seen")["sample_id"]) == used
    keep = {"candidates": folder / "data", "filter": {"unseen_only": False}}
    kept = run_select(folder, **keep, mode="weights", budget_tokens=None)
    assert kept != out
    assert read_mixture(kept / "mixture.yaml").stored_tokens == 72 * SEQ_LEN  # as many as the last stage
    assert pl.read_parquet(kept / "seen.parquet")["seen_tokens"].sum() == 72 * SEQ_LEN


def test_several_targets_and_methods_without_values_serve_candidates(folder):
    more = {str(folder / "other.jsonl"): 0.5}
    out = run_select(folder, more_targets=more)
    assert read_mixture(out / "mixture.yaml").targets == {"target": 1.0, "other": 0.5}
    assert set(pl.read_parquet(out / "scores.parquet")["target"]) == {"target", "other"}
    for method in ("proportional", "dsir"):
        mixture = read_mixture(run_select(folder, method=method, mode="both") / "mixture.yaml")
        assert (mixture.samples, set(mixture.domains)) == (40, {"fresh", "dataclasses"})


def test_another_order_of_the_candidates_shards_selects_the_same_samples(folder, tmp_path):
    random = np.random.default_rng(0)
    for name in ("fresh", "dataclasses"):
        stream = MdsStream(folder / "new" / name)
        order = random.permutation(len(stream)).tolist()
        write_stream(tmp_path / "new" / name, COLUMNS, [stream.row(i) for i in order], shard_bytes=1500)
    one = run_select(folder, out=tmp_path / "one")
    for made in (folder / "run" / "influence").iterdir():
        shutil.rmtree(made)
    other = run_select(folder, out=tmp_path / "other", candidates=tmp_path / "new")
    ids = [Counter(row["sample_id"] for row in iterate(out / "data" / "mds")) for out in (one, other)]
    assert ids[0] == ids[1]


def test_as_on_the_command_line(folder, caplog):
    line = [
        "--run", str(folder / "run"), "--target", str(folder / "target.jsonl"), "--candidates", str(folder / "new"),
        "--values.min_target_tokens", "100", "--values.measured_per_domain", "20",
        "--budget-tokens", str(40 * SEQ_LEN), "--output.wandb", "none",
    ]  # fmt: skip
    config = parse_command(SelectConfig, "select", "as a user types it", line)
    with caplog.at_level(logging.INFO):
        out = select(config, Run(config.run))
    assert read_mixture(out / "mixture.yaml").samples == 40
