"""All pairs of settings with few values: each does something in a selection, or is refused.

A setting does something where what the selection writes is not what it writes without the setting. What every
selection records of its settings (its manifest, its report) does not count.
"""

import json
from itertools import combinations
from pathlib import Path

import pytest
from pydantic import ValidationError

from curate.core.artifacts import sum_of
from curate.core.errors import UserError
from curate.data.mds import COLUMNS, MdsStream, write_stream
from curate.domains.methods import ESTIMATORS
from curate.select import SelectConfig, select
from curate.training.run import Run
from tests import tiny

SEQ_LEN = 24  # overlaps are of 13 tokens
DEFAULTS = {"output.wandb": "none", "budget_tokens": 40 * SEQ_LEN, "values.min_target_tokens": 100}
OPTIONS = {
    "method": ["proportional", "uniform", "random", "dsir", "grad-dot", "less", "shapley", "shuffled"],
    "mode": ["weights", "both"],
    "mixture.schedule": ["early-and-late", "anneal"],
    "values.sources": [("early",), ("late",), ("current",), ("early", "late")],
    "filter.unseen_only": [True, False],
    "filter.contamination_overlap": [None],
    "filter.drop_fraction": [0.5],  # none drops as many as the default of the dozen samples of a tiny window
    "output.wandb": ["offline"],
    "candidates": ["new", "mixed"],
    "retain": ["general.jsonl"],
    "more_targets": ["other.jsonl"],
}
CHOICES = [(name, value) for name, values in OPTIONS.items() for value in values]
PAIRS = [pair for pair in combinations(CHOICES, 2) if pair[0][0] != pair[1][0]]
NOT_COMPARED = ("manifest.json", "settings.json", "report.html", "costs.parquet", "curate.sums.json", "report_data")


def states_what_holds(setting, others):
    """Whether a setting says what would be chosen without it: it changes nothing, and what it says is done."""
    name, value = setting
    method, candidates = others.get("method"), others.get("candidates")
    if name == "values.sources":
        return value == (("late",) if method in (*ESTIMATORS, "shuffled") else ("current",))
    if name == "filter.unseen_only":
        return value is (candidates is not None) or (value is False and candidates == "new")  # nothing was seen
    return False


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, targets of which one holds text of the run, candidates without (`new`) and with (`mixed`) seen samples."""
    folder = tmp_path_factory.mktemp("pairs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SEQ_LEN", SEQ_LEN)
        run = tiny.record_tiny_run(folder)
    seen = set(run.steps["sample_ids"].explode())
    leaked = []
    for domain in ("json", "dataclasses"):
        stream = MdsStream(folder / "data" / domain)
        rows = {True: [], False: []}
        for at in range(len(stream)):
            rows[stream[at].sample_id in seen].append(stream.row(at))
        write_stream(folder / "new" / domain, COLUMNS, rows[False], shard_bytes=3000)
        write_stream(folder / "mixed" / domain, COLUMNS, rows[False] + rows[True][:9], shard_bytes=3000)
        leaked += [rows[False][3]["tokens"].tolist(), rows[True][3]["tokens"].tolist()]
    for name, documents in (("target", 12), ("other", 15), ("general", 18)):
        tiny.write_tiny_target(folder / f"{name}.jsonl", documents)
    with (folder / "target.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": f"l{at}", "tokens": tokens}) + "\n" for at, tokens in enumerate(leaked))
    return folder


class Nobody:
    """Stands for the tracker: the service is not asked, and that it was told leaves a trace."""

    def __init__(self, folder):
        (folder / "wandb").write_text("told")

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def written(folder):
    """What a selection with some settings writes: file -> digest; None where they are refused."""
    made = {}

    def of(settings):
        key = json.dumps(dict(sorted(settings.items())), default=str)
        if key not in made:
            made[key] = _select(folder, settings, folder / "out" / str(len(made)))
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("curate.report.track.open_tracker", lambda config, folder, *_: Nobody(folder))
        yield of


def _select(folder, settings, out):
    raw = {"run": folder / "run", "target": folder / "target.jsonl", "out": out}
    for name, value in {**DEFAULTS, **settings}.items():
        group, _, leaf = name.rpartition(".")
        (raw.setdefault(group, {}) if group else raw)[leaf] = value
    for name in {"candidates", "retain"} & raw.keys():
        raw[name] = folder / raw[name]
    if "more_targets" in raw:
        raw["more_targets"] = {str(folder / raw["more_targets"]): 0.5}
    try:
        select(config := SelectConfig(**raw), Run(config.run))
    except (ValidationError, UserError):
        return None
    files = (path.relative_to(out) for path in Path(out).rglob("*") if path.is_file())
    # places lie in data/*.yaml: all selections are of one folder
    return {str(file): sum_of(out / file) for file in files if file.parts[0] not in NOT_COMPARED}


@pytest.mark.parametrize("setting", CHOICES, ids=str)
def test_a_setting_acts_or_says_what_holds(written, setting):
    found = written(dict([setting]))
    assert found is not None
    assert (found == written({})) == states_what_holds(setting, {})


@pytest.mark.slow
def test_each_of_two_settings_acts_or_both_are_refused(written):
    idle = []
    for pair in PAIRS:
        both = written(dict(pair))
        for setting, other in (pair, pair[::-1]):
            if both is not None and (both == written(dict([other]))) != states_what_holds(setting, dict([other])):
                idle.append((setting, "beside", other))
    assert not idle, "\n".join(map(str, idle))


def test_most_pairs_are_possible(written):
    refused = sum(written(dict(pair)) is None for pair in PAIRS)
    assert refused < 0.4 * len(PAIRS)
