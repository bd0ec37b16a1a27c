"""Inputs: files that are nearly right, with what files of this field are known to hold by accident or by malice."""

import io
import json
from typing import Any

import polars as pl
import yaml
from hypothesis import strategies as st

HOSTILE = [
    b"\xff",
    b"\x00",
    b"\\ud800",
    b"\\ud83d\\ude00",
    b"NaN",
    b"-Infinity",
    b".inf",
    b".nan",
    b"1e999",
    b"9" * 5000,
    b"0x" + b"f" * 4000,
    b"[" * 3000,
    b"{" * 3000,
    b"- " * 3000,
    b"{a: " * 300,
    b"&a [*a]",
    b"*a",
    b"&a ",
    b"~",
    b"~/x",
    b"~nobody/x",
    b"s3://b/x",
    b"!!python/object:os.system ",
    b"!!int ",
    b"!!binary ",
    b"!!float x",
    b"<<: ",
    b"\xef\xbb\xbf",
    b"\r\n",
    b"\n\n",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b": ",
    b"\t",
    b"'",
    b'"',
    b"null",
    b"true",
    b"no",
    b"-1",
    b"0",
    b"-0.0",
    b"1e-3",
    b"2024-01-01",
    b"2001-99-99",
    b"=",
    b"<<",
    b"{steps!q}",
    b"{steps:zz}",
    b"{steps:99999999}",
    b"{}",
    b"{0.__class__}",
    b"../..",
    b"/",
    b".part",
    b"\x1b[31m",
    b"<script>",
    b"%s",
    b"\\",
    b"#",
    b"|",
    b">",
    b"---\n",
    b"...\n",
    b"? ",
    b"[]",
    b"'{'",
]
TEXT = st.text(max_size=12) | st.sampled_from(
    [
        "",
        " ",
        "\0",
        "\ud800",
        "\u202e",
        "é\n",
        "null",
        "1e3",
        "~",
        "~/x",
        "s3://b/x",
        "a/../b",
        "C:\\x",
        "x" * 300,
        "2024-01-01",
        "\x85",
        "=",
        "'",
    ]
)
NUMBER = (
    st.integers(-3, 70)
    | st.floats()
    | st.sampled_from([0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**25, 1e300, -0.0, 0.5])
)
SCALAR = st.none() | st.booleans() | NUMBER | TEXT
ANY = st.recursive(
    SCALAR,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.integers(0, 3), inner, max_size=3),
    max_leaves=6,
)


def mostly(right: st.SearchStrategy[Any], wrong: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Right values, and a wrong one now and then."""
    return st.integers(0, 15).flatmap(lambda draw: wrong if draw == 15 else right)


@st.composite
def mutated(draw: Any, seeds: list[bytes]) -> bytes:
    """A seed with a few accidents: a flipped byte, a cut, a doubled or lost part, something hostile put in."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 3))):
        at, stop = sorted((draw(st.integers(0, len(data))), draw(st.integers(0, len(data)))))
        kind = draw(st.sampled_from(["flip", "cut", "lose", "double", "insert", "replace"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at:]
        elif kind == "lose":
            del data[at:stop]
        elif kind == "double":
            data[at:at] = data[at:stop]
        elif kind == "insert":
            data[at:at] = draw(st.sampled_from(HOSTILE))
        elif kind == "replace":
            data[at : min(stop, at + 8)] = draw(st.sampled_from(HOSTILE))
    return bytes(data)


def files(structured: st.SearchStrategy[bytes], seeds: list[bytes]) -> st.SearchStrategy[bytes]:
    """Well-formed ones, damaged ones, and noise."""
    return st.one_of(structured, structured, mutated(seeds), mutated(seeds), st.binary(max_size=60))


def as_yaml(value: Any) -> bytes:
    """A YAML file; halves of surrogate pairs are escapes in it."""
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


def as_jsonl(rows: list[Any]) -> bytes:
    """JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


WORDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
RIGHT_DOCUMENT = st.one_of(
    st.fixed_dictionaries(
        {"text": WORDS}, optional={"id": WORDS | st.integers(), "other": SCALAR, "prompt": st.none()}
    ),
    st.fixed_dictionaries({"prompt": WORDS, "completion": WORDS}),
    st.lists(st.tuples(st.integers(0, 250), st.integers(0, 1)), min_size=1, max_size=9).map(
        lambda pairs: {"tokens": [token for token, _ in pairs], "loss_mask": [flag for _, flag in pairs]}
    ),
)
WRONG_DOCUMENT = st.one_of(
    st.fixed_dictionaries({"prompt": TEXT, "completion": TEXT}),
    st.fixed_dictionaries(
        {"tokens": st.lists(st.integers(-1, 300), max_size=5)},
        optional={"loss_mask": st.lists(st.integers(-1, 2), max_size=5)},
    ),
    st.fixed_dictionaries(
        {}, optional=dict.fromkeys(("text", "prompt", "completion", "tokens", "loss_mask", "id"), SCALAR)
    ),
    st.fixed_dictionaries({"text": TEXT}, optional={"other": ANY}),
    ANY,
)
DOCUMENTS = st.lists(mostly(RIGHT_DOCUMENT, WRONG_DOCUMENT), min_size=1, max_size=6).map(as_jsonl)


def parquet(frame: pl.DataFrame) -> bytes:
    """A Parquet file."""
    file = io.BytesIO()
    frame.write_parquet(file)
    return file.getvalue()


COLUMNS = [
    ["some text", "more text"],
    ["", None],
    [1, 2],
    [None, None],
    [1.5, float("nan")],
    [[1, 2], [3]],
    [[1, -1], []],
    [[None], [2]],
    [["a"], ["b"]],
    [b"a", b"\xff"],
    [True, False],
    [{"a": 1}, {"a": 2}],
    [2**40, 0],
]


@st.composite
def tables(draw: Any, names: list[str]) -> bytes:
    """A table with columns of these names and others, of any type."""
    chosen = draw(st.lists(st.sampled_from([*names, "other", ""]), unique=True, max_size=4))
    return parquet(pl.DataFrame({name: draw(st.sampled_from(COLUMNS)) for name in chosen}))


@st.composite
def changed(draw: Any, frame: pl.DataFrame) -> bytes:
    """A table with a column lost, renamed, of another type, null or cut; or with rows lost, doubled or disordered."""
    name = draw(st.sampled_from(frame.columns))
    kind = draw(st.sampled_from(["drop", "rename", "type", "null", "head", "double", "reverse", "value", "same"]))
    other = draw(st.sampled_from(COLUMNS))
    if kind == "drop":
        frame = frame.drop(name)
    elif kind == "rename":
        frame = frame.rename({name: name + "_"})
    elif kind == "type":
        frame = frame.with_columns(pl.Series(name, (other * len(frame))[: len(frame)]))
    elif kind == "null":
        frame = frame.with_columns(pl.lit(None, frame.schema[name]).alias(name))
    elif kind == "head":
        frame = frame.head(draw(st.integers(0, len(frame))))
    elif kind == "double":
        frame = pl.concat([frame, frame.head(2)])
    elif kind == "reverse":
        frame = frame.reverse()
    elif kind == "value" and frame.schema[name].is_numeric():
        value = draw(st.sampled_from([-1, 0, 100, 10**6]))
        frame = frame.with_columns(pl.lit(value).cast(frame.schema[name], strict=False).alias(name))
    return parquet(frame)
