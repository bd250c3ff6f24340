"""A client's connection from its first byte: which protocol it speaks, and who serves it from then on."""

from __future__ import annotations

import time
from typing import Final

from waypoint.data.answers import answer, refusal
from waypoint.data.ends import ClientStream, RequestUser, Service
from waypoint.data.engine import Engine
from waypoint.data.exchange import Exchange
from waypoint.data.http1_requests import HttpLimits
from waypoint.data.http1_server import Http1Server
from waypoint.data.http2_server import Http2Server
from waypoint.data.served import PortAtWork
from waypoint.data.sniff import LONGEST_LINE, Seen, http_version, protocol
from waypoint.data.tcp import Reusable, TcpExchange
from waypoint.http.messages import Client, Request
from waypoint.telemetry.summary import Summary
from ztunnel.dataplane.loop import Timer
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.l7.config import PortProtocol

SNIFF_SECONDS: Final = 0.1
"""How long a client of an undeclared port may stay silent before it is taken for one whose server speaks first. As Istio's
`protocolDetectionTimeout` was."""
IDLE_SECONDS: Final = 3600.0
"""How long a client's connection may wait for its next request; an hour as Istio."""
HEAD_SECONDS: Final = 60.0
"""The same in the middle of a head: who sends it byte by byte holds a connection for nothing."""


class PortService(Service):
    """Serves the requests of one connection to a port."""

    __slots__ = ("_engine", "_port")

    def __init__(self, engine: Engine, port: PortAtWork) -> None:
        self._engine = engine
        self._port = port

    def begin(self, stream: ClientStream, request: Request, client: Client, ended: bool) -> RequestUser | None:
        exchange = Exchange(self._engine, stream, request, client, self._port, ended)
        exchange.start()
        return exchange

    def refused(self, stream: ClientStream, client: Client, status: int, details: str) -> None:
        reply = refusal(status, details)
        answer(self._engine, stream, reply)
        summary = Summary(self._port.telemetry, Request(b"", b"", b"", []), client, time.time())
        summary.status, summary.flags, summary.details, summary.bytes_out = reply.status, reply.flag, reply.details, len(reply.body)
        self._engine.recorder.request_done(summary)

    @property
    def is_draining(self) -> bool:
        return self._engine.is_draining or self._port.is_gone


class Connections:
    """All connections of clients in this worker."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.http: set[Http1Server] = set()
        self.http2: set[Http2Server] = set()
        self.tcp: set[TcpExchange] = set()

    def accept(self, transport: Reusable, client: Client, port: PortAtWork) -> Opening:
        """A new connection; its transport's receiver is what this gives."""
        return Opening(self, transport, client, port)

    def judge_again(self) -> None:
        """Policies have changed. Requests are judged one by one; connections of other protocols are judged here."""
        for exchange in list(self.tcp):
            exchange.judge()

    def drain(self) -> None:
        """Idle connections end now, busy ones behind their answers."""
        self.engine.is_draining = True
        for connection in self._all():
            connection.leave()

    def _all(self) -> list[Http1Server | Http2Server]:
        return [*self.http, *self.http2]

    def sweep(self) -> None:
        """Ends connections that have been idle, or in the middle of a head, for too long."""
        now = self.engine.loop.now
        for connection in self._all():
            if not connection.is_busy and now - connection.busy_since >= (HEAD_SECONDS if connection.is_halfway else IDLE_SECONDS):
                connection.leave()

    def limits(self) -> HttpLimits:
        """What clients may ask for now."""
        options = self.engine.served.options
        return HttpLimits(options.max_header_bytes, options.max_headers, options.http10)


