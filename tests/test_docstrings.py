"""A docstring is a sentence that stands alone: it does not go on from the line above it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "reward", "policy", "launch", "benchmarks")
_PREPOSITIONS = """
about above after also among and as at because before behind below beneath beside besides between beyond but
by during for from if in inside into like near of off on onto or out outside over per since so than that
through to towards under until up upon via with within without
"""
HANGING = frozenset(_PREPOSITIONS.split())


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring: of modules, classes, functions, and of the assignment above it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for before, statement in zip([None, *node.body], node.body, strict=False):
            documents = before is None or isinstance(before, ast.Assign | ast.AnnAssign)
            if not documents or not isinstance(statement, ast.Expr):
                continue
            match statement.value:
                case ast.Constant(value=str(text)):
                    yield statement.lineno, text


def hanging(source: str) -> list[tuple[int, str]]:
    found = []
    for line, text in docstrings(ast.parse(source)):
        words = text.split()
        if not words or words[0].strip("`(\"',.;:").lower() in HANGING or words[0] in ("Args:", "Returns:", "Raises:"):
            found.append((line, text.strip().splitlines()[0] if words else ""))
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_do_not_begin_with_a_preposition(package):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for line, text in hanging(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(["docstrings that hang on the line above:", *found])


@pytest.mark.parametrize(
    "source",
    [
        '"""Of the module."""',
        'class A:\n    """With three parts."""',
        'def f():\n    """``for`` a loop."""',
        'class A:\n    x: int\n    """Of the last step."""',
        'LIMIT = 3\n"""\nBelow this nothing works."""',
        'def f():\n    """\n    Raises:\n        ValueError: always.\n    """',
    ],
)
def test_a_hanging_docstring_is_found(source):
    assert len(hanging(source)) == 1


def test_text_that_documents_nothing_is_passed_over():
    assert hanging('def f():\n    g()\n    "of"\n    return "of"\n') == []
