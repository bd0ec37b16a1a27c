"""The readers of YAML and JSON: what is refused, where it stands, and that what is written is read as it was."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from curate.core.errors import UserError
from curate.core.reading import DEPTH, dump_yaml, parse_json, parse_yaml, read_text, read_yaml

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 30)
)
CHAIN = "- &a0 [1]\n" + "".join(f"- &a{level} [*a{level - 1}]\n" for level in range(1, 200))


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("a: 1\nb: 2\na: 3\n", "F line 3"),
        ("a: {b: 1, b: 1}", "F line 1"),
        ("1: a\n0x1: b", "F line 2"),
        ("a: [1,\nb: 2", "F line 2"),
        ("a: b\n---\nc: d", "F line 2"),
        ("a: !!python/object/apply:os.system [ls]", "F line 1"),
        ("a:\n- !!binary aGk=", "F line 2"),
        ("- !!int abc", "F line 1"),
        ("- 0x_", "F line 1"),
        ("? [a]\n: b", "F line 1"),
        ("\n\na: \x00", "F line 3"),
        ('a: "\\ud800"', "F line 1"),
        ("a: &b [*b]", "F line 1"),
        ("- *b", "F line 1"),
        ("a: " + "9" * 5000, "F line 1"),
        ("a: 0x" + "f" * 5000, "F line 1"),
        ("[" * 10_000, "F line 1"),
        ("{a: " * 2_000_000, "F line 1"),
        ("- " * 10_000, "F line 1"),
        (BOMB, "F line 5"),
        (CHAIN, "F line 63"),
    ],
)
def test_yaml_that_is_refused(text, where):
    with pytest.raises(UserError, match=rf"^{where}: .") as refused:
        parse_yaml(text, "F")
    assert len(str(refused.value)) < 400


def test_yaml_that_is_read():
    text = """
base: &base {lr: 1e-3, steps: 1_000, day: 2024-01-01, far: 2001-99-99, sign: =}
more: {<<: *base, lr: 2}
5: [.inf, -.5e+2, null, true, "1e3", ~]
"""
    base = {"lr": 0.001, "steps": 1000, "day": "2024-01-01", "far": "2001-99-99", "sign": "="}
    listed = [float("inf"), "-.5e+2", None, True, "1e3", None]
    listed[1] = -50.0
    assert parse_yaml(text, "F") == {"base": base, "more": {**base, "lr": 2}, 5: listed}
    assert parse_yaml("a: " + "[" * (DEPTH - 1) + "]" * (DEPTH - 1), "F")
    assert parse_yaml("", "F") is None


@pytest.mark.parametrize(
    "text",
    [
        '{"a": 1, "a": 2}', '[{"a": 1, "b": {"c": 1, "c": 1}}]', "[" * 100_000, "9" * 5000, "[1" + "0" * 30 + "]", "",
        "{a", '{"a": "\\ud83d"}', '{"\\ud83d": 1}', "[" * (DEPTH + 1) + "]" * (DEPTH + 1),
    ],
)  # fmt: skip
def test_json_that_is_refused(text):
    with pytest.raises(UserError, match=r"^F is not valid JSON \(") as refused:
        parse_json(text, "F")
    assert len(str(refused.value)) < 400


def test_files_are_named_with_the_line(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(b"a: 1\nb: \xff\n")
    for wrong, message in (
        (path, r"a.yaml line 2: not UTF-8"),
        (tmp_path / "no", "does not exist"),
        (tmp_path, "read"),
    ):
        with pytest.raises(UserError, match=message):
            read_text(wrong)
    path.write_bytes(b"\xef\xbb\xbfa:\n \xff\n")  # positions count from behind a byte order mark
    with pytest.raises(UserError, match=r"line 2: .*0xff"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path) == {"a": 1}


TEXTS = st.text(st.characters(codec="utf-8"), max_size=9) | st.from_regex(
    r"[-+.0-9eE_:xo]{1,6}|~|null|yes|on|=|<<|2024-01-01", fullmatch=True
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@given(VALUES)
def test_what_is_written_is_read_as_it_was(value):
    text = dump_yaml(value)
    assert parse_yaml(text, "F") == value
    assert yaml.safe_load(text) == value
    assert parse_json(json.dumps(value), "F") == value


def test_one_value_that_stands_twice_is_written_twice():
    stream = {"local": "a"}
    assert "&" not in dump_yaml([stream, stream])
