"""Every refusal that the code spells: two sentences at most."""

import ast

import pytest

from tests.fuzz.outcome import sentences
from tests.test_project import ROOT

REFUSALS = {"UserError", "ValueError", "TrainerError"}
FILES = sorted([*ROOT.glob("curate/**/*.py"), *ROOT.glob("pipelines/**/*.py")])


def texts(node: ast.AST) -> str:
    """A message with `_` for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(texts(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return texts(node.left) + texts(node.right)
    if isinstance(node, ast.IfExp):
        return max(texts(node.body), texts(node.orelse), key=sentences)
    return "_"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_refusal_has_two_sentences_at_most(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS and node.args:
            message = texts(node.args[0])
            assert sentences(message) <= 2, f"line {node.lineno}: {message}"
            assert "\n" not in message, f"line {node.lineno}: {message}"
