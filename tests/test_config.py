"""Settings of every command: what one value, a path and a number may be, by flag and by file."""

import importlib
import math
import re
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel, Field

from curate.core.config import Config, FileName, TokenCount, parse_command
from curate.core.errors import UserError
from curate.core.renamed import Renamed
from curate.core.validation import changed, is_list, kinds_of
from curate.embeddings.embed import EmbedConfig
from curate.select import SelectConfig
from tests.test_project import commands

NEEDED = {  # by the name of a setting that has no default, where its kind does not say what would do
    "streams": {"web": {"local": "x"}}, "dataset": {}, "loader": {"batch_size": 1}, "task": {"model": {}},
    "optimizers": [{}], "log": {"file": "x"}, "checkpoints": {0: "x"},
}  # fmt: skip


BESIDE = {"mixture.replay_domains": {"mixture": {"replay_share": 0.1}}, "value_curve": {"windows": "auto"}}
"""What a setting needs beside it to have an effect."""


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
    if get_origin(kind) is tuple:
        return [example(get_args(kind)[0])]
    return get_args(kind)[0] if get_origin(kind) else {int: 3, float: 0.5}.get(kind, "x")


def needed(config):
    """What a config has to be given."""
    fields = {name: field for name, field in config.model_fields.items() if field.is_required()}
    return {name: deepcopy(NEEDED.get(name, example(field.annotation))) for name, field in fields.items()}


def given(config, keys, value, folder, by):
    """The setting, as a command has it that is given one value by a flag or by a file."""
    beside = {"window": "late"} if config is EmbedConfig and keys != ("candidates",) else {}
    raw = needed(config) | beside | deepcopy(BESIDE.get(".".join(keys), {}))
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
    endless = keys[-1] == "clip_norm"
    wrong = [math.nan, True, -math.inf, *([] if endless else [math.inf]), *([10**30] if float not in kinds else [])]
    for value in wrong if str not in kinds else wrong[:1]:
        for by in ("flag", "file"):
            with pytest.raises(UserError, match=rf"{re.escape('.'.join(keys))}|c.yaml line \d+: an integer of"):
                given(config, keys, value, tmp_path, by)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("values.min_target_tokens", 0), ("values.ngram_share", 1.5), ("mixture.prior_strength", 0),
        ("mixture.floors.web", 1.5), ("mixture.ceilings.web", -0.1), ("filter.drop_fraction", 1),
        ("output.shard_bytes", 9), ("values.measured_passes", -1), ("more_targets.other", 0),
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


class Leaf(Config):
    """What a list holds. And more."""

    rate: float = Field(default=0.1, gt=0)
    """How fast."""


class Middle(Config):
    kind: Literal["a", "b"] = "a"
    """Which one."""
    leaf: Leaf = Leaf(rate=0.5)


class Top(Config):
    target: Path
    """What for."""
    tokens: TokenCount = 5
    tokens_or_none: TokenCount | None = None
    share: float | None = Field(default=1.0, ge=0, le=1)
    state: Literal["end"] | int = "end"
    once: bool = False
    files: tuple[FileName, ...] = ()
    sizes: list[Annotated[int, Field(ge=1)]] = [1, 2]
    methods: tuple[Literal["x", "y"], ...] = ("x",)
    pair: tuple[float, float] = (0.5, 1)
    ceiling: float = Field(default=math.inf, allow_inf_nan=True)
    floors: dict[str, float] = {}
    nested: dict[str, dict[str, Any]] = {"a": {"b": 1}}
    name: str = ""
    middle: Middle = Middle(kind="b")
    """In between. It has a leaf."""
    off: Leaf | None = None
    leaves: tuple[Leaf, ...] = ()
    named: dict[str, Leaf] = {}


