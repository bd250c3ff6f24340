"""The lab for people without root, and for people who may not have one at all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp

import pytest

from tests.kit.labs import REPOSITORY, SAMPLES
from ztunnel.lab.paths import LAB_DIR_VARIABLE

pytestmark = pytest.mark.slow

NOBODY = 65534


def _as_ordinary_user() -> list[str]:
    """A prefix for an ordinary user: another one where the interpreter is readable for one, else one without capabilities."""
    if os.geteuid() != 0:
        return []
    become = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    # Through a shell: setpriv itself still may execute what the other user may not.
    probe = [*become, "sh", "-c", 'exec "$0" -c "import trio"', sys.executable]
    if subprocess.run(probe, capture_output=True, check=False).returncode == 0:
        return become
    return ["unshare", "--user", "--map-user=1000", "--map-group=1000"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """Where an ordinary user's labs live."""
    path = Path(mkdtemp(prefix="labs-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _lab(directory: Path, prefix: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {LAB_DIR_VARIABLE: str(directory), "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [*prefix, sys.executable, "-m", "ztunnel", "lab", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment, cwd=REPOSITORY)


def test_an_ordinary_user_needs_no_ceremony(directory: Path) -> None:
    user = _as_ordinary_user()
    if user[:1] == ["setpriv"]:
        os.chown(directory, NOBODY, NOBODY)
    up = _lab(directory, user, "up", "--no-mesh", "-f", str(SAMPLES))
    try:
        assert up.returncode == 0, up.stderr
        answer = _lab(directory, user, "exec", "client", "-n", "shop", "--", "curl", "-sf", "--max-time", "5", "http://orders/")
        assert '"remote_address": "10.244.1.' in answer.stdout, answer
        assert _lab(directory, user, "exec", "client", "-n", "shop", "--", "sh", "-c", "exit 5").returncode == 5
    finally:
        down = _lab(directory, user, "down")
    assert (down.returncode, list(directory.iterdir())) == (0, [])


def test_without_namespaces_it_says_what_is_missing(directory: Path) -> None:
    script = 'echo 0 > /proc/sys/user/max_user_namespaces; exec setpriv --bounding-set -all --inh-caps -all "$@"'
    answer = _lab(directory, ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh"], "up", "-f", str(SAMPLES))
    assert answer.returncode == 1
    assert "cannot make the lab's namespaces" in answer.stderr
    assert "user.max_user_namespaces" in answer.stderr
    assert list(directory.iterdir()) == []
