"""What is compiled is there, each module once, and no interpreted class has a compiled base: Python would refuse to import it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from scripts.compile import COMPILED, PACKAGES, ROOT


def test_modules_that_are_compiled_exist() -> None:
    assert [module for module in COMPILED if not (ROOT / f"{module}.py").is_file()] == []
    assert len(set(COMPILED)) == len(COMPILED)


def test_no_interpreted_class_has_a_compiled_base() -> None:
    compiled = frozenset(COMPILED)
    interpreted = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if _module(path) not in compiled]
    assert [f"{_module(path)}: {name}" for path in interpreted for name, base in _imported_bases(path) if base in compiled] == []


def _module(path: Path) -> str:
    return str(path.relative_to(ROOT).with_suffix(""))


def _imported_bases(path: Path) -> Iterator[tuple[str, str]]:
    """Each class with the modules that its bases come from."""
    tree = ast.parse(path.read_text())
    origins = {
        alias.asname or alias.name: node.module.replace(".", "/")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and base.id in origins:
                    yield node.name, origins[base.id]
