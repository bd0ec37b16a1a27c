"""`curate.select` on a recorded run, as a command and as a function: what it writes, reuses, refuses and survives."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import polars as pl
import pytest
import yaml
from pydantic import ValidationError

from curate.core.errors import UserError
from curate.data.dataset import open_dataset
from curate.data.mds import iterate, write_stream
from curate.data.memory import construct
from curate.mixture.constraints import MixtureConfig
from curate.mixture.record import read_mixture
from curate.select import SelectConfig, select
from curate.training.recorder import RecorderConfig
from curate.training.run import Run
from tests.crash import crash_environment
from tests.tiny import SEQ_LEN, Training, write_tiny_target

ROOT = Path(__file__).resolve().parents[2]
FILES = ["scores.parquet", "domains.parquet", "shards.parquet", "documents.parquet", "mixture.yaml", "report.html"]


LATE = {"sources": ("late",)}
BOTH = {"sources": ("early", "late")}


def config_of(folder, *, values=LATE, **settings):
    return SelectConfig(
        **{
            "run": folder / "run",
            "target": folder / "target.jsonl",
            "budget_tokens": 60 * SEQ_LEN,
            "values": {"min_target_tokens": 100, **values},
            "output": {"wandb": "none"},
            **settings,
        }
    )


def embed_config(path, **settings):
    """A file of settings of `curate.embed`."""
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def run_select(folder, **settings):
    config = config_of(folder, **settings)
    return select(config, Run(config.run))


@pytest.fixture(scope="module")
def both(folder):
    return run_select(folder, mode="both", values=BOTH)


def test_everything_is_written_and_agrees(folder, both):
    mixture = read_mixture(both / "mixture.yaml")
    assert (mixture.samples, mixture.stored_tokens) == (60, 60 * SEQ_LEN)
    for name in FILES:
        assert (both / name).stat().st_size > 0, name
    scores = pl.read_parquet(both / "scores.parquet")
    assert set(scores["source"]) == {"early", "late", "current"}
    assert scores.filter(pl.col("source") != "current").height == 2 * 4 * 6
    assert mixture.source == "late"
    domains = pl.read_parquet(both / "domains.parquet")
    for source in ("early", "late", "current"):
        rows = scores.filter(source=source)
        for domain in ("json", "dataclasses"):
            mine = rows.filter(domain=domain)
            wanted = mine["value_total_nats"].sum() / mine["predicted_tokens"].sum()
            found = domains.filter(source=source, domain=domain)["value_per_token"].item()
            assert found == pytest.approx(wanted, rel=1e-9)
    documents = pl.read_parquet(both / "documents.parquet")
    assert documents["value_total_nats"].sum() == pytest.approx(scores["value_total_nats"].sum(), rel=1e-6)


def test_filtered_shards_read_by_a_plain_streaming_dataset_are_the_mixture(both):
    mixture = read_mixture(both / "mixture.yaml")
    rows = list(iterate(both / "data" / "mds"))
    assert Counter(row["domain"] for row in rows) == {name: part.samples for name, part in mixture.domains.items()}
    assert sum(len(row["tokens"]) for row in rows) == mixture.stored_tokens
    dropped = pl.read_parquet(both / "data" / "mds" / "dropped.parquet")
    assert set(dropped["reason"]) <= {"low_value", "not_sampled", "near_duplicate", "contamination"}
    low = set(dropped.filter(reason="low_value")["sample_id"])
    assert low
    assert not low & {row["sample_id"] for row in rows}


def test_streams_yaml_loads_in_one_line_with_the_mixture_exactly(both):
    from streaming import Stream, StreamingDataset

    order = {"shuffle": True, "num_canonical_nodes": 1, "shuffle_block_size": 1000}

    def make():
        streams = [Stream(**stream) for stream in yaml.safe_load((both / "data" / "streams.yaml").read_text())]
        return StreamingDataset(streams=streams, batch_size=6, predownload=8, **order)

    dataset = construct(make)
    found = Counter(row["domain"] for row in dataset)
    mixture = read_mixture(both / "mixture.yaml")
    assert found == {name: part.samples for name, part in mixture.domains.items()}


def test_phases_are_written_in_both_forms_and_served_exactly(folder, tmp_path):
    schedule = {"schedule": "early-and-late", "early_share": 0.2, "late_share": 0.3}
    out = run_select(folder, mode="both", out=tmp_path / "out", mixture=schedule)
    mixture = read_mixture(out / "mixture.yaml")
    assert [phase.blend for phase in mixture.phases] == [1, 0, 1]
    assert [phase.samples for phase in mixture.phases] == [12, 30, 18]
    assert not (out / "data" / "streams.yaml").exists()
    for path in (out / "data" / "schedule.yaml", out / "data" / "mds" / "schedule.yaml"):
        rows = list(open_dataset(path, batch_size=6, seed=0))
        assert len(rows) == mixture.samples == 60
        for phase in mixture.phases:
            part = rows[phase.start_sample : phase.start_sample + phase.samples]
            found = Counter(row["domain"] for row in part)
            assert found == {name: count for name, count in phase.domains.items() if count}
    assert "open_dataset" in (out / "report.html").read_text()


def test_a_complete_selection_is_reused_and_other_settings_are_refused(folder, both):
    stamp = (both / "mixture.yaml").stat().st_mtime_ns
    assert run_select(folder, mode="both", values=BOTH, out=both) == both
    assert (both / "mixture.yaml").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match=r"made with other settings \(budget_tokens: 720 there, 600 now\)"):
        run_select(folder, mode="both", values=BOTH, out=both, budget_tokens=600)


def test_a_folder_of_something_else_is_not_written_to(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="was not made by this command"):
        run_select(folder, out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_same_settings_give_the_same_bytes(folder, both, tmp_path):
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    again = run_select(folder, mode="both", values=BOTH, run=tmp_path / "run")
    assert again.name == both.name
    same = [*FILES[:-1], "data/streams.yaml", "manifest.json"]
    same += sorted(str(path.relative_to(both)) for path in (both / "data" / "mds").rglob("*") if path.is_file())
    for name in same:
        assert (again / name).read_bytes() == (both / name).read_bytes(), name


def command(folder, run, *more):
    return [
        sys.executable, "-m", "curate.select", "--target", str(folder / "target.jsonl"), "--run", str(run),
        "--values.min_target_tokens", "100", "--budget-tokens", str(60 * SEQ_LEN), "--mode", "both",
        "--values.sources", "[early, late]", "--output.wandb", "none", *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_ends_with_the_same_bytes(folder, both, tmp_path):
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    eager = embed_config(tmp_path / "embed.yaml", adjoint={"save_seconds": 0})
    arguments = command(folder, tmp_path / "run", "--values.embed_config", str(eager))
    for before, at in (("scratch/cotangent", 2), ("embeddings/late.*/manifest", 1), ("selections/.*/scores", 1)):
        crash = crash_environment(before, at, alone=True)
        killed = subprocess.run(arguments, cwd=ROOT, env=crash, capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, before
    finished = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    (out,) = (tmp_path / "run" / "selections").iterdir()
    for name in ("scores.parquet", "mixture.yaml", "data/mds/index.json", "documents.parquet"):
        assert (out / name).read_bytes() == (both / name).read_bytes(), name
    assert f"wrote {out / 'mixture.yaml'}" in finished.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "fine"}\n{"text": ', "line 2: not valid JSON"),
        (b'{"text": "fine"}\n\xff\xfe\n', "line 2: not UTF-8"),
        (b"", "is empty"),
        (b'{"tokens": [1, 2, 3]}\n', "has 2 predicted tokens in 1"),
    ],
)
def test_a_bad_target_ends_in_one_sentence(folder, tmp_path, line, message):
    (tmp_path / "bad.jsonl").write_bytes(line)
    arguments = command(folder, folder / "run", "--target", str(tmp_path / "bad.jsonl"))
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_budget_beyond_the_caps_names_what_binds_and_what_would_fit(folder):
    with pytest.raises(UserError, match=r"max_epochs 4 at all .* dataclasses .*, json .*budget_tokens at most"):
        run_select(folder, budget_tokens=5000 * SEQ_LEN, mode="weights")


def test_what_earlier_stages_consumed_counts_against_the_caps(folder):
    budget = {"budget_tokens": 400 * SEQ_LEN, "mode": "weights"}
    alone = run_select(folder, **budget)
    with pytest.raises(UserError, match=r"max_epochs 4 .* budget_tokens at most 3,"):
        run_select(folder, **budget, source={"earlier_runs": (folder / "run",) * 4})
    once = run_select(folder, **budget, source={"earlier_runs": (folder / "run",)})
    assert once != alone
    ledgers = [pl.read_parquet(out / "seen.parquet")["seen_tokens"].sum() for out in (alone, once)]
    assert ledgers == [72 * SEQ_LEN, 144 * SEQ_LEN]
    assert "epochs so far" in (once / "report.html").read_text(encoding="utf-8")


def test_written_samples_can_leave_out_all_that_was_seen(folder):
    settings = {"unseen_only": True}
    out = run_select(folder, mode="samples", filter=settings)
    trained = set(Run(folder / "run").steps["sample_ids"].explode())
    written = {row["sample_id"] for row in iterate(out / "data" / "mds")}
    assert written
    assert not written & trained
    dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet")
    assert set(dropped.filter(reason="seen")["sample_id"]) <= trained
    for mode in ("weights", "both"):
        with pytest.raises(ValidationError, match=r"filter.unseen_only True"):
            config_of(folder, mode=mode, filter=settings)


def test_several_targets_and_what_is_retained_are_valued_in_one_pass(folder, tmp_path):
    for name, documents in (("other", 15), ("general", 18)):
        write_tiny_target(tmp_path / f"{name}.jsonl", documents=documents)
    more = {"more_targets": {str(tmp_path / "other.jsonl"): 0.5}, "retain": tmp_path / "general.jsonl"}
    out = run_select(folder, mode="weights", **more)
    alone = run_select(folder, mode="weights")
    mixture = read_mixture(out / "mixture.yaml")
    assert mixture.targets == {"target": 1.0, "other": 0.5}
    assert mixture.group_limits["retain"].reached >= mixture.group_limits["retain"].least - 1e-8
    scores, single = (pl.read_parquet(part / "scores.parquet") for part in (out, alone))
    assert set(scores["target"]) == {"target", "other", "general"}
    together = scores.filter(target="target").select("row", "value_total_nats").sort("row")
    for found, wanted in zip(together["value_total_nats"], single.sort("row")["value_total_nats"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    domains = pl.read_parquet(out / "domains.parquet")
    for name, part in mixture.domains.items():
        rows = dict(domains.filter(domain=name).select("target", "shrunk").iter_rows())
        together = rows["target"] + 0.5 * rows["other"] + 0.75 * rows["general"]  # .5 of 1.5
        assert part.shrunk == pytest.approx(together / 2.25)
    assert "Every target" in (out / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="two targets are called 'target'"):
        run_select(folder, mode="weights", retain=folder / "target.jsonl")


def test_what_is_retained_has_a_say_in_which_samples_are_left_out(folder, tmp_path):
    write_tiny_target(tmp_path / "general.jsonl", documents=18)
    left = []
    for retain in ({}, {"retain": tmp_path / "general.jsonl"}):
        out = run_select(
            folder, **retain, mode="samples", mixture={"max_epochs": 9},
            filter={"drop_fraction": 0.5, "duplicate_overlap": 1, "contamination_overlap": None},
        )  # fmt: skip
        dropped = pl.read_parquet(out / "data" / "mds" / "dropped.parquet").filter(reason="low_value")
        left.append(set(dropped["sample_id"]))
    assert min(map(len, left)) > 0
    assert left[0] != left[1]


def test_a_missing_target_and_an_unknown_key_are_named(folder):
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        run_select(folder, target=folder / "nowhere.jsonl")
    result = subprocess.run(
        command(folder, folder / "run", "--mixture.temprature", "1"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "temprature" in result.stderr


def test_dvemb_serves_the_same_line(folder, tmp_path):
    dvemb = {**LATE, "embed_config": embed_config(tmp_path / "embed.yaml", estimator="dvemb")}
    out = run_select(folder, mode="weights", values=dvemb)
    assert json.loads((out / "manifest.json").read_text())["settings"]["embedding"]["estimator"] == "dvemb"
    assert read_mixture(out / "mixture.yaml").samples == 60


def test_how_well_anchors_express_the_target_is_in_the_manifest_and_the_report(folder, tmp_path, caplog):
    adjoint = {"anchors_per_domain": 1, "samples_per_anchor": 6}
    path = embed_config(tmp_path / "embed.yaml", estimator="anchors", horizon=12, adjoint=adjoint)
    with caplog.at_level(logging.INFO):
        out = run_select(folder, mode="weights", values={**LATE, "embed_config": path})
    residual = json.loads((out / "manifest.json").read_text())["residuals"]["late"]
    assert 0 < residual <= 1
    assert f"late window: the anchors leave {100 * residual:.0f} % of the target's gradient unexplained" in caplog.text
    shown = json.loads((out / "report_data" / "report.json").read_text(encoding="utf-8"))
    assert shown["residuals"] == {"late": pytest.approx(residual)}
    assert shown["horizons"] == {"late": "step_12"}


@pytest.mark.slow
def test_an_anchor_file_that_changed_is_another_selection(folder, tmp_path):
    write_tiny_target(tmp_path / "anchors.jsonl", documents=20)
    adjoint = {"anchor_files": [str(tmp_path / "anchors.jsonl")], "anchors_per_file": 2, "min_anchor_tokens": 50}
    path = embed_config(tmp_path / "embed.yaml", estimator="anchors", adjoint=adjoint)
    settings = {"mode": "weights", "values": {**LATE, "embed_config": path}}
    out = run_select(folder, **settings)
    write_tiny_target(tmp_path / "anchors.jsonl", documents=19)
    assert run_select(folder, **settings) != out


def test_the_last_source_sets_the_mixture_and_must_be_there(folder, tmp_path):
    for sources in (("early",), ("late", "early"), ("early", "current")):
        out = run_select(folder, mode="weights", values={"sources": sources})
        assert read_mixture(out / "mixture.yaml").source == sources[-1]
        assert set(pl.read_parquet(out / "domains.parquet")["source"]) == set(sources)
    Training(Run(folder / "run").spec.streams).run(tmp_path / "run", RecorderConfig(windows={"late": (8, 12)}))
    with pytest.raises(UserError, match=r"no window 'early'.*\['late'\].*values.sources"):
        run_select(folder, run=tmp_path / "run", values={"sources": ("early",)})


@pytest.mark.slow
def test_a_domain_of_which_nothing_is_left_has_no_weight(folder, tmp_path, caplog):
    """All that there is of one domain was trained on, and lies elsewhere in its stream since it was valued."""
    run = Run(folder / "run")
    run_select(folder, mode="weights")
    stream, trained = run.streams["json"], set(run.steps["sample_ids"].explode())
    rows = [stream.row(at) for at in range(len(stream)) if stream[at].sample_id in trained]
    write_stream(tmp_path / "json", stream.encodings[0], rows, shard_bytes=1500)
    moved = Run(folder / "run", {"json": tmp_path / "json"})
    given = {"mode": "samples", "filter": {"unseen_only": True}}
    loose = MixtureConfig(
        max_epochs=9, ceilings={"json": 0.5}, replay_domains=("json", "dataclasses"), replay_share=0.2
    )
    out = select(config_of(folder, out=tmp_path / "out", **given, mixture=loose), moved)
    mixture = read_mixture(out / "mixture.yaml")
    assert set(mixture.domains) == {"dataclasses"}
    assert (mixture.samples, mixture.domains["dataclasses"].prior) == (60, 1)
    assert f"nothing is left of json ({len(rows)} seen)" in caplog.text
    assert {row["domain"] for row in iterate(out / "data" / "mds")} == {"dataclasses"}
    assert (out / "report.html").exists()
    floor = config_of(
        folder, out=tmp_path / "floor", **given, mixture=MixtureConfig(max_epochs=9, floors={"json": 0.1})
    )
    with pytest.raises(UserError, match=r"nothing is left of json \(\d+ seen\).*lower mixture.floors of json"):
        select(floor, moved)


@pytest.mark.slow
def test_streams_with_other_samples_are_another_selection(folder, tmp_path):
    out, given = tmp_path / "out", {"mode": "weights"}
    run = Run(folder / "run")
    assert run_select(folder, out=out, **given) == run_select(folder, out=out, **given)
    moved, grown = {}, {}
    for domain, stream in run.streams.items():
        rows = [stream.row(at) for at in range(len(stream))]
        for kind, name, own in ((moved, "moved", rows[::-1]), (grown, "grown", [*rows, rows[0]])):
            kind[domain] = tmp_path / name / domain
            write_stream(kind[domain], stream.encodings[0], own, shard_bytes=1500)
    config = config_of(folder, out=out, **given)
    assert select(config, Run(folder / "run", moved)) == out  # the same samples
    with pytest.raises(UserError, match=r"selected from other samples than the streams hold now"):
        select(config, Run(folder / "run", grown))
    free = config_of(folder, **given)
    assert select(free, Run(folder / "run", grown)) != select(free, run)


@pytest.mark.parametrize(
    ("mixture", "problem"),
    [
        ({"floors": {"web": 0.1}}, r"mixture.floors names web"),
        ({"prior": {"json": 1.0, "web": 1.0}}, r"mixture.prior names web and lacks dataclasses"),
        ({"floors": {"json": 0.6}, "ceilings": {"json": 0.3}}, r"ceilings.json at least 0.6, or mixture.floors.json"),
    ],
)
def test_constraints_that_no_data_could_meet_are_refused_before_anything_is_valued(
    folder, monkeypatch, mixture, problem
):
    monkeypatch.setattr("curate.selection.pipeline.measure", lambda *_: pytest.fail("values were made"))
    with pytest.raises(UserError, match=problem):
        run_select(folder, mode="weights", seed=77, mixture=MixtureConfig(**mixture))
