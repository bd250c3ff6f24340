"""Tunnels and relays over real sockets: half-closes, resets, back-pressure, deadlines, both record layers."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.kit.wire import TIMES, Wire, received
from ztunnel.dataplane.buffers import CHUNK
from ztunnel.dataplane.endings import TunnelLost, TunnelTimes
from ztunnel.dataplane.loop import READABLE
from ztunnel.dataplane.sockets import reset
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone import frames
from ztunnel.mesh.errors import LocalError, UpstreamRefused

BOTH = list(itertools.product((True, False), repeat=2))


@pytest.fixture(name="make")
def fixture_make() -> Iterator[Callable[..., Wire]]:
    """Makes wires that are closed in the end, and must not have met a bug."""
    made: list[Wire] = []

    def make(*, own: tuple[bool, bool] = (True, True), times: TunnelTimes = TIMES) -> Wire:
        made.append(Wire(own=own, times=times))
        return made[-1]

    yield make
    for wire in made:
        wire.close()
        assert wire.loop.bugs == 0


@pytest.fixture(name="wire")
def fixture_wire(make: Callable[..., Wire]) -> Wire:
    return make()


@pytest.mark.parametrize("own", BOTH, ids=lambda pair: "-".join("own" if each else "openssl" for each in pair))
def test_bytes_both_ways(make: Callable[..., Wire], own: tuple[bool, bool]) -> None:
    wire = make(own=own)
    near, ends = wire.open()
    near.send(b"hello")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"hello")
    data = os.urandom(3_000_000)
    assert hashlib.sha256(wire.exchange(near, far, data)).digest() == hashlib.sha256(data).digest()
    assert hashlib.sha256(wire.exchange(far, near, data)).digest() == hashlib.sha256(data).digest()
    assert ends.answered == 1
    assert wire.client.relays[0].to_stream == 3_000_005
    assert wire.server.relays[0].to_stream == 3_000_000


def test_an_answer_that_nobody_waits_for_travels_with_the_first_bytes(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"settle who takes early data")
    wire.run_until(lambda: ends.answered)
    sent_before = wire.server.tunnel.bytes_sent
    near, ends = wire.open()
    near.send(b"question")
    wire.run_until(lambda: len(wire.server.apps) == 2 and received(wire.server.apps[1]) == b"question")
    assert (ends.answered, wire.server.tunnel.bytes_sent) == (0, sent_before)
    wire.server.apps[1].send(b"answer")
    wire.run_until(lambda: received(near) == b"answer")
    assert ends.answered == 1


def test_an_answer_without_company_is_not_kept_for_long(wire: Wire) -> None:
    for _ in range(2):
        near, ends = wire.open()
        near.send(b"an upload that nobody says anything to")
        wire.run_until(lambda ends=ends: ends.answered)  # type: ignore[misc]  # mypy does not infer a lambda's default
    assert wire.server.tunnel._answer_due is None


def test_an_answer_keeps_nothing_else_waiting(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"first")
    wire.run_until(lambda: ends.answered)
    near, ends = wire.open()
    near.send(b"question")
    wire.client.tunnel.mux.ping(b"presence")
    wire.client.tunnel.mark_dirty()
    wire.run_until(lambda: len(wire.server.apps) == 2)
    assert wire.server.tunnel._answer_due is None, "the answer goes with the PING's"


def test_an_answer_that_is_waited_for_goes_at_once(wire: Wire) -> None:
    _, ends = wire.open(optimistic=False)
    wire.run_until(lambda: ends.answered)
    assert wire.server.tunnel._answer_due is None


def test_half_close_passes_in_each_direction(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"request")
    near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"request")
    wire.run_until(lambda: received(far) == b"")
    far.send(b"answer")
    wire.run_until(lambda: received(near) == b"answer")
    assert not ends.is_over
    far.close()
    wire.run_until(lambda: received(near) == b"")
    wire.run_until(lambda: ends.is_over)
    assert ends.results == [None]
    assert wire.server.ends[0].results == [None]
    assert wire.client.idle == 1


def test_a_reset_is_a_reset_at_the_other_end(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    near.close()
    wire.run_until(lambda: wire.server.ends[0].is_over)
    assert ends.results[0] is not None
    with pytest.raises(ConnectionResetError):
        wire.run_until(lambda: received(far) == b"never")


def test_a_refusal_resets_the_application(wire: Wire) -> None:
    wire.server.status = 503
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: ends.is_over)
    error = ends.results[0]
    assert isinstance(error, UpstreamRefused)
    assert error.status == 503
    with pytest.raises(ConnectionResetError):
        wire.run_until(lambda: received(near) == b"never")


def test_a_slow_reader_stops_its_sender_and_nobody_else(wire: Wire) -> None:
    near, _ = wire.open()
    other, _ = wire.open()
    near.send(b"x")
    other.send(b"y")
    wire.run_until(lambda: len(wire.server.apps) == 2)
    slow, quick = wire.server.apps
    wire.run_until(lambda: received(slow) == b"x")
    wire.run_until(lambda: received(quick) == b"y")
    taken = 0
    blob = bytes(1 << 20)
    for _ in range(64):
        try:
            taken += near.send(blob)
        except BlockingIOError:
            pass
        wire.loop.run_once(0)
    for _ in range(200):
        wire.loop.run_once(0)
    waiting = sum(len(part) for relay in wire.server.relays for part in relay._backlog)
    assert waiting <= 4 << 20
    assert wire.exchange(other, quick, os.urandom(1_000_000))
    got = 0

    def drain() -> bool:
        nonlocal got
        got += len(received(slow) or b"")
        return got == taken

    wire.run_until(drain, 20)


def test_two_hundred_streams(wire: Wire) -> None:
    wire.run_until(lambda: wire.client.tunnel._settled)
    pairs = [wire.open()[0] for _ in range(200)]
    for number, near in enumerate(pairs):
        near.send(b"%d" % number)
    wire.run_until(lambda: len(wire.server.apps) == 200)
    answers: list[bytes] = []

    def all_came() -> bool:
        answers.extend(data for far in wire.server.apps if (data := received(far)))
        return len(answers) == 200

    wire.run_until(all_came)
    assert sorted(answers) == sorted(b"%d" % number for number in range(200))
    assert not wire.client.tunnel.mux.can_open


def test_a_silent_peer_is_given_up(make: Callable[..., Wire]) -> None:
    wire = make(times=TunnelTimes(handshake=0.05, ping=10, ping_timeout=20))
    wire.loop.forget(wire.sockets[1].fileno())
    wire.run_until(lambda: wire.client.closed)
    assert "handshake did not come within 0.05 s" in str(wire.client.closed[0])


def test_a_peer_that_does_not_answer_pings_is_given_up(make: Callable[..., Wire]) -> None:
    wire = make(times=TunnelTimes(handshake=5, ping=0.02, ping_timeout=0.05))
    _near, ends = wire.open()
    wire.run_until(lambda: wire.server.apps and wire.client.tunnel._settled)
    wire.loop.forget(wire.sockets[1].fileno())
    wire.run_until(lambda: wire.client.closed)
    assert "PING" in str(wire.client.closed[0])
    assert ends.is_over


def test_going_away_lets_live_streams_end(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    wire.server.tunnel.go_away()
    wire.run_until(lambda: wire.client.tunnel.is_draining)
    assert not wire.client.tunnel.mux.can_open
    assert wire.exchange(near, far, b"still here") == b"still here"
    near.close()
    far.close()
    wire.run_until(lambda: wire.server.closed and wire.client.closed)
    assert ends.results == [None]
    assert wire.server.closed == [None]
    assert wire.client.closed == [None]


def test_a_stream_that_crosses_a_goaway_is_served(wire: Wire) -> None:
    wire.run_until(lambda: wire.client.tunnel._settled and wire.server.tunnel._settled)
    wire.server.tunnel.go_away()
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: not wire.server.tunnel.is_parting)
    wire.run_until(lambda: received(far) == b"x")
    assert wire.exchange(near, far, b"in time") == b"in time"
    near.close()
    far.close()
    wire.run_until(lambda: wire.server.closed and wire.client.closed)
    assert ends.results == [None]


def test_a_tunnel_that_is_told_to_go_during_the_handshake_serves_its_first_stream(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"x")
    wire.server.tunnel.go_away()
    assert wire.server.tunnel.is_parting
    wire.run_until(lambda: wire.server.apps)
    wire.run_until(lambda: not wire.server.tunnel.is_parting)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    near.close()
    far.close()
    wire.run_until(lambda: wire.server.closed and wire.client.closed)
    assert ends.results == [None]


def test_a_peer_that_never_answers_is_waited_for_a_second_and_no_longer(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ztunnel.dataplane.tunnel._PARTING_SECONDS", 0.05)
    wire.run_until(lambda: wire.client.tunnel._settled and wire.server.tunnel._settled)
    wire.loop.forget(wire.sockets[0].fileno())
    wire.server.tunnel.go_away()
    wire.run_until(lambda: wire.server.closed)
    assert wire.server.closed == [None]


def test_a_peer_that_says_goaway_first_is_refused_streams_all_the_same(wire: Wire) -> None:
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    wire.client.tunnel.mux._exchange.out += frames.goaway(0, 0, b"")
    wire.client.tunnel.mark_dirty()
    wire.run_until(lambda: wire.server.tunnel.is_draining)
    wire.server.tunnel.go_away()
    wire.run_until(lambda: not wire.server.tunnel.is_parting)
    assert not wire.client.tunnel.mux.can_open
    assert wire.server.tunnel.mux._refusing


# Peers that take small frames only


def test_a_peer_of_small_frames(wire: Wire) -> None:
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    wire.client.tunnel.mux.peer_max_frame = 16384
    for size in (1, 16384, 16385, 3_000_000):
        data = os.urandom(size)
        assert wire.exchange(near, far, data) == data
    near.shutdown(socket.SHUT_WR)
    wire.run_until(lambda: received(far) == b"")


def test_a_peer_of_small_frames_and_small_windows(wire: Wire) -> None:
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    tunnel = wire.client.tunnel
    tunnel.mux.peer_max_frame = 16384
    stream = next(iter(tunnel.relays))
    # All but a little of the window is used up: what is left is less than one frame.
    tunnel.mux._streams[stream].send_window = 1000
    sent = os.urandom(1000)
    assert wire.exchange(near, far, sent) == sent
    assert tunnel.mux.sendable(stream) == 0
    near.send(b"waits")
    for _ in range(5):
        wire.loop.run_once(0)
    assert tunnel._parked
    tunnel.mux._streams[stream].send_window = 0
    feed = bytearray(frames.window_update(stream, 100))
    tunnel._dispatch(tunnel.mux.receive(memoryview(feed), 0, len(feed), wire.loop.now))
    wire.run_until(lambda: received(far) == b"waits")


@pytest.mark.parametrize("frame", [CHUNK, 16384])
def test_small_messages_of_others_leave_before_a_bulk_transfers_buffer(wire: Wire, frame: int) -> None:
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    tunnel = wire.client.tunnel
    wire.loop.run_once(0)
    tunnel.mux.peer_max_frame = frame
    before = tunnel.bytes_sent
    sent_by_then: list[int] = []

    class Other:
        def flush(self) -> None:
            sent_by_then.append(tunnel.bytes_sent)

        def on_bug(self) -> None:
            raise AssertionError("no bug here")

    wire.loop.flush_later(Other())
    near.send(bytes(60_000))
    wire.run_until(lambda: tunnel.bytes_sent > before + 60_000)
    assert sent_by_then == [before]


def test_tiny_frames_leave_turns_to_others(make: Callable[..., Wire]) -> None:
    """One buffer of them is taken in parts; nothing of it is lost, nor the end behind it."""
    wire = make()
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    client, server = wire.client.tunnel, wire.server.tunnel
    [stream] = client.relays
    for number in range(5000):
        header = bytearray(frames.HEADER_BYTES)
        client.mux.data_header(header, 0, stream, 1)
        client._plain.append(header + bytes((number & 0xFF,)))
    client.mux.end_stream(stream)
    client.flush()
    wire.run_until(lambda: server._unheard)
    got = bytearray()

    def all_came() -> bool:
        got.extend(received(far) or b"")
        return len(got) == 5000

    wire.run_until(all_came)
    assert got == bytes(number & 0xFF for number in range(5000))
    wire.run_until(lambda: received(far) == b"")


# Life


def test_stages_for_the_listing(wire: Wire) -> None:
    fresh = Tunnel(wire.loop, wire.scratch, wire.client, TIMES, client=True)
    assert fresh.stage == "connecting"
    fresh.close(LocalError("never needed"))
    fresh.close(LocalError("twice"))
    fresh.on_event(READABLE)
    assert fresh.is_dead
    tunnel = wire.client.tunnel
    assert tunnel.stage == "handshake"
    wire.run_until(lambda: tunnel.is_ready)
    assert tunnel.stage == "open"
    wire.open()
    wire.run_until(lambda: wire.server.relays)
    tunnel.go_away()
    tunnel.go_away()
    assert tunnel.stage == "draining"
    assert 0 < tunnel.bytes_sent < 10_000


def test_a_tunnel_that_nobody_needs_any_more_goes_before_it_is_made(wire: Wire) -> None:
    fresh = Tunnel(wire.loop, wire.scratch, wire.client, TIMES, client=True)
    fresh.go_away()
    assert fresh.is_dead
    fresh.go_away()


@pytest.mark.parametrize("end", ["abort", "reset"])
def test_a_tunnel_that_is_reset(wire: Wire, end: str) -> None:
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    if end == "abort":
        wire.server.tunnel.abort(LocalError("the pod is gone"))
        wire.server.tunnel.abort(LocalError("twice"))
    else:
        wire.loop.forget(wire.sockets[1].fileno())
        reset(wire.sockets[1])
    wire.run_until(lambda: wire.client.closed)
    assert isinstance(wire.client.closed[0], TunnelLost)
    assert "Connection reset" in str(wire.client.closed[0])
    assert ends.is_over


def test_a_bug_is_the_end_of_one_tunnel(wire: Wire) -> None:
    wire.run_until(lambda: wire.client.tunnel._settled)
    wire.client.tunnel.on_bug()
    assert str(wire.client.closed[0]) == "internal error"


def test_a_peer_that_ends_with_live_streams(wire: Wire) -> None:
    near, ends = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    (relay,) = wire.server.tunnel.relays.values()
    wire.server.tunnel.relays.clear()
    wire.server.tunnel.close()
    relay.abort(LocalError("nobody told it"))
    wire.run_until(lambda: wire.client.closed)
    assert "closed the tunnel with 1 live streams" in str(wire.client.closed[0])
    assert ends.is_over


def test_a_peer_that_goes_away_with_an_error_is_logged(wire: Wire, caplog: pytest.LogCaptureFixture) -> None:
    wire.run_until(lambda: wire.client.tunnel._settled)
    wire.open()
    wire.run_until(lambda: wire.server.apps)
    with caplog.at_level(logging.INFO):
        wire.server.tunnel.mux.goaway(11)
        wire.server.tunnel.mark_dirty()
        wire.run_until(lambda: wire.client.tunnel.is_draining)
    assert "peer ended its tunnel with an error" in caplog.text


def test_a_quiet_peer_that_answers_pings_is_kept(make: Callable[..., Wire]) -> None:
    # No clock here: on a machine that is busy elsewhere, pings are late, and so are their answers.
    wire = make(times=TunnelTimes(handshake=30, ping=0.02, ping_timeout=30))
    wire.open()
    wire.run_until(lambda: wire.server.apps)
    before = wire.client.tunnel.bytes_sent
    wire.run_until(lambda: wire.client.closed or wire.client.tunnel.bytes_sent > before + 5 * 17, seconds=30)
    assert not wire.client.closed


def test_data_for_a_stream_that_nobody_holds_is_given_back(wire: Wire) -> None:
    near, _ = wire.open()
    near.send(b"x")
    wire.run_until(lambda: wire.server.apps)
    far = wire.server.apps[0]
    wire.run_until(lambda: received(far) == b"x")
    (stream,) = wire.server.tunnel.relays
    relay = wire.server.tunnel.relays.pop(stream)
    before = wire.server.tunnel.bytes_received
    near.send(bytes(100_000))
    wire.run_until(lambda: wire.server.tunnel.bytes_received > before + 100_000)
    assert wire.server.tunnel.mux.export().receiver.credit >= 100_000
    relay.abort(LocalError("nobody holds it"))
