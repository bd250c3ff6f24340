"""Port 15008: which CONNECT is served, which refused and how, and what a peer may take up."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from datetime import timedelta

import msgspec
import pytest

from tests.kit.builders import deny, principals
from tests.kit.hbone import connect_headers
from tests.kit.pki import FakePki
from tests.kit.proxies import SETTINGS, LoopbackNode, LoopbackPod, Told
from tests.kit.wire import received
from ztunnel.dataplane.flow import FlowPath
from ztunnel.dataplane.streams import StreamEnd
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.events import RequestReceived
from ztunnel.hbone.handshake import Credentials, Handshake, TlsContexts
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.errors import Flag, MeshError, PolicyDenied
from ztunnel.mesh.ports import INBOUND_HBONE


class Stranger:
    """A client tunnel of nobody's pod in the same loop, which may ask for what no client should. Implements `TunnelOwner`, `RelayOwner`."""

    def __init__(self, node: LoopbackNode, server: LoopbackPod, credentials: Credentials, source: str = "127.0.0.1") -> None:
        self.node = node
        self.closed: list[MeshError | None] = []
        self.statuses: dict[int, int] = {}
        self.ended: set[int] = set()
        self.sock = socket.socket()
        self.sock.bind((source, 0))
        self.sock.connect((server.ip, INBOUND_HBONE))
        self.sock.setblocking(False)
        self.tunnel = Tunnel(node.loop, node.node.scratch, self, node.node.times, client=True)
        contexts = TlsContexts(credentials)
        self.tunnel.start(
            self.sock, Handshake(contexts, server=False, expected=frozenset({server.workload.identity}), own_records=True), (server.ip, 1)
        )

    def tunnel_ready(self, tunnel: Tunnel) -> None: ...

    def tunnel_request(self, tunnel: Tunnel, request: RequestReceived) -> None: ...

    def tunnel_idle(self, tunnel: Tunnel) -> None: ...

    def tunnel_closed(self, tunnel: Tunnel, error: MeshError | None) -> None:
        self.closed.append(error)

    def ask(self, authority: str, method: bytes = b"CONNECT") -> int:
        """The status of the answer."""
        stream = self.open(authority, method)
        self.node.run_until(lambda: stream in self.statuses)
        return self.statuses[stream]

    def open(self, authority: str, method: bytes = b"CONNECT") -> int:
        stream = self.tunnel.mux.open_stream(connect_headers(authority, method))
        self.tunnel.relays[stream] = _Watcher(self, stream)
        self.tunnel.mark_dirty()
        return stream


class _Watcher(StreamEnd):
    """Writes down what happens to a stream: as much of its user as the tunnel calls."""

    def __init__(self, stranger: Stranger, stream: int) -> None:
        super().__init__()
        self.stranger = stranger
        self.stream = stream

    def answered(self, status: int, ended: bool) -> None:
        self.stranger.statuses[self.stream] = status

    def deliver(self, view: memoryview) -> None:
        self.stranger.tunnel.mux.consumed(self.stream, len(view))

    def remote_ended(self) -> None:
        self.stranger.ended.add(self.stream)

    def remote_reset(self, code: int) -> None:
        self.stranger.ended.add(self.stream)
        self.stranger.tunnel.relays.pop(self.stream, None)

    def tunnel_lost(self, error: MeshError) -> None: ...


class Gate:
    """A server pod and those who come to it."""

    def __init__(self, settings: dict[str, object]) -> None:
        self.node = LoopbackNode(msgspec.structs.replace(SETTINGS, **settings))
        self.server = self.node.pod("server")
        self.strangers: list[Stranger] = []

    def stranger(
        self, account: str = "stranger", *, pki: FakePki | None = None, source: str = "127.0.0.1", end: timedelta = timedelta(days=1)
    ) -> Stranger:
        authority = pki or self.node.pki
        credentials = authority.credentials(authority.identity(account), roots_pem=self.node.pki.root_pem, valid=(-timedelta(days=1), end))
        self.strangers.append(Stranger(self.node, self.server, credentials, source))
        return self.strangers[-1]

    def target(self, port: int = 8080) -> str:
        return f"{self.server.ip}:{port}"

    @property
    def last(self) -> Told:
        return self.node.ended()[-1]

    @property
    def path(self) -> FlowPath:
        return self.last.path

    def close(self) -> None:
        for stranger in self.strangers:
            stranger.tunnel.relays.clear()
            stranger.tunnel.close()
        self.node.close()
        for stranger in self.strangers:
            stranger.sock.close()


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., Gate]]:
    made: list[Gate] = []

    def make(**settings: object) -> Gate:
        made.append(Gate(settings))
        return made[-1]

    yield make
    for gate in made:
        gate.close()


@pytest.fixture(name="gate")
def fixture_gate(make: Callable[..., Gate]) -> Gate:
    return make()


# What is served


