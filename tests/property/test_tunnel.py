"""A server's tunnel against peers that send anything: it ends with the right error, and its neighbour in the same loop does not notice.

The hostile peer is on a real socket. Some have no certificate and send bytes; others are authenticated and abuse what they may say:
their frames go through a real record layer, so that they reach the HTTP/2 machine.
"""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kit import h2peer
from tests.kit.tls import End
from tests.kit.wire import Side, Wire, received, tcp_pair
from ztunnel.dataplane.endings import TlsFailed, TunnelLost, TunnelTimes
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import frames
from ztunnel.hbone.frames import Code, Kind, MuxError
from ztunnel.hbone.handshake import Handshake, TlsContexts
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.hbone.records import RecordError
from ztunnel.mesh.errors import Flag, LocalError, MeshError, UpstreamTimeout

QUICK = TunnelTimes(handshake=0.15, ping=10, ping_timeout=20)
LONG = TunnelTimes(handshake=5, ping=10, ping_timeout=20)
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


class Victim(Side):
    """The server side of one more tunnel of a wire's loop."""

    def __init__(self, wire: Wire, times: TunnelTimes) -> None:
        super().__init__(wire, client=False, times=times)


class Hostile:
    """A peer of one victim: its socket, and after `greet` its records."""

    def __init__(self, scene: Scene, times: TunnelTimes) -> None:
        self.scene = scene
        self.sock, theirs = tcp_pair()
        self.victim = Victim(scene.wire, times)
        self.handshake = Handshake(scene.contexts[0], server=False, expected=frozenset({scene.contexts[1].identity}), own_records=True)
        self.victim.tunnel.start(theirs, Handshake(scene.contexts[1], server=True, expected=None, own_records=True), ("127.0.0.1", 1))
        self.end: End | None = None
        self.heard = bytearray()
        """Plaintext that the victim has sent."""

    @property
    def tunnel(self) -> Tunnel:
        return self.victim.tunnel

    def greet(self, *, hello: bool = True) -> None:
        """Completes the handshake, and the HTTP/2 greeting."""
        flight = self.handshake.outgoing()
        while not self.handshake.done:
            self.sock.sendall(flight)
            self.scene.turn(self._answer)
            flight = self.handshake.outgoing()
        self.sock.sendall(flight)
        self.end = End(*self.handshake.finish())
        if hello:
            self.say(frames.PREFACE + h2peer.SETTINGS + h2peer.SETTINGS_ACK)

    def _answer(self) -> bool:
        data = received(self.sock)
        if data:
            self.handshake.receive(data)
        return bool(data)

    def say(self, plain: bytes) -> None:
        """Frames, sealed."""
        assert self.end is not None
        self.push(self.end.seal(plain))

    def push(self, wire: bytes) -> None:
        """Bytes as they are, as far as somebody still takes them."""
        view = memoryview(wire)

        def sent() -> bool:
            nonlocal view
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                pass
            except (BrokenPipeError, ConnectionResetError):
                return True
            return not view or self.is_over

        self.scene.turn(sent)

    @property
    def is_over(self) -> bool:
        return bool(self.victim.closed)

    def fate(self) -> MeshError | None:
        """How the victim's tunnel ended."""
        self.scene.turn(lambda: self.is_over)
        (error,) = self.victim.closed
        return error

    def last_words(self) -> list[str]:
        """The frames that the victim said before it hung up, as far as they came."""
        assert self.end is not None
        try:
            while data := self.sock.recv(1 << 20):
                self.end.receive(data)
        except (BlockingIOError, ConnectionResetError, RecordError):
            pass
        return h2peer.frame_texts(bytes(self.end.plain))

    def close(self) -> None:
        self.tunnel.close(LocalError("the test is over"))
        self.sock.close()
        for app in self.victim.apps:
            app.close()


