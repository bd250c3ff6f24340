"""Tunnels and relays over real sockets: half-closes, resets, back-pressure, deadlines, both record layers."""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest

from tests.kit.wire import TIMES, Wire, received
from ztunnel.dataplane.tunnel import TunnelTimes
from ztunnel.mesh.errors import UpstreamRefused

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
