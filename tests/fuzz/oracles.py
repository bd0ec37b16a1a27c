"""What may be accepted: slow, obvious checks that share no code with the readers."""

import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from pydantic import BaseModel

from tests.fuzz.outcome import demand


def document_of(row: Any) -> tuple[Any, ...]:
    """Content of a document's row: ("text", t), ("pair", p, c) or ("tokens", t, m)."""
    demand(isinstance(row, dict), "a row that is no object")
    there = {key for key in ("text", "prompt", "completion", "tokens", "loss_mask") if row.get(key) is not None}
    for key in sorted(there & {"text", "prompt", "completion"}):
        demand(isinstance(row[key], str) and row[key] != "", f"{key} is no text")
        demand(row[key].encode("utf-8", "replace").decode() == row[key], f"{key} is not Unicode")
    if there == {"text"}:
        return "text", row["text"]
    if there == {"prompt", "completion"}:
        return "pair", row["prompt"], row["completion"]
    demand(there in ({"tokens"}, {"tokens", "loss_mask"}), f"a row of {sorted(there)}")
    tokens, mask = list(row["tokens"]), None if "loss_mask" not in there else list(row["loss_mask"])
    demand(len(tokens) > 0 and all(type(token) is int and 0 <= token < 2**31 for token in tokens), "tokens are no ids")
    demand(
        mask is None or (len(mask) == len(tokens) and all(flag in (0, 1) for flag in mask)), "a mask that does not fit"
    )
    return "tokens", tokens, mask


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    demand(len({key for key, _ in pairs}) == len(pairs), "a key that stands twice")
    return dict(pairs)


def rows_of_jsonl(data: bytes) -> list[Any]:
    """Each line's value; a key that stands twice is an objection."""
    lines = data.split(b"\n")
    lines = lines[:-1] if lines[-1] == b"" else lines
    return [json.loads(line.decode("utf-8-sig"), object_pairs_hook=no_key_twice) for line in lines]


def rows_of_parquet(data: bytes) -> list[Any]:
    """Each row as a mapping."""
    return pl.read_parquet(io.BytesIO(data)).to_dicts()


def same_documents(rows: list[Any], documents: list[Any]) -> None:
    """Each row became the document that it says."""
    demand(len(rows) == len(documents) and len(rows) > 0, f"{len(rows)} rows became {len(documents)} documents")
    for row, document in zip(rows, documents, strict=True):
        kind, *content = document_of(row)
        mask = None if document.loss_mask is None else [int(flag) for flag in document.loss_mask]
        made = {"text": [document.text], "pair": [document.prompt, document.text], "tokens": [document.tokens, mask]}
        demand(made[kind] == [*content[:1], *content[1:]], f"{content} became {document}")
        if row.get("id") is not None:
            demand(document.id == str(row["id"]), f"id {row['id']!r} became {document.id!r}")