class Scene:
    """A wire that goes about its business, and hostile peers beside it."""

    def __init__(self) -> None:
        self.wire = Wire()
        pki = self.wire.pki
        self.contexts = [TlsContexts(pki.credentials(pki.identity(name))) for name in ("mallory", "victim")]
        self.peers: list[Hostile] = []
        self.near, self.ends = self.wire.open()
        self.near.send(b"x")
        self.wire.run_until(lambda: self.wire.server.apps)
        self.far = self.wire.server.apps[0]
        self.wire.run_until(lambda: received(self.far) == b"x")

    def peer(self, times: TunnelTimes = LONG) -> Hostile:
        self.peers.append(Hostile(self, times))
        return self.peers[-1]

    def turn(self, condition: Callable[[], object]) -> None:
        self.wire.run_until(condition, 10)

    def neighbour_is_well(self) -> bool:
        """The other tunnel carries bytes both ways."""
        assert self.wire.exchange(self.near, self.far, b"ping") == b"ping"
        assert self.wire.exchange(self.far, self.near, b"pong") == b"pong"
        assert not self.ends.is_over
        assert self.wire.loop.bugs == 0
        return True

    def forget(self) -> None:
        """Ends the peers of one example."""
        for peer in self.peers:
            peer.close()
        self.peers.clear()
        self.wire.loop.run_once(0)

    def close(self) -> None:
        self.forget()
        self.wire.close()


@pytest.fixture(name="scene", scope="module")
def fixture_scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


# Bytes from somebody without a certificate


@SHARED
@given(data=st.binary(min_size=1, max_size=3000))
def test_any_bytes_in_place_of_a_handshake(scene: Scene, data: bytes) -> None:
    peer = scene.peer(QUICK)
    peer.sock.sendall(data)
    peer.sock.shutdown(socket.SHUT_WR)
    assert isinstance(peer.fate(), MeshError)
    assert scene.neighbour_is_well()
    scene.forget()


@SHARED
@given(st.data())
def test_a_handshake_that_is_cut_or_changed(scene: Scene, data: st.DataObject) -> None:
    peer = scene.peer(QUICK)
    flight = bytearray(peer.handshake.outgoing())
    if data.draw(st.booleans(), label="cut"):
        del flight[data.draw(st.integers(0, len(flight) - 1), label="length") :]
    else:
        at = data.draw(st.integers(0, len(flight) - 1), label="at")
        flight[at] ^= data.draw(st.integers(1, 255), label="bits")
    peer.sock.sendall(flight)
    peer.sock.shutdown(socket.SHUT_WR)
    assert isinstance(peer.fate(), MeshError)
    assert scene.neighbour_is_well()
    scene.forget()


# Somebody authenticated


@SHARED
@given(data=st.binary(min_size=1, max_size=2000))
def test_any_bytes_in_place_of_frames(scene: Scene, data: bytes) -> None:
    peer = scene.peer()
    peer.greet()
    peer.say(data)
    peer.sock.shutdown(socket.SHUT_WR)
    error = peer.fate()
    assert error is None or isinstance(error, MuxError | TunnelLost)
    assert scene.neighbour_is_well()
    scene.forget()


FRAME = st.builds(
    frames.frame,
    st.sampled_from([*range(Kind.CONTINUATION + 1), 0x77]),
    st.integers(0, 255),
    st.sampled_from([0, 1, 2, 3, 5, 1 << 30]),
    st.binary(max_size=40) | st.just(h2peer.CONNECT_BLOCK),
)


@SHARED
@given(sent=st.lists(FRAME, min_size=1, max_size=20))
def test_any_frames(scene: Scene, sent: list[bytes]) -> None:
    peer = scene.peer()
    peer.greet()
    for each in sent:
        peer.say(each)
    peer.sock.shutdown(socket.SHUT_WR)
    error = peer.fate()
    assert error is None or isinstance(error, MuxError | TunnelLost)
    assert scene.neighbour_is_well()
    scene.forget()


@SHARED
@given(st.data())
def test_ciphertext_that_is_cut_or_changed(scene: Scene, data: st.DataObject) -> None:
    peer = scene.peer()
    peer.greet()
    assert peer.end is not None
    sealed = bytearray(peer.end.seal(h2peer.headers(1) + h2peer.data(1, os.urandom(200))))
    at = data.draw(st.integers(0, len(sealed) - 1), label="at")
    cut = data.draw(st.booleans(), label="cut")
    if cut:
        del sealed[at:]
    else:
        sealed[at] ^= data.draw(st.integers(1, 255), label="bits")
    peer.push(bytes(sealed))
    peer.sock.shutdown(socket.SHUT_WR)
    error = peer.fate()
    # A length that was made longer is a record that never becomes whole.
    assert error is None or isinstance(error, RecordError | TunnelLost)
    assert not peer.victim.relays, "nothing of it reached anybody"
    assert scene.neighbour_is_well()
    scene.forget()


