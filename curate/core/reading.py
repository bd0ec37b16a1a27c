"""The one reader of YAML and JSON: accepted text has one meaning, and an error names file and line.

Text is UTF-8 (a byte order mark is skipped); no key stands twice in a mapping; values are nested `DEPTH` levels at
most; integers fit into 64 bits. YAML has one document, no tags of its own, and `1e-3` is a number; a date is text.
Aliases are followed as long as they stand for `_ALIASED` values at most.
"""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from curate.core.errors import UserError

DEPTH = 64
# Values that all aliases of a file may stand for.
_ALIASED = 100_000
# Characters of a text that an error repeats.
_SHOWN = 200
_SURROGATE = re.compile("[\ud800-\udfff]")
_YAML = "tag:yaml.org,2002:"
# PyYAML's own pattern asks for a dot in the mantissa and a sign in the exponent, so that `1e-3` would be text.
_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
       |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
       |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
       |[-+]?\.(?:inf|Inf|INF)
       |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


def read_text(path: Path) -> str:
    """Read the text of a file.

    Raises:
        UserError: it is missing, cannot be read, or is not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:  # a path with NUL is a ValueError
        raise UserError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        # Skips the byte order mark that Windows editors write.
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Positions count in `error.object`: the bytes without the mark.
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} line {line}: not UTF-8 (byte {error.object[error.start]:#04x})") from None


def read_yaml(path: Path) -> Any:
    """Read the value of a YAML file.

    Raises:
        UserError: see `read_text` and `parse_yaml`.
    """
    return parse_yaml(read_text(path), str(path))


def parse_yaml(text: str, where: str) -> Any:
    """Parse one YAML document.

    Args:
        text: one document.
        where: what the error calls it.

    Raises:
        UserError: it is not valid, or not what the module's docstring says.
    """
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            # Breaks the cycles of its state, which hold the text.
            loader.dispose()
    except yaml.reader.ReaderError as error:
        number = text.count("\n", 0, error.position) + 1
        raise UserError(f"{where} line {number}: the character {chr(error.character)!r} is not allowed") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or ""
        line = "" if mark is None else f" line {mark.line + 1}"
        # "but found ..." is the second half of a sentence that the context begins.
        sentence = f"{error.context}, {problem}" if problem.startswith("but ") else problem
        raise UserError(f"{where}{line}: {shortened(sentence)}") from None


def parse_json(text: str, where: str) -> Any:
    """Parse one JSON value.

    Args:
        text: one value.
        where: what the error calls it.

    Raises:
        UserError: it is not valid, or not what the module's docstring says.
    """
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
        _check_extent(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON (line {error.lineno}: {error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({json_problem(error)})") from None
    return value


def json_problem(error: Exception) -> str:
    """Say what `json.loads` with `unique_keys` found wrong, as part of a sentence."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    # Python's own words (limit on `int` of a text) advise what no user can do.
    return "an integer of thousands of digits" if "digits" in str(error) else shortened(error)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make a dict of a JSON object, for `json.loads(object_pairs_hook=)`.

    Raises:
        ValueError: a key stands twice.
    """
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {shortened(repr(twice))} stands twice")
    return mapping


def dump_yaml(value: Any) -> str:
    """Write YAML that `read_yaml`, and any reader of YAML 1.1, reads as `value`; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def shortened(problem: object, most: int = _SHOWN) -> str:
    """Shorten a library's message or a user's text to one line of `most` characters."""
    line = " ".join(str(problem).split())
    return line if len(line) <= most else line[:most] + " ..."


def first_line(error: BaseException) -> str:
    """Shorten a library's error to its first line."""
    return shortened((str(error).splitlines() or [type(error).__name__])[0])


def _check_extent(value: Any) -> None:
    """Refuse what is nested too deeply, and unusable values at any depth.

    Raises:
        ValueError: says what.
    """
    # Level by level instead of by recursion, which a hostile text would exhaust.
    level = [value]
    for depth in range(DEPTH + 1):
        inner: list[Any] = []
        for member in level:
            problem = _unusable(member)
            if isinstance(member, dict):
                inner += [*member, *member.values()]
            elif isinstance(member, list):
                inner += member
            if depth == DEPTH and isinstance(member, dict | list):
                problem = f"nested deeper than {DEPTH} levels"
            if problem:
                raise ValueError(problem)
        level = inner


def _unusable(value: Any) -> str | None:
    """Say what is wrong with one value itself, without the values in it."""
    if isinstance(value, int) and value.bit_length() > 64:
        return "an integer of more than 64 bits"
    return "half of a surrogate pair" if isinstance(value, str) and _SURROGATE.search(value) else None


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the bounds of the module's docstring."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._aliased = 0
        # Of composed nodes: values in it, levels of it.
        self._extents: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose one node, or return the node that an alias stands for."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent):
            return self._aliased_node(event, super().compose_node(parent, index))
        self._level += 1
        if self._level > DEPTH:
            raise _problem(f"nested deeper than {DEPTH} levels", event.start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is not None:
            self._extents[id(node)] = self._extent(node)
        return node

    def _aliased_node(self, event: yaml.AliasEvent, node: yaml.Node | None) -> yaml.Node | None:
        # A node gets its extent when it is complete, so one without is still being composed: a circle.
        if id(node) not in self._extents:
            raise _problem(f"the alias *{event.anchor} stands for what it is a part of", event.start_mark)
        # The sum over all aliases, each with the aliases in it: what "billion laughs" makes of a short text.
        values, levels = self._extents[id(node)]
        self._aliased += values
        if self._aliased > _ALIASED:
            raise _problem(f"the aliases stand for more than {_ALIASED:,} values", event.start_mark)
        if self._level + levels > DEPTH:
            raise _problem(f"nested deeper than {DEPTH} levels", event.start_mark)
        return node

    def _extent(self, node: yaml.Node) -> tuple[int, int]:
        """Count the values in a node, itself included, and its levels."""
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = node.value
        elif isinstance(node, yaml.MappingNode):
            inner = [member for pair in node.value for member in pair]
        extents = [self._extents[id(member)] for member in inner]
        return 1 + sum(values for values, _ in extents), 1 + max((levels for _, levels in extents), default=0)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose a mapping and refuse doubled keys (those that `<<` brings in do not count)."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == _YAML + "merge":
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in lines:
                raise _problem(f"the key {shortened(repr(key))} stands twice (line {lines[key]})", key_node.start_mark)
            lines[key] = line
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node; a text that Python cannot convert is an error of the text."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, TypeError):
            not_of_type = f"{shortened(repr(node.value))} is no {node.tag.removeprefix(_YAML)}"
            raise _problem(not_of_type, node.start_mark) from None
        problem = _unusable(value)
        if problem:
            raise _problem(problem, node.start_mark)
        return value


class _Dumper(yaml.SafeDumper):
    """Writes no aliases, and quotes text that YAML 1.1 or our reader would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _problem(problem: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, mark)


# Only the types that JSON has, so no dates, sets or binary; the entry None is what refuses every other tag.
_DATA = [_YAML + name for name in ("null", "bool", "int", "float", "str", "seq", "map")]
_Loader.yaml_constructors = {tag: yaml.SafeLoader.yaml_constructors[tag] for tag in _DATA} | {
    None: yaml.SafeLoader.yaml_constructors[None]
}
# Dates stay text, `=` is no value of its own, and floats have the pattern above, for the reader and the writer alike.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.removeprefix(_YAML) not in ("timestamp", "float", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(_YAML + "float", _FLOAT, list("-+0123456789."))
