"""What pydantic knows of a field, and what it says where a value does not fit."""

from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from curate.reading import shortened


def kinds_of(annotation: Any) -> list[Any]:
    """The members of a union, else the type alone; without metadata and None."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in kinds_of(member)]
    return [] if annotation is NoneType else [annotation]


def is_list(kind: Any) -> bool:
    """Whether a type is a list or tuple of any length."""
    return get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[-1] is ...)


def first_problem(error: ValidationError) -> str:
    """The first thing that a validation found wrong, as "field.inner: what"."""
    first = error.errors(include_url=False)[0]
    what = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
    given = first["input"]
    if isinstance(given, str | int | float) and first["type"] not in ("value_error", "extra_forbidden"):
        what = f"{what} (it is {shortened(repr(given))})"
    where, what = shortened(".".join(setting_of(error))), shortened(what.removeprefix("Value error, "), most=600)
    return f"{where}: {what}" if where else what


def setting_of(error: ValidationError) -> tuple[str, ...]:
    """The keys that lead to what `first_problem` is about; where a union is tried, only those that lead to it."""
    keys: list[str] = []
    for key in map(str, error.errors(include_url=False)[0]["loc"]):
        if "[" in key:
            break
        keys.append(key)
    return tuple(keys)
