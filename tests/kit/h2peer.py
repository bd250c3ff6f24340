"""HTTP/2 peers for tests: frames as readable text, scripted conversations, and the `h2` library as the other end of a wire in memory.

`Script` plays raw frames at one multiplexer and compares what comes back with a diff; `MuxEnd` and `LibraryEnd` carry whole
transfers and have the same verbs, so any two of them can be joined by `join`. Nothing here knows what a CONNECT means.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Protocol

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest

from ztunnel.hbone import frames
from ztunnel.hbone.events import DataReceived, Event, RequestReceived, ResponseReceived, StreamEnded
from ztunnel.hbone.frames import Code, Kind, MuxError, Setting
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux

CONNECT = ((b":method", b"CONNECT"), (b":authority", b"10.0.0.1:80"))
CONNECT_BLOCK = b"\x02\x07CONNECT\x01\x0b10.0.0.1:80"
OK_BLOCK = b"\x88"
FIRST_WORDS = frames.PREFACE
SETTINGS = frames.settings({})
SETTINGS_ACK = frames.frame(Kind.SETTINGS, frames.ACK, 0)


def data(stream: int, payload: bytes, end: bool = False, padding: int | None = None) -> bytes:
    """One DATA frame; `padding` None means no PADDED flag."""
    flags = (frames.END_STREAM if end else 0) | (0 if padding is None else frames.PADDED)
    body = payload if padding is None else bytes((padding,)) + payload + bytes(padding)
    return frames.frame(Kind.DATA, flags, stream, body)


def headers(stream: int, block: bytes = CONNECT_BLOCK, end: bool = False) -> bytes:
    """One HEADERS frame with all of `block`."""
    return frames.frame(Kind.HEADERS, frames.END_HEADERS | (frames.END_STREAM if end else 0), stream, block)


def literal(fields: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A header block of plain literals, whatever they are. Names and values of less than 127 bytes."""
    return b"".join(b"\x00" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in fields)


def frame_texts(wire: bytes) -> list[str]:
    """One readable line per frame."""
    lines = []
    pos = 0
    if wire.startswith(frames.PREFACE):
        lines.append("PREFACE")
        pos = len(frames.PREFACE)
    while pos < len(wire):
        word, flags, stream = frames.HEADER.unpack_from(wire, pos)
        end = pos + frames.HEADER_BYTES + (word >> 8)
        assert end <= len(wire), "cut frame"
        lines.append(_frame_text(word & 0xFF, flags, stream, wire[pos + frames.HEADER_BYTES : end]))
        pos = end
    return lines


def _frame_text(kind: int, flags: int, stream: int, payload: bytes) -> str:
    number = int.from_bytes(payload[:4], "big")
    match kind:
        case Kind.SETTINGS if flags & frames.ACK:
            return "SETTINGS ack"
        case Kind.SETTINGS:
            pairs = (payload[at : at + 6] for at in range(0, len(payload), 6))
            return "SETTINGS " + " ".join(
                f"{Setting(int.from_bytes(pair[:2], 'big')).name}={int.from_bytes(pair[2:], 'big')}" for pair in pairs
            )
        case Kind.WINDOW_UPDATE:
            return f"WINDOW_UPDATE {stream} +{number}"
        case Kind.RST_STREAM:
            return f"RST_STREAM {stream} {Code(number).name}"
        case Kind.GOAWAY:
            return f"GOAWAY last={number} {Code(int.from_bytes(payload[4:8], 'big')).name}"
        case Kind.PING:
            return f"PING{' ack' if flags & frames.ACK else ''} {payload.hex()}"
        case _:
            end = " end" if flags & frames.END_STREAM and kind != Kind.CONTINUATION else ""
            return f"{frames.kind_name(kind)} {stream} {len(payload)}B{end}"


def event_text(event: Event) -> str:
    """An event as text that does not borrow memory."""
    return f"Data {event.stream} {bytes(event.data)!r}" if isinstance(event, DataReceived) else repr(event)


