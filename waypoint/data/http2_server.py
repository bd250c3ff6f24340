"""One HTTP/2 connection of a client: each stream a request. Implements `ClientStream` for each."""

from __future__ import annotations

import base64
import os
from typing import Final

from waypoint.data.ends import ClientStream, RequestUser, Service
from waypoint.data.heads import FRAMING, has_no_body, trailer_lines
from waypoint.data.http1_requests import HttpLimits, is_authority
from waypoint.data.http2 import Http2Connection, Http2Stream, content_length, joined_cookies, limits
from waypoint.http.messages import Client, Headers, Request, Response
from ztunnel.dataplane.loop import Loop
from ztunnel.hbone.events import Event, RequestReceived
from ztunnel.hbone.frames import Code

_PARTING_SECONDS: Final = 1.0
"""How long requests that crossed our GOAWAY are still taken."""
_METHOD: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ-_")
_PATH: Final = bytes(range(0x21, 0x7F)).replace(b"#", b"")


class Http2Request(Http2Stream, ClientStream):
    """One request."""

    __slots__ = ("_is_head", "_is_tunnel", "complete", "server", "user")

    def __init__(self, server: Http2Server, number: int) -> None:
        super().__init__(server, number)
        self.server = server
        self.user: RequestUser | None = None
        self.complete = False
        """The whole request has come."""
        self._is_head = False
        self._is_tunnel = False

    def begin(self, headers: Headers, ended: bool) -> None:
        """Reads the head and gives the request to the service."""
        server = self.server
        self.complete = ended
        made = self._read(headers)
        if isinstance(made, tuple):
            server.service.refused(self, server.client, *made)
            return
        self._is_head = made.method == b"HEAD"
        self._is_tunnel = bool(made.upgrade)
        user = server.service.begin(self, made, server.client, ended)
        if not self.is_over:
            self.user = user

    def _read(self, headers: Headers) -> Request | tuple[int, str]:
        pseudo: dict[bytes, bytes] = {}
        regular: Headers = []
        host = b""
        for name, value in headers:
            if name[:1] == b":":
                pseudo[name] = value
            elif name == b"host":
                host = value
            elif name not in FRAMING or name in (b"content-length", b"te", b"expect"):
                regular.append((name, value))
        if len(regular) > self.server.bounds.headers:
            return 431, "http2.too_many_headers"
        method, path = pseudo.get(b":method", b""), pseudo.get(b":path", b"")
        protocol = pseudo.get(b":protocol", b"").lower()
        if method == b"CONNECT" and protocol != b"websocket":
            return 403, "upgrade_failed"
        authority = pseudo.get(b":authority") or host
        if not authority:
            return 400, "missing_host_header"
        if not _METHOD.issuperset(method) or not is_authority(authority) or path.translate(None, _PATH):
            return 400, "http2.codec_error"
        if path[:1] != b"/" and not (path == b"*" and method == b"OPTIONS"):
            return 400, "http2.codec_error"
        self.left = content_length(regular)
        if self.left == -2 or (self.complete and self.left > 0):
            return 400, "http2.codec_error"
        if protocol:
            # As an endpoint of HTTP/1.1 is asked; one of HTTP/2 is asked with CONNECT again.
            regular = [line for line in regular if line[0] != b"sec-websocket-key"]
            regular.append((b"sec-websocket-key", base64.b64encode(os.urandom(16))))
            method = b"GET"
        return Request(method, path, authority, joined_cookies(regular), version=20, upgrade=protocol)

    # Answering

    @property
    def is_full(self) -> bool:
        return self._full

    def interim(self, response: Response) -> None:
        if not self.is_over:
            self.server.mux.interim(self.number, response.status, response.headers)
            self.server.schedule()

    def respond(self, response: Response, ended: bool) -> None:
        if self.is_over:
            return
        status, headers = response.status, response.headers
        if status == 101:
            status = 200
            headers = [line for line in headers if not line[0].startswith(b"sec-websocket-accept")]
        server = self.server
        bodiless = ended or self._is_head or (has_no_body(status) and not self._is_tunnel)
        # With END_STREAM where there is no body: gRPC reads a status among the headers only there. The rest of a request that is not
        # complete is stopped by RST_STREAM(NO_ERROR) behind it (RFC 9113 §8.1).
        server.mux.respond(self.number, status, headers, end=bodiless)
        server.schedule()
        if bodiless:
            self.sent_all()

    def send(self, data: bytes) -> None:
        self.put(data)

    def end(self, trailers: Headers) -> None:
        self.put_end(trailer_lines(trailers) if trailers else trailers)

    def sent_all(self) -> None:
        self.user = None
        if self.complete:
            self.server.over(self)
        else:
            # Nobody wants the rest of the request (RFC 9113 §8.1).
            self.server.reset(self, Code.NO_ERROR)
            self.server.over(self)

    def reset(self, code: int = 0x2) -> None:
        self.user = None
        if not self.is_over:
            self.server.reset(self, code)
            self.server.over(self)

    def pause(self) -> None:
        self.hold()

    def resume(self) -> None:
        self.go_on()


