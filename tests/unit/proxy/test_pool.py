"""Which tunnel a connection gets, and when tunnels end."""

from __future__ import annotations

import datetime
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import pytest

from tests.kit.proxies import SETTINGS, LoopbackNode, LoopbackPod
from tests.kit.wire import received, tcp_pair
from ztunnel.dataplane.channel import Configure
from ztunnel.dataplane.kernel_tls import TCP_ULP
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.events import RequestReceived
from ztunnel.mesh.errors import Flag, UpstreamTimeout
from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.proxy.pool import Key, _Member

SECOND = datetime.timedelta(seconds=1)


class Lane:
    """A client, a server with an application, and connections between them."""

    def __init__(self, settings: Configure) -> None:
        self.node = LoopbackNode(settings)
        self.client, self.server = self.node.pod("client"), self.node.pod("server")
        self.app = self.node.listen(self.server)
        self.destination = (self.server.ip, self.app.getsockname()[1])

    def open(self) -> tuple[socket.socket, socket.socket]:
        """A connection that carries bytes: both applications' ends."""
        near = self.node.connect(self.client, self.destination)
        near.send(b"x")
        far = self.node.accepted(self.app)
        self.node.run_until(lambda: received(far) == b"x")
        far.send(b"y")
        self.node.run_until(lambda: received(near) == b"y")
        return near, far

    def end(self, ends: tuple[socket.socket, socket.socket]) -> None:
        before = len(self.node.ended())
        for sock in ends:
            sock.close()
        self.node.run_until(lambda: len(self.node.ended()) == before + 2)

    @property
    def tunnels(self) -> list[Tunnel]:
        return [tunnel for _, tunnel in self.node.pool.tunnels()]


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., Lane]]:
    made: list[Lane] = []

    def make(**settings: object) -> Lane:
        made.append(Lane(msgspec.structs.replace(SETTINGS, **settings)))
        return made[-1]

    yield make
    for lane in made:
        lane.node.close()


@pytest.fixture(name="lane")
def fixture_lane(make: Callable[..., Lane]) -> Lane:
    return make()


def alive(node: LoopbackNode, ends: tuple[socket.socket, socket.socket]) -> bool:
    near, far = ends
    near.send(b"ping")
    node.run_until(lambda: received(far) == b"ping")
    return True


def has_tls() -> bool:
    """Whether this machine's kernel takes a connection's TLS."""
    near, far = tcp_pair()
    with near, far:
        try:
            near.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        except FileNotFoundError:
            return False
        return True


# Sharing


def test_connections_to_one_peer_share_a_tunnel(lane: Lane) -> None:
    first, second = lane.open(), lane.open()
    (tunnel,) = lane.tunnels
    assert len(tunnel.relays) == 2
    assert lane.node.pool.tunnels()[0][0] == lane.client.uid
    lane.end(first)
    lane.end(second)
    lane.open()
    assert lane.tunnels == [tunnel], "an idle tunnel is used again"


def test_what_a_tunnel_says_last_is_delivered(lane: Lane) -> None:
    lane.open()
    (tunnel,) = lane.tunnels
    assert tunnel._sock is not None
    assert struct.unpack("ii", tunnel._sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8))[0] == 0


def test_connections_that_come_while_it_is_being_made_wait_for_the_same_tunnel(lane: Lane) -> None:
    near = [lane.node.connect(lane.client, lane.destination) for _ in range(3)]
    assert len(lane.tunnels) == 1
    for sock in near:
        sock.send(b"x")
    for _ in near:
        lane.node.accepted(lane.app)


def test_a_tunnel_belongs_to_its_pod_and_its_peers_workload(lane: Lane) -> None:
    other = lane.node.pod("other")
    lane.open()
    near = lane.node.connect(other, lane.destination)
    near.send(b"x")
    lane.node.accepted(lane.app)
    assert len(lane.tunnels) == 2
    # The same address and identity, another pod: what goes there now must not end in the former one's tunnel.
    lane.node.apply(replace(lane.server.workload, uid="uid-a-successor"))
    lane.open()
    assert len(lane.tunnels) == 3


def test_a_full_tunnel_gets_a_sister_and_is_used_again_later(make: Callable[..., Lane]) -> None:
    lane = make(max_streams=2)
    ends = [lane.open() for _ in range(3)]
    first, second = lane.tunnels
    assert [len(first.relays), len(second.relays)] == [2, 1]
    lane.end(ends[0])
    lane.open()
    assert [len(first.relays), len(second.relays)] == [2, 1]


def test_the_tunnel_that_had_room_last_is_used_until_it_is_full(make: Callable[..., Lane]) -> None:
    lane = make(max_streams=2)
    ends = [lane.open() for _ in range(3)]
    first, second = lane.tunnels
    ends.append(lane.open())
    lane.end(ends[0])
    lane.end(ends[3])
    lane.open()
    assert [len(first.relays), len(second.relays)] == [1, 2]
    lane.open()
    assert [len(first.relays), len(second.relays)] == [2, 2]


