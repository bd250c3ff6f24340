"""Hatchling's build hook: with ZTUNNEL_COMPILE=1 a wheel has the compiled form of the hot modules beside the sources (scripts/compile.py).

Without it, and in editable installs, a wheel is pure Python, as everywhere where there is no C compiler.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

sys.path.insert(0, str(Path(__file__).parents[1]))


class CompiledModules(BuildHookInterface):  # type: ignore[type-arg]  # hatchling's own parameter, its builder's configuration
    """Adds what `scripts.compile` makes."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, object]) -> None:
        """Called by hatchling before a wheel is built."""
        if version == "editable" or os.environ.get("ZTUNNEL_COMPILE") != "1":
            return
        from scripts.compile import compiled  # noqa: PLC0415 - mypy is there only where something is compiled

        tree = compiled()
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"] = {str(path): str(path.relative_to(tree)) for path in tree.rglob("*.so")}
