"""Control groups of a test's own, in the unified hierarchy, where the machine lets us make them."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.polling import eventually

ROOTS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))


def unified_root() -> Path | None:
    """Where version 2 is mounted, alone or beside version 1."""
    return next((root for root in ROOTS if (root / "cgroup.controllers").exists()), None)


@contextmanager
def control_group() -> Iterator[Path]:
    """An empty group below that of this process, as a directory; skips the test where none can be made. Its processes must have ended."""
    root = unified_root()
    if root is None:
        pytest.skip("no control groups of version 2 here")
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    parent = Path(f"{root}{own.removeprefix('0::')}")
    try:
        made = Path(tempfile.mkdtemp(prefix="ztunnel-test-", dir=parent))
    except OSError as error:
        pytest.skip(f"no control group can be made in {parent}: {error.strerror}")
    try:
        yield made
    finally:
        for directory in sorted([made, *(each for each in made.rglob("*") if each.is_dir())], reverse=True):
            eventually(lambda each=directory: _removed(each), within=30, saying=f"{directory} is empty")  # type: ignore[misc]  # a lambda's default


def _removed(directory: Path) -> bool:
    try:
        directory.rmdir()
    except OSError:
        return False
    return True


def join(group: Path, pid: int | None = None) -> None:
    """Moves a process, or this one, into a group."""
    (group / "cgroup.procs").write_text(str(pid or os.getpid()))