def test_tunnels_to_one_peer_are_bounded(make: Callable[..., Lane]) -> None:
    lane = make(max_streams=1, tunnels_per_peer=2)
    for _ in range(2):
        lane.open()
    near = lane.node.connect(lane.client, lane.destination)
    with pytest.raises(ConnectionResetError):
        received(near)
    assert lane.node.node.limits["tunnels_per_peer"] == 1
    assert lane.node.ended()[-1].error == "limit reached: tunnels_per_peer"


@pytest.mark.slow
def test_tunnels_that_take_nothing_new_do_not_count_towards_the_bound(make: Callable[..., Lane]) -> None:
    lane = make(tunnels_per_peer=1)
    first = lane.open()
    # The peer is going away: the tunnel lives as long as its stream, and must not keep others from being made.
    (served,) = lane.server.pod.inbound
    served.go_away()
    lane.node.run_until(lambda: lane.tunnels[0].is_draining)
    second = lane.open()
    assert len(lane.tunnels) == 2
    assert alive(lane.node, first)
    assert alive(lane.node, second)


# The end of a tunnel


def test_an_idle_tunnel_is_closed_after_a_while(make: Callable[..., Lane]) -> None:
    lane = make(idle_seconds=0.05)
    lane.end(lane.open())
    assert len(lane.tunnels) == 1
    lane.node.run_until(lambda: not lane.tunnels and not lane.server.pod.inbound)


def test_use_puts_off_the_end_of_an_idle_tunnel(make: Callable[..., Lane]) -> None:
    lane = make(idle_seconds=0.1)
    lane.end(lane.open())
    ends = lane.open()
    lane.node.run_for(0.15)
    assert alive(lane.node, ends)
    lane.end(ends)
    lane.end(lane.open())
    lane.node.run_until(lambda: not lane.tunnels)


def test_a_workload_that_is_gone_gets_no_new_streams_and_keeps_its_old_ones(lane: Lane) -> None:
    ends = lane.open()
    (tunnel,) = lane.tunnels
    lane.node.remove(lane.server.workload)
    assert tunnel.is_draining
    assert lane.tunnels == [tunnel]
    assert alive(lane.node, ends)
    lane.node.apply(lane.server.workload)
    lane.open()
    assert len(lane.tunnels) == 2
    lane.end(ends)
    lane.node.run_until(lambda: tunnel not in lane.tunnels)
    assert len(lane.tunnels) == 1


def test_at_the_end_idle_tunnels_say_goodbye_and_live_ones_go_on(lane: Lane) -> None:
    lane.end(lane.open())
    (idle,) = lane.tunnels
    lane.node.pool.retire_all()
    assert idle.is_dead
    lane.node.run_until(lambda: not lane.server.pod.inbound)
    ends = lane.open()
    lane.node.pool.retire_all()
    assert alive(lane.node, ends)
    lane.end(ends)
    lane.node.run_until(lambda: not lane.tunnels)


def test_a_pod_that_is_gone_takes_its_tunnels_with_it(lane: Lane) -> None:
    near, far = lane.open()
    lane.node.pool.drop_pod(lane.client.uid)
    assert not lane.tunnels
    for sock in (near, far):
        with pytest.raises(ConnectionResetError):
            lane.node.run_until(lambda sock=sock: received(sock) == b"never")  # type: ignore[misc]  # mypy does not infer defaults


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["client", "server"])
def test_a_tunnel_takes_no_streams_past_its_certificates_end(lane: Lane, whose: str) -> None:
    identity = lane.node.pki.identity(whose)
    lane.node.certify(identity, lane.node.pki.credentials(identity, valid=(-SECOND, 3 * SECOND)))
    ends = lane.open()
    (old,) = lane.tunnels
    lane.node.certify(identity, lane.node.pki.credentials(identity))
    assert old.expires_at < lane.node.loop.now + 3
    lane.node.run_until(lambda: lane.node.loop.now + 0.5 >= old.expires_at)
    lane.open()
    assert len(lane.tunnels) == 2
    assert alive(lane.node, ends)


# Tunnels that do not come to be


def refused(lane: Lane, near: socket.socket) -> tuple[str, Flag]:
    """What the record says of a connection that was reset."""
    lane.node.run_until(lane.node.ended)
    with pytest.raises(ConnectionResetError):
        lane.node.run_until(lambda: received(near) == b"never")
    record = lane.node.ended()[-1]
    assert not lane.tunnels
    return record.error, record.flag


def close_door(pod: LoopbackPod) -> None:
    pod.pod.acceptors[0].close()


