"""One HTTP/1.1 connection of a client: requests in, answers out, one after the other.

A request behind another one waits until that is answered; meanwhile nothing more is read. Everything that is written in one round leaves
at once. What is no request is answered, and the connection ends behind that.
"""

from __future__ import annotations

from typing import Final

from waypoint.data.ends import ClientStream, RequestUser, Service
from waypoint.data.heads import LARGE, BadMessage, chunk, has_no_body, last_chunk, response_head, websocket_accept, write_pieces
from waypoint.data.http1_requests import NO_TRAILERS, End, HttpLimits, RequestReader, Unread
from waypoint.http.messages import Client, Headers, Request, Response
from ztunnel.dataplane.bytestream import Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.errors import MeshError

SLICE: Final = 64 << 10
"""Bytes that are parsed before what they hold is acted upon: pipelined requests of so many at most wait."""
_LINGER_SECONDS: Final = 2.0
"""How long a client may still send when the last answer has left; closed at once, what it sends would cost it that answer."""
_FLUSH_BYTES: Final = 128 << 10
"""So much of an answer does not wait for the end of the round."""
_MAX_DISCARDED: Final = 1 << 20
"""Bytes of a body that are read behind an answer that did not wait for them, to keep the connection."""


class Http1Server(ClientStream):
    """Implements `Receiver` for the connection and `ClientStream` for its request of the moment."""

    __slots__ = (
        "_chunked", "_chunks", "_client", "_close", "_dead", "_dirty", "_discarded", "_ending", "_events", "_expects", "_has_responded",
        "_in_body", "_key", "_loop", "_method", "_out", "_out_bytes", "_pausing", "_reader", "_reading", "_register", "_running",
        "_service", "_transport", "_user", "busy_since", "is_busy",
    )  # fmt: skip

    def __init__(
        self, loop: Loop, transport: Transport, service: Service, client: Client, limits: HttpLimits, register: set[Http1Server]
    ) -> None:
        """`register`: it is there while it lives."""
        self._register = register
        register.add(self)
        self._loop = loop
        self._transport = transport
        self._service = service
        self._client = client
        self._reader = RequestReader(limits)
        self._events = self._reader.events
        self._user: RequestUser | None = None
        # Of the request that is being answered.
        self.is_busy = False
        self.busy_since = loop.now
        """Since when it has been busy, or idle."""
        self._in_body = False
        """Its body is not complete."""
        self._method = b""
        self._chunks = True
        self._key: bytes | None = None
        """Of a websocket's handshake."""
        self._chunked = False
        self._has_responded = False
        self._expects = False
        """Its client may wait for a 100 before it sends the body."""
        self._close = False
        """The connection ends behind the answer."""
        self._discarded = 0
        # Writing and reading.
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._dirty = False
        self._pausing = False
        """The exchange wants no more of the body."""
        self._reading = True
        self._running = False
        self._ending = False
        """The last answer has left."""
        self._dead = False

    # The transport

    def opened(self) -> None:
        pass

    def received(self, data: memoryview) -> None:
        if self._ending or self._dead:
            return
        if len(data) <= SLICE:
            self._reader.read(data)
        else:
            self._read_slices(data)
        self._run()

    def _read_slices(self, data: memoryview) -> None:
        reader, events = self._reader, self._events
        at = 0
        while at < len(data) and not self._ending and not self._dead:
            reader.read(data[at : at + SLICE])
            at += SLICE
            if at < len(data):
                self._run()
                if len(events) > 1 and not self._ending and not self._dead:
                    # Requests wait behind the one that is being answered: the rest is read behind them.
                    events.append(Unread(bytes(data[at:])))
                    return

    def peer_ended(self) -> None:
        if self._dead:
            return
        if self._ending or not self.is_busy:
            # It ends as it began, in order: a reset would show as an error of every connection at the client's node.
            self._write()
            self._transport.end()
            if not self._dead:
                self._loop.call_later(_LINGER_SECONDS, self._finish)
            return
        if self._reader.is_raw:
            self._events.append(NO_TRAILERS)
            self._run()
            return
        self._cut("downstream_remote_disconnect")

    def writable(self) -> None:
        if self._user is not None:
            self._user.client_writable()
        elif not self._running:
            self._run()

    def lost(self, error: MeshError) -> None:
        if not self._dead:
            self._cut("downstream_remote_disconnect")

    def closed(self) -> None:
        self._finish()

    def on_bug(self) -> None:
        self._cut("internal_error")

    def _cut(self, why: str) -> None:
        """The client has gone, or must go."""
        user, self._user = self._user, None
        self._finish()
        if user is not None:
            user.client_lost(why)

    def _finish(self) -> None:
        if self._dead:
            return
        self._dead = True
        self._register.discard(self)
        self._reader.close()
        self._out.clear()
        self._transport.close()

    # Acting on what came

    def _run(self) -> None:
        if self._running:
            return
        self._running = True
        events = self._events
        while events and not self._dead and not self._ending:
            event = events[0]
            if type(event) is bytes:
                if self._pausing:
                    break
                events.popleft()
                if self._user is not None:
                    self._user.request_data(event)
                elif self._discard(len(event)):
                    break
            elif type(event) is End:
                if self._pausing:
                    break
                events.popleft()
                self._request_complete(event)
            elif type(event) is Unread:
                events.popleft()
                self._read_slices(memoryview(event.data))
            elif self._in_body:
                assert type(event) is BadMessage
                self._broken_body(event)
            elif self.is_busy or self._transport.is_full:
                break
            else:
                events.popleft()
                if type(event) is Request:
                    self._begin(event)
                else:
                    assert type(event) is BadMessage
                    self._answer_bad(event)
        self._running = False
        self._watch_reading()

    def _watch_reading(self) -> None:
        """Reads on unless the exchange has paused or requests wait."""
        if self._dead:
            return
        reading = not self._events and not self._pausing
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._transport.resume()
            else:
                self._transport.pause()

    def _begin(self, request: Request) -> None:
        events = self._events
        ended = bool(events) and events[0] is NO_TRAILERS
        if ended:
            events.popleft()
        self.is_busy = True
        self.busy_since = self._loop.now
        self._in_body = not ended
        self._key = request.get(b"sec-websocket-key") if request.upgrade else None
        self._method = request.method
        self._expects = request is self._reader.expects
        self._chunks = request.version >= 11
        self._discarded = 0
        self._has_responded = False
        self._close = request is self._reader.last
        user = self._service.begin(self, request, self._client, ended)
        if self.is_busy and not self._dead:
            self._user = user

    def _broken_body(self, bad: BadMessage) -> None:
        """The body that is being read goes wrong: whoever has its beginning must not take it for a whole one."""
        if self._has_responded:
            self._cut("http1.codec_error")
            return
        user, self._user = self._user, None
        if user is not None:
            user.client_lost("http1.codec_error")
        self._answer_bad(bad)

    def _answer_bad(self, bad: BadMessage) -> None:
        self.is_busy = True
        self._close = True
        self._in_body = False
        self._method = b"GET"
        self._chunks = True
        self._service.refused(self, self._client, bad.status, bad.details)

    def _discard(self, size: int) -> bool:
        """A piece of a body that nobody wants any more. True: that was too much, the connection ends."""
        self._discarded += size
        if self._discarded <= _MAX_DISCARDED:
            return False
        self._ending = True
        self._schedule()
        return True

    def _request_complete(self, end: End) -> None:
        self._in_body = False
        if self._user is not None:
            self._user.request_ended(end.trailers)
        elif self.is_busy and not self._ending:
            # It was answered before its end.
            self._next()

    # Answering

    @property
    def is_full(self) -> bool:
        return self._transport.is_full

    def interim(self, response: Response) -> None:
        if self._dead or not self._chunks:
            return
        if response.status == 100:
            self._expects = False
        head, _ = response_head(response, bodiless=True, ended=True, chunks=True, close=False)
        self._push(head)

    def respond(self, response: Response, ended: bool) -> None:
        if self._dead:
            return
        self._has_responded = True
        status = response.status
        if status == 101:
            head = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            if self._key and response.get(b"sec-websocket-accept") is None:
                # An endpoint of HTTP/2 does not say it (RFC 8441 §5).
                head += b"sec-websocket-accept: " + websocket_accept(self._key) + b"\r\n"
            self._push(head + b"".join([name + b": " + value + b"\r\n" for name, value in response.headers]) + b"\r\n")
            self._chunked = False
            self._close = True
            return
        if self._reader.is_raw or (self._in_body and self._expects) or self._service.is_draining:
            # A client that waits for 100 may send its body now or never; one that asked for an upgrade may have begun to speak it.
            self._close = True
        bodiless = self._method == b"HEAD" or has_no_body(status)
        if not self._chunks and not bodiless and not ended and response.get(b"content-length") is None:
            self._close = True
        head, self._chunked = response_head(response, bodiless=bodiless, ended=ended, chunks=self._chunks, close=self._close)
        self._push(head)
        if ended:
            self._answered()

    def send(self, data: bytes) -> None:
        if self._dead or not data:
            return
        if not self._chunked:
            self._push(data)
        elif len(data) < LARGE:
            self._push(chunk(data))
        else:
            self._push(b"%x\r\n" % len(data))
            self._push(data)
            self._push(b"\r\n")

    def end(self, trailers: Headers) -> None:
        if self._dead:
            return
        if self._chunked:
            self._push(last_chunk(trailers))
        self._answered()

    def reset(self, code: int = 0x2) -> None:
        """A client of HTTP/1.1 sees that an answer was cut by the connection's end before the body's."""
        self._user = None
        if not self._dead:
            self.flush()
            self._finish()

    def pause(self) -> None:
        self._pausing = True
        if not self._running:
            self._watch_reading()

    def resume(self) -> None:
        if self._pausing:
            self._pausing = False
            if not self._running:
                self._run()

    def _answered(self) -> None:
        self._user = None
        if self._close:
            self._ending = True
            self._events.clear()
            self._schedule()
        elif self._in_body:
            # The rest of the body is read and thrown away in front of the next request.
            self._pausing = False
            if not self._running:
                self._run()
        else:
            self._next()

    def _next(self) -> None:
        self.is_busy = False
        self._pausing = False
        self._chunked = False
        self.busy_since = self._loop.now
        if self._events:
            if not self._running:
                self._run()
        elif self._service.is_draining:
            self._ending = True
            self._schedule()

    @property
    def is_halfway(self) -> bool:
        """Whether the head of the next request has come in part."""
        return self._reader.is_halfway

    def leave(self) -> None:
        """The proxy drains: an idle connection ends now, a busy one behind its answer."""
        if not self.is_busy and not self._dead and not self._ending:
            self._ending = True
            self.flush()

    def _push(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes >= _FLUSH_BYTES:
            self._write()
        else:
            self._schedule()

    def _schedule(self) -> None:
        if not self._dirty:
            self._dirty = True
            self._loop.flush_later(self)

    def _write(self) -> None:
        out = self._out
        if out:
            self._out = []
            self._out_bytes = 0
            write_pieces(self._transport, out)

    def flush(self) -> None:
        """Sends what was written in this round."""
        self._dirty = False
        if self._dead:
            return
        self._write()
        if self._ending:
            self._transport.end()
            self._transport.resume()
            self._loop.call_later(_LINGER_SECONDS, self._finish)
