"""One HTTP/1.1 connection to an endpoint: one request at a time, kept for the next one where both sides can.

What llhttp tells while it reads is noted and acted upon behind the reading. An endpoint that answers before it has the whole request, that
says more than its answer, or that speaks without being asked, loses the connection: what it says next could be taken for the answer to
somebody else's request.

Length: reading, acting and writing share one connection's state, whose invariants would be told twice if they were apart.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Protocol

import httptools

from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.heads import (
    CONNECTION,
    CONTENT_LENGTH,
    LARGE,
    TRANSFER_ENCODING,
    UPGRADE,
    BadMessage,
    Stop,
    chunk,
    has_no_body,
    known,
    last_chunk,
    request_head,
    tokens,
    trailer_lines,
    without_nominated,
    write_pieces,
)
from waypoint.http.messages import Headers, Request, Response
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.bytestream import Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.errors import MeshError, UpstreamTimeout

MAX_HEADER_BYTES: Final = 60 << 10
MAX_HEADERS: Final = 100
MAX_INTERIM: Final = 32
"""1xx responses in front of one answer."""
_FLUSH_BYTES: Final = 128 << 10
_HEAD_END: Final = b"\r\n\r\n"


class Keeper(Protocol):
    """Who keeps connections."""

    def freed(self, connection: Http1Client) -> None:
        """It can take another request."""

    def gone(self, connection: Http1Client) -> None:
        """It is no more. Called once."""


class _End:
    __slots__ = ("trailers",)

    def __init__(self, trailers: Headers) -> None:
        self.trailers = trailers


class _HeadOnly(Exception):
    """Stops llhttp, which cannot be told that a response has no body."""


_NO_TRAILERS: Final = _End([])


class Http1Client(ServerStream):
    """Implements `Receiver` for the connection and `ServerStream` for its request of the moment."""

    __slots__ = (
        "_bytes", "_chunked", "_close", "_connection", "_dead", "_dirty", "_events", "_fields", "_head", "_headers", "_held", "_interims",
        "_is_head", "_keeper", "_length", "_loop", "_out", "_out_bytes", "_parser", "_pausing", "_raw", "_raw_ended", "_reading",
        "_running", "_sending", "_silent", "_status", "_stop", "_transport", "_until_end", "_upgraded", "_upgrading", "_user", "failure",
        "has_answered", "idle_since", "is_open", "label", "opened_at", "requests",
    )  # fmt: skip

    def __init__(self, loop: Loop, keeper: Keeper) -> None:
        """`connect` it next."""
        self._loop = loop
        self._keeper = keeper
        self._transport: Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._events: deque[Response | bytes | _End | BadMessage] = deque()
        self._user: ResponseUser | None = None
        self.failure: tuple[ResetReason, str] | None = None
        """Why it ended, if it failed."""
        self.is_open = False
        self.has_answered = False
        """The answer of the moment has begun."""
        self.idle_since = loop.now
        self.opened_at = loop.now
        self.requests = 0
        self.label = ""
        """What it is good for beyond its endpoint: the pool's."""
        # Of the response that is being read.
        self._headers: Headers = []
        self._bytes = 0
        self._silent = 0
        """Bytes since something was last told of them."""
        self._fields = 0
        self._head = True
        self._status = 0
        self._connection = b""
        self._upgrade_reset()
        self._length = False
        self._chunked = False
        self._until_end = False
        self._interims = 0
        self._is_head = False
        self._held = b""
        self._stop = Stop()
        self._close = False
        # Of the request.
        self._sending = False
        self._raw = False
        self._raw_ended = False
        """Both directions carry another protocol."""
        self._out: list[bytes] = []
        self._out_bytes = 0
        self._dirty = False
        self._pausing = False
        self._reading = True
        self._running = False
        self._dead = False

    def _upgrade_reset(self) -> None:
        self._upgrading = False
        self._upgraded = b""

    def connect(self, transport: Transport) -> None:
        """Its transport, which may still be on its way."""
        self._transport = transport

    @property
    def is_usable(self) -> bool:
        """Whether it takes a request now."""
        return not self._dead and self._user is None and not self._close

    # A request

    def request(self, request: Request, ended: bool, user: ResponseUser) -> None:
        """Sends a request's head; `ended`: that is all of it."""
        self.requests += 1
        self._user = user
        self.has_answered = False
        self._sending = not ended
        self._is_head = request.method == b"HEAD"
        self._upgrading = bool(request.upgrade)
        self._interims = 0
        head, self._chunked = request_head(request, ended)
        self._push(head)

    @property
    def is_full(self) -> bool:
        return self._transport is not None and self._transport.is_full

    def send(self, data: bytes) -> None:
        if self._dead or not data or not self._sending:
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
        if self._dead or not self._sending:
            return
        self._sending = False
        if self._raw or self._upgrading:
            self._write()
            assert self._transport is not None
            self._transport.end()
        elif self._chunked:
            self._push(last_chunk(trailers))

    def pause(self) -> None:
        self._pausing = True
        if not self._running:
            self._watch_reading()

    def resume(self) -> None:
        if self._pausing:
            self._pausing = False
            if not self._running:
                self._run()

    def cancel(self) -> None:
        self._user = None
        if self._raw_ended:
            self.end([])  # both ends have said all: a farewell, not a reset
        self._finish()

    def _push(self, data: bytes) -> None:
        self._out.append(data)
        self._out_bytes += len(data)
        if self._out_bytes >= _FLUSH_BYTES:
            self._write()
        elif not self._dirty:
            self._dirty = True
            self._loop.flush_later(self)

    def _write(self) -> None:
        out = self._out
        if out and self._transport is not None:
            self._out = []
            self._out_bytes = 0
            write_pieces(self._transport, out)

    def flush(self) -> None:
        """Sends what was written in this round."""
        self._dirty = False
        if not self._dead:
            self._write()

    # What llhttp tells

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._bytes += len(name) + len(value)
        if self._fields > MAX_HEADERS or self._bytes > MAX_HEADER_BYTES:
            raise self._stop.bad(502, "headers too large")
        if value and value[-1] in b" \t":
            value = value.rstrip(b" \t")
        lower, kind = known(name)
        if not kind:
            self._headers.append((lower, value))
        elif self._head:
            if kind == CONTENT_LENGTH:
                if not value.isdigit():
                    raise self._stop.bad(502, "malformed content-length")
                self._length = True
                self._headers.append((lower, value))
            elif kind == CONNECTION:
                self._connection = self._connection + b"," + value if self._connection else value
            elif kind == TRANSFER_ENCODING:
                if value.lower() != b"chunked" or self._length:
                    raise self._stop.bad(502, "unknown transfer coding")
                self._length = True
            elif kind == UPGRADE:
                self._upgraded = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        status: int = parser.get_status_code()
        headers = self._headers
        self._headers = []
        self._head = False
        self._status = status
        if self._connection:
            nominated = tokens(self._connection)
            if len(nominated) > 1 or nominated[:1] not in ([], [b"keep-alive"], [b"close"], [b"upgrade"]):
                headers = without_nominated(headers, nominated)
        if not 100 <= status <= 999:
            raise self._stop.bad(502, "no status")
        if status == 101 and not (self._upgrading and self._upgraded.lower() == b"websocket"):
            raise self._stop.bad(502, "an upgrade that nobody asked for")
        self._events.append(Response(status, headers))
        if status >= 200:
            if not parser.should_keep_alive():
                self._close = True
            if self._is_head:
                raise self._stop.by(_HeadOnly())
            self._until_end = not self._length and not has_no_body(status)

    def on_body(self, body: bytes) -> None:
        self._events.append(body)
        self._bytes = self._fields = 0

    def on_message_complete(self) -> None:
        if self._status >= 200:
            self._events.append(_End(trailer_lines(self._headers)) if self._headers else _NO_TRAILERS)
        self._next_head()

    def _next_head(self) -> None:
        self._headers = []
        self._bytes = self._fields = 0
        self._head = True
        self._length = self._until_end = False
        self._connection = b""
        self._held = b""

    # The transport

    def opened(self) -> None:
        self.is_open = True

    def received(self, data: memoryview) -> None:
        if self._dead:
            return
        self.is_open = True
        if self._user is None:
            # Nobody has asked.
            self._finish()
            return
        if self._raw:
            self._events.append(bytes(data))
        elif self._is_head:
            self._parse_head_only(bytes(data))
        else:
            self._parse(data)
        self._run()

    def _parse(self, data: memoryview) -> None:
        before = len(self._events)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._switch(bytes(data[upgrade.args[0] :]))
        except httptools.HttpParserError as error:
            self._refuse(error, self._stop.take(error))
        else:
            if len(self._events) > before:
                self._silent = 0
                return
            # A head in pieces, or a chunk's extension or a trailer that never ends.
            self._silent += len(data)
            if self._silent > 2 * MAX_HEADER_BYTES:
                self._events.append(BadMessage(502, "headers too large"))

    def _parse_head_only(self, data: bytes) -> None:
        """The answer to HEAD: its end is that of its head."""
        held = self._held + data if self._held else data
        self._held = b""
        begin = 0
        # Interim responses first; `_responded` refuses more than it allows.
        while len(self._events) <= MAX_INTERIM:
            at = held.find(_HEAD_END, begin)
            if at < 0:
                self._held = held[begin:]
                if len(self._held) > 2 * MAX_HEADER_BYTES:
                    self._events.append(BadMessage(502, "headers too large"))
                return
            end = at + len(_HEAD_END)
            if self._parse_one_head(held[begin:end], held[end:] if len(held) > end else b""):
                return
            begin = end
            if begin == len(held):
                return

    def _parse_one_head(self, head: bytes, rest: bytes) -> bool:
        """False: it was an interim response, and what follows is to be read."""
        try:
            self._parser.feed_data(head)
        except httptools.HttpParserUpgrade:
            self._switch(rest)
            return True
        except httptools.HttpParserError as error:
            reason = self._stop.take(error)
            if not isinstance(reason, _HeadOnly):
                self._refuse(error, reason)
                return True
            self._parser = httptools.HttpResponseParser(self)
            self._next_head()
            self._events.append(_NO_TRAILERS)
            if rest:
                self._close = True
            return True
        return False

    def _switch(self, rest: bytes) -> None:
        """A 101 was read."""
        self._raw = self._close = True
        self._sending = True
        self._chunked = False
        if rest:
            self._events.append(rest)

    def _refuse(self, error: Exception, reason: Exception | None) -> None:
        self._close = True
        if reason is None and str(error).startswith("Data after"):
            return
        self._events.append(reason if isinstance(reason, BadMessage) else BadMessage(502, str(error)))

    def peer_ended(self) -> None:
        if self._dead:
            return
        if self._raw or self._until_end:
            self._events.append(_NO_TRAILERS)
            self._until_end = False
            self._close = True
            self._run()
        elif self._user is None or not self._events:
            self._fail(ResetReason.CONNECTION_TERMINATION, "")
        else:
            # It waits for an exchange that has paused, and may be whole.
            self._close = True
            if not any(type(event) is _End for event in self._events):
                self._events.append(BadMessage(0, "connection termination"))

    def writable(self) -> None:
        if self._user is not None:
            self._user.upstream_writable()

    def lost(self, error: MeshError) -> None:
        if self._dead:
            return
        if self._user is not None and any(type(event) is _End for event in self._events):
            # The answer is here; the connection is not needed for it.
            self._close = True
            self._transport = None
            return
        if self.is_open:
            reason = ResetReason.CONNECTION_TERMINATION
        else:
            reason = ResetReason.CONNECTION_TIMEOUT if isinstance(error, UpstreamTimeout) else ResetReason.CONNECTION_FAILURE
        self._fail(reason, str(error))

    def closed(self) -> None:
        if not self._dead and self._user is not None and not self._events:
            self._fail(ResetReason.CONNECTION_TERMINATION, "")

    def on_bug(self) -> None:
        self._fail(ResetReason.LOCAL_RESET, "internal error")

    def _fail(self, reason: ResetReason, text: str) -> None:
        user, self._user = self._user, None
        self.failure = (reason, text)
        self._finish()
        if user is not None:
            user.upstream_failed(reason, text)

    def _finish(self) -> None:
        if self._dead:
            return
        self._dead = True
        self._events.clear()
        self._out.clear()
        if self._transport is not None:
            self._transport.close()
        self._keeper.gone(self)

    # Acting on what came

    def _run(self) -> None:
        if self._running:
            return
        self._running = True
        events = self._events
        while events and not self._dead and not self._pausing:
            event = events.popleft()
            user = self._user
            if user is None:
                self._finish()
            elif type(event) is bytes:
                user.upstream_data(event)
            elif type(event) is Response:
                self._responded(event, user)
            elif type(event) is _End:
                self._ended(event, user)
            else:
                assert type(event) is BadMessage
                if event.status:
                    self._fail(ResetReason.PROTOCOL_ERROR, event.details)
                else:
                    self._fail(ResetReason.CONNECTION_TERMINATION, "")
        self._running = False
        self._watch_reading()

    def _responded(self, response: Response, user: ResponseUser) -> None:
        if response.status < 200 and response.status != 101:
            self._interims += 1
            if self._interims > MAX_INTERIM:
                self._fail(ResetReason.PROTOCOL_ERROR, "too many interim responses")
            else:
                user.upstream_interim(response)
            return
        self.has_answered = True
        ended = bool(self._events) and self._events[0] is _NO_TRAILERS and not self._raw
        if ended:
            self._events.popleft()
            self._free()
        user.upstream_response(response, ended)

    def _ended(self, end: _End, user: ResponseUser) -> None:
        if self._raw and self._sending:
            # One direction of another protocol; the other one goes on until the exchange ends it.
            self._raw_ended = True
            user.upstream_ended(end.trailers)
            return
        self._free()
        user.upstream_ended(end.trailers)

    def _free(self) -> None:
        """The answer is complete: the next request may come, if both sides can."""
        self._user = None
        if self._close or self._sending or self._events:
            self._finish()
        else:
            self.idle_since = self._loop.now
            self._keeper.freed(self)

    def _watch_reading(self) -> None:
        if self._dead or self._transport is None:
            return
        reading = not self._events and not self._pausing
        if reading is not self._reading:
            self._reading = reading
            if reading:
                self._transport.resume()
            else:
                self._transport.pause()

    def close(self) -> None:
        """Ends an idle connection."""
        self._finish()