def test_nobody_listens_on_15008(lane: Lane) -> None:
    close_door(lane.server)
    error, flag = refused(lane, lane.node.connect(lane.client, lane.destination))
    assert error == f"connect to {lane.server.ip}:{INBOUND_HBONE}: Connection refused"
    assert flag is Flag.CONNECT


@pytest.mark.parametrize("prepared", [False, True], ids=["first", "with sockets in stock"])
def test_a_dial_that_fails_at_once_is_told_at_once(lane: Lane, prepared: bool) -> None:
    # TCP to a broadcast address is refused by the kernel before anything is sent.
    lane.node.apply(replace(lane.server.workload, addresses=("255.255.255.255",)))
    if prepared:
        lane.client.pod.ipv4.receive([socket.socket()])
    error, _ = refused(lane, lane.node.connect(lane.client, ("255.255.255.255", 80)))
    assert error.startswith(f"connect to 255.255.255.255:{INBOUND_HBONE}: ")


def test_silence_on_15008_is_probably_a_network_policy(make: Callable[..., Lane]) -> None:
    lane = make(connect_seconds=0.1)
    close_door(lane.server)
    with socket.create_server((lane.server.ip, INBOUND_HBONE), backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        error, flag = refused(lane, lane.node.connect(lane.client, lane.destination))
        for sock in waiting:
            sock.close()
    assert "NetworkPolicy" in error
    assert flag is Flag.NETWORK_POLICY


def test_a_peer_of_another_identity_is_not_spoken_to(lane: Lane) -> None:
    lane.node.certify(lane.server.workload.identity, lane.node.pki.credentials(lane.node.pki.identity("somebody")))
    error, flag = refused(lane, lane.node.connect(lane.client, lane.destination))
    assert "somebody" in error
    assert flag is Flag.IDENTITY_ERROR


def test_without_a_certificate_nothing_is_carried(lane: Lane) -> None:
    lane.node.certify(lane.client.workload.identity, None)
    error, flag = refused(lane, lane.node.connect(lane.client, lane.destination))
    assert error.startswith("no valid certificate for spiffe://cluster.local/ns/default/sa/client")
    assert flag is Flag.IDENTITY_ERROR


def test_no_socket_to_be_had(lane: Lane) -> None:
    lane.node.sockets_to_be_had = False
    error, _ = refused(lane, lane.node.connect(lane.client, lane.destination))
    assert error == "no socket to be had in the pod's namespace"


def test_too_many_wait_for_sockets(make: Callable[..., Lane]) -> None:
    lane = make(max_streams=1, tunnels_per_peer=10)
    near = [lane.node.connect(lane.client, lane.destination) for _ in range(5)]
    assert lane.node.node.limits["sockets_waiting"] == 1
    assert [record.error for record in lane.node.ended()] == ["limit reached: sockets_waiting"]
    for sock in near[:4]:
        sock.send(b"x")
        lane.node.accepted(lane.app)


def test_a_socket_that_comes_too_late_is_closed(lane: Lane) -> None:
    near = lane.node.connect(lane.client, lane.destination)
    near.close()
    lane.node.pool.drop_pod(lane.client.uid)
    lane.node.run_until(lane.node.ended)
    lane.node.run_for(0.02)
    assert not lane.tunnels


def test_an_answer_that_does_not_come(make: Callable[..., Lane]) -> None:
    lane = make(connect_seconds=0.1, response_seconds=0.1)
    # The peer's application neither accepts nor refuses: no 200 comes. Its own deadline answers 503 first, or ours ends the wait.
    near = lane.node.connect(lane.client, lane.destination)
    lane.app.close()
    with socket.create_server(lane.destination, backlog=0) as listener:
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(listener.getsockname())
        lane.node.run_until(lambda: len(lane.node.ended()) == 2)
        for sock in waiting:
            sock.close()
    errors = {record.error for record in lane.node.ended()}
    assert f"connect to {lane.server.ip}:8080 timed out" in errors
    with pytest.raises(ConnectionResetError):
        lane.node.run_until(lambda: received(near) == b"never")


def test_a_client_tunnel_yields_no_requests(lane: Lane) -> None:
    key = Key(lane.client.uid, lane.client.workload.identity, (), lane.destination, "")
    member = _Member(lane.node.pool, key)
    with pytest.raises(AssertionError):
        member.tunnel_request(member.tunnel, RequestReceived(1, (), False))
    assert UpstreamTimeout.flag is Flag.CONNECT


# Records by the kernel


def test_tunnels_are_given_to_a_kernel_that_has_tls_and_work_with_one_that_has_not(make: Callable[..., Lane]) -> None:
    lane = make(kernel_records=True)
    ends = lane.open()
    assert alive(lane.node, ends)
    (inbound,) = lane.server.pod.inbound
    assert lane.tunnels[0].is_in_kernel is inbound.is_in_kernel is lane.node.node.kernel.is_on is has_tls()
