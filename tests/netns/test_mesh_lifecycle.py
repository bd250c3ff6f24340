"""Agents that end, die, come back and are configured wrongly: what their pods' connections see of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import permutations
from pathlib import Path

import pytest

from tests.kit import apps
from tests.kit.mesh import COMMAND, DEFAULT_SETTINGS, REPOSITORY, Agent, Mesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually
from tests.kit.workers import WORKERS_VARIABLE, worker_count
from ztunnel.settings import variable

APP = 8080
DRAIN_SECONDS, SHORT_DRAIN_SECONDS = 15.0, 1.5
"""Longer than any test takes whose connections end before the deadline; and of those that wait for it."""
MARKER = b"plaintext-marker-of-lifecycle"
SETTINGS = f"{DEFAULT_SETTINGS}drain_seconds: {DRAIN_SECONDS}\n"
with_a_worker = pytest.mark.skipif(worker_count() == 0, reason="workers: 0 has no process that could die")


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=2, settings=SETTINGS) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("neighbour", node=1, ambient=True)
        mesh.pod("server", node=1, ambient=True)
        mesh.pod("outsider", node=1)
        mesh.settle()
        yield mesh


@pytest.fixture
def mesh(shared: Mesh) -> Iterator[Mesh]:
    """With an echo server in `server`."""
    with apps.Echo(shared.pods["server"], APP):
        yield shared
    shared.start()
    shared.settle()
    shared.check()


@pytest.fixture
def client(mesh: Mesh) -> Pod:
    return mesh.pods["client"]


@pytest.fixture
def server(mesh: Mesh) -> Pod:
    return mesh.pods["server"]


@pytest.fixture
def to(server: Pod) -> tuple[str, int]:
    return server.v4, APP


# SIGTERM


@pytest.mark.parametrize("number", [0, 1], ids=["client-side", "server-side"])
def test_a_drain_lets_live_connections_finish_and_refuses_new_ones(mesh: Mesh, client: Pod, to: tuple[str, int], number: int) -> None:
    agent = mesh.agents[number]
    with client.connect(to) as live:
        assert apps.ping(live)
        began = time.monotonic()
        agent.send(signal.SIGTERM)
        eventually(lambda: apps.outcome(client, to) in ("reset", "refused"))
        assert agent.is_running
        assert apps.ping(live, MARKER)
        # A change of the mesh must not make it enrol its pods anew.
        mesh.relabel("server", "touched", f"by-{number}")
        until = time.monotonic() + 0.5
        eventually(lambda: apps.ping(live) and time.monotonic() > until)
        assert apps.outcome(client, to) in ("reset", "refused")
        live.shutdown(socket.SHUT_WR)
        assert apps.read_all(live) == b""
    assert agent.wait() == 0
    assert time.monotonic() - began < DRAIN_SECONDS, "it waits for its connections, not for the deadline"
    assert apps.outcome(client, to) in ("reset", "refused")


def test_a_policy_that_comes_while_it_drains_ends_whom_it_denies(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    agent = mesh.agents[1]
    with client.connect(to) as live:
        assert apps.ping(live)
        agent.send(signal.SIGTERM)
        eventually(lambda: agent.said("draining"))
        mesh.policy("nobody", {})
        assert apps.ending(live) == "reset"
    mesh.clear("AuthorizationPolicy")
    assert agent.wait() == 0
    assert agent.said("closed due to policy change", "flag=DENY", "default/nobody")


@pytest.mark.parametrize("number", [0, 1], ids=["client-side", "server-side"])
def test_at_the_drain_deadline_connections_are_reset(mesh: Mesh, client: Pod, to: tuple[str, int], number: int) -> None:
    agent = mesh.agents[number]
    _restart(mesh, agent, {variable("drain_seconds"): str(SHORT_DRAIN_SECONDS)})
    with client.connect(to) as live:
        assert apps.ping(live)
        began = time.monotonic()
        agent.send(signal.SIGTERM)
        assert apps.ending(live) == "reset"
        assert time.monotonic() - began > SHORT_DRAIN_SECONDS * 0.8
    assert agent.wait() == 0
    assert agent.said("drained", "cut=1")
    assert agent.said("connection complete", "drain deadline")


def test_while_it_drains_it_is_not_ready_and_a_second_signal_ends_it_at_once(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    agent = mesh.agents[0]
    assert _readiness(agent) == 200
    with client.connect(to) as live:
        assert apps.ping(live)
        began = time.monotonic()
        agent.send(signal.SIGTERM)
        eventually(lambda: _readiness(agent) == 500)
        status = agent.ask("status")
        assert (status["ready"], status["worker"]) == (False, "draining")
        agent.send(signal.SIGTERM)
        agent.wait()
        assert time.monotonic() - began < DRAIN_SECONDS
        assert apps.ending(live) == "reset"


def _restart(mesh: Mesh, agent: Agent, settings: dict[str, str]) -> None:
    """Another agent on its node that is told these settings; the one after it is as all others."""
    agent.stop()
    agent.overrides = settings
    mesh.start()
    agent.overrides = {}
    mesh.settle()


def _readiness(agent: Agent) -> int:
    with agent.node.tcp_socket(socket.AF_INET) as sock:
        sock.connect(("127.0.0.1", 15021))
        sock.sendall(b"GET /healthz/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return int(apps.read_all(sock).split(b" ")[1])


# SIGKILL


@pytest.mark.parametrize("number", [0, 1], ids=["client-side", "server-side"])
def test_a_killed_agent_fails_closed_and_its_successor_carries_on(mesh: Mesh, client: Pod, to: tuple[str, int], number: int) -> None:
    agent = mesh.agents[number]
    workers = agent.workers
    with client.connect(to) as live, apps.tapped(mesh.net.nodes[0]) as tap:
        assert apps.ping(live)
        agent.stop(signal.SIGKILL)
        assert apps.ending(live) == "reset"
        words = _words(agent)
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers), saying="the worker dies with its supervisor")
        for _ in range(3):
            assert apps.outcome(client, to, MARKER) in ("reset", "refused")
        assert not tap.saw(MARKER)
        agent.start()
        while not agent.is_ready:
            assert _words(agent) == words, "its pods are captured all the time, and peers must not be told otherwise"
        mesh.settle()
        assert _words(agent) == words
        assert apps.call(client, to, MARKER) == MARKER
        assert not tap.saw(MARKER)


def _words(agent: Agent) -> dict[str, str]:
    """What the agent tells the cluster about its pods."""
    return {file.name: file.read_text() for file in (agent.directory / "status").iterdir() if not file.name.startswith(".")}


def test_rules_stay_and_are_adopted_without_a_gap(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    """The successor takes over full rules: its pods do not go through the lenient first phase of enrolment again."""
    agent = mesh.agents[0]
    eventually(lambda: not _is_guarded(client))
    rules = _rules(client)
    agent.stop()
    assert _rules(client) == rules
    with apps.tapped(mesh.net.nodes[0]) as tap:
        agent.start()
        while not agent.is_ready:
            assert not _is_guarded(client)
            apps.outcome(client, to, MARKER)
        assert not tap.saw(MARKER)


def _is_guarded(pod: Pod) -> bool:
    return any("tcp flags" in line for line in _rules(pod))


def _rules(pod: Pod) -> list[str]:
    """Without what changes with the owner of a table."""
    listed = pod.command("nft", "--stateless", "list", "ruleset").splitlines()
    return [line.partition("#")[0].strip() for line in listed if not line.strip().startswith("flags")]


# The worker


@with_a_worker
def test_a_dead_worker_takes_only_its_own_connections_and_is_replaced(mesh: Mesh, client: Pod, server: Pod, to: tuple[str, int]) -> None:
    agent, other = mesh.agents
    restarts = int(str(agent.ask("status")["worker_restarts"]))
    counted = agent.metric("ztunnel_worker_restarts_total")
    with client.connect(to) as doomed, mesh.pods["neighbour"].connect(to) as safe:
        assert apps.ping(doomed)
        assert apps.ping(safe)
        killed = _kill_workers(agent)
        assert apps.ending(doomed) == "reset"
        assert apps.ping(safe)
        eventually(lambda: apps.outcome(client, to) == "echoed")
        assert apps.ping(safe)
    eventually(lambda: len(agent.workers) == len(killed))
    assert not set(agent.workers) & set(killed)
    eventually(lambda: agent.ask("status")["worker_restarts"] == restarts + len(killed))
    assert agent.metric("ztunnel_worker_restarts_total") == counted + len(killed)
    assert agent.said("worker died", "SIGKILL")
    assert other.metric("ztunnel_worker_restarts_total") == 0


@with_a_worker
def test_a_dead_worker_on_the_servers_side_is_replaced_too(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    agent = mesh.agents[1]
    with client.connect(to) as doomed:
        assert apps.ping(doomed)
        _kill_workers(agent)
        assert apps.ending(doomed) == "reset"
    eventually(lambda: apps.outcome(client, to) == "echoed")


@with_a_worker
@pytest.mark.parametrize("where", ["tunnel", "plaintext to a pod", "plaintext from a pod"])
def test_a_dead_worker_does_not_make_a_cut_transfer_look_whole(mesh: Mesh, client: Pod, server: Pod, where: str) -> None:
    """Neither application may take what came until then for all: a FIN behind half of an upload would say so."""
    outsider = mesh.pods["outsider"]
    near, far = (outsider, server) if where == "plaintext to a pod" else (client, outsider if where == "plaintext from a pod" else server)
    agent = mesh.agents[0] if where == "plaintext from a pod" else mesh.agents[1]
    with far.listener(APP + 1) as listening, near.connect((far.v4, APP + 1)) as sending:
        taking, _ = listening.accept()
        with taking:
            taking.settimeout(5)
            sending.sendall(b"half")
            assert apps.read_exactly(taking, 4) == b"half"
            _kill_workers(agent)
            assert apps.ending(taking) == "reset"
            assert apps.ending(sending) == "reset"
    eventually(lambda: apps.outcome(client, (server.v4, APP)) == "echoed")


@with_a_worker
def test_an_agent_whose_worker_dies_again_and_again_is_not_ready(mesh: Mesh) -> None:
    agent = mesh.agents[0]

    def keeps_dying() -> bool:
        _kill_workers(agent)
        return _readiness(agent) == 500

    assert _readiness(agent) == 200
    eventually(keeps_dying)
    eventually(lambda: _readiness(agent) == 200)


@with_a_worker
def test_connections_wait_for_the_next_worker(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    """The supervisor holds the listeners: whoever connects while there is no worker waits a moment and is served."""
    agent = mesh.agents[0]
    # One whose workers have died often already waits longer before the next than our client has patience.
    _restart(mesh, agent, {})
    killed = _kill_workers(agent)
    eventually(lambda: not set(killed) & set(agent.workers))
    assert apps.outcome(client, to) == "echoed"


def _kill_workers(agent: Agent) -> list[int]:
    """All of them: of several, nobody can say which has a connection. Their process ids."""
    workers = agent.workers
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    return workers


# Starting


def test_a_second_agent_with_the_same_socket_is_refused(mesh: Mesh, client: Pod, to: tuple[str, int]) -> None:
    agent = mesh.agents[0]
    config = agent.directory / "second.yaml"
    settings = (agent.directory / "agent.yaml").read_text().replace("admin: {", "admin: {metrics_port: 0, readiness_port: 0, ")
    config.write_text(settings)
    status, said = _run(agent, config)
    assert status == 1
    assert f"an agent already answers on {agent.socket}" in said
    assert "Traceback" not in said
    assert agent.is_ready
    assert apps.outcome(client, to) == "echoed"


def test_ports_that_are_taken_are_named(mesh: Mesh) -> None:
    agent = mesh.agents[0]
    config = agent.directory / "second.yaml"
    config.write_text((agent.directory / "agent.yaml").read_text().replace("agent.sock", "second.sock"))
    status, said = _run(agent, config)
    assert status == 1
    assert "15020" in said or "15021" in said
    assert "Traceback" not in said


def test_settings_that_cannot_be_used_are_all_listed(mesh: Mesh) -> None:
    agent = mesh.agents[0]
    config = agent.directory / "second.yaml"
    config.write_text("node: Node_1\ndrain_seconds: soon\ntunnel: {records: rust}\nadmin: {metrics_prot: 1}\n")
    status, said = _run(agent, config)
    assert status == 2
    for word in ("node", "drain_seconds", "tunnel.records", "admin.metrics_prot", "metrics_port"):
        assert word in said, said
    assert "Traceback" not in said


def _run(agent: Agent, config: Path) -> tuple[int, str]:
    """Exit status and standard error of an agent that is expected not to start."""
    command = ["nsenter", f"--net={agent.node.path}", *COMMAND, "run", "--config", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPOSITORY, check=False)
    return done.returncode, done.stderr


def test_a_directory_of_manifests_that_is_not_there_is_named(mesh: Mesh) -> None:
    agent = mesh.agents[0]
    config = agent.directory / "second.yaml"
    settings = (agent.directory / "agent.yaml").read_text().replace("agent.sock", "second.sock")
    settings = settings.replace("admin: {", "admin: {metrics_port: 0, readiness_port: 0, ")
    config.write_text(settings.replace(str(mesh.manifests), str(mesh.root / "nowhere")))
    status, said = _run(agent, config)
    assert status == 2
    assert "sources.files" in said
    assert "nowhere" in said
    assert "Traceback" not in said


VARIANTS = (
    {WORKERS_VARIABLE: "0"},
    {variable("tunnel.records"): "openssl"},
    {variable("tunnel.optimistic_data"): "false"},
    {variable("log.format"): "json"},
    {WORKERS_VARIABLE: "3"},
)


def test_nodes_that_are_set_up_differently_talk_to_each_other() -> None:
    with Mesh(nodes=len(VARIANTS), start=False) as mesh:
        for number, (agent, variant) in enumerate(zip(mesh.agents, VARIANTS, strict=True)):
            agent.overrides = variant
            mesh.pod(f"pod-{number}", node=number, ambient=True)
        mesh.start()
        mesh.settle()
        data = os.urandom(1 << 19)
        pods = list(mesh.pods.values())
        with ExitStack() as stack:
            for pod in pods:
                stack.enter_context(apps.Echo(pod, APP))
            for source, target in permutations(pods, 2):
                with source.connect((target.v4, APP)) as connection:
                    assert _echoes(connection, data), f"{source.name} to {target.name}"
        threaded, openssl = mesh.agents[:2]
        assert {row["records"] for row in openssl.rows("tunnels")} == {"openssl"}
        assert {row["records"] for row in threaded.rows("tunnels")} == {"own"}
        assert threaded.ask("status")["worker"] == "in-process"
        assert threaded.workers == []
        assert len(mesh.agents[-1].workers) == 3
        assert [agent.stop() for agent in mesh.agents] == [0] * len(VARIANTS)


def _echoes(connection: socket.socket, data: bytes) -> bool:
    """In pieces that fit into the buffers on the way, because one thread sends and receives."""
    step = 1 << 16
    for at in range(0, len(data), step):
        connection.sendall(data[at : at + step])
        if apps.read_exactly(connection, step) != data[at : at + step]:
            return False
    return True
