"""Connections to one endpoint, kept for the next request.

Bounds: circuit breakers for connections and for requests that wait for one; idle connections and their age. As in Envoy, an endpoint
without any connection gets one whatever the breaker says, or nothing would ever get through.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.http1_client import Http1Client
from waypoint.data.http2_client import Http2Client
from waypoint.data.sockets import SocketStream
from waypoint.data.tunnels import Tunnels
from waypoint.http.messages import Request
from waypoint.upstream.breakers import Breakers
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamError, UpstreamTimeout
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, UpstreamHttp
from ztunnel.mesh.ports import INBOUND_HBONE

MAX_IDLE: Final = 256
"""Idle connections to one endpoint."""


class Unreachable(Exception):
    """A request could not even begin; why, as a client reads it and as the transport said it."""

    def __init__(self, reason: ResetReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class Dialler:
    """Opens transports to endpoints: a stream in a tunnel, or a TCP connection."""

    __slots__ = ("_loop", "_scratch", "_tunnels")

    def __init__(self, loop: Loop, scratch: Scratch, tunnels: Tunnels) -> None:
        self._loop = loop
        self._scratch = scratch
        self._tunnels = tunnels

    def open(self, cluster: Cluster, endpoint: Endpoint, receiver: Receiver) -> Transport:
        """A transport that is being opened; the receiver hears `opened` or `lost`, perhaps before this returns.

        Raises:
            MeshError: it cannot even be tried.
        """
        seconds = cluster.limits.connect_timeout
        if not endpoint.hbone:
            stream = SocketStream(self._loop, self._scratch, receiver)
            stream.connect((endpoint.address, endpoint.port), seconds, cluster.limits.keepalive)
            return stream
        if endpoint.identity is None:
            raise LocalError(f"{endpoint.address} is to be reached by HBONE and its identity is not known")
        address = f"[{endpoint.address}]" if ":" in endpoint.address else endpoint.address
        through = (endpoint.address, INBOUND_HBONE)
        return self._tunnels.stream(through, (endpoint.identity,), f"{address}:{endpoint.port}", receiver, seconds)


class _Waiting(ServerStream):
    """A request that waits for a connection. Nothing is sent to it; it may be cancelled."""

    __slots__ = ("_pool", "ended", "http2", "request", "user")

    def __init__(self, pool: HttpPool, request: Request, ended: bool, user: ResponseUser, http2: bool) -> None:
        self.http2 = http2
        self._pool = pool
        self.request = request
        self.ended = ended
        self.user = user

    @property
    def is_full(self) -> bool:
        return True

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def cancel(self) -> None:
        self._pool.forget(self)


class HttpPool:
    """The connections to one endpoint. Implements `Keeper`."""

    __slots__ = ("_all", "_breakers", "_cluster", "_dialler", "_endpoint", "_http2", "_idle", "_loop", "_retired", "_waiting")

    def __init__(self, loop: Loop, dialler: Dialler, cluster: Cluster, endpoint: Endpoint, breakers: Breakers) -> None:
        self._loop = loop
        self._dialler = dialler
        self._cluster = cluster
        self._endpoint = endpoint
        self._breakers = breakers
        self._idle: list[Http1Client] = []
        self._all: set[Http1Client] = set()
        self._http2: list[Http2Client] = []
        self._waiting: deque[_Waiting] = deque()
        self._retired = False

    def send(self, request: Request, ended: bool, user: ResponseUser) -> tuple[ServerStream, bool]:
        """Begins a request on an idle connection or a new one: (its stream, whether it has begun).

        One that has not begun waits for a connection: the user hears `upstream_ready` or `upstream_failed`, and sends nothing before.

        Raises:
            Unreachable: no connection is to be had.
        """
        http = self._cluster.http
        if http is UpstreamHttp.HTTP2 or (http is UpstreamHttp.CLIENT and request.version == 20):
            return self._send_http2(request, ended, user)
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.is_usable:
                connection.request(request, ended, user)
                return connection, True
        if not self._may_connect():
            return self._wait(request, ended, user, False), False
        connection = self._connect()
        connection.request(request, ended, user)
        return connection, True

    def _send_http2(self, request: Request, ended: bool, user: ResponseUser) -> tuple[ServerStream, bool]:
        connection = self._usable_http2()
        if connection is None:
            if not self._may_connect():
                return self._wait(request, ended, user, True), False
            connection = self._connect_http2()
        self._check_upgrade(connection, request)
        return connection.request(request, ended, user), True

    def _check_upgrade(self, connection: Http2Client, request: Request) -> None:
        if request.upgrade and not connection.mux.peer_takes_connect_protocol:
            raise Unreachable(ResetReason.PROTOCOL_ERROR, "the endpoint takes no extended CONNECT over HTTP/2")

    def _usable_http2(self) -> Http2Client | None:
        for connection in self._http2:
            if connection.is_usable:
                return connection
        return None

    def _may_connect(self) -> bool:
        breakers = self._breakers
        return breakers.connections < breakers.limits.max_connections or not (self._all or self._http2)

    def _connect_http2(self) -> Http2Client:
        connection = Http2Client(self._loop, self, self._cluster.limits.max_concurrent_streams)
        self._http2.append(connection)
        self._breakers.connections += 1
        try:
            connection.join(self._dialler.open(self._cluster, self._endpoint, connection))
        except MeshError as error:
            connection.close()
            raise Unreachable(reason_of(error), str(error)) from error
        if connection.failure is not None:
            raise Unreachable(*connection.failure)
        return connection

    def _connect(self) -> Http1Client:
        connection = Http1Client(self._loop, self)
        self._all.add(connection)
        self._breakers.connections += 1
        try:
            connection.connect(self._dialler.open(self._cluster, self._endpoint, connection))
        except MeshError as error:
            connection.close()
            raise Unreachable(reason_of(error), str(error)) from error
        if connection.failure is not None:
            raise Unreachable(*connection.failure)
        return connection

    def _wait(self, request: Request, ended: bool, user: ResponseUser, http2: bool) -> _Waiting:
        if not self._breakers.admit_pending():
            raise Unreachable(ResetReason.OVERFLOW, "")
        waiting = _Waiting(self, request, ended, user, http2)
        self._waiting.append(waiting)
        return waiting

    def forget(self, waiting: _Waiting) -> None:
        """It waits no longer."""
        if waiting in self._waiting:
            self._waiting.remove(waiting)
            self._breakers.release_pending()

    def _next(self) -> None:
        """Whoever has waited longest gets a connection, if there is one."""
        while self._waiting:
            http2 = self._waiting[0].http2
            if not (self._usable_http2() if http2 else self._idle) and not self._may_connect():
                return
            waiting = self._waiting.popleft()
            self._breakers.release_pending()
            try:
                stream, begun = self.send(waiting.request, waiting.ended, waiting.user)
            except Unreachable as error:
                waiting.user.upstream_failed(error.reason, error.text)
                continue
            if begun:
                waiting.user.upstream_ready(stream)

    def freed(self, connection: Http1Client) -> None:
        limits = self._cluster.limits
        worn = limits.max_requests_per_connection and connection.requests >= limits.max_requests_per_connection
        old = limits.max_connection_duration and self._loop.now - connection.opened_at >= limits.max_connection_duration
        if self._retired or worn or old or len(self._idle) >= MAX_IDLE:
            connection.close()
            return
        self._idle.append(connection)
        if self._waiting:
            self._next()

    def gone(self, connection: Http1Client) -> None:
        if connection in self._all:
            self._all.remove(connection)
            self._breakers.release_connection()
        if connection in self._idle:
            self._idle.remove(connection)
        if self._waiting:
            # Behind whatever is under way: it may be the answer to this one that made room.
            self._loop.call_later(0.0, self._next)

    def roomier(self, connection: Http2Client) -> None:
        limits = self._cluster.limits
        worn = limits.max_requests_per_connection and connection.requests >= limits.max_requests_per_connection
        old = limits.max_connection_duration and self._loop.now - connection.opened_at >= limits.max_connection_duration
        if self._retired or worn or old:
            connection.leave()
        elif self._waiting:
            self._loop.call_later(0.0, self._next)

    def http2_gone(self, connection: Http2Client) -> None:
        if connection in self._http2:
            self._http2.remove(connection)
            self._breakers.release_connection()
        if self._waiting:
            self._loop.call_later(0.0, self._next)

    def update(self, cluster: Cluster, endpoint: Endpoint) -> None:
        """The limits may have changed."""
        self._cluster = cluster
        self._endpoint = endpoint

    def sweep(self, now: float) -> None:
        """Closes what has been idle for too long."""
        for connection in [each for each in self._idle if now - each.idle_since >= self._cluster.limits.idle_timeout]:
            connection.close()
        for http2 in [each for each in self._http2 if not each.streams() and now - each.idle_since >= self._cluster.limits.idle_timeout]:
            http2.close()

    def retire(self) -> None:
        """Nothing new goes this way; what is under way ends in its time."""
        self._retired = True
        for connection in list(self._idle):
            connection.close()
        for http2 in list(self._http2):
            http2.leave()

    def __len__(self) -> int:
        return len(self._all) + len(self._http2)


def reason_of(error: MeshError) -> ResetReason:
    """How a client reads why there is no connection."""
    if isinstance(error, UpstreamTimeout):
        return ResetReason.CONNECTION_TIMEOUT
    return ResetReason.CONNECTION_FAILURE if isinstance(error, UpstreamError) else ResetReason.LOCAL_CONNECTION_FAILURE
