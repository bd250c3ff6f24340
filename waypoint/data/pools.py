"""Connections to endpoints, kept for the next request: one pool per endpoint and HTTP version.

Bounds: idle connections of one endpoint and their age; everything else is bounded by requests, which circuit breakers bound.
"""

from __future__ import annotations

from typing import Final

from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.http1_client import Http1Client
from waypoint.data.sockets import SocketStream
from waypoint.data.tunnels import Tunnels
from waypoint.http.messages import Request
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import Loop
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamError, UpstreamTimeout
from ztunnel.mesh.l7.clusters import Cluster, Endpoint
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


class Http1Pool:
    """Connections that speak HTTP/1.1. Implements `Keeper`."""

    __slots__ = ("_all", "_cluster", "_dialler", "_endpoint", "_idle", "_loop", "_retired")

    def __init__(self, loop: Loop, dialler: Dialler, cluster: Cluster, endpoint: Endpoint) -> None:
        self._loop = loop
        self._dialler = dialler
        self._cluster = cluster
        self._endpoint = endpoint
        self._idle: list[Http1Client] = []
        self._all: set[Http1Client] = set()
        self._retired = False

    def send(self, request: Request, ended: bool, user: ResponseUser) -> ServerStream:
        """Begins a request on an idle connection or a new one.

        Raises:
            Unreachable: no connection is to be had.
        """
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.is_usable:
                connection.request(request, ended, user)
                return connection
        connection = Http1Client(self._loop, self)
        self._all.add(connection)
        try:
            connection.connect(self._dialler.open(self._cluster, self._endpoint, connection))
        except MeshError as error:
            self._all.discard(connection)
            raise Unreachable(reason_of(error), str(error)) from error
        if connection.failure is not None:
            raise Unreachable(*connection.failure)
        connection.request(request, ended, user)
        return connection

    def freed(self, connection: Http1Client) -> None:
        limits = self._cluster.limits
        worn = limits.max_requests_per_connection and connection.requests >= limits.max_requests_per_connection
        old = limits.max_connection_duration and self._loop.now - connection.opened_at >= limits.max_connection_duration
        if self._retired or worn or old or len(self._idle) >= MAX_IDLE:
            connection.close()
        else:
            self._idle.append(connection)

    def gone(self, connection: Http1Client) -> None:
        self._all.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)

    def update(self, cluster: Cluster) -> None:
        """The limits may have changed."""
        self._cluster = cluster

    def sweep(self, now: float) -> None:
        """Closes what has been idle for too long."""
        for connection in [each for each in self._idle if now - each.idle_since >= self._cluster.limits.idle_timeout]:
            connection.close()

    def retire(self) -> None:
        """Nothing new goes this way; what is under way ends in its time."""
        self._retired = True
        for connection in list(self._idle):
            connection.close()

    def __len__(self) -> int:
        return len(self._all)


def reason_of(error: MeshError) -> ResetReason:
    """How a client reads why there is no connection."""
    if isinstance(error, UpstreamTimeout):
        return ResetReason.CONNECTION_TIMEOUT
    return ResetReason.CONNECTION_FAILURE if isinstance(error, UpstreamError) else ResetReason.LOCAL_CONNECTION_FAILURE