@pytest.mark.slow
def test_a_peer_is_not_served_past_its_certificates_end(gate: Gate) -> None:
    with gate.node.listen(gate.server):
        stranger = gate.stranger(end=timedelta(seconds=2))
        assert stranger.ask(gate.target()) == 200
        (tunnel,) = gate.server.pod.inbound
        gate.node.run_until(lambda: gate.node.loop.now >= tunnel.expires_at)
        gate.node.run_until(lambda: not stranger.tunnel.mux.can_open)
        assert not tunnel.is_dead, "the live stream goes on"


def test_the_answer_comes_after_the_application(gate: Gate) -> None:
    stranger = gate.stranger(source="127.0.0.5")
    stream = stranger.open(gate.target())
    listener = gate.node.listen(gate.server)
    far = gate.node.accepted(listener)
    assert far.getpeername()[0] == "127.0.0.5"
    gate.node.run_until(lambda: stranger.statuses == {stream: 200})
    far.send(b"x")
    far.close()
    gate.node.run_until(lambda: stream in stranger.ended)


def test_an_application_may_be_the_first_to_speak(gate: Gate) -> None:
    """It is connected to before the client's bytes have come. The kernel would tell it so after a while only."""
    stranger = gate.stranger()
    listener = gate.node.listen(gate.server)
    stranger.open(gate.target())
    gate.node.run_until(lambda: [each for each in gate.node.table.live() if each.relay and each.relay.state == "open"])
    far, _ = listener.accept()
    far.close()


def test_a_record_says_where_the_tunnel_came_to_and_what_the_request_named(gate: Gate) -> None:
    # As on the client's side, and as Istio's ztunnel writes it: dst.addr has the tunnel's port, dst.hbone_addr the application's.
    gate.node.listen(gate.server)
    stranger = gate.stranger()
    assert stranger.ask(gate.target()) == 200
    (connection,) = gate.node.table.live()
    row = connection.state(0)
    assert (row.destination, row.target) == (f"{gate.server.ip}:{INBOUND_HBONE}", gate.target())
    stranger.tunnel.close()
    gate.node.run_until(gate.node.ended)
    assert (gate.path.destination, gate.path.target) == ((gate.server.ip, INBOUND_HBONE), gate.target())


def test_a_request_that_ends_at_once_is_an_end_of_file_for_the_application(gate: Gate) -> None:
    stranger = gate.stranger()
    listener = gate.node.listen(gate.server)
    stream = stranger.open(gate.target())
    stranger.tunnel.mux.end_stream(stream)
    far = gate.node.accepted(listener)
    gate.node.run_until(lambda: received(far) == b"")
    far.close()
    gate.node.run_until(gate.node.ended)
    assert gate.last.flag is Flag.NONE


def test_a_peer_with_a_pods_address_and_another_identity_is_not_that_pod(gate: Gate) -> None:
    pod = gate.node.pod("client")
    gate.node.listen(gate.server)
    assert gate.stranger("impostor", source=pod.ip).ask(gate.target()) == 200
    (connection,) = gate.node.table.live()
    assert connection.facts.source_uid == ""
    assert str(connection.facts.source_identity).endswith("sa/impostor")
    assert gate.stranger("client", source=pod.ip).ask(gate.target()) == 200
    assert gate.node.table.live()[1].facts.source_uid == pod.uid


# What is refused


@pytest.mark.parametrize(
    ("authority", "method", "status", "error"),
    [
        ("not an authority", b"CONNECT", 400, "authority without"),
        ("192.0.2.1:80", b"CONNECT", 400, "ip mismatch"),
        ("nobody.example:80", b"CONNECT", 503, "unknown service"),
        ("SERVER:15001", b"CONNECT", 503, "the proxy itself"),
        ("SERVER:80", b"GET", 400, "instead of CONNECT"),
    ],
)
def test_what_cannot_be_served(gate: Gate, authority: str, method: bytes, status: int, error: str) -> None:
    stranger = gate.stranger()
    assert stranger.ask(authority.replace("SERVER", gate.server.ip), method) == status
    assert error in gate.last.error
    assert gate.path.source_identity.endswith("sa/stranger")
    assert len(gate.node.table) == 0
    # The tunnel goes on.
    gate.node.listen(gate.server)
    assert stranger.ask(gate.target()) == 200


def test_a_policy_says_no(gate: Gate) -> None:
    gate.node.apply(deny("no-strangers", principals(gate.node.pki.identity("stranger"))))
    assert gate.stranger().ask(gate.target()) == 401
    assert (gate.last.flag, gate.path.policy) == (Flag.DENY, "AuthorizationPolicy default/no-strangers")
    assert gate.server.asked == [], "nothing was dialled"


