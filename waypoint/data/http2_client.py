"""One HTTP/2 connection to an endpoint: many requests at once. Implements `ServerStream` for each."""

from __future__ import annotations

from typing import Final, Protocol

from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.heads import FRAMING, has_no_body, trailer_lines
from waypoint.data.http2 import Http2Connection, Http2Stream, content_length, limits
from waypoint.http.messages import Headers, Request, Response
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.loop import Loop
from ztunnel.hbone.events import Event, InterimReceived, PeerGoingAway, ResponseReceived
from ztunnel.hbone.frames import Code
from ztunnel.mesh.errors import MeshError, UpstreamTimeout

MAX_INTERIM: Final = 32
"""1xx responses in front of one answer."""
_CONNECT_DROPS: Final = frozenset((b"sec-websocket-key", b"sec-websocket-accept"))


class Keeper(Protocol):
    """Who keeps connections."""

    def roomier(self, connection: Http2Client) -> None:
        """A request is over: it can take another one, or is idle."""

    def http2_gone(self, connection: Http2Client) -> None:
        """It is no more. Called once."""


class Http2Exchange(Http2Stream, ServerStream):
    """One request."""

    __slots__ = ("_client", "_interims", "_is_head", "has_answered", "is_tunnel", "sent", "user")

    def __init__(self, client: Http2Client, number: int, user: ResponseUser, request: Request, sent: bool) -> None:
        super().__init__(client, number)
        self._client = client
        self.user: ResponseUser | None = user
        self.sent = sent
        """The whole request has gone out."""
        self.has_answered = False
        self.is_tunnel = bool(request.upgrade)
        self._is_head = request.method == b"HEAD"
        self._interims = 0

    @property
    def is_full(self) -> bool:
        return self._full

    def send(self, data: bytes) -> None:
        self.put(data)

    def end(self, trailers: Headers) -> None:
        self.put_end(trailer_lines(trailers) if trailers else trailers)

    def sent_all(self) -> None:
        self.sent = True

    def pause(self) -> None:
        self.hold()

    def resume(self) -> None:
        self.go_on()

    def cancel(self) -> None:
        self.user = None
        if not self.is_over:
            self._client.reset(self, Code.CANCEL)
            self._client.over(self)

    def interim(self, status: int, headers: Headers) -> None:
        """A 1xx."""
        self._interims += 1
        if self._interims > MAX_INTERIM:
            self.fail(ResetReason.PROTOCOL_ERROR, "too many interim responses")
        elif self.user is not None:
            self.user.upstream_interim(Response(status, headers))

    def response(self, status: int, headers: Headers, ended: bool) -> None:
        """The answer's head."""
        headers = [line for line in headers if line[0][:1] != b":" and (line[0] not in FRAMING or line[0] == b"content-length")]
        self.has_answered = True
        if self.is_tunnel and status == 200:
            status, headers = 101, [line for line in headers if line[0] != b"content-length"]
        elif self._is_head or has_no_body(status):
            # A body nevertheless would be taken for the next answer by a client of HTTP/1.1 (RFC 9113 §8.1.1).
            self.left = 0
        else:
            self.left = content_length(headers)
            if self.left == -2 or (ended and self.left > 0):
                self.fail(ResetReason.PROTOCOL_ERROR, "content-length is not the body's")
                return
        user = self.user
        if ended:
            self.finished()
        if user is not None:
            user.upstream_response(Response(status, headers), ended)

    def finished(self) -> None:
        """The answer is complete."""
        self.user = None
        if self.is_over:
            return
        if not self.sent:
            # It answered without waiting for the rest, which nobody needs any more.
            self._client.reset(self, Code.NO_ERROR)
        self._client.over(self)

    def fail(self, reason: ResetReason, text: str) -> None:
        """There is no answer."""
        user, self.user = self.user, None
        if not self.is_over:
            self._client.reset(self, Code.CANCEL)
            self._client.over(self)
        if user is not None:
            user.upstream_failed(reason, text)


