"""Settings of every command: what one value, a path and a number may be, by flag and by file."""

import importlib
import math
import re
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from curate.config import Config, parse_command
from curate.errors import UserError
from curate.selection import SelectConfig
from curate.validation import is_list, kinds_of
from tests.test_project import commands

NEEDED = {  # by the name of a setting that has no default, where its kind does not say what would do
    "streams": {"web": {"local": "x"}}, "dataset": {}, "loader": {"batch_size": 1}, "task": {"model": {}},
    "optimizers": [{}], "log": {"file": "x"}, "checkpoints": {0: "x"},
}  # fmt: skip


class Asked(Exception):  # noqa: N818
    """Carries what a command asked for."""


def config_of(command):
    """The class that a command gives to `parse_command`."""
    spec = find_spec(command)
    module = importlib.import_module(f"{command}.__main__" if spec.submodule_search_locations else command)
    original = module.parse_command

    def stop(config, *rest):
        raise Asked(config)

    module.parse_command = stop
    try:
        module.main()
    except Asked as asked:
        return asked.args[0]
    finally:
        module.parse_command = original
    raise AssertionError(command)


COMMANDS = {command: config_of(command) for command in commands()}


def is_group(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def settings(config, above=()):
    """Keys and field of every setting, those of groups included."""
    for name, field in config.model_fields.items():
        yield (*above, name), field
        for kind in filter(is_group, kinds_of(field.annotation)):
            yield from settings(kind, (*above, name))


def example(annotation):
    kind = kinds_of(annotation)[0]
    if is_group(kind) or get_origin(kind) is dict:
        return {}
    return get_args(kind)[0] if get_origin(kind) else {int: 3, float: 0.5}.get(kind, "x")


def needed(config):
    """What a config has to be given."""
    fields = {name: field for name, field in config.model_fields.items() if field.is_required()}
    return {name: deepcopy(NEEDED.get(name, example(field.annotation))) for name, field in fields.items()}


def given(config, keys, value, folder, by):
    """The setting, as a command has it that is given one value by a flag or by a file."""
    raw = needed(config)
    inner, group = raw, config
    for key in keys[:-1]:
        group = kinds_of(group.model_fields[key].annotation)[0]
        inner = inner.setdefault(key, needed(group) if is_group(group) else {})
    text = yaml.safe_dump(value, default_flow_style=True).splitlines()[0]
    arguments = [f"--{'.'.join(keys)}={value if isinstance(value, str) else text}"]
    if by == "file":
        inner[keys[-1]] = value
        arguments = []
    (folder / "c.yaml").write_text(yaml.safe_dump(raw))
    config = parse_command(config, "x", "", ["--config", str(folder / "c.yaml"), *arguments])
    for key in keys:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    return config


def listed():
    for command, config in COMMANDS.items():
        for keys, field in settings(config):
            for kind in filter(is_list, kinds_of(field.annotation)):
                yield pytest.param(config, keys, kind, id=f"{command} {'.'.join(keys)}")


@pytest.mark.parametrize(("config", "keys", "kind"), list(listed()))
def test_one_value_is_a_list_of_one(config, keys, kind, tmp_path):
    others = {"resumed": {"step": 1}, "methods": "proportional"}
    value = others.get(keys[-1], example(get_args(kind)[0]))
    made = [given(config, keys, value, tmp_path, by) for by in ("flag", "file")]
    wanted = given(config, keys, [value], tmp_path, "file")
    assert made == [wanted, wanted]
    assert len(wanted) == 1


def paths():
    for command, config in COMMANDS.items():
        for keys, field in settings(config):
            for kind in kinds_of(field.annotation):
                if kind is Path or Path in get_args(kind):
                    more = ("7",) if get_origin(kind) is dict else ()
                    yield pytest.param(config, (*keys, *more), id=f"{command} {'.'.join(keys)}")


@pytest.mark.parametrize(("config", "keys"), list(paths()))
def test_a_path_may_start_with_the_home_folder_and_is_no_url(config, keys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    if keys == ("checkpoints", "7"):  # its keys are numbers
        keys = ("log", "file")
    for by in ("flag", "file"):
        made = given(config, keys, "~/x", tmp_path, by)
        assert (list(made) if isinstance(made, tuple) else [made]) == [Path("/home/somebody/x")]
        with pytest.raises(UserError, match=rf"{re.escape('.'.join(keys[:1]))}.*s3://b/x is a URL"):
            given(config, keys, "s3://b/x", tmp_path, by)


def numbers():
    for command, config in COMMANDS.items():
        for keys, field in settings(config):
            if {int, float} & set(filter(lambda kind: isinstance(kind, type), kinds_of(field.annotation))):
                yield pytest.param(config, keys, kinds_of(field.annotation), id=f"{command} {'.'.join(keys)}")


@pytest.mark.parametrize(("config", "keys", "kinds"), list(numbers()))
def test_a_number_is_finite_and_of_a_size_that_can_be_handled(config, keys, kinds, tmp_path):
    endless = keys[-1] in ("decay_epochs", "clip_norm")
    wrong = [math.nan, True, -math.inf, *([] if endless else [math.inf]), *([10**30] if float not in kinds else [])]
    for value in wrong if str not in kinds else wrong[:1]:
        for by in ("flag", "file"):
            with pytest.raises(UserError, match=rf"{re.escape('.'.join(keys))}|c.yaml line \d+: an integer of"):
                given(config, keys, value, tmp_path, by)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("tolerance", -1), ("target_batch_size", 0), ("min_target_tokens", 0), ("mixture.temperature", 0),
        ("mixture.floors.web", 1.5), ("mixture.ceilings.web", -0.1), ("dvemb.width", 0),
        ("tracking.timeout_seconds", 0), ("adjoint.save_seconds", -1), ("more_targets.other", 0),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_refused(flag, value):
    with pytest.raises(UserError, match=rf"--{re.escape(flag)}: .*{value}\b"):
        parse_command(SelectConfig, "x", "", ["--target", "t", f"--{flag}={value}"])


class Inner(Config):
    mode: str = "a"
    size: int = 1


class Outer(Config):
    names: dict[str, str] = {}
    inner: Inner = Inner(mode="b")
    other: Inner | None = None
    fast: bool = False
    weights: dict[str, float] = {}


def parse(*arguments):
    return parse_command(Outer, "x", "", arguments)


def test_later_ones_override_and_the_other_settings_of_a_group_stay(tmp_path):
    (tmp_path / "a.yaml").write_text("inner: {size: 2}\nnames: {a: b}\nfast: true\n")
    (tmp_path / "b.yaml").write_text("inner: {size: 3}\nother: {}\n")
    first, second = (f"--config={tmp_path / name}.yaml" for name in "ab")
    assert parse("--inner.size", "2") == Outer(inner=Inner(mode="b", size=2))
    assert parse("--inner", "{size: 2}", "--fast", "--names.a.b", "c") == parse(
        "--fast=true", "--inner.size=2", "--names", "{a.b: c}"
    )
    assert parse(first, second) == Outer(inner=Inner(mode="b", size=3), names={"a": "b"}, fast=True, other=Inner())
    assert parse(second, "--inner.size=5", first).inner == Inner(mode="b", size=2)
    assert parse(first, "--names.c", "d", "--fast", "false").names == {"a": "b", "c": "d"}
    assert parse(second, "--other", "null").other is None
    assert parse("--other.size", "7").other == Inner(size=7)
    assert parse("--names", "{a: '1e3', b: \"null\"}").names == {"a": "1e3", "b": "null"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x",), "'x' stands where an option"), (("--",), "stands where"), (("--fast.x", "3"), "--fast has no"),
        (("--inner.size",), "--inner.size needs a value"), (("--inner.sise=3",), "no option --inner.sise"),
        (("--inner=3",), "--inner: "), (("--inner={",), "--inner line 1: "), (("--weights.a", "b"), "--weights.a: "),
        (("--config", "no.yaml"), "no.yaml does not exist"), (("--config=gs://b/c",), "--config: gs://b/c is a URL"),
        (("--config",), "--config needs a value"),
        (("--inner", "{size: " * 999), "--inner line 1: nested deeper"),
        (("--inner.size", "9" * 5000), "--inner.size: "),
    ],
)  # fmt: skip
def test_what_is_no_option_is_refused(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        parse(*arguments)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"inner: {size: 0x}", r"a.yaml: inner.size: "), (b"inner: {\xff: 1}", r"a.yaml line 1: not UTF-8"),
        (b"- a", r"a.yaml holds list"), (b"3: a", r"a.yaml: 3: "), (b"fast: [", r"a.yaml line 1: "),
        (b"fast: a\nfast: b", r"a.yaml line 2: the key 'fast' stands twice"), (b"iner: {}", r"a.yaml: iner: there"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_names_the_file(tmp_path, content, message):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        parse("--config", str(tmp_path / "a.yaml"))


def test_a_printed_config_is_the_config(tmp_path, capsys):
    for arguments in ((), ("--names.1e3", "2024-01-01", "--inner.mode", "null", "--weights.a=1e-5")):
        with pytest.raises(SystemExit):
            parse(*arguments, "--print_config")
        (tmp_path / "a.yaml").write_text(capsys.readouterr().out)
        assert parse(f"--config={tmp_path / 'a.yaml'}") == parse(*arguments)