def test_a_policy_is_heard_by_tunnels_that_were_served_before(gate: Gate) -> None:
    gate.node.listen(gate.server)
    stranger = gate.stranger()
    assert stranger.ask(gate.target()) == 200
    guard = deny("no-strangers", principals(gate.node.pki.identity("stranger")))
    gate.node.apply(guard)
    assert stranger.ask(gate.target()) == 401
    assert gate.path.policy == "AuthorizationPolicy default/no-strangers"
    gate.node.node.index.apply(Delta(removed_policies=(guard.key,)))
    assert stranger.ask(gate.target()) == 200


def test_an_application_that_does_not_listen_is_a_503(gate: Gate) -> None:
    assert gate.stranger().ask(gate.target()) == 503
    assert gate.last.error == f"connect to {gate.target()}: Connection refused"


def test_a_pod_that_the_mesh_does_not_know_is_a_503(gate: Gate) -> None:
    gate.node.node.index.apply(Delta(removed_workloads=(gate.server.uid,)))
    assert gate.stranger().ask(gate.target()) == 503


def test_a_full_node_is_a_503(make: Callable[..., Gate]) -> None:
    gate = make(max_connections=1)
    gate.node.listen(gate.server)
    stranger = gate.stranger()
    assert stranger.ask(gate.target()) == 200
    assert stranger.ask(gate.target()) == 503
    assert gate.node.node.limits == {"connections": 1}


def test_a_stream_that_is_reset_while_its_application_is_dialled(gate: Gate) -> None:
    stranger = gate.stranger()
    gate.node.run_until(lambda: stranger.tunnel._settled)
    gate.server.pod.ipv4._asked = True  # no socket comes for the moment
    stream = stranger.open(gate.target())
    gate.node.run_until(lambda: len(gate.node.table))
    stranger.tunnel.mux.reset(stream, 8)
    stranger.tunnel.mark_dirty()
    gate.node.run_until(lambda: not len(gate.node.table))
    assert not next(iter(gate.server.pod.inbound)).relays


def test_a_policy_that_comes_while_the_application_is_dialled_is_a_401(gate: Gate) -> None:
    stranger = gate.stranger()
    gate.node.run_until(lambda: stranger.tunnel._settled)
    gate.server.pod.ipv4._asked = True  # no socket comes for the moment
    stream = stranger.open(gate.target())
    gate.node.run_until(lambda: len(gate.node.table))
    gate.node.table.live()[0].abort(PolicyDenied("closed due to policy change"))
    gate.node.run_until(lambda: stream in stranger.statuses)
    assert stranger.statuses[stream] == 401


# Tunnels


def test_a_peer_of_another_root_is_refused_and_written_down(gate: Gate) -> None:
    stranger = gate.stranger(pki=FakePki())
    gate.node.run_until(lambda: stranger.closed)
    gate.node.run_until(gate.node.ended)
    assert gate.last.flag in (Flag.TLS_FAILURE, Flag.IDENTITY_ERROR)
    assert not gate.server.pod.inbound
    assert gate.server.pod.handshaking == 0


def test_handshakes_under_way_are_bounded(make: Callable[..., Gate]) -> None:
    gate = make(max_handshakes_per_pod=1, handshake_seconds=0.2)
    silent = socket.create_connection((gate.server.ip, INBOUND_HBONE))
    gate.node.run_until(lambda: gate.server.pod.handshaking)
    turned_away = gate.stranger()
    gate.node.run_until(lambda: turned_away.closed)
    assert gate.node.node.limits == {"inbound_tunnels": 1}
    gate.node.run_until(lambda: not gate.server.pod.handshaking)
    assert "did not come within 0.2 s" in gate.last.error
    gate.node.listen(gate.server)
    assert gate.stranger().ask(gate.target()) == 200
    silent.close()


def test_one_address_cannot_hold_the_door_shut(make: Callable[..., Gate]) -> None:
    gate = make(max_handshakes_per_pod=6)
    local = gate.server.ip
    silent = [socket.create_connection((local, INBOUND_HBONE), source_address=("127.0.0.99", 0)) for _ in range(6)]
    gate.node.run_until(lambda: gate.node.node.limits["inbound_tunnels"] == 3)
    assert gate.server.pod.handshaking == 3
    gate.node.listen(gate.server)
    assert gate.stranger().ask(gate.target()) == 200, "others still get in"
    for sock in silent:
        sock.close()
    gate.node.run_until(lambda: not gate.server.pod.handshaking)


def test_without_a_certificate_nobody_is_let_in(gate: Gate) -> None:
    gate.node.certify(gate.server.workload.identity, None)
    stranger = gate.stranger()
    gate.node.run_until(lambda: stranger.closed)
    assert gate.last.flag is Flag.IDENTITY_ERROR
    assert gate.last.opened
    assert gate.last.closed


def test_a_tunnel_that_ends_well_leaves_no_record(gate: Gate) -> None:
    stranger = gate.stranger()
    gate.node.run_until(lambda: gate.server.pod.inbound and stranger.tunnel._settled)
    stranger.tunnel.close()
    gate.node.run_until(lambda: not gate.server.pod.inbound)
    assert gate.node.records == []
