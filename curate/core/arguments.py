"""Parses every command line: `--config FILE.yaml`, dotted flags over it, `--help [PAGE]` and `--print_config`.

    --mixture.max_epochs 3     a setting; dashes and underscores of its name are the same
    --mixture '{prior: ...}'   a group of settings or a mapping, as YAML; a group's other settings stay
    --source.earlier_runs '[a, b]'   a list; one value is a list of one
    --once                     a setting of type bool needs no value
    --retain null              none, where a setting may be none

Later ones override earlier ones, files and flags alike. Files are read by `core.reading`, flags too where they are
lists or mappings; everything else is text until the config's own validation. An old name is an error that says the
new one (`curate.core.renamed`), one error for all of them.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from curate.core.errors import UserError
from curate.core.help_pages import help_page
from curate.core.paths import local_path
from curate.core.reading import dump_yaml, parse_yaml, read_yaml, shortened
from curate.core.renamed import Keys, leaves, replacements
from curate.core.validation import first_problem, group_of, is_list, kinds_of, setting_of

Model = TypeVar("Model", bound=BaseModel)

_HELP, _PRINT = "help", "print_config"
_PLAIN: TypeAdapter[Any] = TypeAdapter(Any)


def parse(config: type[Model], prog: str, description: str, argv: Sequence[str]) -> Model:
    """Build a config; `--help` and `--print_config` print and exit.

    Raises:
        UserError: an option is unknown, missing, or its value is not valid.
        SystemExit: 0 after `--help` or `--print_config`.
    """
    options = list(_options(config, argv))
    for page in [text for name, text in options if name == _HELP]:
        sys.stdout.write(help_page(config, prog, description, page))
        raise SystemExit(0)
    # Files and flags are taken in the order of the command line, since later ones override.
    given = _Given(config)
    for name, text in options:
        if name == "config":
            given.take_file(text)
        elif name != _PRINT:
            given.take_flag(name, text)
    # Before the validation: it would call an old name unknown.
    if given.renamed:
        raise UserError("; ".join(given.renamed))
    shown = any(name == _PRINT for name, _ in options)
    try:
        parsed = config.model_validate(given.values)
    except ValidationError as error:
        # `--print_config` writes a file to start from, so what is required may still be missing.
        if not shown or any(problem["type"] != "missing" for problem in error.errors()):
            only_files = all(name == "config" for name, _ in options)
            raise UserError(_problem_text(error, given.files, only_files=only_files)) from None
    if shown:
        sys.stdout.write(dump_yaml(_shown(config, given.values)))
        raise SystemExit(0)
    return parsed


class _Given:
    """Settings of files and flags, each put over what the ones before it said.

    Attributes:
        values: the settings, in nested mappings.
        files: which file each setting of a file is from.
        renamed: sentences that say what to write instead of old names.
    """

    def __init__(self, config: type[BaseModel]) -> None:
        self._config = config
        self.values: dict[str, Any] = {}
        self.files: dict[Keys, str] = {}
        self.renamed: list[str] = []

    def take_file(self, name: str) -> None:
        """Put a file's settings over the present ones.

        Raises:
            UserError: it cannot be read, or is no mapping.
        """
        path, raw = _read_file(name)
        settings = list(leaves(raw))
        old = replacements(self._config, settings)
        self.renamed += [f"{path}: {', '.join(old)}"] if old else []
        for key, value in raw.items():
            _put(self._config, self.values, (key,), value)
        self.files |= {keys: str(path) for keys, _ in settings}

    def take_flag(self, name: str, text: str) -> None:
        """Put one flag over the present settings.

        Raises:
            UserError: there is no such setting, and never was; or its text is not what it should be.
        """
        try:
            keys, annotation = _find_setting(self._config, name)
        except UserError:
            old = _replaced(self._config, name, text)
            if not old:
                raise
            self.renamed += old
            return
        value = _value(annotation, text, name)
        self.renamed += replacements(self._config, _leaves(keys, value), flags=True)
        _put(self._config, self.values, keys, value)
        # A setting that a flag overrides is no longer the file's: an error about it must not name the file.
        self.files = {setting: file for setting, file in self.files.items() if setting[: len(keys)] != keys}


def _options(config: type[BaseModel], argv: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield name and text of each option."""
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        if name in ("-h", _HELP):
            # A page is a word of its own (`--help mixture`), unless that word is the next option.
            is_page = not equals and words and not words[0].startswith("-")
            yield _HELP, words.pop(0) if is_page else text
        elif not word.startswith("--") or not name:
            raise UserError(f"{shortened(repr(word))} stands where an option is expected; see --help")
        elif equals or name.replace("-", "_") == _PRINT:
            yield _PRINT if name.replace("-", "_") == _PRINT else name, text
        elif words and not words[0].startswith("--"):
            yield name, words.pop(0)
        # An old name without a value goes on too: its error says the new name.
        elif name != "config" and (_replaced(config, name) or kinds_of(_find_setting(config, name)[1]) == [bool]):
            yield name, "true"
        else:
            raise UserError(f"--{name} needs a value; see --help")


def _replaced(config: type[BaseModel], name: str, text: str = "") -> list[str]:
    """Sentences that say what to write instead of a flag that is gone; none for any other flag."""
    keys = tuple(name.replace("-", "_").split("."))
    value = parse_yaml(text, f"--{name}") if text.lstrip().startswith("{") else text
    return replacements(config, _leaves(keys, value), flags=True)


