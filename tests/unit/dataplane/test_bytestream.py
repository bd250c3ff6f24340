"""A tunnel's stream as bytes with back-pressure: order, credit, half-closes and resets, over two real tunnels."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.kit.wire import Wire
from ztunnel.dataplane.bytestream import FULL, TunnelStream
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.events import RequestReceived
from ztunnel.mesh.errors import MeshError, UpstreamError, UpstreamRefused


class Notes:
    """A receiver that writes everything down. Implements `Receiver`."""

    def __init__(self) -> None:
        self.stream: TunnelStream | None = None
        self.data = bytearray()
        self.said: list[str] = []
        self.error: MeshError | None = None
        self.pause_after = 1 << 60

    def opened(self) -> None:
        self.said.append("opened")

    def received(self, data: memoryview) -> None:
        self.data += data
        if len(self.data) >= self.pause_after and self.stream is not None:
            self.stream.pause()

    def peer_ended(self) -> None:
        self.said.append("ended")

    def writable(self) -> None:
        self.said.append("writable")

    def closed(self) -> None:
        self.said.append("closed")

    def lost(self, error: MeshError) -> None:
        self.said.append("lost")
        self.error = error


class Joined:
    """A stream between two `TunnelStream`s."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.near, self.far = Notes(), Notes()
        self.status = 200
        wire.server.tunnel_request = self.request  # type: ignore[method-assign]  # the other half of the pair
        tunnel = wire.client.tunnel
        stream = tunnel.mux.open_stream(((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80")))
        self.near.stream = TunnelStream(tunnel, stream, self.near, answered=False, early=True)
        tunnel.adopt(stream, self.near.stream)
        tunnel.mark_dirty()

    def request(self, tunnel: Tunnel, request: RequestReceived) -> None:
        if self.status != 200:
            tunnel.mux.respond(request.stream, self.status, end=True)
            tunnel.mark_dirty()
            return
        self.far.stream = TunnelStream(tunnel, request.stream, self.far, answered=True)
        tunnel.adopt(request.stream, self.far.stream)
        tunnel.answer(request.stream)

    @property
    def ends(self) -> tuple[TunnelStream, TunnelStream]:
        self.wire.run_until(lambda: self.far.stream is not None and "opened" in self.near.said)
        assert self.near.stream is not None
        assert self.far.stream is not None
        return self.near.stream, self.far.stream


@pytest.fixture(name="joined")
def fixture_joined() -> Iterator[Joined]:
    wire = Wire()
    yield Joined(wire)
    wire.close()
    assert wire.loop.bugs == 0
    assert wire.scratch.waiting.bytes == 0


def test_bytes_arrive_in_order_whatever_their_pieces(joined: Joined) -> None:
    near, far = joined.ends
    pieces = [os.urandom(size) for size in (1, 3, 70_000, 5, 300_000, 1)]
    for piece in pieces:
        near.write(piece)
    far.write(b"back")
    joined.wire.run_until(lambda: len(joined.far.data) == sum(map(len, pieces)) and joined.near.data == b"back")
    assert joined.far.data == b"".join(pieces)
    assert (near.to_stream, far.from_stream) == (370_010, 370_010)


def test_what_leaves_meanwhile_does_not_get_between_a_large_message_and_its_stream(joined: Joined) -> None:
    """A waypoint's connections write to their own streams when they are flushed, and all streams share one buffer for frames."""
    near, _ = joined.ends
    other = Joined(joined.wire)
    neighbour, _ = other.ends

    class Neighbour:
        def flush(self) -> None:
            neighbour.write(b"of the neighbour")

        def on_bug(self) -> None:
            raise AssertionError("no bug here")

    for size in (5_000, 50_000):
        message = os.urandom(size)
        joined.far.data.clear()
        other.far.data.clear()
        joined.wire.loop.flush_later(Neighbour())
        near.write(message)
        joined.wire.run_until(lambda: other.far.data and len(joined.far.data) >= size)  # noqa: B023 - called at once
        assert joined.far.data == message
        assert other.far.data == b"of the neighbour"


def test_a_receiver_that_pauses_stops_the_sender_and_loses_nothing(joined: Joined) -> None:
    near, far = joined.ends
    joined.far.pause_after = 1
    sent = bytearray()
    while not near.is_full:
        piece = os.urandom(1 << 19)
        sent += piece
        near.write(piece)
        for _ in range(20):
            joined.wire.loop.run_once(0)
    assert len(sent) < (4 << 20) + FULL + (2 << 20), "no more than a window waits at the far side, and a little here"
    assert "writable" not in joined.near.said
    joined.far.pause_after = 1 << 60
    far.resume()
    joined.wire.run_until(lambda: len(joined.far.data) == len(sent) and "writable" in joined.near.said)
    assert joined.far.data == sent
    assert not near.is_full


def test_each_direction_ends_by_itself(joined: Joined) -> None:
    near, far = joined.ends
    near.write(b"question")
    near.end()
    joined.wire.run_until(lambda: "ended" in joined.far.said)
    assert joined.far.data == b"question"
    far.write(b"answer")
    far.end()
    joined.wire.run_until(lambda: joined.near.said[-2:] == ["ended", "closed"] and joined.far.said[-1] == "closed")
    assert joined.near.data == b"answer"
    assert not joined.wire.client.tunnel.relays
    assert not joined.wire.server.tunnel.relays


def test_the_end_waits_for_a_receiver_that_has_paused(joined: Joined) -> None:
    near, far = joined.ends
    joined.far.pause_after = 1
    near.write(b"one")
    joined.wire.run_until(lambda: joined.far.data)
    near.write(b"two")
    near.end()
    joined.wire.run_until(lambda: far._waiting and far._remote_ended)
    assert joined.far.said == []
    joined.far.pause_after = 1 << 60
    far.resume()
    joined.wire.run_until(lambda: joined.far.said == ["ended"])
    assert joined.far.data == b"onetwo"


@pytest.mark.parametrize("how", ["close", "tunnel"])
def test_a_cut_is_told_as_one(joined: Joined, how: str) -> None:
    near, _ = joined.ends
    if how == "close":
        near.close()
    else:
        joined.wire.client.tunnel.close(UpstreamError("gone"))
    joined.wire.run_until(lambda: joined.far.said == ["lost"])
    assert isinstance(joined.far.error, UpstreamError)
    near.write(b"into the void")


def test_a_refused_connect_is_a_loss_with_its_status() -> None:
    wire = Wire()
    joined = Joined(wire)
    joined.status = 503
    wire.run_until(lambda: joined.near.said == ["lost"])
    assert isinstance(joined.near.error, UpstreamRefused)
    assert "503" in str(joined.near.error)
    wire.close()
    assert wire.loop.bugs == 0
