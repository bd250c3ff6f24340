"""Into the mesh and out of it at run time: what happens to connections that live, to rules that somebody touches, to pods that go."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import pytest

from tests.kit import apps
from tests.kit.mesh import Agent, Mesh
from tests.kit.netns import Pod
from tests.kit.polling import eventually
from tests.kit.traffic import accept, talk
from ztunnel.dataplane.sockets import reset_on_close
from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND

APP = 8080
MARKER = b"plaintext-marker-of-enrolment"
GRACE_SECONDS = 0.3
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
REPAIR_SECONDS = 30
"""A look every second, and a machine that may be busy with something else: a repair that failed is tried again with growing waits."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=2) as mesh:
        mesh.pod("client", node=0)
        mesh.pod("server", node=1)
        mesh.settle()
        yield mesh


@pytest.fixture
def mesh(shared: Mesh) -> Iterator[Mesh]:
    yield shared
    shared.clear("AuthorizationPolicy", "PeerAuthentication")
    for name in ("client", "server"):
        shared.enrol(name, False)
    for name in [name for name in shared.pods if name not in ("client", "server")]:
        shared.remove_pod(name)
    shared.settle()
    # Longer than a request to open a stream waits for a peer that is gone: redirection stays as long as a connection needs it.
    eventually(lambda: all(_is_untouched(shared.pods[name]) for name in ("client", "server")), within=30)
    shared.check()


@pytest.fixture
def client(mesh: Mesh) -> Pod:
    return mesh.pods["client"]


@pytest.fixture
def server(mesh: Mesh) -> Pod:
    return mesh.pods["server"]


def enrol(mesh: Mesh, ambient: bool = True) -> None:
    for name in ("client", "server"):
        mesh.enrol(name, ambient)
    mesh.settle()


def complete(mesh: Mesh) -> None:
    """Enrols both pods and waits until the grace period for their older connections is over."""
    enrol(mesh)
    eventually(lambda: not any("tcp flags" in line for name in ("client", "server") for line in _rules(mesh.pods[name])))


def _is_untouched(pod: Pod) -> bool:
    return pod.command("nft", "list", "tables") == "" and "lookup 100" not in pod.command("ip", "rule")


def keeps_talking(connection: socket.socket, seconds: float) -> bool:
    """Whether an echoed connection answers all the time for so long."""
    until = time.monotonic() + seconds
    while apps.ping(connection):
        if time.monotonic() > until:
            return True
    return False


# In and out, with live connections


@FAMILIES
def test_a_pod_that_is_enrolled_keeps_its_plaintext_connection_and_tunnels_the_next(
    mesh: Mesh, client: Pod, server: Pod, family: int
) -> None:
    to = (server.address(family), APP)
    with apps.Echo(server, APP), client.connect(to) as live:
        assert apps.ping(live)
        enrol(mesh)
        assert keeps_talking(live, 2 * GRACE_SECONDS)
        with apps.tapped(mesh.net.nodes[0]) as tap:
            assert apps.call(client, to, MARKER) == MARKER
            assert not tap.saw(MARKER)
            assert INBOUND_HBONE in tap.ports
        assert apps.ping(live)


def test_under_strict_the_plaintext_connection_ends(mesh: Mesh, client: Pod, server: Pod) -> None:
    mesh.policy("default", {"mtls": {"mode": "STRICT"}}, "PeerAuthentication")
    with apps.Echo(server, APP), client.connect((server.v4, APP)) as live:
        assert apps.ping(live)
        enrol(mesh)
        assert not apps.ping(live)
        assert apps.outcome(client, (server.v4, APP)) == "echoed"


@FAMILIES
def test_becoming_strict_ends_what_is_older_than_the_capture_and_nothing_else(mesh: Mesh, client: Pod, server: Pod, family: int) -> None:
    outsider = mesh.pod("outsider", node=0)
    mesh.settle()
    to = (server.address(family), APP)
    # A client's own port is its choice, and no reason to take it for a tunnel.
    with apps.Echo(server, APP), outsider.connect(to, (outsider.address(family), INBOUND_HBONE)) as old:
        assert apps.ping(old)
        enrol(mesh)
        assert keeps_talking(old, 2 * GRACE_SECONDS)
        with (
            server.listener(APP + 1) as listener,
            client.listener(APP + 1) as other_listener,
            client.connect((to[0], APP + 1)) as inward,
            accept(listener) as inward_end,
            server.connect((client.address(family), APP + 1)) as outward,
            accept(other_listener) as outward_end,
        ):
            talk(inward, inward_end)
            talk(outward, outward_end)
            mesh.policy("default", {"mtls": {"mode": "STRICT"}}, "PeerAuthentication")
            eventually(lambda: not apps.ping(old))
            talk(inward_end, inward)
            talk(outward_end, outward)
            talk(inward, inward_end)


