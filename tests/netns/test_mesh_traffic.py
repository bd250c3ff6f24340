"""What a mesh carries and how: captured, encrypted between the nodes, with the client's address, and with TCP's own endings."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.kit import apps
from tests.kit.mesh import Mesh
from tests.kit.netns import Place, Pod
from tests.kit.polling import NeverHappened, eventually
from tests.kit.traffic import accept, nobody_waits, source_of, talk
from ztunnel.dataplane.sockets import reset
from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND
from ztunnel.node.redirect import PROBE_ADDRESSES

APP = 8080
MARKER = b"plaintext-marker-" + bytes(range(65, 91)) * 4
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
BULK_BYTES = 20 << 20
_GREETINGS = 50
NEWS_SECONDS = 0.15
"""Longer than a worker keeps news of connections to itself."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=2) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("server", node=1, ambient=True)
        mesh.pod("neighbour", node=0, ambient=True)
        mesh.pod("outsider", node=1)
        mesh.service("server", "server", {80: APP}, ("10.96.0.1", "fd96::1"))
        mesh.settle()
        yield mesh


@pytest.fixture
def mesh(shared: Mesh) -> Iterator[Mesh]:
    yield shared
    shared.check()


@pytest.fixture
def client(mesh: Mesh) -> Pod:
    return mesh.pods["client"]


@pytest.fixture
def server(mesh: Mesh) -> Pod:
    return mesh.pods["server"]


@pytest.fixture
def outsider(mesh: Mesh) -> Pod:
    return mesh.pods["outsider"]


# The wire


@FAMILIES
def test_between_nodes_there_is_tls_on_15008_and_nothing_else(mesh: Mesh, client: Pod, server: Pod, family: int) -> None:
    with apps.tapped(mesh.net.nodes[0]) as tap, apps.Echo(server, APP) as echo:
        assert apps.call(client, (server.address(family), APP), MARKER) == MARKER
        assert tap.look()
        assert tap.ports == {INBOUND_HBONE}
        assert not tap.saw(MARKER)
        assert not tap.saw(MARKER[:17])
        towards = [segment.payload for segment in tap.segments if segment.destination_port == INBOUND_HBONE]
        # Records of application data (23) of TLS 1.2's number, as TLS 1.3 writes them.
        assert any(payload.startswith(b"\x17\x03\x03") for payload in towards)
    assert echo.peers == [client.address(family)]


def test_the_tap_sees_what_is_not_encrypted(mesh: Mesh, server: Pod, outsider: Pod) -> None:
    with apps.tapped(mesh.net.nodes[0]) as tap, apps.Echo(mesh.net.nodes[0], APP):
        assert apps.call(outsider, (mesh.net.nodes[0].v4, APP), MARKER) == MARKER
        assert tap.saw(MARKER)


@FAMILIES
def test_pods_of_one_node_talk_through_tunnels_as_well(mesh: Mesh, client: Pod, family: int) -> None:
    neighbour = mesh.pods["neighbour"]
    with apps.Echo(neighbour, APP) as echo:
        assert apps.call(client, (neighbour.address(family), APP)) == b"hello"
    assert echo.peers == [client.address(family)]
    assert eventually(lambda: mesh.agents[0].said("direction=inbound", "dst.workload=neighbour", "sa/client"))


def test_both_sides_count_and_name_the_connection(mesh: Mesh, client: Pod, server: Pod) -> None:
    labels = {"source_workload": "client", "destination_workload": "server", "connection_security_policy": "mutual_tls"}

    def counted() -> list[float]:
        return [agent.metric("istio_tcp_received_bytes_total", **labels) for agent in mesh.agents]

    before = counted()
    with apps.Echo(server, APP):
        apps.call(client, (server.v4, APP), MARKER)
    eventually(lambda: counted() == [each + len(MARKER) for each in before])
    assert mesh.agents[1].said("src.identity=spiffe://cluster.local/ns/default/sa/client", "direction=inbound")


# Endings


