"""Connections that a pod opens: where each goes, and how those end that go nowhere."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

from tests.kit.builders import deny, principals, service
from tests.kit.proxies import SETTINGS, LoopbackNode, LoopbackPod
from tests.kit.wire import received
from ztunnel.dataplane.flow import Direction
from ztunnel.hbone import connect
from ztunnel.hbone.connect import ConnectRequest, parse_request
from ztunnel.hbone.events import Headers
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.routing import Route
from ztunnel.proxy import outbound


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., LoopbackNode]]:
    made: list[LoopbackNode] = []

    def make(**settings: object) -> LoopbackNode:
        made.append(LoopbackNode(msgspec.structs.replace(SETTINGS, **settings)))
        return made[-1]

    yield make
    for node in made:
        node.close()


@pytest.fixture(name="node")
def fixture_node(make: Callable[..., LoopbackNode]) -> LoopbackNode:
    return make()


@pytest.fixture(name="client")
def fixture_client(node: LoopbackNode) -> LoopbackPod:
    return node.pod("client")


def is_reset(node: LoopbackNode, sock: socket.socket) -> bool:
    with pytest.raises(ConnectionResetError):
        node.run_until(lambda: received(sock) == b"never")
    return True


def exchange(node: LoopbackNode, near: socket.socket, listener: socket.socket) -> socket.socket:
    """Bytes go both ways; the application's end."""
    near.send(b"request")
    far = node.accepted(listener)
    node.run_until(lambda: received(far) == b"request")
    far.send(b"answer")
    node.run_until(lambda: received(near) == b"answer")
    return far


def test_to_a_pod_of_the_mesh_through_a_tunnel(node: LoopbackNode, client: LoopbackPod) -> None:
    server = node.pod("server")
    near = node.connect(client, (server.ip, 8080))
    listener = node.listen(server)
    far = exchange(node, near, listener)
    assert far.getpeername()[0] == "127.0.0.1", "the application sees the address that the tunnel came from"
    row = next(each for each in node.table.live() if each.facts.direction is Direction.OUTBOUND)
    assert (row.facts.protocol, row.facts.destination, row.facts.target) == ("HBONE", (server.ip, 15008), f"{server.ip}:8080")
    assert node.table.towards == {server.uid: 1}
    near.close()
    far.close()
    node.run_until(lambda: len(node.ended()) == 2)
    (inbound, to_app), (outbound, from_app) = node.way(Direction.INBOUND), node.way(Direction.OUTBOUND)
    assert (from_app.up_bytes, from_app.down_bytes) == (to_app.up_bytes, to_app.down_bytes) == (7, 6)
    assert outbound.mutual_tls
    assert inbound.mutual_tls
    assert outbound.destination_identity == inbound.destination_identity == str(server.workload.identity)
    assert inbound.source_identity == outbound.source_identity == str(client.workload.identity)
    assert (outbound.source_uid, outbound.destination_uid, inbound.destination_uid) == (client.uid, server.uid, server.uid)
    assert from_app.trace == to_app.trace != ""


def test_a_socket_that_ended_well_dials_the_next_connection(node: LoopbackNode, client: LoopbackPod) -> None:
    server = node.pod("server")
    listener = node.listen(server)
    for number in range(1, 4):
        near = node.connect(client, (server.ip, 8080))
        far = exchange(node, near, listener)
        near.close()
        node.run_until(lambda far=far: received(far) == b"")  # type: ignore[misc]
        far.close()
        node.run_until(lambda number=number: len(node.ended()) == 2 * number)  # type: ignore[misc]
    assert {record.error for record in node.ended()} == {""}
    assert node.used_up(server) == 0


def test_a_pod_says_what_it_is_now(node: LoopbackNode, client: LoopbackPod, monkeypatch: pytest.MonkeyPatch) -> None:
    server = node.pod("server")
    listener = node.listen(server)
    asked: list[ConnectRequest] = []

    def noted(headers: Headers) -> ConnectRequest:
        asked.append(parse_request(headers))
        return asked[-1]

    monkeypatch.setattr(connect, "parse_request", noted)
    sources = []
    for revision in ("v1", "v1", "v2"):
        node.apply(replace(client.workload, canonical_revision=revision))
        for _ in range(2):
            near = node.connect(client, (server.ip, 8080))
            exchange(node, near, listener)
            sources.append((client.ip, near.getsockname()[1]))
    assert [each.baggage.revision for each in asked] == ["v1"] * 4 + ["v2"] * 2
    assert [each.forwarded_for for each in asked] == sources
    assert len({each.traceparent for each in asked}) == 6


def test_what_is_said_of_one_route_is_not_said_of_another(node: LoopbackNode, client: LoopbackPod) -> None:
    """The same route object, as no router gives it to two: whose it is counts, and what its source is."""
    server = node.pod("server")
    route = node.outbound._router.resolve(client.workload, (server.ip, 8080), lambda _: 0, lambda _: 0)
    assert isinstance(route, Route)
    way = node.outbound._way(client.pod, client.workload, route)
    assert node.outbound._way(client.pod, client.workload, route) is way
    again = replace(client.workload, canonical_revision="v2")
    other = node.outbound._way(client.pod, again, route)
    assert b"service.version=v2" in other.head.block((client.ip, 1), "")
    assert node.outbound._way(server.pod, again, route).key.source == server.workload.identity