def test_a_connection_made_while_the_pod_was_leaving_does_not_outlive_strict(mesh: Mesh, client: Pod, server: Pod) -> None:
    outsider = mesh.pod("outsider", node=0)
    enrol(mesh)
    to = (server.v4, APP)
    with apps.Echo(server, APP), client.connect(to) as held:
        assert apps.ping(held)
        mesh.enrol("server", False)
        eventually(lambda: apps.outcome(outsider, to) == "echoed")
        with outsider.connect(to) as sly:
            assert apps.ping(sly)
            mesh.policy("default", {"mtls": {"mode": "STRICT"}}, "PeerAuthentication")
            mesh.enrol("server")
            mesh.settle()
            eventually(lambda: apps.outcome(outsider, to) == "reset")
            assert not apps.ping(sly)
            assert apps.ping(held)


@FAMILIES
def test_a_pod_that_leaves_keeps_its_tunnelled_connection_and_goes_direct_with_the_next(
    mesh: Mesh, client: Pod, server: Pod, family: int
) -> None:
    enrol(mesh)
    to = (server.address(family), APP)
    with apps.Echo(server, APP) as echo, client.connect(to) as live, apps.tapped(mesh.net.nodes[0]) as tap:
        assert apps.ping(live, MARKER)
        enrol(mesh, False)
        assert not tap.saw(MARKER)
        assert apps.call(client, to, MARKER) == MARKER
        assert tap.saw(MARKER)
        assert echo.peers == [client.address(family)] * 2
        tap.segments.clear()
        assert keeps_talking(live, 0.2)
        assert tap.ports == {INBOUND_HBONE}
    eventually(lambda: _is_untouched(client) and _is_untouched(server))


def test_a_pod_that_leaves_and_is_wanted_again_keeps_its_connection(mesh: Mesh, client: Pod, server: Pod) -> None:
    enrol(mesh)
    with apps.Echo(server, APP), client.connect((server.v4, APP)) as live:
        assert apps.ping(live)
        for ambient in (False, True, False, True):
            enrol(mesh, ambient)
            assert keeps_talking(live, 0.1)
        assert apps.outcome(client, (server.v4, APP)) == "echoed"
        assert INBOUND_HBONE in {int(str(row["destination"]).rpartition(":")[2]) for row in mesh.agent_of(client).rows("connections")}


def test_traffic_goes_on_while_pods_come_and_go(mesh: Mesh, client: Pod, server: Pod) -> None:
    """Each connection on its own may meet either way of travelling, but none may fail."""
    with apps.Echo(server, APP):
        for round_ in range(3):
            for name in ("server", "client"):
                mesh.enrol(name, round_ % 2 == 0)
                agent = mesh.agent_of(mesh.pods[name])
                wanted = round_ % 2 == 0
                eventually(lambda: _carries(mesh, client, server) and bool(agent.row(mesh.pods[name])["captured"]) is wanted)  # noqa: B023
        mesh.settle()
        assert _carries(mesh, client, server)


def _carries(mesh: Mesh, client: Pod, server: Pod) -> bool:
    mesh.annotate()
    became = apps.outcome(client, (server.v4, APP))
    if became != "echoed":
        pytest.fail(f"a connection ended as {became}")
    return True


# Status


def test_status_tells_labelled_enrolled_captured_and_flowing_apart(mesh: Mesh, server: Pod) -> None:
    pod = mesh.pod("fresh", node=0)
    agent = mesh.agent_of(pod)
    mesh.settle()
    assert _answers(agent, pod) == (False, False, False, False)
    mesh.enrol("fresh")
    mesh.settle()
    assert _answers(agent, pod) == (True, True, True, False)
    with apps.Echo(server, APP), pod.connect((server.v4, APP)) as live:
        assert apps.ping(live)
        eventually(lambda: _answers(agent, pod) == (True, True, True, True), within=2)
    assert agent.metric("ztunnel_enrolled_pods") == 1
    assert "istio.io/dataplane-mode" in str(agent.row(pod)["reason"])


