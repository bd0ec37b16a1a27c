"""README and docs: links lead somewhere, and what code blocks name exists."""

import ast
import re
import shlex
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from curate.__main__ import COMMANDS
from curate.plans.plan import load_plan
from curate.selection.renamed import SELECT

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
COMMON = {"config", "print_config", "trust", "help", "h"}
# Groups of settings: `group.setting` in a page is one of them.
GROUPS = (
    "source", "values", "mixture", "filter", "output", "adjoint", "dvemb", "dvemb_adam", "baseline", "index", "draw",
    "recorder", "optimizer", "columns", "capture", "branch_test",
)  # fmt: skip
SUFFIXES = ("yaml", "json", "parquet", "py", "pt")  # of files that are called like a group
PARSED = (
    "curate.select", "curate.embed", "curate.search", "curate.verify", "curate.schedule", "curate.branch_test",
    "curate.reconstruct", "pipelines.pretrain",
)  # fmt: skip
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page, *languages):
    """Text of a page's code blocks in some languages."""
    fence = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [text for language, text in fence.findall(page.read_text(encoding="utf-8")) if language in languages]


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """What a link to a heading may name, as GitHub and MkDocs make it."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def configs(annotation):
    """The config classes in an annotation: itself, of an optional one, of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, UnionType, tuple, list) or hasattr(annotation, "__metadata__"):
        return [config for part in get_args(annotation) for config in configs(part)]
    return []


def is_setting(config, keys):
    """Whether a dotted name is a setting of a config class; below a mapping any name is."""
    name, *rest = (key.replace("-", "_") for key in keys)
    field = config.model_fields.get(name)
    if field is None:
        return False
    inner = configs(field.annotation)
    return not rest or not inner or any(is_setting(each, rest) for each in inner)


def source_of(module):
    """The file that `python -m MODULE` runs."""
    base = ROOT / module.replace(".", "/")
    return base / "__main__.py" if base.is_dir() else base.with_suffix(".py")


@cache
def config_of(module) -> Any:
    """The config class that a command parses, found without running the command."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    (name,) = {
        node.args[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "parse_command"
    }
    places = {
        alias.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    own = ".".join(source_of(module).relative_to(ROOT).with_suffix("").parts)
    return getattr(import_module(places.get(name, own)), name)


def defined(module):
    """Names of the functions and classes of a module, which is not imported: some take long."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def commands(page):
    """Module and words of each command of a page's shell blocks; module None: a script that takes no settings."""
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["bash"]:
            words = words[1:]
        if not words:
            continue
        if words[0].startswith(".venv/bin/python") or words[0] == "python":
            assert words[1] == "-m", line
            yield words[2], words[3:]
        elif words[0] == "curate":
            yield COMMANDS[words[1]][0].removesuffix(".__main__"), words[2:]
        elif words[0].startswith("scripts/"):
            run = re.findall(r"-m (pipelines\.\w+) \"\$@\"", (ROOT / words[0]).read_text(encoding="utf-8"))
            yield (run[0] if run else None), words[1:]
        else:
            assert words[0] == "pip", line


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@every_page
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), link


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    missing = [name for name in NAMES if name.startswith("docs/") and f"]({name}" not in readme]
    assert missing == []


@every_page
def test_commands_have_a_module_and_know_their_settings(page):
    for module, words in commands(page):
        if module is None:
            continue
        assert find_spec(module) is not None, module
        for word in words:
            if not word.startswith("--") or module == "pytest":
                continue
            name = word[2:].partition("=")[0]
            assert name in COMMON or is_setting(config_of(module), name.split(".")), f"{module} {word}"


@every_page
def test_commands_in_the_text_exist(page):
    for module in re.findall(r"`python -m ([\w.]+)", prose(page)):
        assert find_spec(module) is not None, module
    for script in re.findall(r"`(?:bash )?(scripts/[\w.]+)", prose(page)):
        assert (ROOT / script).exists(), script


@every_page
def test_settings_in_the_text_exist(page):
    known = [config_of(module) for module in PARSED]
    text = prose(page).partition("## Old settings")[0]
    for span in re.findall(r"`([^`\n]+)`", text):
        name = span.split()[0].removeprefix("--").rstrip(":")
        if re.fullmatch(r"\w+(\.\w+)+", name) and name.split(".")[0] in GROUPS and name.split(".")[-1] not in SUFFIXES:
            assert any(is_setting(config, name.split(".")) for config in known), span


@every_page
def test_yaml_files_hold_settings(page, tmp_path):
    for text in blocks(page, "yaml"):
        first = text.splitlines()[0]
        if first.startswith("# python -m "):
            config = config_of(first.split()[3])
            assert yaml.safe_load(text).keys() <= config.model_fields.keys(), text
            flags = {} if "--window" not in first else {"window": first.split()[-1]}
            config.model_validate(flags | yaml.safe_load(text))
        else:
            assert first == "# plan.yaml", text
            (tmp_path / "plan.yaml").write_text(text, encoding="utf-8")
            load_plan(tmp_path / "plan.yaml")


@every_page
def test_python_blocks_are_python_and_import_what_exists(page):
    for text in blocks(page, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("curate"):
                assert {alias.name for alias in node.names} <= defined(str(node.module)), text
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "curate":
                assert node.attr in import_module("curate").__all__, node.attr


def test_the_glossary_has_every_old_setting():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").partition("## Old settings")[2]
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    new_of = {old: new.strip() for olds, new in rows for old in re.findall(r"`([^`]+)`", olds)}
    for old, new in SELECT.settings.items():
        assert old in new_of
        if re.fullmatch(r"[\w.]+", new):
            assert new_of[old] == f"`{new}`"
