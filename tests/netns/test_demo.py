"""The demo itself: every proof holds, and nothing stays behind, however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.polling import eventually

pytestmark = pytest.mark.slow

DEMO = [sys.executable, "-m", "scripts.demo"]
SECONDS = 120.0


@pytest.fixture
def labs(tmp_path: Path) -> Path:
    """Where the labs of a test keep their state."""
    return tmp_path / "labs"


@pytest.fixture
def environment(labs: Path) -> dict[str, str]:
    return {**os.environ, "ZTUNNEL_LAB_DIR": str(labs)}


@pytest.fixture
def begun(environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A demo whose cluster is up, in a process group of its own as a shell would start it."""
    with subprocess.Popen(
        DEMO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "✓" in line:
                break
        yield process
        process.kill()


def remaining(labs: Path) -> list[Path]:
    return list(labs.iterdir()) if labs.exists() else []


def processes(labs: Path) -> list[str]:
    """Command lines that name the labs' directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
            if str(labs) in line:
                found.append(line)
    return found


@pytest.mark.parametrize(("options", "proofs"), [((), 12), (("--waypoint",), 18)], ids=["main", "waypoint"])
def test_every_proof_holds_and_nothing_stays(labs: Path, environment: dict[str, str], options: tuple[str, ...], proofs: int) -> None:
    command = [*DEMO, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "✗" not in done.stdout
    assert len(re.findall("✓", done.stdout)) >= proofs
    assert remaining(labs) == []
    eventually(lambda: not processes(labs), saying="every process of the lab gone")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_stays_when_it_is_interrupted(labs: Path, begun: subprocess.Popen[str], number: signal.Signals) -> None:
    os.killpg(begun.pid, number)
    begun.communicate(timeout=SECONDS)
    assert begun.returncode in (128 + number, -number)
    assert remaining(labs) == []
    eventually(lambda: not processes(labs), saying="every process of the lab gone")


def test_a_reader_that_has_seen_enough_ends_it_quietly(labs: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(DEMO, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(SECONDS) == 128 + signal.SIGPIPE
    assert remaining(labs) == []