def test_ways_are_as_few_as_routes(node: LoopbackNode, client: LoopbackPod, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbound, "MAX_ROUTES", 3)
    server = node.pod("server")
    route = node.outbound._router.resolve(client.workload, (server.ip, 8080), lambda _: 0, lambda _: 0)
    assert isinstance(route, Route)
    routes = [replace(route, authority=f"10.0.0.1:{number}") for number in range(10)]
    for each in routes * 2:
        assert node.outbound._way(client.pod, client.workload, each).route is each
    assert len(node.outbound._ways) <= 3


@pytest.mark.parametrize("half_closes", [False, True])
def test_what_the_application_has_sent_already_leaves_with_the_request(node: LoopbackNode, client: LoopbackPod, half_closes: bool) -> None:
    server = node.pod("server")
    listener = node.listen(server)
    exchange(node, node.connect(client, (server.ip, 8080)), listener)
    near, accepted = node.captured((server.ip, 8080))
    near.send(b"early")
    if half_closes:
        near.shutdown(socket.SHUT_WR)
    node.outbound.accept(client.pod, accepted, (client.ip, near.getsockname()[1]))
    connection = [each for each in node.table.live() if each.facts.direction is Direction.OUTBOUND][-1]
    assert connection.moved()[0] == 5, "before the loop has said anything of it"
    far = node.accepted(listener)
    node.run_until(lambda: received(far) == b"early")
    if half_closes:
        node.run_until(lambda: received(far) == b"")
    far.send(b"late")
    node.run_until(lambda: received(near) == b"late")


def test_to_a_service_through_one_of_its_pods(node: LoopbackNode, client: LoopbackPod) -> None:
    server = node.pod("server")
    node.apply(service("web", "10.96.0.1", ports={80: 8080}, behind=[server.workload]))
    listener = node.listen(server)
    exchange(node, node.connect(client, ("10.96.0.1", 80)), listener)
    facts = [connection.facts for connection in node.table.live()]
    assert {each.service for each in facts} == {"web.default.svc.cluster.local"}


def test_to_a_pod_outside_the_mesh_in_plain(node: LoopbackNode, client: LoopbackPod) -> None:
    outsider = node.pod("outsider", hbone=False)
    listener = node.listen(outsider)
    far = exchange(node, node.connect(client, (outsider.ip, 8080)), listener)
    assert node.table.live()[0].facts.protocol == "TCP"
    assert node.table.towards == {outsider.uid: 1}
    far.close()


def test_to_the_world_in_plain(node: LoopbackNode, client: LoopbackPod) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        near = node.connect(client, listener.getsockname())
        far = exchange(node, near, listener)
    near.close()
    far.close()
    node.run_until(node.ended)
    assert len(node.ended()) == 1
    path, _ = node.way(Direction.OUTBOUND)
    assert (path.mutual_tls, path.destination_uid, path.source_identity) == (False, "", "")


def test_a_plain_dial_that_is_refused(node: LoopbackNode, client: LoopbackPod) -> None:
    outsider = node.pod("outsider", hbone=False)
    near = node.connect(client, (outsider.ip, 8080))
    assert is_reset(node, near)
    assert node.ended()[0].error == f"connect to {outsider.ip}:8080: Connection refused"


def test_a_plain_dial_finds_no_socket(node: LoopbackNode, client: LoopbackPod) -> None:
    node.sockets_to_be_had = False
    assert is_reset(node, node.connect(client, ("127.0.0.1", 9)))
    assert node.ended()[0].error == "no socket to be had in the pod's namespace"


def test_no_socket_comes_in_time(make: Callable[..., LoopbackNode]) -> None:
    node = make(connect_seconds=0.05)
    client = node.pod("client")
    client.pod.ipv4._asked = True  # the supervisor was asked and does not answer
    assert is_reset(node, node.connect(client, ("127.0.0.1", 9)))
    assert node.ended()[0].error == "no socket came in time"
    late = socket.socket()
    client.pod.ipv4.receive([late])
    assert late.fileno() == -1, "nobody waits for it any more"


def test_too_many_wait_for_a_socket(node: LoopbackNode, client: LoopbackPod) -> None:
    client.pod.ipv4._asked = True
    waiting = [node.connect(client, ("127.0.0.1", 9)) for _ in range(4)]
    assert is_reset(node, node.connect(client, ("127.0.0.1", 9)))
    assert node.node.limits["sockets_waiting"] == 1
    client.pod.ipv4.close()
    assert all(is_reset(node, each) for each in waiting)


def test_a_service_without_endpoints_is_refused(node: LoopbackNode, client: LoopbackPod) -> None:
    node.apply(service("web", "10.96.0.1"))
    assert is_reset(node, node.connect(client, ("10.96.0.1", 80)))
    path, record = node.way(Direction.OUTBOUND)
    assert "no healthy upstream" in record.error
    assert (path.service, record.flag) == ("web.default.svc.cluster.local", Flag.CONNECT)


