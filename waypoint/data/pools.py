"""Connections to one endpoint, kept for the next request.

Bounds: circuit breakers for connections and for requests that wait for one; idle connections and their age. As in Envoy, an endpoint
without any connection gets one whatever the breaker says, or nothing would ever get through.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from waypoint.data.dialler import Dialler
from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.http1_client import Http1Client
from waypoint.data.http2_client import Http2Client
from waypoint.data.tls import host_of
from waypoint.http.messages import Client, Request
from waypoint.upstream.breakers import Breakers
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.errors import MeshError, UpstreamError, UpstreamTimeout
from ztunnel.mesh.l7.clusters import Cluster, Endpoint, UpstreamHttp

MAX_IDLE: Final = 256
"""Idle connections to one endpoint."""


class Unreachable(Exception):
    """A request could not even begin; why, as a client reads it and as the transport said it."""

    def __init__(self, reason: ResetReason, text: str) -> None:
        super().__init__(text)
        self.reason = reason
        self.text = text


class _Waiting(ServerStream):
    """A request that waits for a connection. Nothing is sent to it; it may be cancelled."""

    __slots__ = ("_pool", "client", "ended", "http2", "request", "user")

    def __init__(self, pool: HttpPool, request: Request, ended: bool, user: ResponseUser, client: Client | None, http2: bool) -> None:
        self.client = client
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

    __slots__ = ("_all", "_breakers", "_cluster", "_dialler", "_endpoint", "_http2", "_idle", "_labels", "_loop", "_retired", "_waiting")

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
        self._labels = has_labels(cluster)

    def send(self, request: Request, ended: bool, user: ResponseUser, client: Client | None = None) -> tuple[ServerStream, bool]:
        """Begins a request on an idle connection or a new one: (its stream, whether it has begun).

        One that has not begun waits for a connection: the user hears `upstream_ready` or `upstream_failed`, and sends nothing before.

        Raises:
            Unreachable: no connection is to be had.
        """
        http = self._cluster.http
        label = self._label(request, client) if self._labels else ""
        if http is UpstreamHttp.HTTP2 or (http is UpstreamHttp.CLIENT and request.version == 20):
            return self._send_http2(request, ended, user, client, label)
        connection = self._idle_http1(label)
        if connection is None:
            if not self._makes_room():
                return self._wait(request, ended, user, client, http2=False), False
            connection = self._connect(request, client, label)
        connection.request(request, ended, user)
        return connection, True

    def _label(self, request: Request, client: Client | None) -> str:
        """What a connection is good for, beyond its endpoint: one host's name in TLS, one client's in a PROXY header."""
        tls = self._cluster.tls
        host = host_of(request.authority.decode("ascii", "replace")) if tls is not None and not tls.sni else ""
        return f"{host} {client.address} {client.port}" if self._cluster.proxy_protocol and client is not None else host

    def _idle_http1(self, label: str) -> Http1Client | None:
        idle = self._idle
        if not self._labels:
            while idle:
                connection = idle.pop()
                if connection.is_usable:
                    return connection
            return None
        for connection in idle:
            if connection.label == label and connection.is_usable:
                idle.remove(connection)
                return connection
        return None

    def _send_http2(
        self, request: Request, ended: bool, user: ResponseUser, client: Client | None, label: str
    ) -> tuple[ServerStream, bool]:
        connection = self._usable_http2(label)
        if connection is None:
            if not self._makes_room():
                return self._wait(request, ended, user, client, http2=True), False
            connection = self._connect_http2(request, client, label)
        self._check_upgrade(connection, request)
        return connection.request(request, ended, user), True

    def _check_upgrade(self, connection: Http2Client, request: Request) -> None:
        if request.upgrade and not connection.mux.peer_takes_connect_protocol:
            raise Unreachable(ResetReason.PROTOCOL_ERROR, "the endpoint takes no extended CONNECT over HTTP/2")

    def _usable_http2(self, label: str) -> Http2Client | None:
        for connection in self._http2:
            if connection.is_usable and connection.label == label:
                return connection
        return None

    def _may_connect(self) -> bool:
        breakers = self._breakers
        return breakers.connections < breakers.limits.max_connections or not (self._all or self._http2)

    def _makes_room(self) -> bool:
        """Whether a new connection may be opened; one that is idle but of no use to this request goes, if that is what it takes."""
        idle: list[Http1Client | Http2Client] = [*self._idle, *[each for each in self._http2 if not each.streams()]]
        for connection in idle:
            if self._may_connect():
                return True
            connection.close()
        return self._may_connect()

    def _connect_http2(self, request: Request, client: Client | None, label: str) -> Http2Client:
        connection = Http2Client(self._loop, self, self._cluster.limits.max_concurrent_streams)
        connection.label = label
        self._http2.append(connection)
        self._breakers.connections += 1
        try:
            host = request.authority.decode("ascii", "replace")
            connection.join(self._dialler.open(self._cluster, self._endpoint, connection, host=host_of(host), client=client, http2=True))
        except MeshError as error:
            connection.close()
            raise Unreachable(reason_of(error), str(error)) from error
        if connection.failure is not None:
            raise Unreachable(*connection.failure)
        return connection

    def _connect(self, request: Request, client: Client | None, label: str) -> Http1Client:
        connection = Http1Client(self._loop, self)
        connection.label = label
        self._all.add(connection)
        self._breakers.connections += 1
        try:
            host = request.authority.decode("ascii", "replace")
            connection.connect(
                self._dialler.open(self._cluster, self._endpoint, connection, host=host_of(host), client=client, http2=False)
            )
        except MeshError as error:
            connection.close()
            raise Unreachable(reason_of(error), str(error)) from error
        if connection.failure is not None:
            raise Unreachable(*connection.failure)
        return connection

    def _wait(self, request: Request, ended: bool, user: ResponseUser, client: Client | None, *, http2: bool) -> _Waiting:
        if not self._breakers.admit_pending():
            raise Unreachable(ResetReason.OVERFLOW, "")
        waiting = _Waiting(self, request, ended, user, client, http2)
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
            first = self._waiting[0]
            label = self._label(first.request, first.client) if self._labels else ""
            if not self._has_free(label, http2=first.http2) and not self._makes_room():
                return
            waiting = self._waiting.popleft()
            self._breakers.release_pending()
            try:
                stream, begun = self.send(waiting.request, waiting.ended, waiting.user, waiting.client)
            except Unreachable as error:
                waiting.user.upstream_failed(error.reason, error.text)
                continue
            if begun:
                waiting.user.upstream_ready(stream)

    def _has_free(self, label: str, *, http2: bool) -> bool:
        if http2:
            return self._usable_http2(label) is not None
        return any(each.is_usable and (each.label == label or not self._labels) for each in self._idle)

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
        self._endpoint = endpoint
        if (cluster.tls, cluster.proxy_protocol, cluster.http) != (self._cluster.tls, self._cluster.proxy_protocol, self._cluster.http):
            # Connections that stand were made another way.
            self._close_idle()
        self._cluster = cluster
        self._labels = has_labels(cluster)

    def _close_idle(self) -> None:
        for connection in list(self._idle):
            connection.close()
        for http2 in list(self._http2):
            http2.leave()

    def sweep(self, now: float) -> None:
        """Closes what has been idle for too long."""
        for connection in [each for each in self._idle if now - each.idle_since >= self._cluster.limits.idle_timeout]:
            connection.close()
        for http2 in [each for each in self._http2 if not each.streams() and now - each.idle_since >= self._cluster.limits.idle_timeout]:
            http2.close()

    def retire(self) -> None:
        """Nothing new goes this way; what is under way ends in its time."""
        self._retired = True
        self._close_idle()

    def __len__(self) -> int:
        return len(self._all) + len(self._http2)


def reason_of(error: MeshError) -> ResetReason:
    """How a client reads why there is no connection."""
    if isinstance(error, UpstreamTimeout):
        return ResetReason.CONNECTION_TIMEOUT
    return ResetReason.CONNECTION_FAILURE if isinstance(error, UpstreamError) else ResetReason.LOCAL_CONNECTION_FAILURE


def has_labels(cluster: Cluster) -> bool:
    """Whether connections to one endpoint differ by more than their protocol."""
    return bool(cluster.proxy_protocol) or (cluster.tls is not None and not cluster.tls.sni)
