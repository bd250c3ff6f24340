"""Flow control, ours and the peer's: nobody sends more than allowed, nothing is lost, nobody waits for ever."""

from __future__ import annotations

import pytest

from tests.kit.h2peer import (
    SETTINGS,
    SETTINGS_ACK,
    Script,
    client,
    data,
    fails,
    frame_texts,
    headers,
    server,
)
from ztunnel.hbone import frames
from ztunnel.hbone.events import (
    StreamEnded,
    StreamReset,
    WindowOpened,
)
from ztunnel.hbone.frames import Code, MuxError
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux

TINY = MuxLimits(stream_window=100, connection_window=65_535)


def small(script: Script, stream: int, length: int) -> None:
    script.mux.data_header(bytearray(9), 0, stream, length)


def test_credit_is_batched_and_nothing_is_lost() -> None:
    script = server(TINY, streams=1)
    sent = 0
    for _ in range(40):
        script.receives(data(1, bytes(10)), events=["Data 1 " + repr(bytes(10))])
        script.mux.consumed(1, 10)
        sent += sum(int(text.partition("+")[2]) for text in frame_texts(bytes(script.mux.take())) if text.startswith("WINDOW_UPDATE 1"))
    assert sent == 390


def test_connection_credit_for_streams_that_are_gone() -> None:
    script = server(MuxLimits(connection_window=65_536), streams=1)
    script.receives(data(1, bytes(16_384)), events=["Data 1 " + repr(bytes(16_384))])
    script.mux.reset(1, Code.CANCEL)
    script.mux.consumed(1, 16_384)
    script.sends("RST_STREAM 1 CANCEL", "WINDOW_UPDATE 0 +16384")


def test_no_credit_for_a_direction_that_ended() -> None:
    script = server(TINY, streams=1)
    script.receives(data(1, bytes(90), end=True), events=["Data 1 " + repr(bytes(90)), StreamEnded(1)])
    script.mux.consumed(1, 90)
    script.sends()


def test_beyond_the_streams_window() -> None:
    script = server(TINY, streams=1)
    script.receives(data(1, bytes(100)), events=["Data 1 " + repr(bytes(100))])
    assert fails(script, data(1, b"x")) is Code.FLOW_CONTROL_ERROR


def test_beyond_the_connections_window() -> None:
    limits = MuxLimits(stream_window=1 << 20, connection_window=65_535)
    assert fails(server(limits, streams=1), data(1, bytes(65_536))) is Code.FLOW_CONTROL_ERROR
    script = server(limits, streams=1)
    script.receives(data(1, bytes(65_535)), events=["Data 1 " + repr(bytes(65_535))])
    assert fails(script, data(1, b"x")) is Code.FLOW_CONTROL_ERROR


def test_the_default_window_counts_until_settings_are_acknowledged() -> None:
    mux = Mux(client=False, limits=TINY)
    wire = bytearray(frames.PREFACE + SETTINGS + headers(1) + data(1, bytes(1000)))
    assert len(mux.receive(memoryview(wire), 0, len(wire), 0.0)) == 3
    wire = bytearray(SETTINGS_ACK)
    mux.receive(memoryview(wire), 0, len(wire), 0.0)
    mux.take()
    mux.consumed(1, 1000)
    assert "WINDOW_UPDATE 1 +1000" in frame_texts(bytes(mux.take()))
    wire = bytearray(data(1, bytes(100)) + data(1, b"x"))
    with pytest.raises(MuxError) as caught:
        mux.receive(memoryview(wire), 0, len(wire), 0.0)
    assert caught.value.code == Code.FLOW_CONTROL_ERROR


@pytest.mark.parametrize("cut", [None, 4])
def test_an_end_without_data_needs_no_window(cut: int | None) -> None:
    """RFC 9113 §6.9.1: not even one that our SETTINGS have made negative."""
    mux = Mux(client=False, limits=TINY)
    wire = bytearray(frames.PREFACE + SETTINGS + headers(1) + data(1, bytes(1000)) + SETTINGS_ACK)
    mux.receive(memoryview(wire), 0, len(wire), 0.0)
    assert mux.export().table.live[0].receive_window < 0
    end = data(1, b"", end=True)
    events = [event for part in (end[:cut], end[cut or len(end) :]) for event in mux.receive(memoryview(part), 0, len(part), 0.0)]
    assert events == [StreamEnded(1)]


def test_our_data_takes_from_both_windows() -> None:
    script = client(streams=2)
    buffer = bytearray(20)
    script.mux.data_header(buffer, 3, 1, 16_384)
    assert buffer[3:12] == b"\x00\x40\x00\x00\x00\x00\x00\x00\x01"
    assert (script.mux.sendable(1), script.mux.sendable(3)) == (65_535 - 16_384, 65_535 - 16_384)


def test_more_than_allowed_is_our_own_error() -> None:
    script = client(streams=1)
    for stream, length in ((1, 16_385), (3, 1)):
        with pytest.raises(ValueError, match="may not be sent"):
            small(script, stream, length)
    script.receives(frames.settings({4: 5}), events=["SettingsReceived()"], sends=["SETTINGS ack"])
    with pytest.raises(ValueError, match="may not be sent"):
        small(script, 1, 6)


def test_window_opened_only_when_something_waits() -> None:
    script = client(streams=2)
    script.receives(frames.settings({4: 10}), events=["SettingsReceived()"], sends=["SETTINGS ack"])
    small(script, 1, 10)
    script.receives(frames.window_update(3, 5))
    assert script.mux.sendable(1) == 0
    script.receives(frames.window_update(1, 5), frames.window_update(1, 5), events=[WindowOpened(1)])
    assert script.mux.sendable(1) == 10


def test_the_connections_window_opens() -> None:
    script = client(streams=2)
    script.receives(frames.window_update(1, 100_000), frames.window_update(0, 1))
    for _ in range(4):
        small(script, 1, 16_384)
    assert (script.mux.sendable(1), script.mux.sendable(3)) == (0, 0)
    script.receives(frames.window_update(0, 7), events=[WindowOpened(0)])
    assert (script.mux.sendable(1), script.mux.sendable(3)) == (7, 7)


def test_settings_rebase_windows_below_zero() -> None:
    script = client(streams=1)
    small(script, 1, 1000)
    script.receives(frames.settings({4: 400}), events=["SettingsReceived()"], sends=["SETTINGS ack"])
    assert script.mux.sendable(1) == 0
    script.receives(frames.window_update(1, 600))
    assert script.mux.sendable(1) == 0
    script.receives(frames.settings({4: 405}), events=["SettingsReceived()", WindowOpened(1)], sends=["SETTINGS ack"])
    assert script.mux.sendable(1) == 5


def test_windows_overflow() -> None:
    assert fails(client(), frames.window_update(0, 2**31 - 65_535)) is Code.FLOW_CONTROL_ERROR
    assert fails(client(), frames.window_update(0, 0)) is Code.PROTOCOL_ERROR
    script = client(streams=2)
    overflow = frames.window_update(1, 2**31 - 65_535)
    script.receives(overflow, events=[StreamReset(1, 3, False)], sends=["RST_STREAM 1 FLOW_CONTROL_ERROR"])
    script.receives(frames.window_update(3, 0), events=[StreamReset(3, 1, False)], sends=["RST_STREAM 3 PROTOCOL_ERROR"])
    script = client(streams=1)
    script.receives(frames.window_update(1, 2**31 - 1 - 65_535))
    assert fails(script, frames.settings({4: 65_536})) is Code.FLOW_CONTROL_ERROR