def once(data: bytes) -> Any:
    """A YAML file by PyYAML itself, with an objection to keys that stand twice."""
    text = data.decode("utf-8-sig")
    stack, seen = [yaml.compose(text, Loader=yaml.SafeLoader)], set()
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen or isinstance(node, yaml.ScalarNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = [(key.tag, str(key.value)) for key, _ in node.value if not key.tag.endswith(":merge")]
            demand(len(set(keys)) == len(keys), f"a key stands twice in {keys}")
            stack += [part for pair in node.value for part in pair]
        else:
            stack += node.value
    return yaml.load(text, Loader=yaml.BaseLoader)  # every scalar as it is written


def _number(text: str) -> float | None:
    forms = {"null": None, "~": None, "true": None, ".inf": math.inf, "-.inf": -math.inf, "+.inf": math.inf}
    if text.lower() in forms:
        return forms[text.lower()]
    for read in (lambda: float(text.replace("_", "")), lambda: float(int(text.replace("_", ""), 0))):
        try:
            return read()
        except ValueError:
            continue
    return None


def said_is_meant(said: Any, made: Any, where: str = "") -> None:
    """Every setting of a file is in the config as it stands there; `said` has scalars as written."""
    if isinstance(made, BaseModel):
        demand(isinstance(said, Mapping), f"{where}: {said!r} became {made!r}")
        for key, value in said.items():
            if key == "<<":  # brings in what stands elsewhere in the file
                continue
            demand(hasattr(made, key), f"{where}.{key} is no setting")
            said_is_meant(value, getattr(made, key), f"{where}.{key}")
    elif isinstance(made, dict) and isinstance(said, Mapping):
        demand({str(key) for key in made} >= {key for key in said if _number(key) is None}, f"{where} lost keys")
        for key, value in made.items():
            if str(key) in said:
                said_is_meant(said[str(key)], value, f"{where}.{key}")
    elif isinstance(made, list | tuple):
        items = said if isinstance(said, list) else [said]
        demand(len(items) == len(made), f"{where}: {said!r} became {made!r}")
        for item, value in zip(items, made, strict=True):
            said_is_meant(item, value, where)
    else:
        _same_scalar(said, made, where)


def _same_scalar(said: Any, made: Any, where: str) -> None:
    demand(isinstance(said, str), f"{where}: {said!r} became {made!r}")
    if isinstance(made, bool):
        wanted = {"true", "yes", "on", "1", "y", "t", "1.0"} if made else {"false", "no", "off", "0", "n", "f", "0.0"}
        demand(said.lower() in wanted, f"{where}: {said!r} became {made!r}")
    elif isinstance(made, int | float):
        demand(not (isinstance(made, float) and math.isnan(made)), f"{where} is not a number")
        number = _tokens(said) if _number(said) is None else _number(said)
        demand(number == made or ":" in said or said.startswith("0"), f"{where}: {said!r} became {made!r}")
    elif isinstance(made, Path):
        demand(Path(said).expanduser() == made and "://" not in said, f"{where}: {said!r} became {made}")
    elif isinstance(made, str):
        demand(made == said or Path(said).expanduser() == Path(made), f"{where}: {said!r} became {made!r}")
    else:
        demand(made is None and said.lower() in ("null", "~", ""), f"{where}: {said!r} became {made!r}")


def _tokens(said: str) -> float | None:
    match = re.fullmatch(r"\s*([\d_.]+)([kmbtKMBT]?)\s*", said)
    return (
        None
        if match is None
        else round(
            float(match[1].replace("_", "")) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[match[2].lower()]
        )
    )


def numbers_in(value: Any) -> Iterator[int | float]:
    """All numbers in a model or container."""
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list | tuple):
        for member in value:
            yield from numbers_in(member)
    elif isinstance(value, int | float):
        yield value


POSITIVE = re.compile(
    r"steps$|batch_size|^seq_len|temperature$|^tolerance|epochs$|_bytes$|^width|^lr$|^peak|^min_target_tokens|^pairs$"
)
MAY_BE_ZERO = {
    "warmup_steps",
    "memory_bytes",
    "disk_bytes",
    "sample_temperature",
    "slopes_passes",
    "cadence_snapshots",
}


def in_range(config: BaseModel, where: str = "") -> None:
    """By its name: what can only be positive is, and nothing but what may be endless is infinite."""
    for name, value in config:
        if isinstance(value, BaseModel):
            in_range(value, f"{where}{name}.")
        if isinstance(value, int | float) and not isinstance(value, bool) and POSITIVE.search(name):
            demand(value > 0 or (name in MAY_BE_ZERO and value == 0), f"{where}{name} is {value}")
        endless = name in ("decay_epochs", "clip_norm") or isinstance(value, BaseModel)
        infinite = [number for number in numbers_in(value) if isinstance(number, float) and math.isinf(number)]
        demand(endless or not infinite or name in ("arguments", "kwargs", "dataset"), f"{where}{name} is {value}")
