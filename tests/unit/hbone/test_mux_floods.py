"""What a peer may do for nothing, and what ends its connection."""

from __future__ import annotations

import pytest

from tests.kit.h2peer import (
    SETTINGS,
    SETTINGS_ACK,
    client,
    data,
    fails,
    headers,
    server,
)
from ztunnel.hbone import frames
from ztunnel.hbone.frames import Code, Kind
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.receiver import MOST_EVENTS

FLOODS = {
    "PING": (frames.frame(Kind.PING, 0, 0, bytes(8)), 1000),
    "SETTINGS": (SETTINGS, 100),
    "SETTINGS ack": (SETTINGS_ACK, 100),
    "empty DATA": (data(1, b""), 1000),
    "padded empty DATA": (data(1, b"", padding=9), 1000),
    "WINDOW_UPDATE": (frames.window_update(0, 1), 2000),
    "WINDOW_UPDATE of a stream": (frames.window_update(1, 1), 2000),
    "PRIORITY": (frames.frame(Kind.PRIORITY, 0, 9, bytes(5)), 1000),
    "unknown": (frames.frame(77, 0, 9, b"abc"), 1000),
    "GOAWAY": (frames.goaway(0, 0, b""), 1000),
    "late frames": (frames.rst_stream(3, 8), 20_000),
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_end_the_connection(name: str) -> None:
    frame, budget = FLOODS[name]
    script = server(streams=2)
    script.mux.reset(3, Code.CANCEL)
    script.now += 1.0
    wire = bytearray(frame * budget)
    script.mux.receive(memoryview(wire), 0, len(wire), script.now)
    script.now += 1.0
    script.mux.receive(memoryview(wire), 0, len(wire), script.now)
    script.mux.take()
    assert fails(script, frame) is Code.ENHANCE_YOUR_CALM


def test_tiny_frames_are_the_work_of_many_turns() -> None:
    """A buffer that is full of them would keep everybody else waiting for fifty milliseconds."""
    script = server(streams=1)
    wire = bytearray(data(1, b"x") * 3000)
    taken, counts = 0, list[int]()
    while taken < len(wire):
        counts.append(len(script.mux.receive(memoryview(wire), taken, len(wire), script.now)))
        taken = script.mux.taken
    assert (sum(counts), max(counts)) == (3000, MOST_EVENTS)


def test_rapid_reset() -> None:
    script = server()
    wire = b"".join(headers(stream) + frames.rst_stream(stream, 8) for stream in range(1, 2003, 2))
    assert fails(script, wire) is Code.ENHANCE_YOUR_CALM


def test_resets_that_we_are_made_to_send() -> None:
    script = server()
    wire = b"".join(headers(stream) + frames.window_update(stream, 0) for stream in range(1, 2003, 2))
    assert fails(script, wire) is Code.ENHANCE_YOUR_CALM


def test_continuation_flood() -> None:
    script = server()
    empty = frames.frame(Kind.CONTINUATION, 0, 1, b"")
    assert fails(script, frames.frame(Kind.HEADERS, 0, 1, b""), empty * 32) is Code.ENHANCE_YOUR_CALM
    script = server()
    wire = frames.frame(Kind.HEADERS, 0, 1, b"") + frames.frame(Kind.CONTINUATION, 0, 1, bytes(60_000)) * 2
    assert fails(script, wire) is Code.ENHANCE_YOUR_CALM


def test_a_peer_that_never_reads() -> None:
    script = server(MuxLimits(output_bytes=1000))
    assert fails(script, frames.frame(Kind.PING, 0, 0, bytes(8)) * 60) is Code.ENHANCE_YOUR_CALM


def test_a_receiver_of_much_data_may_update_often() -> None:
    script = client(streams=1)
    buffer = bytearray(9)
    update = bytearray(frames.window_update(0, 16_384) + frames.window_update(1, 16_384))
    for _ in range(20_000):
        script.mux.data_header(buffer, 0, 1, 16_384)
        script.mux.receive(memoryview(update), 0, len(update), script.now)


def test_short_streams_that_were_served_are_no_flood() -> None:
    script = server()
    for stream in range(1, 6001, 2):
        script.mux.receive(memoryview(bytearray(headers(stream))), 0, len(headers(stream)), script.now)
        script.mux.respond(stream, 200)
        script.mux.take()
        wire = bytearray(frames.rst_stream(stream, 8))
        script.mux.receive(memoryview(wire), 0, len(wire), script.now)
    assert script.mux.open_count == 0
