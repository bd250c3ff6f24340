"""What every program's settings owe their reader: a docstring for each."""

from __future__ import annotations

import ast
import inspect
from dataclasses import is_dataclass
from itertools import pairwise
from typing import get_type_hints


def undocumented(settings: type) -> list[str]:
    """Settings of this class and its sections that no docstring follows."""
    sections = [settings, *(kind for kind in get_type_hints(settings).values() if isinstance(kind, type) and is_dataclass(kind))]
    return [name for section in sections for name in _undocumented(section)]


def _undocumented(section: type) -> list[str]:
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)
    hints = get_type_hints(section)
    found = []
    for statement, following in pairwise([*body.body, ast.Pass()]):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_section = is_dataclass(hints[statement.target.id])
            if not is_section and not isinstance(following, ast.Expr):
                found.append(f"{section.__name__}.{statement.target.id}")
    return found
