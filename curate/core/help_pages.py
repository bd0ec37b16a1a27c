"""Pages of `--help`: the settings that people set first, one group of settings, or all.

A setting's text is its attribute docstring, its type in plain words and its default. Nothing is imported but the
config class.
"""

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from textwrap import wrap
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from curate.core.errors import UserError
from curate.core.reading import shortened
from curate.core.trust import OPTION
from curate.core.validation import TypeName, group_of, is_list, kinds_of

ALL = "all"
# In place of a default, where a setting has none (None may be a default).
_REQUIRED = object()
_WIDTH = 100  # of a page where there is no terminal
# Narrower ones cannot hold two columns, wider ones are hard to read.
_WIDTHS = range(40, 121)
# The most that flags take before the texts beside them.
_COLUMN = 30
_NAMES = {bool: "true or false", int: "integer", float: "number", str: "text", Path: "path", Any: "any value"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
_UNBROKEN: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}


class _Row(NamedTuple):
    """One flag, and the text beside it."""

    head: str
    text: str


class _Group(NamedTuple):
    """Settings under one heading; the command's own have no name."""

    name: str
    text: str
    facts: str
    rows: list[_Row]

    def section(self) -> str:
        """The group with all of its settings."""
        return _section(" ".join(filter(None, [f"{self.name}:", self.text, self.facts])), self.rows)

    def line(self) -> _Row:
        """The group in the list of groups."""
        first_sentence = re.split(r"(?<=[.])\s", self.text, maxsplit=1)[0]
        return _Row(self.name, f"{first_sentence} {self.facts}".strip())


def help_page(config: type[BaseModel], prog: str, description: str, page: str = "") -> str:
    """The text of one page of `--help`.

    Args:
        config: the command's settings.
        prog: how the command is called.
        description: what it does; paragraphs, indented ones stay as they are.
        page: `all`, or the name of a group; the first page without it.

    Raises:
        UserError: there is no such page.
    """
    first, *groups = _groups(config)
    # A group's page has the groups in it too.
    pages = {
        group.name: [inner for inner in groups if f"{inner.name}.".startswith(f"{group.name}.")] for group in groups
    }
    name = page.replace("-", "_")
    if name in pages:
        return "\n\n".join(group.section() for group in pages[name]) + "\n"
    if name not in ("", ALL):
        raise UserError(f"there is no help page {shortened(repr(page))}; there are {', '.join([ALL, *pages])}")
    blocks = [_usage(config, prog), _wrapped(description)]
    if first.rows:
        blocks.append(_section("Settings:", first.rows))
    if name == ALL:
        blocks += [group.section() for group in groups]
    elif groups:
        outer = [group.line() for group in groups if "." not in group.name]
        blocks.append(_section("Groups of settings:", outer, one_line=True))
    blocks.append(_section("Options:", list(_options(bool(groups)))))
    if groups and name != ALL:
        blocks.append(_wrapped(f"`--help {ALL}` shows every setting, `--help {groups[0].name}` those of one group."))
    return "\n\n".join(filter(None, blocks)) + "\n"


def _options(has_groups: bool) -> Iterator[_Row]:
    yield _Row("--config FILE.yaml", "Read settings from a file. What comes later wins, files and flags alike.")
    yield _Row("--print_config", "Print all settings as such a file, and stop.")
    yield _Row(f"{OPTION} MODULE", "Let a run's model run code of this module or package.")
    if has_groups:
        yield _Row("-h, --help [PAGE]", f"Print this page, every setting ({ALL}) or one group, and stop.")
    else:
        yield _Row("-h, --help", "Print this page, and stop.")


def _usage(config: type[BaseModel], prog: str) -> str:
    needed = [(name, field) for name, field in config.model_fields.items() if field.is_required()]
    # Up to three required settings are spelled out, as one would type them; more come from a file.
    flags = [f"--{name} {name.upper()}" for name, field in needed if not _is_group(field.annotation)]
    words = [*(flags if len(needed) <= 3 else []), "[--config FILE.yaml]", "[--SETTING VALUE ...]"]
    indent = " " * len(f"usage: {prog} ")
    # NUL stands for the spaces inside a flag and its value, where `wrap` must not break the line.
    lines = wrap(" ".join(word.replace(" ", "\0") for word in words), max(_width() - len(indent), 30), **_UNBROKEN)
    return f"usage: {prog} " + f"\n{indent}".join(lines).replace("\0", " ")


def _wrapped(description: str) -> str:
    paragraphs = re.split(r"\n\s*\n", description.strip("\n"))
    # A paragraph with an indented line is a table or an example: it keeps its lines.
    return "\n\n".join(
        paragraph if re.search(r"^\s", paragraph, re.MULTILINE) else "\n".join(wrap(paragraph, _width(), **_UNBROKEN))
        for paragraph in paragraphs
    )


def _section(heading: str, rows: Sequence[_Row], *, one_line: bool = False) -> str:
    """Lay out a heading and its rows in two columns; a long flag gets a line of its own."""
    width = _width()
    column = min(max((len(row.head) + 4 for row in rows), default=0), _COLUMN)
    lines = wrap(heading, width, **_UNBROKEN)
    for row in rows:
        text = wrap(row.text, width - column, **_UNBROKEN)
        if one_line and len(text) > 1:
            text = [_cut(row.text, width - column)]
        if len(row.head) + 4 > column:
            lines.append(f"  {row.head}")
        else:
            text = text or [""]
            lines.append(f"  {row.head}".ljust(column) + text.pop(0))
        lines += [" " * column + line for line in text]
    return "\n".join(line.rstrip() for line in lines)