class Script:
    """One multiplexer and everything said to it and by it; every step is compared, output not asked for is an error at the next step."""

    def __init__(self, *, client: bool, limits: MuxLimits | None = None, now: float = 1000.0) -> None:
        self.mux = Mux(client=client, limits=limits or MuxLimits())
        self.now = now
        self.mux.take()
        self.receives(b"" if client else frames.PREFACE, SETTINGS, SETTINGS_ACK, events=["SettingsReceived()"], sends=["SETTINGS ack"])

    def receives(self, *wire: bytes, events: Sequence[str | Event] = (), sends: Sequence[str] = ()) -> None:
        """Plays frames in one piece; then the events and the frames that wait to be sent must be these."""
        buffer = bytearray(b"".join(wire))
        happened = self.mux.receive(memoryview(buffer), 0, len(buffer), self.now)
        expected = [event if isinstance(event, str) else event_text(event) for event in events]
        self._compare(expected, [event_text(event) for event in happened])
        self.sends(*sends)

    def sends(self, *expected: str) -> None:
        """Exactly these frames wait to be sent."""
        self._compare(list(expected), frame_texts(bytes(self.mux.take())))

    def _compare(self, expected: list[str], actual: list[str]) -> None:
        if expected != actual:
            raise AssertionError("conversation diverged (- expected, + actual)\n" + "\n".join(difflib.ndiff(expected, actual)))


def server(limits: MuxLimits | None = None, streams: int = 0) -> Script:
    """A server with `streams` open and answered streams: 1, 3, 5…"""
    script = Script(client=False, limits=limits)
    for stream in range(1, 2 * streams, 2):
        script.receives(headers(stream), events=[RequestReceived(stream, CONNECT, False)])
        script.mux.respond(stream, 200)
        script.sends(f"HEADERS {stream} {2 if stream == 1 else 1}B")
    return script


def client(limits: MuxLimits | None = None, streams: int = 0) -> Script:
    """A client with `streams` open and answered streams: 1, 3, 5…"""
    script = Script(client=True, limits=limits)
    for stream in range(1, 2 * streams, 2):
        assert script.mux.open_stream(CONNECT) == stream
        script.mux.take()
        script.receives(headers(stream, OK_BLOCK), events=[ResponseReceived(stream, 200, ((b":status", b"200"),), False)])
    return script


def _receive_all(script: Script, buffer: bytearray) -> None:
    at = 0
    while at < len(buffer):
        script.mux.receive(memoryview(buffer), at, len(buffer), script.now)
        at = script.mux.taken


def fails(script: Script, *wire: bytes) -> Code:
    """The code that these frames end the connection with; the GOAWAY says the same, and nothing is taken any more."""
    buffer = bytearray(b"".join(wire))
    with pytest.raises(MuxError) as caught:
        _receive_all(script, buffer)
    goaway = frame_texts(bytes(script.mux.take()))[-1]
    assert goaway.startswith("GOAWAY")
    assert goaway.endswith(Code(caught.value.code).name)
    with pytest.raises(MuxError) as again:
        script.mux.receive(memoryview(bytearray(SETTINGS)), 0, len(SETTINGS), script.now)
    assert again.value.code == caught.value.code
    assert not script.mux.has_output
    assert not script.mux.can_open
    return Code(caught.value.code)


class End(Protocol):
    """One end of a wire that carries transfers."""

    def feed(self, wire: bytes) -> None: ...

    def pump(self) -> bytes: ...