# Floods

FLOODS: dict[str, tuple[bytes, bytes]] = {
    "PING": (b"", frames.frame(Kind.PING, 0, 0, bytes(8))),
    "SETTINGS": (b"", h2peer.SETTINGS),
    "RST_STREAM": (b"", b""),
    "CONTINUATION": (frames.frame(Kind.HEADERS, 0, 1, h2peer.CONNECT_BLOCK), frames.frame(Kind.CONTINUATION, 0, 1)),
    "empty DATA": (h2peer.headers(1), h2peer.data(1, b"")),
    "WINDOW_UPDATE": (h2peer.headers(1), frames.window_update(0, 1)),
    "PRIORITY": (b"", frames.frame(Kind.PRIORITY, 0, 1, bytes(5))),
    "unknown frames": (b"", frames.frame(0x77, 0, 0, b"x")),
}  # fmt: skip


def rapid_resets(first: int, count: int) -> bytes:
    return b"".join(h2peer.headers(stream) + frames.rst_stream(stream, Code.CANCEL) for stream in range(first, first + 2 * count, 2))


@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_ends_its_own_tunnel(scene: Scene, flood: str) -> None:
    peer = scene.peer()
    peer.victim.hold = True
    peer.greet()
    before, piece = FLOODS[flood]
    peer.say(before)
    rounds = 0
    while not peer.is_over:
        assert rounds < 100, "nobody stops it"
        peer.say(rapid_resets(2 * 100 * rounds + 1, 100) if flood == "RST_STREAM" else piece * 400)
        assert scene.neighbour_is_well()
        rounds += 1
    error = peer.fate()
    assert isinstance(error, MuxError)
    assert error.code == Code.ENHANCE_YOUR_CALM
    scene.forget()


@pytest.mark.slow
def test_the_neighbour_of_a_flood_keeps_its_speed(scene: Scene) -> None:
    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(20):
            assert scene.neighbour_is_well()
        return time.perf_counter() - began

    alone = min(seconds() for _ in range(3))
    together = []
    for _ in range(3):
        peers = [scene.peer() for _ in range(4)]
        for peer in peers:
            peer.greet()
            assert peer.end is not None
            # All that they can put on the wire before anybody reads.
            flood = peer.end.seal(FLOODS["PING"][1] * 20_000)
            try:
                peer.sock.send(flood)
            except BlockingIOError:
                pass
        together.append(seconds())
        assert all(peer.is_over for peer in peers)
        scene.forget()
    # What is read of a flood before its budget is spent takes milliseconds, once.
    assert min(together) < 3 * alone + 0.2


def test_the_last_word_to_a_flooder_says_why(scene: Scene) -> None:
    peer = scene.peer()
    peer.greet()
    peer.say(h2peer.SETTINGS * (MuxLimits().settings + 10))
    assert isinstance(peer.fate(), MuxError)
    assert peer.last_words()[-1].endswith("ENHANCE_YOUR_CALM")
    scene.forget()


def test_more_streams_than_allowed_are_refused_and_the_rest_goes_on(scene: Scene) -> None:
    peer = scene.peer()
    peer.victim.hold = True
    peer.greet()
    peer.say(b"".join(h2peer.headers(stream) for stream in range(1, 2 * 210, 2)))
    scene.turn(lambda: len(peer.victim.relays) == MuxLimits().streams)
    assert len(peer.tunnel.relays) == MuxLimits().streams
    assert not peer.is_over
    assert scene.neighbour_is_well()
    scene.forget()


# Stalls


def in_handshake(peer: Hostile) -> None:
    peer.sock.sendall(peer.handshake.outgoing()[:50])


def before_finished(peer: Hostile) -> None:
    peer.sock.sendall(peer.handshake.outgoing())


def before_settings(peer: Hostile) -> None:
    peer.greet(hello=False)


def inside_the_preface(peer: Hostile) -> None:
    peer.greet(hello=False)
    peer.say(frames.PREFACE[:10])