def _answers(agent: Agent, pod: Pod) -> tuple[object, ...]:
    row = agent.row(pod)
    return tuple(row[key] for key in ("labelled", "enrolled", "captured", "flowing"))


@pytest.mark.parametrize("port", [INBOUND_HBONE, OUTBOUND, INBOUND_PLAINTEXT])
def test_a_port_that_the_application_has_is_a_problem_until_it_is_free(mesh: Mesh, client: Pod, server: Pod, port: int) -> None:
    agent = mesh.agent_of(server)
    with apps.Echo(server, APP):
        with server.listener(port):
            mesh.enrol("server")
            eventually(lambda: f"port {port} is in use by the application" in str(agent.row(server).get("problem")))
            assert _answers(agent, server)[:3] == (True, False, False)
            assert any(f"port {port} is in use" in problem for problem in agent.problems)
            # It is left alone meanwhile, and nobody is sent to it by HBONE.
            mesh.annotate()
            assert apps.outcome(client, (server.v4, APP)) == "echoed"
        mesh.settle()
        assert agent.row(server)["problem"] == ""
        assert apps.outcome(client, (server.v4, APP)) == "echoed"


# Drift


def test_deleted_rules_are_brought_back_or_cannot_be_deleted(mesh: Mesh, client: Pod, server: Pod) -> None:
    complete(mesh)
    rules = _rules(client)
    agent = mesh.agent_of(client)
    before = agent.metric("ztunnel_redirection_repairs_total")
    client.command("nft", "flush", "ruleset", check=False)
    for table in client.command("nft", "list", "tables").splitlines():
        client.command("nft", *table.replace("table", "delete table").split(), check=False)
    if _rules(client) != rules:
        eventually(lambda: agent.metric("ztunnel_redirection_repairs_total") == before + 1, within=REPAIR_SECONDS)
        assert agent.said("redirection has drifted", "default/client")
    assert _rules(client) == rules
    _is_tunnelled(mesh, client, server)


def _rules(pod: Pod) -> list[str]:
    listed = pod.command("nft", "--stateless", "list", "ruleset").splitlines()
    return [line for line in listed if not line.lstrip().startswith("#")]


def _is_tunnelled(mesh: Mesh, client: Pod, server: Pod) -> None:
    with apps.Echo(server, APP), apps.tapped(mesh.net.nodes[0]) as tap:
        assert apps.call(client, (server.v4, APP), MARKER) == MARKER
        assert tap.ports == {INBOUND_HBONE}


@pytest.mark.parametrize("version", ["-4", "-6"])
def test_a_deleted_routing_rule_is_brought_back_and_counted(mesh: Mesh, client: Pod, server: Pod, version: str) -> None:
    complete(mesh)
    agent = mesh.agent_of(server)
    before = agent.metric("ztunnel_redirection_repairs_total")
    server.command("ip", version, "rule", "delete", "lookup", "100")
    eventually(lambda: agent.metric("ztunnel_redirection_repairs_total") == before + 1, within=REPAIR_SECONDS)
    assert "lookup 100" in server.command("ip", version, "rule")
    assert agent.said("redirection has drifted", "default/server")
    mesh.settle()
    _is_tunnelled(mesh, client, server)


def test_a_deleted_local_route_is_brought_back(mesh: Mesh, client: Pod, server: Pod) -> None:
    complete(mesh)
    agent = mesh.agent_of(server)
    before = agent.metric("ztunnel_redirection_repairs_total")
    server.command("ip", "route", "flush", "table", "100")
    eventually(lambda: agent.metric("ztunnel_redirection_repairs_total") == before + 1, within=REPAIR_SECONDS)
    mesh.settle()
    _is_tunnelled(mesh, client, server)


# Pods that go