def _leaves(keys: Keys, value: Any) -> Iterable[tuple[Keys, Any]]:
    # An empty mapping is a value, as in `leaves`.
    return leaves(value, keys) if isinstance(value, Mapping) and value else [(keys, value)]


def _find_setting(config: type[BaseModel], name: str) -> tuple[Keys, Any]:
    """Find the keys that lead to a setting, and its type; a mapping's key may have dots where its values have no keys.

    Raises:
        UserError: there is no such setting.
    """
    keys: list[str] = []
    annotation: Any = config
    rest = name.split(".")
    while rest:
        groups = [kind for kind in kinds_of(annotation) if group_of(kind) or get_origin(kind) is dict]
        if annotation is Any:
            # Inside of untyped values (a trainer's settings) every name is a key.
            keys, rest = [*keys, *rest], []
        elif groups and group_of(groups[0]):
            field = groups[0].model_fields.get(rest[0].replace("-", "_"))
            if field is None:
                raise UserError(f"there is no option --{shortened(name.replace('-', '_'))}; see --help")
            keys.append(rest.pop(0).replace("-", "_"))
            annotation = field.annotation
        elif groups:
            annotation = get_args(groups[0])[1]
            # Domains and files have dots in their names: `--mixture.prior.web.en 1` sets one key, `web.en`.
            flat = not any(kind is Any or group_of(kind) or get_origin(kind) is dict for kind in kinds_of(annotation))
            keys.append(".".join(rest) if flat else rest[0])
            rest = [] if flat else rest[1:]
        else:
            raise UserError(f"--{shortened('.'.join(keys))} has no settings of its own; see --help")
    return tuple(keys), annotation


def _value(annotation: Any, text: str, name: str) -> Any:
    """Read a flag's text as YAML where it can be nothing else; other text is left to the validation."""
    kinds = kinds_of(annotation)
    if text == "null" and NoneType in get_args(annotation):
        return None
    nested = [kind for kind in kinds if group_of(kind) or get_origin(kind) in (dict, list, tuple)]
    only_yaml = all(kind is Any or (kind in nested and not is_list(kind)) for kind in kinds)
    # A list may also be one plain value, which stays text: YAML would read the path `1e3` as a number.
    return parse_yaml(text, f"--{name}") if only_yaml or (nested and text.lstrip()[:1] in ("[", "{")) else text


def _read_file(name: str) -> tuple[Path, dict[str, Any]]:
    try:
        path = local_path(Path(name))
    except ValueError as error:
        raise UserError(f"--config: {error}") from None
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise UserError(f"{path} holds {type(raw).__name__}, expected a mapping of settings")
    return path, raw


def _put(config: type[BaseModel], given: dict[str, Any], keys: Keys, value: Any) -> None:
    """Set one value; a group of settings is set one by one, so that its other settings stay."""
    key, rest = keys[0], keys[1:]
    field = config.model_fields.get(key)
    group = group_of(field.annotation) if field else None
    if group and (rest or isinstance(value, Mapping)):
        inner = _as_mapping(given.get(key, field.default if field else None))
        given[key] = inner
        for inner_keys, setting in {rest: value}.items() if rest else [((name,), item) for name, item in value.items()]:
            _put(group, inner, inner_keys, setting)
    elif rest:
        given[key] = dict(given[key]) if isinstance(given.get(key), Mapping) else {}
        _put_plain(given[key], rest, value)
    else:
        given[key] = value


def _put_plain(given: dict[str, Any], keys: Keys, value: Any) -> None:
    """Set one value of a mapping in a setting; what stands in its way is replaced."""
    for key in keys[:-1]:
        given[key] = dict(given[key]) if isinstance(given.get(key), Mapping) else {}
        given = given[key]
    given[keys[-1]] = value


def _as_mapping(group: Any) -> dict[str, Any]:
    """A group of settings to put others over: as given so far, or as its default has it."""
    if isinstance(group, BaseModel):
        # Only what the parent's default sets: the class's own defaults come in the validation.
        return group.model_dump(exclude_unset=True)
    return dict(group) if isinstance(group, Mapping) else {}


def _problem_text(error: ValidationError, files: Mapping[Keys, str], *, only_files: bool) -> str:
    """The error's sentence, with the file that the setting is from, or as a flag."""
    where = setting_of(error)
    # Settings of files around the setting, or in it where it is a group; the last file wins.
    near = [file for keys, file in files.items() if keys == where[: len(keys)] or where == keys[: len(where)]]
    if near and (where or only_files):
        return f"{near[-1]}: {first_problem(error)}"
    return f"{'--' if where else ''}{first_problem(error)}; see --help"


def _shown(config: type[BaseModel], given: Mapping[str, Any]) -> dict[str, Any]:
    """Collect all settings: as given, else the default; null where a setting has none."""
    shown: dict[str, Any] = {}
    for name, field in config.model_fields.items():
        value = given.get(name, None if field.is_required() else field.default)
        group = group_of(field.annotation)
        if group and isinstance(value, BaseModel | Mapping):
            value = _shown(group, value if isinstance(value, Mapping) else dict(value))
        shown[name] = _PLAIN.dump_python(value, mode="json")
    return shown