@pytest.mark.parametrize(
    ("stall", "missing", "flag"),
    [
        (lambda peer: None, "the end of the TLS handshake", Flag.TLS_FAILURE),
        (in_handshake, "the end of the TLS handshake", Flag.TLS_FAILURE),
        (before_finished, "the end of the TLS handshake", Flag.TLS_FAILURE),
        (before_settings, "HTTP/2 SETTINGS", Flag.H2_HANDSHAKE_FAILURE),
        (inside_the_preface, "HTTP/2 SETTINGS", Flag.H2_HANDSHAKE_FAILURE),
    ],
    ids=["nothing", "half a ClientHello", "no Finished", "no SETTINGS", "half a preface"],
)
def test_a_peer_that_stalls_is_given_up(scene: Scene, stall: Callable[[Hostile], None], missing: str, flag: Flag) -> None:
    peer = scene.peer(QUICK)
    stall(peer)
    error = peer.fate()
    assert isinstance(error, UpstreamTimeout)
    assert f"{missing} did not come within 0.15 s" in str(error)
    assert error.flag is flag
    assert scene.neighbour_is_well()
    scene.forget()


@pytest.mark.parametrize("frame", [h2peer.headers(1)[:12], h2peer.data(1, bytes(100))[:50], b"\x00"], ids=["HEADERS", "DATA", "a byte"])
def test_a_peer_that_stalls_inside_a_frame_is_asked_and_given_up(scene: Scene, frame: bytes) -> None:
    peer = scene.peer(TunnelTimes(handshake=5, ping=0.05, ping_timeout=0.1))
    peer.greet()
    peer.say((h2peer.headers(1) if frame.startswith(b"\x00\x00\x64") else b"") + frame)
    error = peer.fate()
    assert isinstance(error, TunnelLost)
    assert "PING" in str(error)
    assert scene.neighbour_is_well()
    scene.forget()


def test_a_peer_that_hangs_up_in_each_phase(scene: Scene) -> None:
    for stall in (in_handshake, before_finished):
        peer = scene.peer()
        stall(peer)
        peer.sock.close()
        assert isinstance(peer.fate(), TlsFailed | TunnelLost)
    peer = scene.peer()
    peer.greet()
    peer.sock.close()
    peer.fate()
    assert scene.neighbour_is_well()
    scene.forget()


# Memory


def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
def test_a_peer_that_never_reads_is_cut_off_or_costs_little(scene: Scene) -> None:
    """Each PING asks for an answer that nobody takes; within the budget per second, for ever."""
    peer = scene.peer()
    peer.tunnel.mux = Mux(client=False, limits=MuxLimits(pings=1 << 30))
    peer.greet()
    scene.turn(lambda: peer.tunnel._settled)
    before = resident()
    pushed = 0
    while not peer.is_over and pushed < 64 << 20:
        peer.say(FLOODS["PING"][1] * 50_000)
        pushed += 17 * 50_000
    error = peer.fate()
    assert isinstance(error, MuxError)
    assert resident() - before < 32 << 20
    assert scene.neighbour_is_well()
    scene.forget()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 100, 16_000])
def test_what_a_slow_application_does_not_take_is_bounded(scene: Scene, size: int) -> None:
    """A fast peer fills its windows, in frames of any size; what is held is about what the windows allow."""
    peer = scene.peer()
    peer.victim.hold = True
    peer.greet()
    peer.say(h2peer.headers(1))
    before = resident()
    # Ten bytes on the wire for each are enough of the smallest.
    budget = 400_000 if size == 1 else MuxLimits().stream_window
    sent = 0
    while sent + size <= budget:
        count = min(2000, (budget - sent) // size)
        peer.say(h2peer.data(1, b"z" * size) * count)
        sent += count * size
    scene.turn(lambda: peer.victim.relays and peer.victim.relays[0].from_stream == sent)
    assert not peer.is_over
    assert resident() - before < 3 * sent + (8 << 20)
    assert scene.neighbour_is_well()
    # One byte more than the window is the end.
    if size > 1:
        peer.say(h2peer.data(1, bytes(16_000)) * 300)
        error = peer.fate()
        assert isinstance(error, MuxError)
        assert error.code == Code.FLOW_CONTROL_ERROR
    scene.forget()