def test_a_deleted_pod_is_let_go_of_wholly_even_with_live_connections(mesh: Mesh, client: Pod) -> None:
    enrol(mesh)
    doomed = mesh.pod("doomed", node=1, ambient=True)
    mesh.settle()
    agent = mesh.agent_of(doomed)
    node = mesh.net.nodes[1]
    # The far end of a pair of interfaces vanishes when the kernel frees the namespace of the near one, and not before.
    node.command("ip", "link", "add", "canary", "type", "veth", "peer", "name", "canary0", "netns", doomed.path)
    inode = os.fstat(doomed.fd).st_ino
    with doomed.listener(APP) as listening, client.connect((doomed.v4, APP)) as live, accept(listening) as far:
        talk(live, far)
        assert inode in _held(agent)
        abandoned = client.tcp_socket(socket.AF_INET)
        abandoned.connect((doomed.v4, APP))
        # The application's own end must not outlive it either: a FIN of its that nobody acknowledges would keep the namespace.
        reset_on_close(far)
    mesh.remove_pod("doomed")
    mesh.settle()
    eventually(lambda: inode not in _held(agent), saying="no descriptor leads to the namespace")
    eventually(lambda: "canary" not in node.command("ip", "-o", "link"), saying="the kernel has freed the namespace")
    abandoned.close()
    assert agent.row(doomed) == {}
    assert [row for row in agent.rows("tunnels") if "doomed" in str(row["pod"])] == []
    assert [row for row in agent.rows("certificates") if "doomed" in str(row["identity"])] == []


def _held(agent: Agent) -> set[int]:
    """Inodes of all namespaces and files that the agent and its workers have open."""
    inodes = set()
    for pid in (agent.pid, *agent.workers):
        for name in os.listdir(f"/proc/{pid}/fd"):
            try:
                inodes.add(os.stat(f"/proc/{pid}/fd/{name}").st_ino)
            except FileNotFoundError:
                continue
    return inodes


@FAMILIES
def test_an_address_that_is_used_again_gets_no_stale_tunnel(mesh: Mesh, client: Pod, family: int) -> None:
    enrol(mesh)
    first = mesh.pod("first", node=1, ambient=True)
    mesh.settle()
    address = first.address(family)
    agent = mesh.agent_of(client)
    with apps.Echo(first, APP, name="first"):
        assert apps.call(client, (address, APP)) == b"first\nhello"
    mesh.remove_pod("first")
    second = mesh.pod("second", node=1, ambient=True)
    assert second.address(family) == address
    assert second.uid != first.uid
    mesh.settle()
    with apps.Echo(second, APP, name="second"):
        assert apps.call(client, (address, APP)) == b"second\nhello"
    eventually(lambda: agent.said(address, "dst.workload=second", "dst.identity=spiffe://cluster.local/ns/default/sa/second"))
    assert {row["peer_identity"] for row in agent.rows("tunnels") if address in str(row["peer"])} <= {str(mesh.identity("second"))}


def test_an_address_that_is_used_again_by_a_client_does_not_inherit_its_rights(mesh: Mesh, server: Pod) -> None:
    enrol(mesh)
    rule = {"from": [{"source": {"serviceAccounts": ["trusted"]}}]}
    mesh.policy("trusted-only", {"selector": {"matchLabels": {"app": "server"}}, "rules": [rule]})
    trusted = mesh.pod("trusted", node=0, ambient=True)
    mesh.settle()
    with apps.Echo(server, APP):
        assert apps.outcome(trusted, (server.v4, APP)) == "echoed"
        mesh.remove_pod("trusted")
        heir = mesh.pod("heir", node=0, ambient=True)
        assert heir.v4 == trusted.v4
        mesh.settle()
        assert apps.outcome(heir, (server.v4, APP)) == "reset"
    eventually(lambda: mesh.agent_of(server).said("flag=DENY", "sa/heir"))


def test_a_pod_that_gets_another_service_account_is_served_as_that(mesh: Mesh, client: Pod, server: Pod) -> None:
    enrol(mesh)
    with apps.Echo(server, APP):
        assert apps.outcome(client, (server.v4, APP)) == "echoed"
        mesh.reassign("server", "other")
        identity = "dst.identity=spiffe://cluster.local/ns/default/sa/other "
        eventually(lambda: apps.outcome(client, (server.v4, APP)) == "echoed" and mesh.agent_of(server).said("direction=inbound", identity))
