"""An agent with exactly the capabilities of the DaemonSet does all that one with every capability does."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.kit import apps
from tests.kit.deployed import capabilities
from tests.kit.mesh import Agent, Mesh
from tests.kit.polling import eventually

APP = 8080


def bounding_set(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("CapBnd")).split()[1], 16)


def confinement(agent: Agent) -> str:
    """What its worker took from itself, and what it could not."""
    line = next(line for line in agent.log.splitlines() if "worker confined" in line)
    return line.partition("worker confined")[2]


def test_what_the_daemon_set_grants_is_enough() -> None:
    granted = capabilities()
    with Mesh(nodes=2, start=False) as mesh:
        free, bounded = mesh.agents
        bounded.prefix = ["setpriv", f"--bounding-set=-all,{','.join(f'+{name.lower()}' for name in granted)}", "--inh-caps=-all"]
        bounded.overrides["ZTUNNEL_WORKERS"] = free.overrides["ZTUNNEL_WORKERS"] = "1"
        mesh.start()
        assert bounding_set(bounded.pid).bit_count() == len(granted)
        there = mesh.pod("there", node=0, ambient=True)
        here = mesh.pod("here", node=1, ambient=True)
        mesh.settle()
        with apps.Echo(here, APP), apps.Echo(there, APP):
            assert apps.call(here, (there.v4, APP)) == b"hello"
            assert apps.call(there, (here.v4, APP)) == b"hello"
            assert bounded.rows("tunnels")
            mesh.enrol("here", ambient=False)
            mesh.settle()
            assert apps.call(here, (there.v4, APP)) == b"hello"
            mesh.enrol("here")
            mesh.settle()
            assert confinement(bounded) == confinement(free)
            assert [bounding_set(worker) for worker in bounded.workers] == [bounding_set(worker) for worker in free.workers]
            # A worker that hangs is somebody else's process; only its supervisor may end it, and does.
            (worker,) = bounded.workers
            os.kill(worker, signal.SIGSTOP)
            try:
                bounded.send(signal.SIGTERM)
                bounded.send(signal.SIGTERM)
                assert bounded.wait() == 0
                eventually(lambda: not Path(f"/proc/{worker}").exists(), within=30)
            finally:
                if Path(f"/proc/{worker}").exists():
                    os.kill(worker, signal.SIGKILL)
