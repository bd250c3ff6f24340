"""Plaintext into a pod: the same verdict as for tunnels, without an identity to go by."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from tests.kit.builders import ANYBODY, deny, service
from tests.kit.proxies import SETTINGS, LoopbackNode, LoopbackPod
from tests.kit.wire import received
from ztunnel.dataplane.flow import Direction
from ztunnel.dataplane.splice import Splice
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.rules import Match
from ztunnel.proxy.facts import Facts
from ztunnel.proxy.pods import PodDial


@pytest.fixture(name="node")
def fixture_node() -> Iterator[LoopbackNode]:
    node = LoopbackNode()
    yield node
    node.close()


@pytest.fixture(name="server")
def fixture_server(node: LoopbackNode) -> LoopbackPod:
    return node.pod("server")


def reason(node: LoopbackNode, sock: socket.socket) -> str:
    with pytest.raises(ConnectionResetError):
        node.run_until(lambda: received(sock) == b"never")
    return node.ended()[-1].error if node.ended() else ""


def test_it_is_carried_with_the_clients_address(node: LoopbackNode, server: LoopbackPod) -> None:
    outsider = node.pod("outsider", hbone=False)
    node.apply(service("web", "10.96.0.1", behind=[server.workload]))
    listener = node.listen(server)
    near = node.plain(server, (server.ip, 8080), outsider.ip)
    far = node.accepted(listener)
    assert far.getpeername()[0] == outsider.ip
    near.send(b"hello")
    node.run_until(lambda: received(far) == b"hello")
    (connection,) = node.table.live()
    assert (connection.facts.source_uid, connection.facts.service_name) == (outsider.uid, "web")
    near.close()
    far.close()
    node.run_until(node.ended)
    assert len(node.ended()) == 1
    path, record = node.way(Direction.INBOUND)
    assert (path.mutual_tls, path.source_identity, record.up_bytes, record.flag) == (False, "", 5, Flag.NONE)


def test_a_socket_that_ended_well_dials_the_next_connection_from_another_address(node: LoopbackNode, server: LoopbackPod) -> None:
    listener = node.listen(server)
    sources = [node.pod(f"outsider-{number}", hbone=False).ip for number in range(5)]
    for source in [*sources, server.ip, sources[0]]:
        before = len(node.ended())
        near = node.plain(server, (server.ip, 8080), source)
        far = node.accepted(listener)
        if source != server.ip:
            assert far.getpeername()[0] == source
        else:
            assert far.getpeername()[0] not in sources, "not from where it came in its former life"
        near.close()
        far.close()
        node.run_until(lambda before=before: len(node.ended()) > before)  # type: ignore[misc]
        came_back, bound = server.pod.ipv4._sockets[-1]
        assert bound == came_back.getsockname()[0] or source == server.ip, "it is known where it comes from"
    assert node.used_up(server) == 0


def test_an_application_may_be_the_first_to_speak(node: LoopbackNode, server: LoopbackPod) -> None:
    """Nobody has said the last word of the handshake with it before."""
    listener = node.listen(server)
    near = node.plain(server, (server.ip, 8080), "127.0.0.1")
    node.loop.run_once(0.01)
    node.loop.run_once(0)
    far, _ = listener.accept()
    far.send(b"welcome")
    node.run_until(lambda: received(near) == b"welcome")
    far.close()


def test_a_dial_that_meets_a_bug_ends_its_own_connection(node: LoopbackNode, server: LoopbackPod) -> None:
    class Broken(Splice):
        def acknowledge(self) -> None:
            raise ZeroDivisionError("this is a bug")

    node.listen(server)
    near, accepted = node.captured((server.ip, 8080))
    connection = node.table.register(Facts(Direction.INBOUND, server.uid, ("192.0.2.1", 1), (server.ip, 8080)))
    connection.relay = Broken(node.loop, node.node.scratch, accepted, connection)
    PodDial(node.node, connection, (server.ip, 8080), None).start(server.pod)
    assert reason(node, near) == "internal error"
    assert node.loop.bugs == 1
    node.loop.bugs = 0


def test_a_pod_that_calls_itself_comes_from_where_the_kernel_says(node: LoopbackNode, server: LoopbackPod) -> None:
    listener = node.listen(server)
    node.plain(server, (server.ip, 8080), server.ip)
    # Not bound to its own address by us: the kernel chooses, and takes the only one there is.
    assert node.accepted(listener).getpeername()[0] in (server.ip, "127.0.0.1")


def test_a_policy_denies_it_before_anything_is_dialled(node: LoopbackNode, server: LoopbackPod) -> None:
    node.apply(deny("no-strangers", Match(not_principals=ANYBODY)))
    near = node.plain(server, (server.ip, 8080), "192.0.2.1")
    assert "denied by AuthorizationPolicy default/no-strangers" in reason(node, near)
    path, record = node.way(Direction.INBOUND)
    assert (record.flag, path.policy) == (Flag.DENY, "AuthorizationPolicy default/no-strangers")
    assert server.asked == []


def test_the_proxys_own_ports_are_not_dialled(node: LoopbackNode, server: LoopbackPod) -> None:
    assert reason(node, node.plain(server, (server.ip, 15001), "192.0.2.1")) == "port 15001 is the proxy itself"


def test_a_pod_that_the_mesh_does_not_know_is_not_served(node: LoopbackNode, server: LoopbackPod) -> None:
    node.node.index.apply(Delta(removed_workloads=(server.uid,)))
    assert "local workload" in reason(node, node.plain(server, (server.ip, 8080), "192.0.2.1"))


def test_nobody_redirected_it(node: LoopbackNode, server: LoopbackPod) -> None:
    assert reason(node, node.plain(server, None, "192.0.2.1")) == ""
    assert node.node.limits == {"original_destination_unknown": 1}


def test_an_application_that_does_not_listen(node: LoopbackNode, server: LoopbackPod) -> None:
    near = node.plain(server, (server.ip, 8080), "127.0.0.1")
    assert reason(node, near) == f"connect to {server.ip}:8080: Connection refused"


def test_connections_are_bounded() -> None:
    node = LoopbackNode(msgspec.structs.replace(SETTINGS, max_connections=0))
    assert reason(node, node.plain(node.pod("server"), ("127.0.0.1", 80), "127.0.0.1")) == ""
    assert node.node.limits == {"connections": 1}
    node.close()
