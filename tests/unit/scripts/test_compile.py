"""What is compiled is there, and each module once."""

from __future__ import annotations

from scripts.compile import COMPILED, ROOT


def test_modules_that_are_compiled_exist() -> None:
    assert [module for module in COMPILED if not (ROOT / f"{module}.py").is_file()] == []
    assert len(set(COMPILED)) == len(COMPILED)
