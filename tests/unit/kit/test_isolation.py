"""The isolation of namespace tests, tried in a child so that this process keeps its own network."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import socket
from pathlib import Path
from tests.kit import isolation
before = Path("/proc/self/ns/net").readlink()
print(isolation.refusal())
first = isolation.isolate()
if first is not None:
    print("refused", first)
    raise SystemExit(77)
assert isolation.isolate() is None
assert Path("/proc/self/ns/net").readlink() != before
assert [name for _, name in socket.if_nameindex()] == ["lo"]
with socket.create_server(("127.0.0.1", 0)) as server:
    socket.create_connection(server.getsockname()).close()
assert not list(Path("/run").iterdir())
assert str(isolation.debugging_line()).startswith("nsenter")
"""


def test_a_process_gets_a_network_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode == 77:
        pytest.skip(done.stdout)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n"
