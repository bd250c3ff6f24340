"""Two workers of which one is killed under load: its connections end, on both sides, and nothing else does."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.kit import apps
from tests.kit.mesh import DEFAULT_SETTINGS, Agent, Mesh
from tests.kit.netns import TIMEOUT_SECONDS, Pod
from tests.kit.polling import eventually
from tests.kit.workers import WORKERS_VARIABLE
from ztunnel.mesh.ports import OUTBOUND

APP, ECHO = 8080, 8081
WORKERS = 2
AT_LEAST = 3
"""Connections that each worker must have."""
BURST, BURSTS = 8, 25
CALLERS = 4
CLIENT_SIDE, SERVER_SIDE = 0, 1
SETTINGS = f"{DEFAULT_SETTINGS}tunnel: {{max_streams: 2, idle_seconds: 1}}\n"
"""Many tunnels, so that both workers of the server's node have some."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Both applications' ends of a connection."""

    near: socket.socket
    far: socket.socket

    def talk(self) -> bool:
        self.near.sendall(b"there")
        self.far.sendall(b"back!")
        return (apps.read_exactly(self.far, 5), apps.read_exactly(self.near, 5)) == (b"there", b"back!")


@dataclass
class Callers:
    """Short connections, one after the other in each of some threads, and what became of them."""

    client: Pod
    to: tuple[str, int]
    outcomes: Counter[str] = field(default_factory=Counter)
    _stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def calling(self) -> Iterator[None]:
        threads = [threading.Thread(target=self._call, daemon=True) for _ in range(CALLERS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(20)

    def _call(self) -> None:
        while not self._stop.is_set():
            self.outcomes[apps.outcome(self.client, self.to)] += 1

    def has_done(self, more: int) -> None:
        """Returns when so many more calls have succeeded."""
        wanted = self.outcomes["echoed"] + more
        eventually(lambda: self.outcomes["echoed"] >= wanted, saying="the load goes on")


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with Mesh(nodes=2, settings=SETTINGS, start=False) as made:
        for agent in made.agents:
            agent.overrides = {WORKERS_VARIABLE: str(WORKERS)}
        made.pod("client", node=0, ambient=True)
        made.pod("server", node=1, ambient=True)
        made.start()
        made.settle()
        yield made


def _dial(client: Pod, server: Pod, listening: socket.socket, stack: ExitStack) -> list[Pair]:
    """Some more, dialled at once: of several that wait, each worker takes some."""
    near = [stack.enter_context(client.tcp_socket(socket.AF_INET)) for _ in range(BURST)]
    for sock in near:
        sock.setblocking(False)
        sock.connect_ex((server.v4, APP))
    eventually(lambda: all(_is_connected(sock) for sock in near))
    for number, sock in enumerate(near):
        sock.settimeout(TIMEOUT_SECONDS)
        sock.sendall(bytes([number]))
    pairs = []
    for _ in near:
        far = stack.enter_context(listening.accept()[0])
        far.settimeout(TIMEOUT_SECONDS)
        pairs.append(Pair(near[apps.read_exactly(far, 1)[0]], far))
    return pairs


def _is_connected(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def _owner(agent: Agent, pod: Pod, local: int, remote: int) -> int:
    """The worker that holds the socket with these ports in a pod's namespace."""
    (inode,) = pod.run(_inodes, f":{local:04X}", f":{remote:04X}")
    return next(pid for pid in agent.workers if f"socket:[{inode}]" in _descriptors(pid))


def _inodes(local: str, remote: str) -> set[str]:
    lines = [line.split() for family in ("tcp", "tcp6") for line in Path(f"/proc/thread-self/net/{family}").read_text().splitlines()[1:]]
    return {line[9] for line in lines if line[1].endswith(local) and line[2].endswith(remote) and line[9] != "0"}


def _descriptors(pid: int) -> list[str]:
    found = []
    for each in Path(f"/proc/{pid}/fd").iterdir():
        try:
            found.append(str(each.readlink()))
        except FileNotFoundError:
            continue
    return found


def _port(name: tuple[str, int]) -> int:
    return name[1]


def _is_quiet(agent: Agent) -> bool:
    return agent.rows("connections") == agent.rows("tunnels") == [] and agent.metric("istio_tcp_sockets_open") == 0


@pytest.mark.parametrize("side", [CLIENT_SIDE, SERVER_SIDE], ids=["client-side", "server-side"])
def test_of_two_workers_one_dies_with_its_connections_only(mesh: Mesh, side: int) -> None:
    client, server, agent = mesh.pods["client"], mesh.pods["server"], mesh.agents[side]
    restarts, counted = agent.ask("status")["worker_restarts"], agent.metric("ztunnel_worker_restarts_total")
    callers = Callers(client, (server.v4, ECHO))
    held = len(_descriptors(agent.pid))
    with apps.Echo(server, ECHO), server.listener(APP) as listening, ExitStack() as stack:
        pairs: dict[Pair, int] = {}

        def are_shared_out() -> bool:
            for pair in _dial(client, server, listening, stack):
                port = _port(pair.near.getsockname() if side == CLIENT_SIDE else pair.far.getpeername())
                pairs[pair] = _owner(agent, client, OUTBOUND, port) if side == CLIENT_SIDE else _owner(agent, server, port, APP)
            return len(pairs) >= BURST * BURSTS or min(list(pairs.values()).count(pid) for pid in agent.workers) >= AT_LEAST

        eventually(are_shared_out, within=30)
        killed, other = agent.workers
        doomed = [pair for pair, owner in pairs.items() if owner == killed]
        safe = [pair for pair, owner in pairs.items() if owner == other]
        assert min(len(doomed), len(safe)) >= AT_LEAST, "each worker has some"
        with callers.calling():
            callers.has_done(20)
            os.kill(killed, signal.SIGKILL)
            began = time.monotonic()
            eventually(lambda: apps.outcome(client, (server.v4, ECHO)) == "echoed", within=1)
            assert time.monotonic() - began < 1
            assert all(pair.talk() for pair in safe)
            assert {(apps.ending(pair.near), apps.ending(pair.far)) for pair in doomed} == {("reset", "reset")}
            eventually(lambda: killed not in agent.workers and len(agent.workers) == WORKERS, saying="another one in its place")
            eventually(lambda: agent.ask("status")["worker"] == "running")
            assert agent.ask("status")["worker_restarts"] == int(str(restarts)) + 1
            assert agent.metric("ztunnel_worker_restarts_total") == counted + 1
            callers.has_done(20)
            assert all(pair.talk() for pair in safe)
        assert set(callers.outcomes) <= {"echoed", "reset"}
        # Each caller has one connection at a time; no more than those that were under way can have met the death.
        assert callers.outcomes["reset"] <= CALLERS * 2
        assert agent.said("worker died", "SIGKILL")
    assert other in agent.workers
    assert mesh.agents[1 - side].ask("status")["worker_restarts"] == (0 if side == CLIENT_SIDE else 1)
    eventually(lambda: all(_is_quiet(each) for each in mesh.agents), within=20, saying="no connection and no tunnel is left")
    eventually(lambda: len(_descriptors(agent.pid)) <= held, saying="the supervisor holds no more than before")
    mesh.settle()