class MuxEnd:
    """A multiplexer that answers every request with 200, consumes what it gets at once and sends what was put into `outbox`."""

    def __init__(self, *, client: bool, limits: MuxLimits | None = None) -> None:
        self.mux = Mux(client=client, limits=limits or MuxLimits())
        self.inbox: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.outbox: dict[int, bytearray] = {}
        self.answers: list[bytes] = []
        """What the next requests are answered with after the 200; nothing once they are used up."""
        self.events: list[Event] = []

    def open(self, payload: bytes) -> int:
        """A stream that sends `payload` and ends."""
        stream = self.mux.open_stream(CONNECT)
        self.outbox[stream] = bytearray(payload)
        return stream

    def feed(self, wire: bytes) -> None:
        buffer = bytearray(wire)
        for event in self.mux.receive(memoryview(buffer), 0, len(buffer), 0.0):
            match event:
                case DataReceived(stream=stream, data=view):
                    self.inbox.setdefault(stream, bytearray()).extend(view)
                    self.mux.consumed(stream, len(view))
                case RequestReceived(stream):
                    self.mux.respond(stream, 200)
                    if self.answers:
                        self.outbox[stream] = bytearray(self.answers.pop(0))
                case StreamEnded(stream):
                    self.ended.add(stream)
            if isinstance(event, RequestReceived | ResponseReceived) and event.ended:
                self.ended.add(event.stream)
            if not isinstance(event, DataReceived):
                self.events.append(event)

    def pump(self) -> bytes:
        mux = self.mux
        wire = mux.take()
        for stream, payload in list(self.outbox.items()):
            while payload and (size := min(mux.sendable(stream), len(payload), mux.peer_max_frame)):
                at = len(wire)
                wire += bytes(frames.HEADER_BYTES)
                mux.data_header(wire, at, stream, size)
                wire += payload[:size]
                del payload[:size]
            if not payload:
                del self.outbox[stream]
                mux.end_stream(stream)
        return bytes(wire + mux.take())


class LibraryEnd:
    """The `h2` library behind the same verbs."""

    def __init__(self, *, client: bool, settings: dict[h2.settings.SettingCodes, int] | None = None) -> None:
        config = h2.config.H2Configuration(client_side=client, header_encoding=None, validate_outbound_headers=False)
        self.connection = h2.connection.H2Connection(config)
        if settings:
            self.connection.local_settings = h2.settings.Settings(client=client, initial_values=settings)
            self.connection.max_inbound_frame_size = self.connection.local_settings.max_frame_size
        self.connection.initiate_connection()
        self.inbox: dict[int, bytearray] = {}
        self.ended: set[int] = set()
        self.outbox: dict[int, bytearray] = {}
        self.answers: list[bytes] = []
        """What the next requests are answered with after the 200; nothing once they are used up."""
        self.events: list[h2.events.Event] = []

    def open(self, payload: bytes) -> int:
        """A stream that sends `payload` and ends."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, list(CONNECT))
        self.outbox[stream] = bytearray(payload)
        return stream

    def feed(self, wire: bytes) -> None:
        for event in self.connection.receive_data(wire):
            match event:
                case h2.events.DataReceived():
                    assert event.stream_id is not None
                    self.inbox.setdefault(event.stream_id, bytearray()).extend(event.data)
                    self.connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id)
                case h2.events.RequestReceived():
                    assert event.stream_id is not None
                    self.connection.send_headers(event.stream_id, [(b":status", b"200")])
                    if self.answers:
                        self.outbox[event.stream_id] = bytearray(self.answers.pop(0))
                case h2.events.StreamEnded():
                    assert event.stream_id is not None
                    self.ended.add(event.stream_id)
            if not isinstance(event, h2.events.DataReceived):
                self.events.append(event)

    def saw(self, kind: type[h2.events.Event]) -> list[h2.events.Event]:
        """The events of one kind so far."""
        return [event for event in self.events if isinstance(event, kind)]

    def pump(self) -> bytes:
        connection = self.connection
        for stream, payload in list(self.outbox.items()):
            while payload:
                size = min(connection.local_flow_control_window(stream), len(payload), connection.max_outbound_frame_size)
                if size <= 0:
                    break
                connection.send_data(stream, bytes(payload[:size]))
                del payload[:size]
            if not payload:
                del self.outbox[stream]
                connection.end_stream(stream)
        return connection.data_to_send()


def join(one: End, other: End, piece: int = 1 << 30, rounds: int = 100_000) -> None:
    """Carries bytes both ways, in pieces of at most `piece`, until neither end has anything to say."""
    for _ in range(rounds):
        there, back = one.pump(), other.pump()
        for at in range(0, len(there), piece):
            other.feed(there[at : at + piece])
        for at in range(0, len(back), piece):
            one.feed(back[at : at + piece])
        if not there and not back:
            return
    raise AssertionError("the conversation does not come to rest")
