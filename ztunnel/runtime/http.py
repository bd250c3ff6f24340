"""A small HTTP/1.1 server on h11 over trio streams, for ports that operators and machines ask: GET, HEAD, POST, short answers.

Everything that a client controls has a bound: header and body bytes, connections, and the time of each phase. Hostile or broken
input gets 400, 408, 413 or 431 and the connection ends. Not a general server: no streaming, no upgrades, no TLS.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

import h11
import trio
from trio.abc import Stream

log = logging.getLogger("ztunnel.http")

_REASONS = {
    200: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    413: b"Content Too Large",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    503: b"Service Unavailable",
}
_CHUNK = 16 << 10


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a client may make the server hold or wait for."""

    header_bytes: int = 8 << 10
    """Request line and headers. Source: Istio ztunnel's metrics server."""
    body_bytes: int = 64 << 10
    connections: int = 64
    """One more ends the one that has kept us waiting longest, so that nobody can lock others out by being slow. It is closed itself
    only when none waits for its client."""
    header_seconds: float = 5.0
    """From a request's first byte to its last header; also for the first byte of a connection."""
    body_seconds: float = 10.0
    idle_seconds: float = 60.0
    """Between two requests on one connection; scrapers come back every 15 to 60 s."""
    answer_seconds: float = 30.0
    """For the handler, and again for the client to take the answer."""
    requests: int = 1000
    """On one connection; then it is closed, so that none lives for ever."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    """Names in lower case; the last one wins."""
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, whole."""

    status: int = 200
    body: bytes = b""
    content_type: str = "text/plain; charset=utf-8"
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Awaitable[Response]]


class BadRequest(Exception):
    """The request cannot be served; the connection ends after the answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


@dataclass(slots=True)
class HttpServer:
    """Serves one handler on any number of listeners.

    Args:
        handler: gives one answer per request, within `answer_seconds`; an error that it raises costs that request only.
        bounds: see there.
        on_bug: told of each error that the handler let escape, after the log.
        on_limit: told of each connection that was one too many.
    """

    handler: Handler
    bounds: Bounds = field(default_factory=Bounds)
    on_bug: Callable[[], None] = lambda: None
    on_limit: Callable[[], None] = lambda: None
    open_connections: int = 0
    _waiting: dict[trio.CancelScope, None] = field(default_factory=dict, init=False)
    """Connections that wait for their clients, longest first."""

    async def run(self, listeners: Sequence[trio.SocketListener], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled. "Started" means that connections are accepted. The listeners are closed at the end."""
        await trio.serve_listeners(self.serve, list(listeners), task_status=_Announce(task_status))

    async def serve(self, stream: Stream) -> None:
        """Serve one connection to its end, and close it."""
        async with stream:
            if self.open_connections >= self.bounds.connections:
                self.on_limit()
                if not self._evict():
                    return
            self.open_connections += 1
            try:
                await _Connection(self, stream).run()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                # The client went away in the middle of something; that is its right.
                pass
            finally:
                self.open_connections -= 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The connection waits for its client, and may have to make room.

        Raises:
            trio.BrokenResourceError: it had to.
        """
        with trio.CancelScope() as scope:
            self._waiting[scope] = None
            try:
                yield
            finally:
                self._waiting.pop(scope, None)
        if scope.cancelled_caught:
            raise trio.BrokenResourceError

    def _evict(self) -> bool:
        longest = next(iter(self._waiting), None)
        if longest is None:
            return False
        del self._waiting[longest]
        longest.cancel()
        return True

    async def answer(self, request: Request) -> Response:
        """The handler's answer, or the one that stands for its failure."""
        try:
            with trio.fail_after(self.bounds.answer_seconds):
                return await self.handler(request)
        except BadRequest as error:
            return Response(error.status, f"{error}\n".encode())
        except trio.TooSlowError:
            log.warning("request timed out", extra={"fields": {"method": request.method, "path": request.path}})
            return Response(503, b"no answer in time\n")
        # The one boundary at which an error of ours must not spread: it costs this request, is counted and has its traceback logged.
        except Exception:
            log.exception("request failed", extra={"fields": {"method": request.method, "path": request.path}})
            self.on_bug()
            return Response(500, b"internal error; see the log\n")


class _Announce:
    """`serve_listeners` reports its listeners; our own callers are told only that it has started."""

    def __init__(self, status: trio.TaskStatus[None]) -> None:
        self._status = status

    def started(self, value: object = None) -> None:
        del value
        self._status.started()