def help_of(config, capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        parse_command(config, "python -m x", "What it does.", arguments)
    assert stopped.value.code == 0
    return capsys.readouterr().out


def flags(page):
    """The text beside each flag or name of a page."""
    texts, head = {}, None
    for line in page.splitlines():
        if re.match(r"  \S", line):
            head, _, text = line.strip().partition("  ")
            texts[head] = text.strip()
        elif head and line.startswith("   "):
            texts[head] = f"{texts[head]} {line.strip()}".strip()
        else:
            head = None
    return texts


def test_help_says_what_each_type_takes(capsys):
    texts = flags(help_of(Top, capsys, "-h"))
    assert {flag: text.partition("[")[2].removesuffix("]") for flag, text in texts.items() if flag in TYPES} == TYPES
    assert texts["--target"].startswith("What for. [")
    assert next(flag for flag in texts if flag.startswith("--")) == "--target"
    assert {"--config FILE.yaml", "--trust MODULE", "--print_config"} < set(texts)


TYPES = {
    "--target": "path; required",
    "--tokens": "token count such as 500000, 50M or 1.5B; default: 5",
    "--tokens_or_none": "token count such as 500000, 50M or 1.5B; default: null",
    "--share": "number from 0 to 1; default: 1.0",
    "--state": "end or integer; default: end",
    "--once": "true or false; default: false",
    "--files": "list of paths; default: empty",
    "--sizes": "list of integers at least 1; default: [1, 2]",
    "--methods": 'list of: x or y; default: ["x"]',
    "--pair": "2 numbers; default: [0.5, 1]",
    "--ceiling": "number; default: inf",
    "--floors": "mapping from name to number; default: empty",
    "--nested": 'mapping from name to mapping from name to any value; default: {"a": {"b": 1}}',
    "--name": 'text; default: ""',
}


def test_help_has_a_page_for_each_group_and_one_for_all(capsys):
    first = flags(help_of(Top, capsys, "--help"))
    assert {name: first[name] for name in ("middle", "off", "leaves", "named")} == {
        "middle": "In between.", "off": "What a list holds. [default: null]",
        "leaves": "What a list holds. [list of these]", "named": "What a list holds. [mapping from name to these]",
    }  # fmt: skip
    middle = {
        "--middle.kind": "Which one. [a or b; default: b]",
        "--middle.leaf.rate": "How fast. [number above 0; default: 0.5]",
    }
    assert flags(help_of(Top, capsys, "--help", "middle")) == middle
    assert flags(help_of(Top, capsys, "--help=middle.leaf")) == dict(list(middle.items())[1:])
    assert flags(help_of(Top, capsys, "-h", "off")) == {"--off.rate": "How fast. [number above 0; default: 0.1]"}
    assert flags(help_of(Top, capsys, "-h", "leaves")) == {"rate": "How fast. [number above 0; default: 0.1]"}
    every = flags(help_of(Top, capsys, "--target", "t", "--help", "all"))
    assert middle.items() | TYPES.keys() <= every.items() | every.keys()
    with pytest.raises(UserError, match=r"'leaf'.* all, middle, middle.leaf, off, leaves, named"):
        parse_command(Top, "x", "", ["--help", "leaf"])


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_setting_and_fits_the_terminal(command, capsys, monkeypatch):
    parts = {keys: [*kinds_of(field.annotation)] for keys, field in settings(COMMANDS[command])}
    plain = {
        keys for keys, kinds in parts.items() if not any(is_group(k) or any(map(is_group, get_args(k))) for k in kinds)
    }
    for columns in (50, 100):
        monkeypatch.setenv("COLUMNS", str(columns))
        page = help_of(COMMANDS[command], capsys, "--help", "all")
        assert {f"--{'.'.join(keys)}" for keys in plain} <= set(flags(page))
        for line in page.splitlines():
            assert len(line) <= columns or " " not in line.strip().removeprefix("usage: python -m "), line
        assert len(help_of(COMMANDS[command], capsys, "-h").splitlines()) <= 120 or columns < 100


class Output(Config):
    form: Literal["samples", "weights"] = "samples"
    forms: tuple[Literal["samples", "weights"], ...] = ()


class Moved(Config):
    RENAMED: ClassVar[Renamed] = Renamed(
        settings={
            "guard": "retain", "shards.drop_fraction": "output.drop", "probe": "measure", "fast": "slow",
            "probe.lr_share": "is gone: it changed nothing", "form": "output.form", "measure": "measure.steps",
        },
        values={"form": {"filter": "samples"}, "output.form": {"filter": "samples", "both": "is gone: run it twice"},
                "output.forms": {"reweight": "weights", "weights": "never"}},
    )  # fmt: skip
    retain: str | None = None
    output: Output = Output()
    measure: Inner = Inner()
    floors: dict[str, float] = {}


def refused(*arguments):
    with pytest.raises(UserError) as error:
        parse_command(Moved, "x", "", arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("content", "replaced"),
    [
        ("{guard: a}", ["guard is now retain"]),
        ("{shards: {drop_fraction: 1}}", ["shards.drop_fraction is now output.drop"]),
        ("{probe: {steps: 1, share: 2, lr_share: 3}}",
         ["probe is now measure", "probe.lr_share is gone: it changed nothing"]),
        ("{probe: {}}", ["probe is now measure"]),
        ("{measure: 3}", ["measure is now measure.steps"]),
        ("{form: filter}", ["form: filter is now output.form: samples"]),
        ("{form: 7, fast: true}", ["form is now output.form", "fast is now slow"]),
        ("{output: {form: filter, forms: [samples, reweight, weights]}}",
         ["output.form: filter is now output.form: samples", "output.forms: reweight is now output.forms: weights"]),
        ("{output: {form: both}}", ["output.form: both is gone: run it twice"]),
    ],
)  # fmt: skip
def test_an_old_name_is_refused_with_the_new_one(tmp_path, content, replaced):
    (tmp_path / "a.yaml").write_text(content)
    assert refused("--config", str(tmp_path / "a.yaml")) == f"{tmp_path}/a.yaml: {', '.join(replaced)}"
    raw = yaml.safe_load(content)
    flags = [
        f"--{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}" for name, value in raw.items()
    ]
    told = refused(*flags)
    assert all(f"--{text.partition(' ')[0].rstrip(':')}" in told for text in replaced if "probe." not in text)


def test_all_old_names_are_in_one_error(tmp_path):
    (tmp_path / "a.yaml").write_text("guard: a\nfloors: {guard: 1}\n")
    (tmp_path / "b.yaml").write_text("shards: {drop_fraction: 1}\n")
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    told = refused(
        *files, "--guard", "b", "--fast", "--output.form", "filter", "--probe.lr-share", "1", "--form=filter"
    )
    assert told.split("; ") == [
        f"{tmp_path}/a.yaml: guard is now retain", f"{tmp_path}/b.yaml: shards.drop_fraction is now output.drop",
        "--guard is now --retain", "--fast is now --slow", "--output.form filter is now --output.form samples",
        "--probe.lr_share is gone: it changed nothing", "--form filter is now --output.form samples",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "arguments", [("--shards.x", "3"), ("--measure.form", "3"), ("--output.form", "c"), ("--guards=1",)]
)
def test_what_never_was_has_no_new_name(arguments):
    assert "is now" not in refused(*arguments)
    assert arguments[0].partition("=")[0] in refused(*arguments)


def test_changed_settings_are_those_that_differ_from_their_defaults():
    assert changed(Top(target="t")) == {"target": Path("t")}
    made = Top(target="t", sizes=[1], middle={"kind": "b", "leaf": {"rate": 0.1}}, off={}, floors={"a": 1}, share=None)
    assert changed(made) == {
        "target": Path("t"), "share": None, "sizes": [1], "floors": {"a": 1.0}, "middle.leaf.rate": 0.1, "off": Leaf(),
    }  # fmt: skip
    assert changed(Top(target="t", off={"rate": 2}, middle={"leaf": {"rate": 0.5}})) == {
        "target": Path("t"), "middle.kind": "a", "off.rate": 2.0,
    }  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_not_changed_settings(command):
    config = COMMANDS[command]
    try:
        made = config.model_validate(needed(config))
    except ValueError:
        pytest.skip("needs more than its settings without a default")
    names = {name.partition(".")[0] for name in changed(made)}
    assert names == {name for name, field in config.model_fields.items() if field.is_required()}
