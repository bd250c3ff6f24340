"""One HTTP/2 connection, whichever end of it we are: bytes in and out, streams with bodies of their own pace.

The protocol's machine is `ztunnel.hbone.mux`, the one that carries tunnels: floods have budgets there and windows are credited for what was
taken. What it does not know is told here: a body's length must be what the head said, or whoever stands behind us and reads HTTP/1.1 would
take the rest for another request.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from waypoint.http.messages import Headers
from ztunnel.dataplane.bytestream import Transport
from ztunnel.dataplane.loop import READABLE, Loop
from ztunnel.hbone.events import DataReceived, Event, SettingsReceived, StreamEnded, StreamReset, TrailersReceived, WindowOpened
from ztunnel.hbone.frames import Code, MuxError
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.mesh.errors import MeshError

FULL: Final = 64 << 10
"""Bytes of a body that wait for the peer's window before whoever sends them has to."""
_RESUME: Final = FULL // 4
_FLUSH_BYTES: Final = 128 << 10
LINGER_SECONDS: Final = 2.0
STREAMS: Final = 1024
"""Requests of one client at once. As Envoy's default."""


def limits(header_bytes: int = 60 << 10) -> MuxLimits:
    """What a peer may do."""
    return MuxLimits(
        stream_window=512 << 10,
        connection_window=4 << 20,
        max_frame=64 << 10,
        client_header_bytes=header_bytes,
        server_header_bytes=header_bytes,
        streams=STREAMS,
        output_bytes=4 << 20,  # heads of answers to so many requests are among it
        messages=True,
    )


class Http2Stream:
    """What both ends of a request share: a body out, within the peer's windows, and a body in, credited as it is taken."""

    __slots__ = (
        "_connection",
        "_ending",
        "_full",
        "_owed",
        "_paused",
        "_queue",
        "_queued",
        "_trailers",
        "is_over",
        "left",
        "number",
        "trailers",
    )

    def __init__(self, connection: Http2Connection, number: int) -> None:
        self._connection = connection
        self.number = number
        self.is_over = False
        self.left = -1
        """Bytes of the body in that are still to come, where the head said so."""
        self.trailers: Headers = []
        """That have come."""
        self._queue: deque[bytes] = deque()
        self._queued = 0
        self._full = False
        self._ending = False
        self._trailers: Headers = []
        self._paused = False
        self._owed = 0

    # Out

    def put(self, data: bytes) -> None:
        """A piece of the body out."""
        if self.is_over or not data:
            return
        self._queue.append(data)
        self._queued += len(data)
        if len(self._queue) == 1:
            self.push()
        if self._queued > FULL:
            self._full = True

    def put_end(self, trailers: Headers) -> None:
        """The body out is complete."""
        if not self.is_over and not self._ending:
            self._ending = True
            self._trailers = trailers
            self.push()

    def push(self) -> None:
        """Sends what the windows and the transport take."""
        connection, queue = self._connection, self._queue
        mux = connection.mux
        while queue:
            if connection.is_blocked:
                return
            room = mux.sendable(self.number)
            if room <= 0:
                return
            piece = queue[0]
            size = min(len(piece), room, mux.peer_max_frame)
            connection.write_data(self.number, piece if size == len(piece) else piece[:size])
            self._queued -= size
            if size == len(piece):
                queue.popleft()
            else:
                queue[0] = piece[size:]
        if self._ending and not self.is_over:
            self._ending = False
            if self._trailers:
                mux.end_with(self.number, self._trailers)
            else:
                mux.end_stream(self.number)
            connection.schedule()
            self.sent_all()

    def pushed(self) -> bool:
        """Goes on after a pause of the peer. True: whoever sends may, too."""
        self.push()
        if self._full and self._queued <= _RESUME:
            self._full = False
            return True
        return False

    def sent_all(self) -> None:
        """Our direction has ended."""

    # In

    def hold(self) -> None:
        """No more credit for the body in."""
        self._paused = True

    def go_on(self) -> None:
        """Credit again, for what was taken meanwhile too."""
        self._paused = False
        if self._owed:
            owed, self._owed = self._owed, 0
            self._connection.credit(self.number, owed)

    def counts(self, size: int) -> bool:
        """A piece of the body in. False: it is more than the head said."""
        if self.left >= 0:
            self.left -= size
            return self.left >= 0
        return True

    def taken(self, size: int) -> None:
        """A piece of the body in was given on."""
        if self._paused and not self.is_over:
            self._owed += size
        else:
            self._connection.credit(self.number, size)

    def forget(self) -> None:
        """It is over: what it holds goes."""
        self.is_over = True
        self._queue.clear()
        if self._owed:
            owed, self._owed = self._owed, 0
            self._connection.credit(self.number, owed)