def _cut(text: str, width: int) -> str:
    """Shorten a text to one line that keeps the facts at its end."""
    # Facts, such as "[default: 3]", begin at the first bracket (see `_row`).
    sentence, bracket, facts = text.partition(" [")
    end = f" ...{bracket}{facts}"
    return wrap(sentence, max(width - len(end), 10), **_UNBROKEN)[0] + end


def _width() -> int:
    columns = shutil.get_terminal_size((_WIDTH, 24)).columns
    return min(max(columns, _WIDTHS.start), _WIDTHS.stop - 1)


def _groups(
    config: type[BaseModel], default: Any = None, name: str = "", flag: str = "--", text: str = "", facts: str = ""
) -> Iterator[_Group]:
    """Yield a group, then all groups in it, with the defaults that the command has.

    Args:
        config: class of the group.
        default: the group's default in its parent; None: the defaults of its class.
        name: dotted name.
        flag: what stands before the name of each setting.
        text: what the group is.
        facts: whether it is a list, required, or off by default.
    """
    fields = [(key, field, _default(default, key, field)) for key, field in config.model_fields.items()]
    plain = [(key, field, usual) for key, field, usual in fields if not _is_group(field.annotation)]
    # Required ones first, else in the class's order.
    plain.sort(key=lambda setting: setting[2] is not _REQUIRED)
    yield _Group(name, text, facts, [_row(flag + key, field, usual) for key, field, usual in plain])
    for key, field, usual in fields:
        single = group_of(field.annotation)
        inner = single or _item_group(field.annotation)
        if inner:
            yield from _groups(
                inner,
                default=usual,
                name=f"{name}.{key}" if name else key,
                flag=f"{flag}{key}." if single and flag else "",  # a setting of a list's item has no flag
                text=_one_line(field.description) or _one_line((inner.__doc__ or "").partition("\n\n")[0]),
                facts=_group_facts(field, usual),
            )


def _default(group: Any, key: str, field: FieldInfo) -> Any:
    if isinstance(group, BaseModel):
        return getattr(group, key)
    return _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)


def _is_group(annotation: Any) -> bool:
    return group_of(annotation) is not None or _item_group(annotation) is not None


def _item_group(annotation: Any) -> type[BaseModel] | None:
    """The group that each item of a list is, or each value of a mapping."""
    holders = [kind for kind in kinds_of(annotation) if is_list(kind) or get_origin(kind) is dict]
    return next((group for kind in holders for item in get_args(kind) if (group := group_of(item))), None)


def _row(flag: str, field: FieldInfo, default: Any) -> _Row:
    facts = [_words(field.annotation, field.metadata), _default_words(default)]
    return _Row(flag, f"{_one_line(field.description)} [{'; '.join(facts)}]".strip())


def _group_facts(field: FieldInfo, default: Any) -> str:
    facts = []
    if _item_group(field.annotation):
        facts.append("list of these" if any(map(is_list, kinds_of(field.annotation))) else "mapping from name to these")
    if default is None or default is _REQUIRED:
        facts.append(_default_words(default))
    return f"[{'; '.join(facts)}]" if facts else ""


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _default_words(value: Any) -> str:
    if value is _REQUIRED:
        return "required"
    # As one would write it in YAML: true, null and lists as in JSON, but text, paths and numbers without quotes.
    text = json.dumps(value, default=str, ensure_ascii=False)
    if isinstance(value, str | Path | float) and value != "":
        text = str(value)
    if isinstance(value, tuple | list | dict) and not value:
        text = "empty"
    return f"default: {shortened(text, most=80)}"


def _words(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    """Describe a type in plain words: "integer at least 1", "list of paths", "a, b or c"."""
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return _words(inner, [*more, *metadata])
    # pydantic keeps the bounds of `Field(gt=0)` inside the FieldInfo that stands in an `Annotated`.
    notes = [note for entry in metadata for note in (entry.metadata if isinstance(entry, FieldInfo) else [entry])]
    for note in notes:
        if isinstance(note, TypeName):
            return note.words
    names = list(dict.fromkeys(_alternatives(annotation)))
    if "number" in names and "integer" in names:
        names.remove("integer")
    words = " or ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))
    return " ".join(filter(None, [words, _limits(notes)]))


def _limits(metadata: Sequence[Any]) -> str:
    bounds = {key: getattr(note, key) for key in _BOUNDS for note in metadata if getattr(note, key, None) is not None}
    if bounds.keys() == {"ge", "le"}:
        return f"from {bounds['ge']} to {bounds['le']}"
    return " and ".join(f"{_BOUNDS[key]} {bound}" for key, bound in bounds.items())


def _alternatives(annotation: Any) -> Iterator[str]:
    """Yield in words what a value may be, without null."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        for member in inner:
            yield from _alternatives(member) if get_origin(member) is not Annotated else [_words(member)]
    elif origin is Literal:
        yield from map(str, inner)
    elif is_list(annotation):
        yield _several("list of ", inner[0])
    elif origin is tuple and len(set(inner)) == 1:
        yield _several(f"{len(inner)} ", inner[0])
    elif origin is tuple:
        yield f"list: {', '.join(map(_words, inner))}"
    elif origin is dict:
        key, value = ("name" if _words(inner[0]) == "text" else _words(inner[0])), _words(inner[1])
        yield f"mapping from {key} to {value}"
    elif annotation is not NoneType:
        yield _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def _several(start: str, item: Any) -> str:
    """Describe a list in words: "list of numbers above 0", "list of: a, b or c"."""
    words = _words(item)
    # Only a known noun takes an s; "a, b or c" and mappings stand behind a colon.
    first, space, rest = words.partition(" ")
    is_noun = first in _NAMES.values() and not rest.startswith("or ")
    return f"{start}{first}s{space}{rest}" if is_noun else f"{start.rstrip()}: {words}"
