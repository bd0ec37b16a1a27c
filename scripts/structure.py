"""Counters of the code's structure: `python scripts/structure.py [CHECKOUT]`; without CHECKOUT of this one.

Sizes:
    lines               of all Python files of curate/ and pipelines/, empty lines too
    comment lines       lines that begin with `#` or end in a comment; directives (fmt, noqa, type) are no comments
    long functions      longer than 60 lines, signature and docstring included, decorators not
    select              lines of the function `select`, and its local variables: parameters too, imported names not
    settings            fields of SelectConfig that are no group of settings, those of its groups included
    help                lines of `python -m curate.select --help` at 80 columns

Imports, wherever they stand in a file; between units, and between modules:
    unit                a folder or a module directly in curate/, as in the layers of pyproject.toml; pipelines/ as one;
                        scripts/ as one
    arrow               a pair of which one imports the other
    floors              members of the longest way along arrows; a circle counts as one
    circle              two or more that reach each other along arrows
Once for the imports that run, as import-linter is set to see them, and once with those below `if TYPE_CHECKING:`, but
for the public names that curate/__init__.py lists for type checkers.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tokenize
from collections.abc import Collection, Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path
from types import CodeType
from typing import Any, get_args

LONG = 60  # lines
DIRECTIVES = ("# fmt:", "# noqa", "# type:", "# ruff:", "#!")
Arrows = set[tuple[str, str]]


def main() -> None:
    """Entry point."""
    root = Path(sys.argv[1]).resolve() if sys.argv[1:] else Path(__file__).resolve().parents[1]
    say_sizes(root)
    say_settings(root)
    say_imports(root)


def say(name: str, value: str) -> None:
    """Print one counter."""
    sys.stdout.write(f"{name:<40}{value}\n")


def modules(root: Path, *folders: str) -> dict[str, Path]:
    """Name -> file of every module."""
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def say_sizes(root: Path) -> None:
    """Lines, comments and long functions."""
    files = modules(root, "curate", "pipelines")
    lines = sum(len(file.read_bytes().splitlines()) for file in files.values())
    whole, after = (sum(counts) for counts in zip(*map(comments, files.values()), strict=True))
    say("lines of curate/ and pipelines/", f"{lines} in {len(files)} files")
    say("comment lines", f"{(whole + after) / lines:.1%}: {whole} begin with one, {after} end in one")
    lengths = {
        f"{name}.{node.name}": length(node)
        for name, file in files.items()
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    longest = sorted((name for name in lengths if lengths[name] > LONG), key=lambda name: -lengths[name])
    say(f"functions of more than {LONG} lines", ", ".join([str(len(longest)), *longest]))


def comments(file: Path) -> tuple[int, int]:
    """Lines that begin with a comment, and lines that end in one."""
    with file.open("rb") as source:
        tokens = [token for token in tokenize.tokenize(source.readline) if token.type == tokenize.COMMENT]
    alone = [token.line.lstrip().startswith("#") for token in tokens if not token.string.startswith(DIRECTIVES)]
    return sum(alone), len(alone) - sum(alone)


def length(node: ast.stmt) -> int:
    """Lines of a statement, decorators left out."""
    return (node.end_lineno or node.lineno) - node.lineno + 1


def say_settings(root: Path) -> None:
    """How large the main command is for who calls it."""
    trees = {name: ast.parse(file.read_bytes()) for name, file in modules(root, "curate").items()}
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "select":
                say(f"select of {name}", f"{length(node)} lines, {local_variables(node)} local variables")
            elif isinstance(node, ast.ClassDef) and node.name == "SelectConfig":
                sys.path.insert(0, str(root))
                say("settings of SelectConfig", str(leaves(getattr(import_module(name), node.name))))
    command = [sys.executable, "-m", "curate.select", "--help"]
    # the checkout's own code, not the installed one
    environment = {**os.environ, "COLUMNS": "80", "PYTHONPATH": str(root)}
    shown = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True).stdout
    say("lines of its help", str(len(shown.splitlines())))


def local_variables(function: ast.stmt) -> int:
    """Of a function, parameters included; names that it imports are none."""
    # compiled, not executed: the code object lists its variables, as the interpreter counts them
    module = compile(ast.Module(body=[function], type_ignores=[]), "structure", "exec")
    (code,) = (constant for constant in module.co_consts if isinstance(constant, CodeType))
    inner = [node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)]
    imported = {alias.asname or alias.name for node in inner for alias in node.names}
    # cellvars: variables that an inner function reads too
    return len({*code.co_varnames, *code.co_cellvars} - imported)


def leaves(config: Any) -> int:
    """Settings of a pydantic model, those of groups one by one."""
    count = 0
    for field in config.model_fields.values():
        kinds = [field.annotation, *get_args(field.annotation)]
        # `Group | None` is a group too
        groups = [kind for kind in kinds if hasattr(kind, "model_fields")]
        count += leaves(groups[0]) if groups else 1
    return count


def say_imports(root: Path) -> None:
    """Floors, arrows and circles."""
    files = modules(root, "curate", "pipelines", "scripts")
    for types in (False, True):
        pairs = {(name, other) for name, file in files.items() for other in imports(name, file, files, types=types)}
        for kind, group in (("units", unit), ("modules of curate/", inside)):
            arrows = {(group(source), group(target)) for source, target in pairs}
            arrows = {(source, target) for source, target in arrows if source and target and source != target}
            say_graph(f"{kind}, {'with types' if types else 'imports that run'}", arrows)


def unit(module: str) -> str:
    """The unit that a module lies in."""
    top, *below = module.split(".")
    return ".".join([top, *below[:1]]) if top == "curate" else top


def inside(module: str) -> str:
    """A module of curate, else nothing."""
    return module if module.partition(".")[0] == "curate" else ""


def imports(name: str, file: Path, known: Collection[str], *, types: bool) -> Iterator[str]:
    """What a module imports of the known ones; with `types` also for type checkers only, but for the public names."""
    for node in statements(ast.parse(file.read_bytes()), types=types and name != "curate"):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                imported = f"{node.module}.{alias.name}"  # a module, or a name in one
                yield from [module for module in (imported, node.module) if module in known][:1]


def statements(node: ast.AST, *, types: bool) -> Iterator[ast.AST]:
    """All that stands below a node; without `types` but for what is for type checkers only."""
    for child in ast.iter_child_nodes(node):
        yield child
        if types or not (isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"):
            yield from statements(child, types=types)


def say_graph(name: str, arrows: Arrows) -> None:
    """Print the counters of a graph."""
    members = circles(arrows)
    names = "".join(f" ({', '.join(sorted(circle))})" for circle in members)
    say(name, f"{floors(arrows, members)} floors, {len(arrows)} arrows, {len(members)} circles{names}")


def circles(arrows: Arrows) -> list[frozenset[str]]:
    """Sets of two or more that reach each other."""
    nodes = {node for arrow in arrows for node in arrow}
    reached = {node: {target for source, target in arrows if source == node} for node in nodes}
    # Warshall's closure: after each turn all ways over the middles so far are known
    for middle, beyond in reached.items():
        for targets in reached.values():
            if middle in targets:
                targets |= beyond
    sets = {frozenset(other for other in targets if node in reached[other]) for node, targets in reached.items()}
    return [members for members in sets if len(members) > 1]


def floors(arrows: Arrows, members: list[frozenset[str]]) -> int:
    """Members of the longest way; a circle counts as one."""
    first = {name: min(circle) for circle in members for name in circle}  # stands for its circle
    below: dict[str, set[str]] = {}
    for pair in arrows:
        source, target = (first.get(name, name) for name in pair)
        # arrows inside a circle would stop the sorter
        below.setdefault(source, set()).update({target} - {source})
    height: dict[str, int] = {}
    for name in TopologicalSorter(below).static_order():
        height[name] = 1 + max((height[other] for other in below.get(name, ())), default=0)
    return max(height.values(), default=0)


if __name__ == "__main__":
    main()