class Http2Connection:
    """Implements `Receiver`."""

    __slots__ = ("_dirty", "_loop", "_out", "_out_bytes", "_transport", "_unheard", "is_dead", "is_ending", "mux")

    def __init__(self, loop: Loop, *, client: bool, bounds: MuxLimits) -> None:
        """Give it its transport with `join`."""
        self._loop = loop
        self._transport: Transport | None = None
        self.mux = Mux(client=client, limits=bounds)
        self._out: list[bytes | bytearray] = []
        self._out_bytes = 0
        self._dirty = False
        self._unheard = b""
        self.is_dead = False
        self.is_ending = False
        """Its last words have been said."""

    def join(self, transport: Transport) -> None:
        """Its transport, which may still be on its way. The greeting leaves with this round."""
        self._transport = transport
        self.schedule()

    # Out

    @property
    def is_blocked(self) -> bool:
        """Whether the transport takes nothing now."""
        return self._transport is None or self._transport.is_full

    def write_data(self, number: int, data: bytes) -> None:
        """A DATA frame; control frames that wait go in front of it."""
        mux = self.mux
        if mux.has_output:
            self._out.append(mux.take())
        header = bytearray(9)
        mux.data_header(header, 0, number, len(data))
        self._out.append(header)
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes >= _FLUSH_BYTES:
            self._write()
        else:
            self.schedule()

    def credit(self, number: int, size: int) -> None:
        """Bytes of a body in need no room any more."""
        self.mux.consumed(number, size)
        if self.mux.has_output:
            self.schedule()

    def schedule(self) -> None:
        """Something is to be sent with this round."""
        if not self._dirty:
            self._dirty = True
            self._loop.flush_later(self)

    def _write(self, *, last: bool = False) -> None:
        """Control frames stay in the multiplexer while the transport takes nothing: its bound ends a peer that asks and never reads."""
        if self.mux.has_output and (last or not self.is_blocked):
            self._out.append(self.mux.take())
        if self._out and self._transport is not None:
            out, self._out = self._out, []
            self._out_bytes = 0
            self._transport.write(b"".join(out))

    def flush(self) -> None:
        """Sends what was written in this round."""
        self._dirty = False
        if self.is_dead:
            return
        self._write(last=self.is_ending)
        if self.is_ending and self._transport is not None:
            self._transport.end()
            self._loop.call_later(LINGER_SECONDS, self._finish)

    # In

    def opened(self) -> None:
        if self.mux.has_output:
            self.schedule()

    def received(self, data: memoryview) -> None:
        if self.is_dead or self.is_ending:
            return
        if self._unheard:
            self._unheard += bytes(data)
            return
        self._hear(bytearray(data))

    def _hear(self, buffer: bytearray) -> None:
        try:
            events = self.mux.receive(memoryview(buffer), 0, len(buffer), self._loop.now)
        except MuxError as error:
            self._write(last=True)
            self._die(str(error), broken=True)
            return
        for event in events:
            if self.is_dead:
                return
            self._on_event(event)
        if self.is_dead:
            return
        if self.mux.taken < len(buffer):
            # Of very small frames, one buffer is the work of many turns.
            self._unheard = bytes(buffer[self.mux.taken :])
            if self._transport is not None:
                self._transport.pause()
            self._loop.again(self, READABLE)
        if self.mux.has_output:
            self.schedule()

    def on_event(self, events: int) -> None:
        """Goes on with what was left."""
        if self.is_dead or not self._unheard:
            return
        unheard, self._unheard = self._unheard, b""
        self._hear(bytearray(unheard))
        if not self._unheard and not self.is_dead and self._transport is not None:
            self._transport.resume()

    def on_bug(self) -> None:
        self._die("internal error", broken=True)

    def _on_event(self, event: Event) -> None:
        if type(event) is DataReceived:
            self._data(event.stream, event.data)
        elif type(event) is WindowOpened:
            stream = self.stream(event.stream)
            if stream is not None:
                self.can_send(stream)
            elif event.stream == 0:
                self._push_all()
        elif type(event) is StreamEnded:
            stream = self.stream(event.stream)
            if stream is not None:
                self._ended(stream)
        elif type(event) is TrailersReceived:
            stream = self.stream(event.stream)
            if stream is not None:
                stream.trailers = list(event.headers)
        elif type(event) is StreamReset:
            stream = self.stream(event.stream)
            if stream is not None:
                self.was_reset(stream, event.code)
        elif type(event) is SettingsReceived:
            self._push_all()
        else:
            self.heard(event)

    def _data(self, number: int, data: memoryview) -> None:
        stream = self.stream(number)
        size = len(data)
        if stream is None:
            self.credit(number, size)
        elif not stream.counts(size):
            self.credit(number, size)
            self.broke(stream)
        else:
            self.got(stream, bytes(data))
            stream.taken(size)

    def _ended(self, stream: Http2Stream) -> None:
        if stream.left > 0:
            self.broke(stream)
        else:
            self.got_all(stream)

    def _push_all(self) -> None:
        for stream in self.streams():
            if self.is_dead or self.is_blocked:
                return
            self.can_send(stream)

    def writable(self) -> None:
        if self.mux.has_output:
            self.schedule()
        self._push_all()

    def peer_ended(self) -> None:
        self._die("the connection was closed")

    def lost(self, error: MeshError) -> None:
        self._die(str(error))

    def closed(self) -> None:
        self._die("the connection was closed")

    def reset(self, stream: Http2Stream, code: int) -> None:
        """Ends a stream in both directions."""
        stream.forget()
        self.mux.reset(stream.number, code)
        self.schedule()

    def broke(self, stream: Http2Stream) -> None:
        """A body that is not what its head said."""
        self.mux.reset(stream.number, Code.PROTOCOL_ERROR)
        self.schedule()
        self.was_reset(stream, Code.PROTOCOL_ERROR)

    def _die(self, why: str, *, broken: bool = False) -> None:
        if self.is_dead:
            return
        self.is_dead = True
        self._out.clear()
        if self._transport is not None:
            if broken:
                self._transport.end()
            self._transport.close()
        self.died(why, broken)

    def _finish(self) -> None:
        self._die("")

    # What the two ends do

    def stream(self, number: int) -> Http2Stream | None:
        """A live stream."""
        raise NotImplementedError

    def streams(self) -> list[Http2Stream]:
        """All of them."""
        raise NotImplementedError

    def heard(self, event: Event) -> None:
        """A request, a response, somebody going away."""
        raise NotImplementedError

    def got(self, stream: Http2Stream, data: bytes) -> None:
        """A piece of a body."""
        raise NotImplementedError

    def got_all(self, stream: Http2Stream) -> None:
        """The body in is complete."""
        raise NotImplementedError

    def can_send(self, stream: Http2Stream) -> None:
        """The peer takes more."""
        raise NotImplementedError

    def was_reset(self, stream: Http2Stream, code: int) -> None:
        """The stream is gone."""
        raise NotImplementedError

    def died(self, why: str, broken: bool) -> None:
        """The connection is gone, and all streams with it. `broken`: the peer broke the protocol."""
        raise NotImplementedError


def joined_cookies(headers: Headers) -> Headers:
    """Cookies that HTTP/2 has cut into crumbs, in one line again (RFC 9113 §8.2.3)."""
    crumbs = [value for name, value in headers if name == b"cookie"]
    if len(crumbs) < 2:
        return headers
    joined = [line for line in headers if line[0] != b"cookie"]
    joined.append((b"cookie", b"; ".join(crumbs)))
    return joined


def content_length(headers: Headers) -> int:
    """What a head says of its body's length: -1 nothing, -2 nonsense."""
    said = {value for name, value in headers if name == b"content-length"}
    if not said:
        return -1
    value = said.pop()
    return int(value) if not said and value.isdigit() and len(value) < 19 else -2
