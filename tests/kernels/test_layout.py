"""The kernels' own house rules, read from the source."""

from __future__ import annotations

import ast
from pathlib import Path

import kernels_cupy

ROOT = Path(kernels_cupy.__file__).parent


def modules() -> dict[str, set[str]]:
    """Module -> every module of ours that it names, also inside functions and for type checking only."""
    names = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    found: dict[str, set[str]] = {}
    for module, text in names.items():
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.module]
        used = {node.module for node in nodes}
        used |= {f"{node.module}.{alias.name}" for node in nodes for alias in node.names}
        found[module] = (used & names.keys()) - {module}
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The modules that are left when all that name none of the others have been taken away, again and again."""
    left = dict(graph)
    while free := [module for module, used in left.items() if not used & left.keys()]:
        for module in free:
            del left[module]
    return set(left)


def test_no_module_names_one_that_names_it() -> None:
    assert len(modules()) > 20
    assert circles(modules()) == set()
    assert circles({"a": {"b"}, "b": {"a"}, "c": set()}) == {"a", "b"}
