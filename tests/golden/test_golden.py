"""What a selection holds, configuration by configuration, against numbers that were committed (`golden.json`).

Other tests compare today with today; this one compares today with the commit that last meant to change a number. A
commit that changes `golden.json` says why. Make it again with `python -m tests.golden.test_golden`.

Counts and choices of samples must be equal. Numbers must agree to `CLOSE`: their last digits differ between processors.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml

from curate.core.trust import trust
from curate.data.mds import COLUMNS, MdsStream, iterate, write_stream
from curate.embeddings.run_capture import CaptureConfig
from curate.mixture.record import read_mixture
from curate.select import SelectConfig, select
from curate.training.run import Run
from tests.tiny import SEQ_LEN, Training, write_tiny_streams, write_tiny_target

GOLDEN = Path(__file__).with_name("golden.json")
DOMAINS = ("json", "dataclasses")
CLOSE = 2e-3  # relative to the largest number of a list
LATE = {"sources": ["late"]}
WINDOWS = {"sources": ["early", "late"]}
PHASES = {"early_share": 0.2, "late_share": 0.3}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "weights": {"mode": "weights", "values": WINDOWS},
    "samples": {"values": WINDOWS},
    "samples by the early window": {"values": {"sources": ["early"]}},
    "samples by the current state": {},
    "weights by the current state": {"mode": "weights"},
    "samples by rows": {"retain": "general.jsonl", "values": {"rows": True, "measured_per_domain": 30}},
    "early-and-late schedule": {
        "mode": "both", "values": WINDOWS, "mixture": {"schedule": "early-and-late", **PHASES},
    },
    "anneal schedule": {
        "mode": "both", "values": WINDOWS, "mixture": {"schedule": "anneal", "late_share": 0.3},
    },
    "candidates": {"candidates": "new", "values": {"measured_per_domain": 20}},
    "candidates by weights": {"candidates": "new", "mode": "weights", "values": {"measured_per_domain": 20}},
    "candidates by rows": {"candidates": "new", "values": {"measured_per_domain": 30, "rows": True}},
    "several targets with retention": {
        "values": LATE, "more_targets": {"other.jsonl": 0.5}, "retain": "general.jsonl",
    },
    "read at the stage's end": {"mode": "weights", "values": WINDOWS, "embedding": {"horizon": "stage_end"}},
    "anchors": {
        "mode": "weights", "values": LATE,
        "embedding": {"estimator": "anchors", "adjoint": {"anchors_per_domain": 1, "samples_per_anchor": 6}},
    },
    "dvemb": {"mode": "weights", "values": LATE, "embedding": {"estimator": "dvemb"}},
    "dvemb-adam": {"mode": "weights", "values": LATE, "embedding": {"estimator": "dvemb-adam"}},
    "dvemb captured in the run": {
        "mode": "weights", "values": LATE, "embedding": {"estimator": "dvemb"}, "run": "captured",
    },
    "dsir": {"method": "dsir", "values": {"dsir_temperature": 8.0}},
    "less": {"method": "less", "mode": "weights"},
    "grad-dot": {"method": "grad-dot"},
    "shuffled": {"method": "shuffled", "mode": "weights"},
    "proportional": {"method": "proportional"},
    "given weights": {
        "method": "proportional", "mode": "weights", "mixture": {"prior": {"json": 0.25, "dataclasses": 0.75}},
    },
}  # fmt: skip


def make_inputs(folder: Path) -> Path:
    """Two recorded runs (one with captured gradients), candidates that no run saw, targets."""
    texts = GOLDEN.parent  # committed: the standard library's texts differ between versions of Python
    streams = write_tiny_streams(folder / "data", sources={name: texts / f"{name}.txt" for name in DOMAINS})
    Training(streams).run(folder / "run")
    run = Run(folder / "run")
    Training(streams, capture=CaptureConfig(estimator="dvemb")).run(folder / "captured")
    seen = set(run.steps["sample_ids"].explode())
    for domain in DOMAINS:
        stream = MdsStream(folder / "data" / domain)
        rows = [stream.row(at) for at in range(len(stream)) if stream[at].sample_id not in seen]
        write_stream(folder / "new" / domain, COLUMNS, rows, shard_bytes=3000)
    for name, documents in (("target", 12), ("other", 15), ("general", 18)):
        write_tiny_target(folder / f"{name}.jsonl", documents, source=texts / "argparse.txt")
    return folder


def select_with(folder: Path, name: str, out: Path) -> Path:
    """The selection of one configuration; names of files stand for files of `folder`."""
    given = {"run": "run", "target": "target.jsonl", **CONFIGURATIONS[name]}
    for key in ("run", "target", "candidates", "retain"):
        if key in given:
            given[key] = folder / given[key]
    if "more_targets" in given:
        given["more_targets"] = {str(folder / file): weight for file, weight in given["more_targets"].items()}
    values = {"min_target_tokens": 100, **given.get("values", {})}
    if "embedding" in given:
        values["embed_config"] = folder / f"{name}.yaml".replace(" ", "-").replace("'", "")
        values["embed_config"].write_text(yaml.safe_dump(given.pop("embedding")), encoding="utf-8")
    given |= {"values": values, "output": {"wandb": "none"}, "budget_tokens": 40 * SEQ_LEN, "out": out}
    config = SelectConfig.model_validate(given)
    return select(config, Run(config.run))


def summary_of(selection: Path) -> dict[str, Any]:
    """What must not change unnoticed: `exact` as it is, `close` up to rounding."""
    mixture = read_mixture(selection / "mixture.yaml")
    domains = sorted(mixture.domains)
    exact: dict[str, Any] = {
        "samples": {name: mixture.domains[name].samples for name in domains},
        "binding": {name: mixture.domains[name].binding for name in domains},
        "phases": [
            [phase.start_sample, phase.samples, dict(sorted(phase.domains.items()))] for phase in mixture.phases
        ],
    }
    close = {"weights": [mixture.domains[name].weight for name in domains]}
    scores = pl.read_parquet(selection / "scores.parquet")
    for (target, source), part in scores.group_by("target", "source", maintain_order=True):
        close[f"values {target} {source}"] = part.sort("domain", "step", "row")["value_total_nats"].to_list()
    table = pl.read_parquet(selection / "domains.parquet").sort("source", "target", "domain")
    close["shrunk"] = [value or 0.0 for value in table["shrunk"].to_list()]
    if (selection / "data" / "mds").exists():
        exact["written"] = _written(selection / "data" / "mds")
        reasons = pl.read_parquet(selection / "data" / "mds" / "dropped.parquet")["reason"].value_counts(sort=False)
        exact["dropped"] = dict(sorted(reasons.iter_rows()))
    for name in ("streams.yaml", "schedule.yaml"):
        if (selection / "data" / name).exists():
            exact[name] = _counts(yaml.safe_load((selection / "data" / name).read_text(encoding="utf-8")))
    return {
        "exact": exact,
        "close": {key: [float(f"{value:.6g}") for value in values] for key, values in close.items()},
    }


def _written(data: Path) -> str:
    """A digest of the samples of every MDS folder, in the order written."""
    folders = sorted({shard.parent for shard in data.rglob("*.mds")})
    ids = [f"{folder.relative_to(data)} {row['sample_id']}" for folder in folders for row in iterate(folder)]
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]


def _counts(written: Any) -> Any:
    """Streams or phases without the places where they lie."""
    if isinstance(written, list):
        return [_counts(entry) for entry in written]
    if isinstance(written, dict):
        return {key: _counts(value) for key, value in written.items() if key not in ("local", "remote", "split")}
    return written


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_selection_is_what_it_was(inputs, name):
    wanted = json.loads(GOLDEN.read_text(encoding="utf-8"))[name]
    found = summary_of(select_with(inputs, name, inputs / "selections" / name.replace(" ", "-")))
    assert found["exact"] == wanted["exact"]
    assert found["close"].keys() == wanted["close"].keys()
    for key, values in wanted["close"].items():
        largest = max(map(abs, values), default=0.0)
        assert found["close"][key] == pytest.approx(values, rel=0, abs=CLOSE * largest), key


def test_every_configuration_has_numbers():
    assert json.loads(GOLDEN.read_text(encoding="utf-8")).keys() == CONFIGURATIONS.keys()


def main() -> None:
    """Write `golden.json` from what the code does now."""
    trust(["tests.tiny"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_inputs(Path(scratch))
        golden = {name: summary_of(select_with(folder, name, folder / "out" / name)) for name in CONFIGURATIONS}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