@FAMILIES
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_half_close_passes_and_the_other_direction_goes_on(client: Pod, server: Pod, family: int, first: str) -> None:
    with server.listener(APP) as listening, client.connect((server.address(family), APP)) as near, accept(listening) as far:
        talk(near, far)
        one, other = (near, far) if first == "client" else (far, near)
        one.shutdown(socket.SHUT_WR)
        assert other.recv(1) == b""
        for _ in range(3):
            other.sendall(b"still here")
            assert apps.read_exactly(one, 10) == b"still here"
        other.shutdown(socket.SHUT_WR)
        assert one.recv(1) == b""


@FAMILIES
@pytest.mark.parametrize("first", ["client", "server"])
def test_a_reset_is_a_reset_at_the_other_end(client: Pod, server: Pod, family: int, first: str) -> None:
    with server.listener(APP) as listening, client.connect((server.address(family), APP)) as near, accept(listening) as far:
        talk(near, far)
        one, other = (near, far) if first == "client" else (far, near)
        reset(one)
        assert apps.ending(other) == "reset"


def test_a_reset_after_a_half_close_is_still_a_reset(client: Pod, server: Pod) -> None:
    with server.listener(APP) as listening, client.connect((server.v4, APP)) as near, accept(listening) as far:
        talk(near, far)
        near.shutdown(socket.SHUT_WR)
        assert far.recv(1) == b""
        reset(far)
        assert apps.ending(near) == "reset"


def test_an_application_that_does_not_listen_is_a_reset_with_the_reason_in_the_log(mesh: Mesh, client: Pod, server: Pod) -> None:
    assert apps.outcome(client, (server.v4, 9999)) == "reset"
    eventually(lambda: mesh.agents[1].said("dst.addr=10.102.0.1:15008 dst.hbone_addr=10.102.0.1:9999", "Connection refused"))
    eventually(lambda: mesh.agents[0].said("dst.hbone_addr=10.102.0.1:9999", "http status 503"))


# Load