class Http2Client(Http2Connection):
    """The connection. `join` it to its transport next."""

    __slots__ = ("_error", "_keeper", "_leaving", "_most", "_streams", "failure", "idle_since", "is_open", "label", "opened_at", "requests")

    def __init__(self, loop: Loop, keeper: Keeper, most: int) -> None:
        """`most`: requests at once."""
        super().__init__(loop, client=True, bounds=limits())
        self._keeper = keeper
        self._most = most
        self._streams: dict[int, Http2Exchange] = {}
        self._leaving = False
        self._error: MeshError | None = None
        self.failure: tuple[ResetReason, str] | None = None
        """Why it ended, if it failed."""
        self.is_open = False
        self.requests = 0
        self.label = ""
        """What it is good for beyond its endpoint: the pool's."""
        self.idle_since = loop.now
        self.opened_at = loop.now

    @property
    def is_usable(self) -> bool:
        """Whether it takes a request now."""
        return not self.is_dead and not self.is_ending and not self._leaving and self.mux.can_open and len(self._streams) < self._most

    @property
    def is_current(self) -> bool:
        """Whether it takes requests, now or once others are over."""
        return not self.is_dead and not self.is_ending and not self._leaving

    def request(self, request: Request, ended: bool, user: ResponseUser) -> ServerStream:
        """Sends a request's head."""
        self.requests += 1
        if request.upgrade:
            head = [
                (b":method", b"CONNECT"),
                (b":protocol", request.upgrade),
                (b":scheme", request.scheme),
                (b":authority", request.authority),
                (b":path", request.path),
            ]
            headers = [line for line in request.headers if line[0] not in _CONNECT_DROPS]
        else:
            head = [
                (b":method", request.method),
                (b":scheme", request.scheme),
                (b":authority", request.authority),
                (b":path", request.path),
            ]
            headers = request.headers
        number = self.mux.open_stream(head + headers, end=ended)
        stream = self._streams[number] = Http2Exchange(self, number, user, request, ended)
        self.schedule()
        return stream

    def over(self, stream: Http2Exchange) -> None:
        """A request is answered, or gone."""
        stream.forget()
        self._streams.pop(stream.number, None)
        if not self._streams:
            self.idle_since = self._loop.now
            if self._leaving:
                self.close()
                return
        self._keeper.roomier(self)

    def leave(self) -> None:
        """No new requests; closed behind the last."""
        self._leaving = True
        if not self._streams:
            self.close()

    def close(self) -> None:
        """Ends it."""
        if not self.is_dead and not self.is_ending:
            self.mux.goaway(Code.NO_ERROR)
            self.is_ending = True
            self.schedule()
            self._keeper.http2_gone(self)

    def stream(self, number: int) -> Http2Stream | None:
        return self._streams.get(number)

    def streams(self) -> list[Http2Stream]:
        return list(self._streams.values())

    def opened(self) -> None:
        self.is_open = True
        super().opened()

    def received(self, data: memoryview) -> None:
        self.is_open = True
        super().received(data)

    def heard(self, event: Event) -> None:
        if isinstance(event, ResponseReceived):
            stream = self._streams.get(event.stream)
            if stream is not None:
                stream.response(event.status, list(event.headers), event.ended)
        elif isinstance(event, InterimReceived):
            stream = self._streams.get(event.stream)
            if stream is not None:
                stream.interim(event.status, [line for line in event.headers if line[0][:1] != b":"])
        elif isinstance(event, PeerGoingAway):
            # The streams that it disowns follow as resets.
            self._leaving = True
            if not self._streams:
                self.close()

    def got(self, stream: Http2Stream, data: bytes) -> None:
        assert isinstance(stream, Http2Exchange)
        if stream.user is not None:
            stream.user.upstream_data(data)

    def got_all(self, stream: Http2Stream) -> None:
        assert isinstance(stream, Http2Exchange)
        user = stream.user
        if stream.is_tunnel and not stream.sent:
            # One direction of another protocol; the exchange ends the other.
            if user is not None:
                user.upstream_ended([])
            return
        trailers = trailer_lines(stream.trailers)
        stream.finished()
        if user is not None:
            user.upstream_ended(trailers)

    def can_send(self, stream: Http2Stream) -> None:
        assert isinstance(stream, Http2Exchange)
        if stream.pushed() and stream.user is not None:
            stream.user.upstream_writable()

    def was_reset(self, stream: Http2Stream, code: int) -> None:
        assert isinstance(stream, Http2Exchange)
        user, stream.user = stream.user, None
        self.over(stream)
        if user is not None:
            if code == Code.REFUSED_STREAM:
                user.upstream_failed(ResetReason.REFUSED_STREAM, "")
            elif code == Code.PROTOCOL_ERROR:
                user.upstream_failed(ResetReason.PROTOCOL_ERROR, "")
            else:
                user.upstream_failed(ResetReason.REMOTE_RESET, "")

    def lost(self, error: MeshError) -> None:
        self._error = error
        super().lost(error)

    def died(self, why: str, broken: bool) -> None:
        if broken:
            reason = ResetReason.PROTOCOL_ERROR
        elif self.is_open:
            reason = ResetReason.CONNECTION_TERMINATION
        else:
            reason = ResetReason.CONNECTION_TIMEOUT if isinstance(self._error, UpstreamTimeout) else ResetReason.CONNECTION_FAILURE
        text = why if self._error is not None or broken else ""
        self.failure = (reason, text)
        streams, self._streams = self._streams, {}
        if not self.is_ending:
            self._keeper.http2_gone(self)
        for stream in streams.values():
            user, stream.user = stream.user, None
            stream.forget()
            if user is not None:
                user.upstream_failed(reason, text)
