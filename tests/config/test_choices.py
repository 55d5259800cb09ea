"""Sets of values that options may take are declared once."""

from __future__ import annotations

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "bonsai_fast"


def values_of(node: ast.AST) -> frozenset[str] | None:
    """The values of `Literal["a", "b"]`; None of anything else, or of one that refers to others."""
    if not (isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal"):
        return None
    items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if not all(isinstance(item, ast.Constant) for item in items):
        return None
    return frozenset(str(item.value) for item in items if isinstance(item, ast.Constant))


def test_no_set_of_values_is_declared_twice() -> None:
    places: dict[frozenset[str], list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            values = values_of(node)
            if values is not None and len(values) > 1:
                place = f"{path.relative_to(PACKAGE)}:{node.lineno}"  # type: ignore[attr-defined]
                places.setdefault(values, []).append(place)
    assert frozenset({"rectangular", "free"}) in places
    assert not {tuple(values): found for values, found in places.items() if len(found) > 1}