class Opening:
    """A connection whose protocol is not known yet. Implements `Receiver` until it is."""

    __slots__ = ("_bytes", "_client", "_connections", "_ended", "_port", "_timer", "_transport")

    def __init__(self, connections: Connections, transport: Reusable, client: Client, port: PortAtWork) -> None:
        self._connections = connections
        self._transport = transport
        self._client = client
        self._port = port
        self._bytes = b""
        self._timer: Timer | None = None
        if port.protocol is PortProtocol.AUTO:
            self._timer = connections.engine.loop.call_later(SNIFF_SECONDS, self._silent)
        elif port.protocol is not PortProtocol.TCP:
            self._timer = connections.engine.loop.call_later(IDLE_SECONDS, self._transport.close)

    def start(self) -> None:
        """Begins at once where nothing is to be waited for."""
        if self._port.protocol is PortProtocol.TCP:
            self._serve_tcp()

    def opened(self) -> None:
        # Behind a handshake: whoever is there has proved what it must.
        self.start()

    def received(self, data: memoryview) -> None:
        port = self._port
        if not self._bytes and port.protocol is not PortProtocol.AUTO and data[0] != 0x50:
            # No "P": not HTTP/2's preface, and no more is to be known.
            self._serve_http1(data)
            return
        start = self._bytes + bytes(data[: LONGEST_LINE + 1])
        seen = protocol(start) if port.protocol is PortProtocol.AUTO else http_version(start)
        whole = memoryview(self._bytes + bytes(data)) if self._bytes else data
        if seen is Seen.UNKNOWN:
            if not self._bytes and port.protocol is not PortProtocol.AUTO:
                self._cancel()
                self._timer = self._connections.engine.loop.call_later(HEAD_SECONDS, self._transport.close)
            self._bytes = bytes(whole)
        elif seen is Seen.HTTP1:
            self._serve_http1(whole)
        elif seen is Seen.HTTP2:
            self._serve_http2(whole)
        else:
            self._serve_tcp(whole)

    def peer_ended(self) -> None:
        self._cancel()
        if self._port.protocol is PortProtocol.AUTO and self._bytes:
            self._serve_tcp(ended=True)
        else:
            self._transport.close()

    def writable(self) -> None:
        pass

    def lost(self, error: MeshError) -> None:
        self._cancel()

    def closed(self) -> None:
        self._cancel()

    def _silent(self) -> None:
        self._timer = None
        self._serve_tcp()

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _serve_http1(self, data: memoryview) -> None:
        self._cancel()
        serve_http1(self._connections, self._transport, self._client, PortService(self._connections.engine, self._port), data)

    def _serve_http2(self, data: memoryview) -> None:
        self._cancel()
        serve_http2(self._connections, self._transport, self._client, PortService(self._connections.engine, self._port), data)

    def _serve_tcp(self, data: memoryview | None = None, *, ended: bool = False) -> None:
        self._cancel()
        if data is None and self._bytes:
            data = memoryview(self._bytes)
        exchange = serve_tcp(self._connections, self._transport, self._client, self._port, data)
        if ended:
            exchange.peer_ended()


def serve_http1(connections: Connections, transport: Reusable, client: Client, service: Service, data: memoryview) -> None:
    """Requests of HTTP/1.1 from here on; `data` is their beginning."""
    server = Http1Server(connections.engine.loop, transport, service, client, connections.limits(), connections.http)
    transport.use(server)
    server.received(data)


def serve_http2(connections: Connections, transport: Reusable, client: Client, service: Service, data: memoryview) -> None:
    """The same of HTTP/2."""
    server = Http2Server(connections.engine.loop, service, client, connections.limits(), connections.http2)
    transport.use(server)
    server.join(transport)
    server.received(data)


def serve_tcp(connections: Connections, transport: Reusable, client: Client, port: PortAtWork, data: memoryview | None) -> TcpExchange:
    """Bytes from here on; `data` came already."""
    exchange = TcpExchange(connections.engine, transport, client, port, connections.tcp.discard)
    connections.tcp.add(exchange)
    transport.use(exchange)
    exchange.start()
    if data is not None:
        exchange.received(data)
    return exchange
