"""Old names of settings: the error for an old name says the new one. No setting is read by its old name."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from curate.core.reading import shortened
from curate.core.validation import group_of, is_list, kinds_of

Keys = tuple[str, ...]


@dataclass(frozen=True)
class Renamed:
    """Old names of a command's settings; its config class holds them as `RENAMED`.

    An entry for a group stands for all of its settings that have no entry. The replacement is a new name or value, or
    the rest of a sentence that starts with the old one ("is gone: it changed nothing").
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    """Old dotted name -> new dotted name."""
    values: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Dotted name as it is used, old or new -> old value -> new value; only values that are no longer valid."""


def replacements(config: type[BaseModel], given: Iterable[tuple[Keys, Any]], *, flags: bool = False) -> list[str]:
    """Say what to write instead of each old name and value, as parts of a sentence.

    Args:
        config: the class that the settings are for; without `RENAMED` nothing is old.
        given: keys and value of each setting.
        flags: whether they stand on the command line; else they stand in a file.
    """
    table: Renamed = getattr(config, "RENAMED", Renamed())
    texts = (text for keys, value in given for text in _replacements(config, table, keys, value, flags))
    # The settings of a group that is gone share one text.
    return list(dict.fromkeys(texts))


def leaves(raw: Mapping[str, Any], above: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield keys and value of every leaf of nested mappings; an empty mapping is a leaf."""
    for key, value in raw.items():
        keys = (*above, str(key))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, keys)
        else:
            yield keys, value


def _replacements(config: type[BaseModel], table: Renamed, keys: Keys, value: Any, flags: bool) -> Iterator[str]:
    name = ".".join(keys)
    # A name that is used again, for something else, is old only where the value does not fit.
    renamed = None if _fits(config, keys, value) else _entry(config, table, keys)
    old, new = renamed or (name, name)
    # A space: what stands there is a sentence, not a name (see `Renamed`).
    if old == name and " " not in new:
        values = table.values.get(name, {})
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, str) and item in values and not _is_choice(config, keys, item):
                yield _sentence(old, new, flags, item, values[item])
                renamed = None  # the sentence says the new name too
    if renamed:
        yield _sentence(old, new, flags)


def _sentence(old: str, new: str, flags: bool, old_value: str = "", new_value: str = "") -> str:
    sign, colon = ("--", " ") if flags else ("", ": ")
    old_text = f"{sign}{old}{colon}{shortened(old_value)}" if old_value else f"{sign}{old}"
    if " " in new or " " in new_value:
        return f"{old_text} {new_value or new}"
    return f"{old_text} is now {sign}{new}{colon}{new_value}" if new_value else f"{old_text} is now {sign}{new}"


def _entry(config: type[BaseModel], table: Renamed, keys: Keys) -> tuple[str, str] | None:
    """Old and new name: the setting's entry, else that of the innermost group around it that is gone."""
    # From the whole name outwards, so that a setting's own entry wins over its group's.
    for length in range(len(keys), 0, -1):
        name = ".".join(keys[:length])
        if name in table.settings and (length == len(keys) or _type_at(config, keys[:length]) is None):
            return name, table.settings[name]
    return None


def _fits(config: type[BaseModel], keys: Keys, value: Any) -> bool:
    """Whether such a setting exists; a group takes settings, not one value."""
    annotation = _type_at(config, keys)
    is_value = value is not None and not isinstance(value, Mapping)
    return annotation is not None and not (is_value and kinds_of(annotation) == [group_of(annotation)])


def _is_choice(config: type[BaseModel], keys: Keys, value: str) -> bool:
    """Whether a setting, or each item of it where it is a list, may have a value."""
    kinds = kinds_of(_type_at(config, keys))
    kinds += [kind for holder in filter(is_list, kinds) for kind in kinds_of(get_args(holder)[0])]
    return any(value in get_args(kind) for kind in kinds if get_origin(kind) is Literal)


def _type_at(config: type[BaseModel], keys: Keys) -> Any:
    """Type of a setting; None where it does not exist. Every key of a mapping is a setting."""
    annotation: Any = config
    for key in keys:
        group = group_of(annotation)
        if group is None:
            takes_keys = any(kind is Any or get_origin(kind) is dict for kind in kinds_of(annotation))
            return Any if takes_keys else None
        if key not in group.model_fields:
            return None
        annotation = group.model_fields[key].annotation
    return annotation
