"""What pydantic knows of a field's type, and its errors in one sentence."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from curate.core.reading import shortened


@dataclass(frozen=True)
class TypeName:
    """Name of a type in the help, where its Python type says too little: metadata of `Annotated`."""

    words: str


def kinds_of(annotation: Any) -> list[Any]:
    """List the members of a union, else the type alone; without metadata and None."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [kind for member in get_args(annotation) for kind in kinds_of(member)]
    return [] if annotation is NoneType else [annotation]


def is_list(kind: Any) -> bool:
    """Whether a type is a list or tuple of any length."""
    return get_origin(kind) is list or (get_origin(kind) is tuple and get_args(kind)[-1] is ...)


def group_of(annotation: Any) -> type[BaseModel] | None:
    """Return the class of a group of settings, if the type is one (or null)."""
    groups = (kind for kind in kinds_of(annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return next(groups, None)


def changed(config: BaseModel) -> dict[str, Any]:
    """Collect dotted name and value of each setting that differs from its default.

    A setting of a group is compared with the group's default in its parent. A group that is set where the default is
    null is compared with its own class, and listed as a whole where nothing differs. Lists and mappings are compared as
    a whole. A setting without a default is always listed.
    """
    return dict(_changed(config, None, ""))


def _changed(config: BaseModel, default: BaseModel | None, above: str) -> Iterator[tuple[str, Any]]:
    """Yield differences of a group from its default, or from the defaults of its class where that is None."""
    for name, field in type(config).model_fields.items():
        value, usual = getattr(config, name), field.default if default is None else getattr(default, name)
        if isinstance(value, BaseModel):
            # The group's default in its parent may differ from the defaults of its class.
            same_class = usual if type(usual) is type(value) else None
            inner = dict(_changed(value, same_class, f"{above}{name}."))
            yield from (inner or ({} if same_class else {above + name: value})).items()
        elif value != usual:
            yield above + name, value


def first_problem(error: ValidationError) -> str:
    """Say the first thing that a validation found wrong, as "field.inner: what"."""
    first = error.errors(include_url=False)[0]
    what = "there is no such setting" if first["type"] == "extra_forbidden" else first["msg"]
    given = first["input"]
    # Our own validators (value_error) say the value themselves.
    if isinstance(given, str | int | float) and first["type"] not in ("value_error", "extra_forbidden"):
        what = f"{what} (it is {shortened(repr(given))})"
    where, what = shortened(".".join(setting_of(error))), shortened(what.removeprefix("Value error, "), most=600)
    return f"{where}: {what}" if where else what


def setting_of(error: ValidationError) -> tuple[str, ...]:
    """Return the keys that lead to what `first_problem` is about, without pydantic's names of a union's members."""
    keys: list[str] = []
    for key in map(str, error.errors(include_url=False)[0]["loc"]):
        if "[" in key:  # pydantic names a union's member so, as in `list[float]`; no user wrote that
            break
        keys.append(key)
    return tuple(keys)
