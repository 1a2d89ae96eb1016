"""Names describe a value: vague names have a scope of at most three lines."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ENGINE = Path(__file__).parents[1] / "engine"
FILES = sorted(path.relative_to(ENGINE).as_posix() for path in ENGINE.rglob("*.py"))
VAGUE = {"found", "held", "told", "made", "noted", "shown", "one", "other", "fed", "looks"}
LINES = 3


def vague_names(tree: ast.AST) -> Iterator[tuple[str, str, int]]:
    """Function, name and lines of each vague name with a longer scope. `other` is the conventional
    name of the second operand of a binary method."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        parameters = {argument.arg for argument in function.args.args}
        places: dict[str, list[int]] = defaultdict(list)
        for node in ast.walk(function):
            if isinstance(node, ast.Name):
                places[node.id].append(node.lineno)
            elif isinstance(node, ast.arg):
                places[node.arg].append(node.lineno)
        for name in VAGUE & places.keys():
            lines = max(places[name]) - min(places[name]) + 1
            if lines > LINES and not (name == "other" and {"self", "other"} <= parameters):
                yield function.name, name, lines


@pytest.mark.parametrize("file", FILES)
def test_vague_names_have_a_short_scope(file: str) -> None:
    assert list(vague_names(ast.parse((ENGINE / file).read_text("utf-8")))) == []


def test_vague_name_is_detected() -> None:
    text = "def act(x):\n    found = x\n    y = 1\n    z = 2\n    return found\n"
    assert list(vague_names(ast.parse(text))) == [("act", "found", 4)]
    assert list(vague_names(ast.parse(text.replace("    z = 2\n", "")))) == []