@FAMILIES
def test_bulk_arrives_whole_both_ways(client: Pod, server: Pod, family: int) -> None:
    data = os.urandom(1 << 20) * (BULK_BYTES >> 20)
    expected = hashlib.sha256(data).digest()

    def give(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    with server.listener(APP) as listening, client.connect((server.address(family), APP)) as near, accept(listening) as far:
        for each in (near, far):
            each.settimeout(30)
        with ThreadPoolExecutor(4) as threads:
            sending = [threads.submit(give, each) for each in (near, far)]
            received = [threads.submit(apps.read_all, each) for each in (far, near)]
            assert [hashlib.sha256(each.result()).digest() for each in received] == [expected, expected]
            for done in sending:
                done.result()


def test_many_connections_share_few_tunnels(mesh: Mesh, client: Pod, server: Pod) -> None:
    with apps.Echo(server, APP):
        live = [client.tcp_socket(socket.AF_INET) for _ in range(100)]
        try:
            for connection in live:
                connection.connect((server.v4, APP))
            for connection in live:
                connection.sendall(b"hello")
            assert all(apps.read_exactly(connection, 5) == b"hello" for connection in live)
            tunnels = [row for row in mesh.agents[0].rows("tunnels") if row["pod"] == "default/client" and row["direction"] == "outbound"]
            towards = [row for row in tunnels if str(row["peer"]).startswith(f"{server.v4}:")]
            assert len(towards) <= 2
            assert sum(int(str(row["streams"])) for row in towards) == 100
        finally:
            for connection in live:
                connection.close()


def test_a_reader_that_stops_does_not_hold_up_the_others(client: Pod, server: Pod) -> None:
    with (
        apps.Echo(server, APP),
        server.listener(APP + 1) as listening,
        client.connect((server.v4, APP + 1)) as stuffed,
        accept(listening),
    ):
        stuffed.setblocking(False)
        sent = 0
        while sent < 64 << 20 and (pushed := _pushed(stuffed)):
            sent += pushed
        # All that is on the way is bounded: socket buffers and one stream's window.
        assert sent < 64 << 20
        for _ in range(20):
            assert apps.call(client, (server.v4, APP)) == b"hello"


@FAMILIES
def test_each_connection_comes_from_its_own_client(mesh: Mesh, client: Pod, server: Pod, family: int) -> None:
    """Sockets that dial again keep the address that they came from: it must be the next client's, or be changed."""
    clients = [client, mesh.pods["neighbour"], client, client, mesh.pods["neighbour"], mesh.pods["outsider"]] * 8
    with apps.Echo(server, APP) as echo:
        for each in clients:
            assert apps.call(each, (server.address(family), APP)) == b"hello"
    assert echo.peers == [each.address(family) for each in clients]


@pytest.mark.parametrize("who", ["client", "outsider"])
def test_an_application_that_speaks_first_is_heard_at_once(mesh: Mesh, server: Pod, who: str) -> None:
    """The proxy's handshake with it waits for the client's first bytes, which may never come."""
    with apps.Echo(server, APP, name="mail"):
        began = time.monotonic()
        for _ in range(_GREETINGS):
            with mesh.pods[who].tcp_socket(socket.AF_INET) as sock:
                sock.settimeout(5)
                sock.connect((server.v4, APP))
                assert sock.recv(16) == b"mail\n"
    # A handshake that nobody completes is completed by the kernel after 40 ms at the soonest, and each would wait for that.
    assert time.monotonic() - began < _GREETINGS * 0.03


def _pushed(sock: socket.socket) -> int:
    """Bytes taken; 0 when for a while nothing is."""
    chunk = bytes(1 << 20)

    def taken() -> int:
        try:
            return sock.send(chunk)
        except BlockingIOError:
            return 0

    try:
        return eventually(taken, within=0.3)
    except NeverHappened:
        return 0


def test_small_messages_do_not_wait_for_acknowledgements(client: Pod, server: Pod) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        assert apps.call(client, (server.v4, APP)) == b"server\nhello"
        return time.perf_counter() - began

    with apps.Echo(server, APP, name="server"):
        # A delayed acknowledgement is 40 ms late; the best of several is not at the mercy of a busy machine.
        assert min(seconds() for _ in range(10)) < 0.03


# What is not captured, and what is not carried


@FAMILIES
def test_a_pods_own_address_and_loopback_are_not_captured(mesh: Mesh, client: Pod, family: int) -> None:
    before = _counted(mesh)
    with apps.Echo(client, APP) as echo:
        for address in (client.address(family), "127.0.0.1" if family == socket.AF_INET else "::1"):
            assert apps.call(client, (address, APP)) == b"hello"
            assert echo.peers.pop() == address
    assert _counted(mesh) == before


def _counted(mesh: Mesh) -> float:
    """Connections that the agents have carried or refused so far, once no news of any is on its way."""
    seen: list[tuple[float, float]] = []

    def rests() -> bool:
        count = sum(agent.metric("istio_tcp_connections_opened_total") for agent in mesh.agents)
        live = any(agent.rows("connections") for agent in mesh.agents)
        if live or not seen or seen[-1][1] != count:
            seen.append((time.monotonic(), count))
        return time.monotonic() - seen[-1][0] > NEWS_SECONDS

    eventually(rests)
    return seen[-1][1]


@FAMILIES
def test_a_probe_reaches_the_application_unproxied(mesh: Mesh, server: Pod, family: int) -> None:
    node = mesh.net.nodes[1]
    probe = next(each for each in PROBE_ADDRESSES if (":" in each) == (family == socket.AF_INET6))
    node.command("ip", "address", "add", f"{probe}/{128 if ':' in probe else 32}", "dev", "lo")
    before = _counted(mesh)
    with apps.Echo(server, APP) as echo:
        assert apps.call(node, (server.address(family), APP), source=(probe, 0)) == b"hello"
    assert echo.peers == [probe]
    assert _counted(mesh) == before


@FAMILIES
@pytest.mark.parametrize("port", [OUTBOUND, INBOUND_PLAINTEXT])
def test_the_proxys_own_ports_are_refused_from_outside_and_inside_and_do_not_loop(
    mesh: Mesh, client: Pod, server: Pod, outsider: Pod, family: int, port: int
) -> None:
    loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
    attempts: list[tuple[Place, str]] = [(outsider, server.address(family)), (client, server.address(family)), (server, loopback)]
    attempts.append((server, server.address(family)))
    before = _counted(mesh)
    for place, address in attempts:
        assert apps.outcome(place, (address, port)) in ("reset", "refused"), f"{place.name} to {address}:{port}"
    assert _counted(mesh) - before <= 3 * len(attempts)
    with apps.Echo(server, APP):
        assert apps.call(client, (server.address(family), APP)) == b"hello"


@FAMILIES
def test_a_client_outside_the_mesh_reaches_a_server_inside_with_its_own_address(mesh: Mesh, outsider: Pod, family: int) -> None:
    target = mesh.pods["neighbour"]
    with apps.Echo(target, APP) as echo:
        assert apps.call(outsider, (target.address(family), APP), MARKER) == MARKER
    assert echo.peers == [outsider.address(family)]
    assert eventually(lambda: mesh.agents[0].said("direction=inbound", "src.workload=outsider") or _passed(mesh, outsider, family))


def _passed(mesh: Mesh, outsider: Pod, family: int) -> bool:
    return mesh.agents[0].said("direction=inbound", f"src.addr={outsider.address(family)}") or mesh.agents[0].said(
        "direction=inbound", f"src.addr=[{outsider.address(family)}]"
    )


@FAMILIES
def test_a_client_inside_reaches_a_pod_outside_the_mesh_in_plaintext(mesh: Mesh, client: Pod, outsider: Pod, family: int) -> None:
    with apps.tapped(mesh.net.nodes[0]) as tap, apps.Echo(outsider, APP) as echo:
        assert apps.call(client, (outsider.address(family), APP), MARKER) == MARKER
        assert tap.saw(MARKER)
    assert echo.peers == [client.address(family)]


@FAMILIES
def test_an_unknown_destination_is_passed_through(mesh: Mesh, client: Pod, family: int) -> None:
    node = mesh.net.nodes[1]
    with apps.Echo(node, APP) as echo:
        assert apps.call(client, (node.address(family), APP)) == b"hello"
    assert echo.peers == [client.address(family)]


def test_half_closes_and_resets_pass_through_plain_connections_too(client: Pod, outsider: Pod) -> None:
    with outsider.listener(APP) as listening:
        with client.connect((outsider.v4, APP)) as near, accept(listening) as far:
            assert source_of(far) == client.v4
            near.shutdown(socket.SHUT_WR)
            assert far.recv(1) == b""
            far.sendall(b"last words")
            assert apps.read_exactly(near, 10) == b"last words"
        with client.connect((outsider.v4, APP)) as near, accept(listening) as far:
            talk(near, far)
            reset(far)
            assert apps.ending(near) == "reset"


@FAMILIES
def test_a_pod_reaches_itself_through_its_own_service(server: Pod, family: int) -> None:
    with apps.Echo(server, APP) as echo:
        assert apps.call(server, ("10.96.0.1" if family == socket.AF_INET else "fd96::1", 80)) == b"hello"
    assert len(echo.peers) == 1


def test_a_cluster_without_ipv6_works(mesh: Mesh) -> None:
    one, other = mesh.pod("four", node=0, ambient=True, ipv6=False), mesh.pod("fore", node=1, ambient=True, ipv6=False)
    mesh.settle()
    with apps.Echo(other, APP, address="0.0.0.0") as echo:
        assert apps.call(one, (other.v4, APP)) == b"hello"
    assert echo.peers == [one.v4]


def test_nothing_is_left_over(mesh: Mesh, client: Pod, server: Pod) -> None:
    with server.listener(APP) as listening:
        assert nobody_waits(listening)
    eventually(lambda: all(agent.rows("connections") == [] for agent in mesh.agents), saying="no connection is listed any more")
    assert threading.active_count() < 8
