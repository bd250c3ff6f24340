"""Peers that mean no good: nothing that they send or withhold costs anybody else a connection, or the agent its composure.

The whole file runs beside one honest connection that measures the time of each round trip.
"""

from __future__ import annotations

import os
import random
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.kit import apps
from tests.kit.bystander import Bystander
from tests.kit.hbone import HbonePeer, HboneServer
from tests.kit.mesh import DEFAULT_SETTINGS, Mesh
from tests.kit.netns import Pod
from tests.kit.pki import FakePki
from tests.kit.polling import eventually
from tests.kit.traffic import accept
from tests.kit.workers import worker_count
from ztunnel.dataplane.sockets import reset
from ztunnel.hbone import frames
from ztunnel.hbone.frames import Kind
from ztunnel.hbone.handshake import Credentials, Handshake, TlsContexts
from ztunnel.mesh.errors import PeerError
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND

APP, HONEST = 8080, 8088
DEADLINE_SECONDS = 0.6
HANDSHAKES, CONNECTIONS = 8, 64
SETTINGS = (
    f"{DEFAULT_SETTINGS}"
    f"deadlines: {{handshake_seconds: {DEADLINE_SECONDS}, connect_seconds: {DEADLINE_SECONDS},"
    f" connect_response_seconds: {DEADLINE_SECONDS}}}\n"
    f"limits: {{handshakes_per_pod: {HANDSHAKES}, connections: {CONNECTIONS}, tunnels_per_peer: 2}}\n"
    "tunnel: {max_streams: 8}\n"
)
SLOWEST_SECONDS = 1.0
"""An honest round trip takes two milliseconds; a test machine may be busy, a stalled worker would take longer than this."""
TYPICAL_SECONDS = 0.05
ENHANCE_YOUR_CALM = 0xB


@pytest.fixture(scope="module")
def shared() -> Iterator[Mesh]:
    with Mesh(nodes=3, settings=SETTINGS, start=False) as mesh:
        mesh.pod("client", node=0, ambient=True)
        mesh.pod("server", node=1, ambient=True)
        mesh.pod("neighbour", node=1, ambient=True)
        mesh.pod("attacker", node=0)
        # On a node whose agent never runs: the tests themselves are what answers on its 15008.
        mesh.pretend(mesh.pod("trap", node=2, ambient=True))
        mesh.start(0, 1)
        mesh.settle()
        yield mesh


@pytest.fixture(scope="module")
def bystander(shared: Mesh) -> Iterator[Bystander]:
    made = Bystander(shared.pods["client"], shared.pods["server"], HONEST, shared.root / "bystander")
    yield made
    made.close()


