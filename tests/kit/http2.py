"""The `h2` library at either end of a waypoint's connections: an independent HTTP/2, and events as plain lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import h2.config
import h2.connection
import h2.events
import h2.settings
from hyperframe.frame import Frame, GoAwayFrame

from tests.kit.waypoint import Bytes

Headers = list[tuple[bytes, bytes]]


class _Connection(h2.connection.H2Connection):
    """The library lets nothing pass behind a GOAWAY, with which streams that are open go on (RFC 9113 §6.8)."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[h2.events.Event]]:
        event = h2.events.ConnectionTerminated()
        event.error_code, event.last_stream_id = frame.error_code, frame.last_stream_id
        return [], [event]


class H2End:
    """One end of an HTTP/2 connection over a `Bytes`. What comes on each stream is collected; windows are given back at once."""

    def __init__(self, end: Bytes, *, client: bool, settings: Mapping[h2.settings.SettingCodes | int, int] | None = None) -> None:
        config = h2.config.H2Configuration(
            client_side=client, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.end = end
        self.connection = _Connection(config)
        if settings:
            self.connection.local_settings.update({int(key): value for key, value in settings.items()})
        self.connection.initiate_connection()
        if settings:
            self.connection.update_settings(dict(settings))
        self.heads: dict[int, Headers] = {}
        """Of requests at a server, of responses at a client."""
        self.interims: list[Headers] = []
        self.data: dict[int, bytearray] = {}
        self.trailers: dict[int, Headers] = {}
        self.ended: set[int] = set()
        self.resets: dict[int, int] = {}
        self.goaway: int | None = None
        self.takes = True
        """Windows are given back."""
        self._owed: list[tuple[int, int]] = []
        end.on_data = self._received
        self.flush()
        if end.data:
            self._received(end)

    def flush(self) -> None:
        if data := self.connection.data_to_send():
            self.end.send(data)

    def _received(self, end: Bytes) -> None:
        for event in self.connection.receive_data(end.take()):
            self._on(event)
        self.flush()

    def _on(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived() | h2.events.ResponseReceived():
                assert event.stream_id is not None
                self.heads[event.stream_id] = [(bytes(name), bytes(value)) for name, value in event.headers or []]
                self.data.setdefault(event.stream_id, bytearray())
            case h2.events.InformationalResponseReceived():
                self.interims.append([(bytes(name), bytes(value)) for name, value in event.headers or []])
            case h2.events.DataReceived():
                assert event.stream_id is not None
                self.data[event.stream_id] += event.data or b""
                self._owed.append((event.flow_controlled_length or 0, event.stream_id))
                if self.takes:
                    self.take()
            case h2.events.TrailersReceived():
                assert event.stream_id is not None
                self.trailers[event.stream_id] = [(bytes(name), bytes(value)) for name, value in event.headers or []]
            case h2.events.StreamEnded():
                assert event.stream_id is not None
                self.ended.add(event.stream_id)
            case h2.events.StreamReset():
                assert event.stream_id is not None
                self.resets[event.stream_id] = int(event.error_code or 0)
            case h2.events.ConnectionTerminated():
                self.goaway = int(event.error_code or 0)

    def take(self) -> None:
        """Gives back the windows of all that has come."""
        self.takes = True
        for size, stream in self._owed:
            if size:
                self.connection.acknowledge_received_data(size, stream)
        self._owed.clear()
        self.flush()

    def request(self, headers: Iterable[tuple[bytes, bytes]], *, end: bool = False) -> int:
        """Opens a stream."""
        stream = self.connection.get_next_available_stream_id()
        self.connection.send_headers(stream, list(headers), end_stream=end)
        self.flush()
        return stream

    def get(self, path: bytes = b"/", *headers: tuple[bytes, bytes], method: bytes = b"GET", end: bool = True) -> int:
        """A request for `app`."""
        pseudo = [(b":method", method), (b":scheme", b"http"), (b":authority", b"app"), (b":path", path)]
        return self.request([*pseudo, *headers], end=end)

    def respond(self, stream: int, *headers: tuple[bytes, bytes], status: bytes = b"200", end: bool = False) -> None:
        self.connection.send_headers(stream, [(b":status", status), *headers], end_stream=end)
        self.flush()

    def send(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """As much as the windows allow, which must be all."""
        for at in range(0, max(len(data), 1), 16384):
            last = at + 16384 >= len(data)
            self.connection.send_data(stream, data[at : at + 16384], end_stream=end and last)
        self.flush()

    def end_with(self, stream: int, *trailers: tuple[bytes, bytes]) -> None:
        self.connection.send_headers(stream, list(trailers), end_stream=True)
        self.flush()

    def reset(self, stream: int, code: int = 8) -> None:
        self.connection.reset_stream(stream, code)
        self.flush()

    def status(self, stream: int) -> bytes | None:
        """Of a response; None until it has come."""
        head = self.heads.get(stream)
        return None if head is None else dict(head)[b":status"]

    def is_over(self, stream: int) -> bool:
        return stream in self.ended or stream in self.resets