class Http2Server(Http2Connection):
    """The connection."""

    __slots__ = ("_leaving", "_register", "_streams", "bounds", "busy_since", "client", "service")

    def __init__(self, loop: Loop, service: Service, client: Client, bounds: HttpLimits, register: set[Http2Server]) -> None:
        """`join` it to its transport next. `register`: it is there while it lives."""
        super().__init__(loop, client=False, bounds=limits(bounds.header_bytes))
        self.service = service
        self.client = client
        self.bounds = bounds
        self._streams: dict[int, Http2Request] = {}
        self._leaving = False
        self._register = register
        register.add(self)
        self.busy_since = loop.now

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return bool(self._streams)

    @property
    def is_halfway(self) -> bool:
        """Whether the peer has not even greeted."""
        return False

    def leave(self) -> None:
        """No new requests; closed behind the last of those that are there or on their way."""
        if self.is_dead or self._leaving:
            return
        self._leaving = True
        self.mux.announce_goaway()
        self.schedule()
        self._loop.call_later(_PARTING_SECONDS, self._part)

    def _part(self) -> None:
        if not self.is_dead and not self.is_ending:
            self.mux.goaway(Code.NO_ERROR)
            self.schedule()
            self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self.mux.is_refusing and not self._streams and not self.is_dead:
            self.is_ending = True
            self.schedule()

    def over(self, stream: Http2Request) -> None:
        """A request is answered, or gone."""
        stream.forget()
        self._streams.pop(stream.number, None)
        if not self._streams:
            self.busy_since = self._loop.now
            if self.service.is_draining:
                self.leave()
            self._end_if_idle()

    def stream(self, number: int) -> Http2Stream | None:
        return self._streams.get(number)

    def streams(self) -> list[Http2Stream]:
        return list(self._streams.values())

    def heard(self, event: Event) -> None:
        if isinstance(event, RequestReceived):
            stream = self._streams[event.stream] = Http2Request(self, event.stream)
            stream.begin(list(event.headers), event.ended)

    def got(self, stream: Http2Stream, data: bytes) -> None:
        assert isinstance(stream, Http2Request)
        if stream.user is not None:
            stream.user.request_data(data)

    def got_all(self, stream: Http2Stream) -> None:
        assert isinstance(stream, Http2Request)
        stream.complete = True
        if stream.user is not None:
            stream.user.request_ended(trailer_lines(stream.trailers))

    def can_send(self, stream: Http2Stream) -> None:
        assert isinstance(stream, Http2Request)
        if stream.pushed() and stream.user is not None:
            stream.user.client_writable()

    def was_reset(self, stream: Http2Stream, code: int) -> None:
        assert isinstance(stream, Http2Request)
        user, stream.user = stream.user, None
        self.over(stream)
        if user is not None:
            user.client_lost("http2.remote_reset")

    def died(self, why: str, broken: bool) -> None:
        self._register.discard(self)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            user, stream.user = stream.user, None
            stream.forget()
            if user is not None:
                user.client_lost("downstream_remote_disconnect")
