"""Settings of `curate.select`: each acts or is refused, old names are told the new ones, and they are few."""

import re

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from curate.core.config import parse_command
from curate.core.errors import UserError
from curate.core.validation import kinds_of
from curate.embeddings.embed import EmbedConfig
from curate.plans.plan import load_plan
from curate.selection.config import SelectConfig

WITHOUT_VALUES = ("proportional", "uniform", "random", "dsir")
OF_WINDOWS = ("grad-dot", "less", "shapley", "shuffled")


def nested(settings):
    raw = {}
    for name, value in settings.items():
        *groups, leaf = name.split(".")
        inner = raw
        for group in groups:
            inner = inner.setdefault(group, {})
        inner[leaf] = value
    return raw


CASES = [  # a setting without effect, beside others
    *(("values.dsir_temperature", 2.0, {"method": method}) for method in ("curate", "random", *OF_WINDOWS)),
    *(
        (setting, value, {"method": method})
        for method in (*WITHOUT_VALUES, *OF_WINDOWS)
        for setting, value in (
            ("values.ngram_share", 0.3), ("values.measured_per_domain", 7), ("values.measured_passes", 7.0)
        )
    ),
    *(
        (setting, value, {"method": method})
        for method in WITHOUT_VALUES
        for setting, value in (
            ("values.sources", ["late"]), ("values.embed_config", "e.yaml"), ("mixture.branch_test", "b.json"),
            ("more_targets", {"o.jsonl": 1.0}), ("retain", "g.jsonl"), ("filter.drop_fraction", 0.1),
            ("output.wandb", "offline"), ("output.wandb_texts", True),
        )
    ),
    *((("mixture.prior_strength", 0.5, {"method": method})) for method in ("proportional", "uniform", "random")),
    *(("candidates", "new", {"method": method}) for method in OF_WINDOWS),
    *(("values.sources", ["current"], {"method": method}) for method in OF_WINDOWS),
    *(
        (setting, value, {"mode": "weights"})
        for setting, value in (
            ("filter.drop_fraction", None), ("filter.duplicate_overlap", 0.5), ("values.measured_passes", 7.0),
            ("output.shard_bytes", 9999), ("filter.unseen_only", True),
        )
    ),
    ("filter.unseen_only", True, {"mode": "both"}),
    ("mixture.early_share", 0.3, {}),
    ("mixture.early_share", 0.3, {"mixture.schedule": "anneal"}),
    ("mixture.late_share", 0.3, {}),
    ("mixture.max_regression", 0.3, {}),
    ("mixture.replay_share", 0.3, {}),
    ("mixture.replay_domains", ["web"], {}),
    ("filter.held_out", ["h.jsonl"], {"filter.contamination_overlap": None}),
    ("output.wandb_texts", True, {"output.wandb": "none"}),
    ("values.sources", ["early"], {"candidates": "new"}),
    ("mixture.branch_test", "b.json", {"candidates": "new"}),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value", "others"), CASES, ids=str)
def test_a_setting_without_effect_is_refused(setting, value, others):
    beside = {"target": "t.jsonl", **others}
    SelectConfig.model_validate(nested(beside))
    with pytest.raises(ValidationError, match=re.escape(setting)):
        SelectConfig.model_validate(nested({**beside, setting: value}))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dsir", "values.dsir_temperature": 2.0, "mixture.prior_strength": 0.5},
        {"method": "dsir", "output.wandb": "none"},
        {"mixture.schedule": "early-and-late", "mixture.early_share": 0.3, "mixture.late_share": 0.3},
        {"mixture.schedule": "anneal", "mixture.late_share": 0.3},
        {"retain": "g.jsonl", "mixture.max_regression": 0.3},
        {"mixture.replay_domains": ["web"], "mixture.replay_share": 0.3},
        {"mode": "weights", "filter.unseen_only": False, "candidates": "new"},
        {"output.wandb": "offline", "output.wandb_texts": True},
        {"method": "less", "values.sources": ["early", "late"], "values.embed_config": "e.yaml"},
        {"mode": "samples", "method": "curate", "filter.drop_fraction": 0.2},  # defaults that are said
    ],
    ids=str,
)
def test_settings_that_act_are_taken(settings):
    SelectConfig.model_validate(nested({"target": "t.jsonl", **settings}))


def leaves(config, above=""):
    for name, field in config.model_fields.items():
        groups = [kind for kind in kinds_of(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for group in groups:
            yield from leaves(group, f"{above}{name}.")
        if not groups:
            yield above + name


def test_there_are_few_enough_settings_to_read(capsys, monkeypatch):
    assert len(list(leaves(SelectConfig))) <= 45
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit):
        parse_command(SelectConfig, "python -m curate.select", "What it does.", ["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 120


OLD = [(config, *entry) for config in (SelectConfig, EmbedConfig) for entry in config.RENAMED.settings.items()]


@pytest.mark.parametrize(("config", "old", "new"), OLD)
def test_what_an_old_name_is_called_now_is_a_setting_or_a_sentence(config, old, new):
    groups = {name.rpartition(".")[0] for name in leaves(config)}
    assert new in {*leaves(config), *groups} or " " in new
    assert old not in leaves(config)


def test_old_names_in_a_file_are_one_error_with_all_new_names(tmp_path):
    for config, given in ((SelectConfig, {"target": "t.jsonl"}), (EmbedConfig, {})):
        table = config.RENAMED.settings
        groups = {name for name in table if any(other.startswith(f"{name}.") for other in table)}
        names = {name: new for name, new in table.items() if name not in groups}
        (tmp_path / "old.yaml").write_text(yaml.safe_dump(given | nested(dict.fromkeys(names, 3))))
        with pytest.raises(UserError) as refused:
            parse_command(config, "x", "", ["--config", str(tmp_path / "old.yaml")])
        for name, new in names.items():
            assert f"{name} {new}" in str(refused.value) or f"{name} is now {new}" in str(refused.value), name


def test_old_values_are_told_the_new_ones(tmp_path):
    for name, values in SelectConfig.RENAMED.values.items():
        for old, new in values.items():
            (tmp_path / "old.yaml").write_text(yaml.safe_dump({"target": "t.jsonl"} | nested({name: old})))
            with pytest.raises(UserError, match=rf"{name}: {old} .*{re.escape(new)}"):
                parse_command(SelectConfig, "x", "", ["--config", str(tmp_path / "old.yaml")])


def test_old_names_in_a_plan_are_one_error_too(tmp_path):
    selection = {"window": "late", "shards": {"consume_once": True}, "mode": "filter", "mixture": {"temperature": 1}}
    stages = [{"name": name, "steps": 8} for name in ("one", "two")]
    plan = {"folder": "p", "data": "d", "target": "t.jsonl", "train": "t {out}", "stages": stages}
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan | {"selection": selection}))
    with pytest.raises(UserError) as refused:
        load_plan(tmp_path / "plan.yaml")
    for new in ("values.sources", "filter.unseen_only", "mode: samples", "mixture.prior_strength"):
        assert f"is now {new}" in str(refused.value)