@pytest.fixture
def mesh(shared: Mesh, bystander: Bystander) -> Iterator[Mesh]:
    """With an echo server in `server`. Afterwards nothing must be left of what the test did."""
    bystander.news()
    with apps.Echo(shared.pods["server"], APP):
        yield shared
        times = sorted(bystander.news())
        if times:
            assert times[len(times) // 2] < TYPICAL_SECONDS
            assert times[-1] < SLOWEST_SECONDS
        _is_quiet(shared)
        server = shared.pods["server"]
        assert apps.outcome(shared.pods["client"], (server.v4, APP)) == "echoed"
    assert not any(agent.ask("status")["worker_restarts"] for agent in shared.agents[:2])
    shared.check()


def _is_quiet(mesh: Mesh) -> None:
    eventually(
        lambda: [len(agent.rows("connections")) for agent in mesh.agents[:2]] == [1, 1], saying="only the bystander's connection is left"
    )


@pytest.fixture
def attacker(mesh: Mesh) -> Pod:
    return mesh.pods["attacker"]


@pytest.fixture
def server(mesh: Mesh) -> Pod:
    return mesh.pods["server"]


def ends(sock: socket.socket, within: float = 5.0) -> bool:
    """Whether the other side ends the connection, whatever it says before."""
    sock.settimeout(within)
    try:
        while sock.recv(1 << 16):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


def send(sock: socket.socket, data: bytes) -> None:
    """Sends; a peer that has hung up is what most of these tests want."""
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        pass


# Without an identity


@pytest.mark.parametrize("port", [OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_random_bytes_at_each_port(mesh: Mesh, attacker: Pod, server: Pod, port: int, family: int) -> None:
    dice = random.Random(port)
    for size in (1, 5, 6, 64, 4096, 1 << 17):
        for first in (b"", b"\x16\x03\x01", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            with apps.connected(attacker, (server.address(family), port)) as sock:
                send(sock, first + dice.randbytes(size))
                try:
                    sock.shutdown(socket.SHUT_WR)
                except OSError:
                    pass
                assert ends(sock)


def test_a_handshake_whose_bytes_are_damaged(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    """A good first flight with one byte changed, at many places."""
    flight = _hello(mesh)
    for at in range(0, len(flight), 7):
        broken = bytearray(flight)
        broken[at] ^= 0x55
        with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
            send(sock, bytes(broken))
            sock.shutdown(socket.SHUT_WR)
            assert ends(sock)


def _hello(mesh: Mesh) -> bytes:
    contexts = TlsContexts(mesh.credentials("stranger"))
    return Handshake(contexts, server=False, expected=frozenset({mesh.identity("server")}), own_records=True).outgoing()


def tls(place: Pod, to: Pod, context: ssl.SSLContext) -> ssl.SSLSocket:
    """A handshake by the interpreter's own TLS. Raises what that raises."""
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    sock = place.tcp_socket(socket.AF_INET)
    try:
        sock.connect((to.v4, INBOUND_HBONE))
        return context.wrap_socket(sock)
    except OSError:
        sock.close()
        raise


def test_tls_without_a_client_certificate_is_refused(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    # In TLS 1.3 a client has finished before the server has looked at its certificate: the alert comes with the first read.
    with tls(attacker, server, context) as sock, pytest.raises(ssl.SSLError, match=r"(?i)certificate.required"):
        sock.recv(1)
    eventually(lambda: mesh.agents[1].said("connection complete", attacker.v4, "flag=TLS_FAILURE"))


def test_tls_1_2_is_refused(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match=r"(?i)protocol.version"):
        tls(attacker, server, context)


def test_another_application_protocol_is_refused(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    with pytest.raises(ssl.SSLError, match=r"(?i)no.application.protocol"):
        tls(attacker, server, context)


def test_a_certificate_of_a_foreign_root_is_refused(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    foreign = FakePki().credentials(SpiffeId("cluster.local", "default", "client"), roots_pem=mesh.credentials("any").roots_pem)
    assert not _is_let_in(mesh, attacker, server, foreign)
    eventually(lambda: mesh.agents[1].said("connection complete", attacker.v4, "its issuer is not among our roots"))


def _is_let_in(mesh: Mesh, attacker: Pod, server: Pod, credentials: Credentials) -> bool:
    sock = attacker.tcp_socket(socket.AF_INET)
    try:
        sock.connect((server.v4, INBOUND_HBONE))
        peer = HbonePeer(sock, credentials, mesh.identity("server"))
        return peer.request(f"{server.v4}:{APP}") == 200
    except (PeerError, EOFError, OSError):
        return False
    finally:
        sock.close()


# With an identity


@pytest.fixture
def peer(mesh: Mesh, attacker: Pod, server: Pod) -> Iterator[HbonePeer]:
    """Somebody whom the mesh has certified, and who is not a workload of it."""
    with mesh.peer(attacker, server) as made:
        yield made


def test_a_certified_peer_gets_what_anybody_gets(peer: HbonePeer, server: Pod) -> None:
    stream = peer.ask(f"{server.v4}:{APP}")
    assert peer.status(stream) == 200
    peer.send(stream, b"hello")
    assert peer.receive(stream, 5) == b"hello"


def test_a_target_that_is_not_this_pod_is_refused(mesh: Mesh, peer: HbonePeer, server: Pod) -> None:
    neighbour = mesh.pods["neighbour"]
    with apps.Echo(neighbour, APP) as echo:
        assert peer.request(f"{neighbour.v4}:{APP}") == 400
        assert peer.request(f"[{server.v6}]:{APP}") == 400
        assert peer.request("127.0.0.1:15020") == 400
        assert peer.request("[::1]:22") == 400
        assert echo.peers == []
    assert peer.request(f"{server.v4}:{APP}") == 200


@pytest.mark.parametrize("port", [OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE])
def test_the_proxys_own_ports_are_no_targets(peer: HbonePeer, server: Pod, port: int) -> None:
    assert peer.request(f"{server.v4}:{port}") == 503


@pytest.mark.parametrize(
    "authority", ["nonsense", "10.102.0.1", "10.102.0.1:0", "10.102.0.1:99999", "10.102.0.1:-1", "[::", "::1:80", "a b:80"]
)
def test_an_authority_that_is_none_is_refused(peer: HbonePeer, authority: str) -> None:
    assert peer.request(authority) == 400


def test_a_host_that_nobody_knows_is_refused(peer: HbonePeer) -> None:
    assert peer.request("nobody.default.svc.cluster.local:80") == 503


@pytest.mark.parametrize("method", [b"GET", b"POST", b"CONNECT2"])
def test_other_methods_are_refused(peer: HbonePeer, server: Pod, method: bytes) -> None:
    assert peer.request(f"{server.v4}:{APP}", method) == 400


def test_a_port_where_nobody_listens_is_refused_after_the_attempt(peer: HbonePeer, server: Pod) -> None:
    assert peer.request(f"{server.v4}:9999") == 503


def test_an_application_that_never_answers_is_given_up_at_the_deadline(mesh: Mesh, peer: HbonePeer, server: Pod) -> None:
    """A full backlog: the kernel drops further SYNs."""
    with ExitStack() as stack:
        listener = stack.enter_context(server.listener(9090, "0.0.0.0"))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(server.tcp_socket(socket.AF_INET))
            filler.setblocking(False)
            filler.connect_ex((server.v4, 9090))
        began = time.monotonic()
        assert peer.request(f"{server.v4}:9090") == 503
        assert DEADLINE_SECONDS * 0.8 < time.monotonic() - began < DEADLINE_SECONDS * 6


@pytest.mark.parametrize(
    "flood",
    [
        pytest.param(frames.frame(Kind.PING, 0, 0, b"12345678") * 4000, id="ping"),
        pytest.param(frames.settings({}) * 1000, id="settings"),
        pytest.param(frames.frame(Kind.WINDOW_UPDATE, 0, 0, b"\0\0\0\1") * 8000, id="window-update"),
        pytest.param(frames.frame(0x77, 0, 0, b"") * 4000, id="unknown"),
    ],
)
def test_a_flood_of_control_frames_ends_the_tunnel_and_nothing_else(peer: HbonePeer, flood: bytes) -> None:
    try:
        peer.send_raw(flood)
    except OSError:
        return
    gone = peer.gone()
    assert gone is None or gone.code == ENHANCE_YOUR_CALM


def test_rapid_resets_end_the_tunnel(peer: HbonePeer, server: Pod) -> None:
    try:
        for _ in range(3000):
            stream = peer.mux.open_stream(((b":method", b"CONNECT"), (b":authority", f"{server.v4}:{APP}".encode())))
            peer.mux.reset(stream, 8)
        peer.flush()
        gone = peer.gone()
    except OSError:
        return
    assert gone is None or gone.code == ENHANCE_YOUR_CALM


def test_garbage_inside_of_tls_ends_the_tunnel(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    for seed in range(8):
        with mesh.peer(attacker, server) as peer:
            try:
                peer.send_raw(random.Random(seed).randbytes(4096))
            except OSError:
                continue
            peer.gone()


def test_records_that_do_not_decrypt_end_the_tunnel(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    with mesh.peer(attacker, server) as peer:
        peer.sock.sendall(b"\x17\x03\x03\x00\x40" + os.urandom(64))
        assert ends(peer.sock)


# Stalls


def test_nobody_waits_for_a_client_that_says_nothing(attacker: Pod, server: Pod) -> None:
    with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
        _ends_at_the_deadline(sock)


def test_nobody_waits_for_half_a_hello(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
        sock.sendall(_hello(mesh)[:100])
        _ends_at_the_deadline(sock)


def test_a_drip_does_not_stretch_the_deadline(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    hello = _hello(mesh)
    began = time.monotonic()
    with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
        sock.settimeout(DEADLINE_SECONDS / 10)
        for byte in hello:
            send(sock, bytes((byte,)))
            try:
                if not sock.recv(1):
                    break
            except TimeoutError:
                continue
            except ConnectionResetError:
                break
    assert time.monotonic() - began < DEADLINE_SECONDS * 6


def test_nobody_waits_for_a_certificate_that_does_not_come(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
        sock.sendall(_hello(mesh))
        _ends_at_the_deadline(sock)


def test_nobody_waits_for_settings_that_do_not_come(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    with apps.connected(attacker, (server.v4, INBOUND_HBONE)) as sock:
        contexts = TlsContexts(mesh.credentials("stranger"))
        shaking = Handshake(contexts, server=False, expected=frozenset({mesh.identity("server")}), own_records=True)
        while not shaking.done:
            sock.sendall(shaking.outgoing())
            shaking.receive(sock.recv(1 << 16))
        sock.sendall(shaking.outgoing())
        _ends_at_the_deadline(sock)


def _ends_at_the_deadline(sock: socket.socket) -> None:
    began = time.monotonic()
    assert ends(sock)
    assert DEADLINE_SECONDS * 0.5 < time.monotonic() - began < DEADLINE_SECONDS * 6


def test_a_pod_that_cannot_be_reached_on_15008_is_given_up_at_the_deadline(mesh: Mesh) -> None:
    """As behind a NetworkPolicy that does not know of HBONE."""
    silent = mesh.pod("silent", node=1, ambient=True)
    try:
        mesh.settle()
        silent.command("nft", "add table inet wall; add chain inet wall in { type filter hook input priority 0; }")
        silent.command("nft", "add rule inet wall in tcp dport 15008 drop")
        began = time.monotonic()
        assert apps.outcome(mesh.pods["client"], (silent.v4, APP)) == "reset"
        assert DEADLINE_SECONDS * 0.8 < time.monotonic() - began < DEADLINE_SECONDS * 6
        eventually(lambda: mesh.agents[0].said("connection complete", "dst.workload=silent", "maybe a NetworkPolicy"))
    finally:
        mesh.remove_pod("silent")
        mesh.settle()


# A server that is certified, and up to no good


@pytest.fixture
def trap(mesh: Mesh) -> Iterator[socket.socket]:
    """The listener of a pod that is in the mesh as far as everybody else knows."""
    with mesh.pods["trap"].listener(INBOUND_HBONE) as listening:
        yield listening


def caught(mesh: Mesh, trap: socket.socket) -> HboneServer:
    """The tunnel that a client has just been made to open."""
    return HboneServer(accept(trap), mesh.credentials("trap"))


@contextmanager
def calling(mesh: Mesh) -> Iterator[socket.socket]:
    """An application that has connected to the trap. A pod of its own would be cleaner; a tunnel that died is not used again."""
    with mesh.pods["client"].connect((mesh.pods["trap"].v4, APP)) as near:
        yield near


def test_a_server_that_says_nothing_is_given_up(mesh: Mesh, trap: socket.socket) -> None:
    with calling(mesh) as near, accept(trap):
        _is_reset_at_the_deadline(near)


def test_a_server_that_sends_no_settings_is_given_up(mesh: Mesh, trap: socket.socket) -> None:
    with calling(mesh) as near, caught(mesh, trap):
        _is_reset_at_the_deadline(near)


def test_a_server_that_does_not_answer_is_given_up_and_others_on_the_tunnel_are_not(mesh: Mesh, trap: socket.socket) -> None:
    with calling(mesh) as near, caught(mesh, trap) as server:
        server.flush()
        ignored = server.requested()
        with calling(mesh) as other:
            served = server.requested()
            assert served != ignored
            server.respond(served, 200)
            _is_reset_at_the_deadline(near)
            server.send(served, b"still here")
            assert apps.read_exactly(other, 10) == b"still here"
    eventually(lambda: mesh.agents[0].said("dst.workload=trap", "no answer to CONNECT in time"))


def _is_reset_at_the_deadline(near: socket.socket) -> None:
    began = time.monotonic()
    assert apps.ending(near) == "reset"
    assert DEADLINE_SECONDS * 0.5 < time.monotonic() - began < DEADLINE_SECONDS * 6


@pytest.mark.parametrize("status", [301, 400, 401, 404, 503])
def test_a_refusal_is_a_reset_for_the_application(mesh: Mesh, trap: socket.socket, status: int) -> None:
    with calling(mesh) as near, caught(mesh, trap) as server:
        server.flush()
        server.respond(server.requested(), status)
        assert apps.ending(near) == "reset"
    eventually(lambda: mesh.agents[0].said("dst.workload=trap", f"http status {status}"))


@pytest.mark.parametrize("code", [0, 2, 8, 0xA])
def test_a_stream_that_is_reset_before_its_end_is_never_taken_for_an_ended_one(mesh: Mesh, trap: socket.socket, code: int) -> None:
    with calling(mesh) as near, caught(mesh, trap) as server:
        server.flush()
        stream = server.requested()
        server.respond(stream, 200)
        server.send(stream, b"half of it")
        assert apps.read_exactly(near, 10) == b"half of it"
        server.reset(stream, code)
        assert apps.ending(near) == "reset"


@pytest.mark.parametrize("how", ["end", "reset", "garbage"])
def test_a_tunnel_that_breaks_is_never_taken_for_the_end_of_a_stream(mesh: Mesh, trap: socket.socket, how: str) -> None:
    with calling(mesh) as near, caught(mesh, trap) as server:
        server.flush()
        stream = server.requested()
        server.respond(stream, 200)
        server.send(stream, b"half of it")
        assert apps.read_exactly(near, 10) == b"half of it"
        if how == "reset":
            reset(server.sock)
        elif how == "end":
            server.sock.close()
        else:
            # The first three bytes are the length of a frame: with small random ones everything would wait for the rest.
            server.send_raw(b"\xff" + os.urandom(511))
        assert apps.ending(near) == "reset"


def test_a_server_without_the_right_certificate_gets_nothing(mesh: Mesh, trap: socket.socket) -> None:
    with calling(mesh) as near:
        near.sendall(b"a secret")
        with accept(trap) as sock, pytest.raises((PeerError, EOFError, OSError)):
            HboneServer(sock, mesh.credentials("attacker")).requested()
        assert apps.ending(near) == "reset"
    eventually(lambda: mesh.agents[0].said("dst.workload=trap", "flag=IDENTITY_ERROR"))


def test_a_server_that_goes_away_is_called_again_on_a_new_tunnel(mesh: Mesh, trap: socket.socket) -> None:
    with calling(mesh) as near, caught(mesh, trap) as server:
        server.flush()
        stream = server.requested()
        server.respond(stream, 200)
        server.mux.goaway(0)
        server.flush()
        server.send(stream, b"going")
        assert apps.read_exactly(near, 5) == b"going"
        with calling(mesh) as second, caught(mesh, trap) as successor:
            successor.flush()
            answered = successor.requested()
            successor.respond(answered, 200)
            successor.send(answered, b"come")
            assert apps.read_exactly(second, 4) == b"come"
            server.send(stream, b"still")
            assert apps.read_exactly(near, 5) == b"still"


# Too many


def test_more_handshakes_than_allowed_are_reset_and_counted(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    agent = mesh.agents[1]
    before = agent.metric("ztunnel_limit_hits_total", limit="inbound_tunnels")
    with ExitStack() as stack:
        flood = [stack.enter_context(apps.connected(attacker, (server.v4, INBOUND_HBONE))) for _ in range(HANDSHAKES * 4)]
        eventually(lambda: agent.metric("ztunnel_limit_hits_total", limit="inbound_tunnels") >= before + HANDSHAKES * 2)
        assert all(ends(sock) for sock in flood)
    with mesh.peer(attacker, server) as peer:
        assert peer.request(f"{server.v4}:{APP}") == 200


@pytest.mark.parametrize("port", [INBOUND_PLAINTEXT, APP])
def test_a_flood_of_plaintext_connections_is_bounded(mesh: Mesh, attacker: Pod, server: Pod, port: int) -> None:
    agent = mesh.agents[1]
    before = agent.metric("ztunnel_limit_hits_total", limit="connections")
    with ExitStack() as stack:
        flood = [stack.enter_context(attacker.tcp_socket(socket.AF_INET)) for _ in range(CONNECTIONS * 3)]
        for sock in flood:
            sock.setblocking(False)
            sock.connect_ex((server.v4, port))
        if port == APP:
            eventually(lambda: agent.metric("ztunnel_limit_hits_total", limit="connections") > before)
            assert len(agent.rows("connections")) <= CONNECTIONS


def test_more_streams_than_the_node_may_hold_are_refused(mesh: Mesh, attacker: Pod, server: Pod) -> None:
    with mesh.peer(attacker, server) as peer:
        streams = [peer.ask(f"{server.v4}:{APP}") for _ in range(CONNECTIONS + 16)]
        statuses = [peer.status(stream) for stream in streams]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) <= CONNECTIONS


def test_an_application_that_opens_too_many_connections_hurts_only_itself(mesh: Mesh) -> None:
    """Two tunnels of eight streams per peer and worker: of one worker's, the seventeenth connection from one pod to another is refused."""
    greedy = mesh.pod("greedy", node=0, ambient=True)
    try:
        mesh.settle()
        to = (mesh.pods["server"].v4, APP)
        with ExitStack() as stack:
            # More than all workers may have together, however unevenly they take them.
            most = 16 * max(1, worker_count())
            live = [stack.enter_context(greedy.connect(to)) for _ in range(most + 8)]
            answers = [apps.ping(each) for each in live]
            assert 16 <= answers.count(True) <= most
        eventually(lambda: mesh.agents[0].said("connection complete", "src.workload=greedy", "limit reached: tunnels_per_peer"))
        assert mesh.agents[0].metric("ztunnel_limit_hits_total", limit="tunnels_per_peer") >= 1
        eventually(lambda: apps.outcome(greedy, to) == "echoed")
    finally:
        mesh.remove_pod("greedy")
        mesh.settle()


def test_what_was_refused_is_said_in_words(mesh: Mesh) -> None:
    said = mesh.agents[1].log
    for words in ("TLS_FAILURE", "did not come within", "ip mismatch"):
        assert words in said, words
