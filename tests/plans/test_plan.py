"""Plans as texts: everything that a stage's command and selection can be wrong in is said when the plan is read."""

import pytest
import yaml

from curate.core.errors import UserError
from curate.plans.plan import load_plan

TRAIN = "train --out {out} --data {data} --steps {steps}"


def write(folder, changes):
    stages = [{"name": "one", "steps": 8}, {"name": "two", "steps": 8}, {"name": "three", "steps": 8}]
    plan = {"folder": "p", "data": "d", "target": "t.jsonl", "train": TRAIN, "stages": stages} | changes
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    return path


@pytest.mark.parametrize(
    "command",
    [
        "train '{out}",
        'train "',
        "train \\",
        "",
        "   ",
        "''",
        "' '",
        "train {steps!q}",
        "train {steps:zz}",
        "train {steps:99999d}",
        "train {steps:{tokens}}",
        "train {}",
        "train {0}",
        "train {steps.real}",
        "train {steps[0]}",
        "train {name:d}",
        "train \0",
        "train {nobody}",
        "train {",
        "train }",
        "train {out!s:.%}",
    ],
)
def test_a_command_that_cannot_be_filled_in_is_refused_for_every_stage(tmp_path, command):
    stages = [{"name": "one", "steps": 8}, {"name": "two", "steps": 8}, {"name": "three", "steps": 8, "train": command}]
    with pytest.raises(UserError, match=r"plan\.yaml: (the|stages|train).*") as refused:
        load_plan(write(tmp_path, {"stages": stages}))
    assert "three" in str(refused.value) or repr(command) in str(refused.value)
    with pytest.raises(UserError, match=r"plan\.yaml: "):
        load_plan(write(tmp_path, {"train_first": command}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": {"mixture": "early"}}, r"selection\.mixture after stage one: "),
        ({"selection": {"mixture": {"schedule": "early"}}}, r"selection\.mixture after stage one: schedule: "),
        ({"selection": {"mixture": {"schedule": None}}}, r"selection\.mixture after stage one: schedule: "),
        ({"checkpoint": "../other/c.pt"}, "does not lie in"),
        ({"checkpoint": "/c.pt"}, "does not lie in"),
        ({"data": "s3://bucket/data"}, r"data: s3://bucket/data is a URL"),
        ({"stages": [{"name": "one", "steps": 8, "windows": {"late": [7, 9]}}]}, "window 'late' covers steps 7 to 9"),
        ({"stages": [{"name": "one", "steps": True}]}, r"stages\.0\.steps: is true"),
        ({"stages": [{"name": "one", "lr_schedule": {"lr": float("inf")}, "steps": 1}]}, r"0\.lr_schedule\.lr: "),
        ({"stages": [{"name": "../one", "steps": 8}]}, r"stages\.0\.name: "),
        ({"stages": [{"name": "one\n", "steps": 8}]}, r"stages\.0\.name: "),
        ({"stages": {"name": "one", "steps": 8, 3: 4}}, r"stages\.0\.3: "),
        ({3: 4}, r"plan\.yaml: 3: "),
    ],
)
def test_what_cannot_be_meant_is_refused_when_the_plan_is_read(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        load_plan(write(tmp_path, changes))


def test_places_may_be_in_the_home_folder_and_numbers_are_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = write(tmp_path, {"folder": "~/p", "data": "~/d", "train_first": TRAIN + " --lr {rate:.2e} '{{}}'"})
    text = path.read_text().replace("name: one", "name: one\n  settings: {rate: 1e-3}")
    path.write_text("\ufeff" + text, encoding="utf-8")
    words = load_plan(path).arguments(0)
    assert words[2:5:2] == ["/home/somebody/p/one/run", "/home/somebody/d"]
    assert words[7:] == ["--lr", "1.00e-03", "{}"]