def test_nobody_redirected_it(node: LoopbackNode, client: LoopbackPod) -> None:
    assert is_reset(node, node.connect(client, None))
    assert node.node.limits == {"original_destination_unknown": 1}
    assert node.records == []


@pytest.mark.parametrize("own", [True, False], ids=["its own address", "loopback"])
def test_a_connection_to_ourselves_does_not_loop(node: LoopbackNode, client: LoopbackPod, own: bool) -> None:
    near = node.connect(client, (client.ip if own else "127.0.0.1", 15001))
    assert is_reset(node, near)
    assert node.ended()[0].error == "attempted recursive call to ourselves"


def test_a_pod_that_the_mesh_does_not_know_yet_reaches_nobody(node: LoopbackNode, client: LoopbackPod) -> None:
    node.node.index.apply(Delta(removed_workloads=(client.uid,)))
    assert is_reset(node, node.connect(client, ("127.0.0.1", 9)))
    assert node.ended()[0].error == "failed to fetch information about local workload"


def test_connections_are_bounded(make: Callable[..., LoopbackNode]) -> None:
    node = make(max_connections=1)
    client, outsider = node.pod("client"), node.pod("outsider", hbone=False)
    listener = node.listen(outsider)
    first = node.connect(client, (outsider.ip, 8080))
    assert is_reset(node, node.connect(client, (outsider.ip, 8080)))
    assert node.node.limits == {"connections": 1}
    exchange(node, first, listener)


def test_ipv6_takes_from_its_own_stock(node: LoopbackNode, client: LoopbackPod) -> None:
    near = node.connect(client, ("127.0.0.1", 9))
    assert client.pod.stock("fd00::1") is client.pod.ipv6
    assert client.pod.stock("10.0.0.1") is client.pod.ipv4
    assert is_reset(node, near)


# Neighbours, where an operator spares TLS between pods of one node


class Neighbours:
    """Two pods of a node on which neighbours are not tunnelled."""

    def __init__(self, node: LoopbackNode) -> None:
        self.node = node
        self.client, self.server = node.pod("client"), node.pod("server")
        self.listener = node.listen(self.server)

    def connect(self) -> socket.socket:
        return self.node.connect(self.client, (self.server.ip, 8080))

    def refusal(self) -> str:
        """Why the client's side was refused."""
        assert is_reset(self.node, self.connect())
        return self.node.way(Direction.OUTBOUND)[1].error


@pytest.fixture(name="neighbours")
def fixture_neighbours(make: Callable[..., LoopbackNode]) -> Neighbours:
    return Neighbours(make(same_node_plaintext=True))


def test_neighbours_are_joined_without_a_tunnel_and_counted_on_both_sides(neighbours: Neighbours) -> None:
    node = neighbours.node
    near = neighbours.connect()
    far = exchange(node, near, neighbours.listener)
    assert far.getpeername()[0] == neighbours.client.ip
    assert node.pool.tunnels() == []
    assert {each.facts.protocol for each in node.table.live()} == {"LOCAL"}
    near.close()
    far.close()
    node.run_until(lambda: len(node.ended()) == 2)
    for direction in Direction:
        path, record = node.way(direction)
        assert (record.total_up_bytes, record.total_down_bytes, record.flag, path.mutual_tls) == (7, 6, Flag.NONE, False)
        assert path.source_identity == str(neighbours.client.workload.identity)
        assert path.destination_identity == str(neighbours.server.workload.identity)


def test_a_policy_denies_a_neighbour_as_it_denies_a_tunnel(neighbours: Neighbours) -> None:
    neighbours.node.apply(deny("no-client", principals(neighbours.client.workload.identity)))
    assert neighbours.refusal() == "refused by the neighbouring workload"
    path, inbound = neighbours.node.way(Direction.INBOUND)
    assert (inbound.flag, path.policy) == (Flag.DENY, "AuthorizationPolicy default/no-client")


def test_a_neighbour_is_whom_the_mesh_says(neighbours: Neighbours) -> None:
    neighbours.server.pod.identity = neighbours.node.pki.identity("impostor")
    neighbours.node.certify(neighbours.server.pod.identity, neighbours.node.pki.credentials(neighbours.server.pod.identity))
    assert "sa/impostor" in neighbours.refusal()


@pytest.mark.parametrize("which", ["client", "server"])
def test_without_a_certificate_a_neighbour_is_not_joined(neighbours: Neighbours, which: str) -> None:
    pod = neighbours.client if which == "client" else neighbours.server
    neighbours.node.certify(pod.workload.identity, None)
    assert "no valid certificate" in neighbours.refusal()


def test_a_neighbour_that_does_not_listen(neighbours: Neighbours) -> None:
    neighbours.listener.close()
    assert "Connection refused" in neighbours.refusal()


def test_a_neighbour_that_is_gone_is_dialled_as_anybody(neighbours: Neighbours) -> None:
    neighbours.server.pod.is_gone = True
    exchange(neighbours.node, neighbours.connect(), neighbours.listener)
    assert len(neighbours.node.pool.tunnels()) == 1