class _Connection:
    """One client."""

    def __init__(self, server: HttpServer, stream: Stream) -> None:
        self._server = server
        self._bounds = server.bounds
        self._stream = stream
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=server.bounds.header_bytes)
        self._has_bytes = False

    async def run(self) -> None:
        for _ in range(self._bounds.requests):
            if not await self._one_request():
                return
            if self._http.our_state is h11.MUST_CLOSE or self._http.their_state is not h11.DONE:
                return
            self._http.start_next_cycle()

    async def _one_request(self) -> bool:
        """Serve one request. False: the connection is over."""
        try:
            with self._server.waiting():
                request = await self._read_request()
            if request is None:
                return False
        except h11.RemoteProtocolError as error:
            await self._refuse(error.error_status_hint, str(error))
            return False
        except BadRequest as error:
            await self._refuse(error.status, str(error))
            return False
        await self._send(await self._server.answer(request), head=request.method == "HEAD")
        return True

    async def _read_request(self) -> Request | None:
        """None: the client has gone, or stayed silent between requests."""
        event = await self._first_event()
        if isinstance(event, h11.ConnectionClosed) or event is None:
            return None
        assert isinstance(event, h11.Request)
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
        if headers.get("expect", "").lower() == "100-continue" and self._http.they_are_waiting_for_100_continue:
            await self._stream.send_all(self._http.send(h11.InformationalResponse(status_code=100, headers=[])) or b"")
        body = await self._read_body()
        return _request(event, headers, body)

    async def _first_event(self) -> h11.Request | h11.ConnectionClosed | None:
        """A request's line and headers. Silence before its first byte ends the connection, silence after it is 408."""
        event = self._http.next_event()
        if event is h11.NEED_DATA:
            started = bool(self._http.trailing_data[0])
            if not started:
                with trio.move_on_after(self._bounds.idle_seconds if self._has_bytes else self._bounds.header_seconds):
                    await self._receive()
                    started = True
            if not started:
                return None
            with trio.move_on_after(self._bounds.header_seconds) as waiting:
                while (event := self._http.next_event()) is h11.NEED_DATA:
                    await self._receive()
            if waiting.cancelled_caught:
                raise BadRequest(408, "the request's headers took too long")
        assert isinstance(event, h11.Request | h11.ConnectionClosed)
        return event

    async def _read_body(self) -> bytes:
        body = bytearray()
        with trio.move_on_after(self._bounds.body_seconds) as waiting:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    await self._receive()
                elif isinstance(event, h11.Data):
                    body += event.data
                    if len(body) > self._bounds.body_bytes:
                        raise BadRequest(413, f"a body of at most {self._bounds.body_bytes} bytes is taken")
                else:
                    break
        if waiting.cancelled_caught:
            raise BadRequest(408, "the request's body took too long")
        return bytes(body)

    async def _receive(self) -> None:
        data = await self._stream.receive_some(_CHUNK)
        self._has_bytes = True
        self._http.receive_data(bytes(data))

    async def _send(self, response: Response, *, head: bool) -> None:
        headers = [
            (b"content-type", response.content_type.encode("latin-1")),
            (b"content-length", b"%d" % len(response.body)),
            *((name.encode("latin-1"), value.encode("latin-1")) for name, value in response.headers),
        ]
        reason = _REASONS.get(response.status, b"")
        out = [self._http.send(h11.Response(status_code=response.status, reason=reason, headers=headers)) or b""]
        if response.body and not head:
            # Not joined to the headers: clients that do not read would hold a copy each of what may be megabytes.
            out += self._http.send_with_data_passthrough(h11.Data(data=response.body)) or ()
        out.append(self._http.send(h11.EndOfMessage()) or b"")
        with trio.move_on_after(self._bounds.answer_seconds) as sending, self._server.waiting():
            for part in out:
                if part:
                    await self._stream.send_all(part)
        if sending.cancelled_caught:
            raise trio.BrokenResourceError

    async def _refuse(self, status: int, text: str) -> None:
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            await self._send(Response(status, f"{text}\n".encode(), headers=(("connection", "close"),)), head=False)


def _request(event: h11.Request, headers: dict[str, str], body: bytes) -> Request:
    if event.http_version not in (b"1.0", b"1.1"):
        raise BadRequest(400, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    try:
        parts = urlsplit(event.target.decode("ascii"))
        query = dict(parse_qsl(parts.query, keep_blank_values=True, max_num_fields=32))
    except (UnicodeDecodeError, ValueError) as error:
        raise BadRequest(400, "the request's target cannot be read") from error
    return Request(event.method.decode("ascii"), parts.path, query, headers, body)
