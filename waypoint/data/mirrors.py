"""Copies of requests, whose answers are thrown away and whose failures nobody sees.

A copy is sent as the request itself is (after its edits), piece by piece; one that its endpoint does not take as fast is given up, because
it must never slow the request down. Source: Envoy's request mirroring.
"""

from __future__ import annotations

from collections.abc import Sequence

from waypoint.data.clusters import ClusterHere
from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.engine import Engine
from waypoint.data.pools import Unreachable
from waypoint.http.messages import Client, Headers, Request, Response
from waypoint.telemetry.tracing import unsampled
from waypoint.upstream.cluster import PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import ResetReason
from ztunnel.dataplane.loop import Loop, Timer
from ztunnel.mesh.l7.routes import Mirror

_EARLY_BYTES = 64 << 10
"""Of a body that waits for a connection."""
_SECONDS = 60.0
"""A copy that has not been answered by then is given up."""


class Copy(ResponseUser):
    """One copy of one request."""

    __slots__ = ("_begun", "_cluster", "_early", "_early_bytes", "_ended", "_endpoint", "_over", "_timer", "_upstream")

    def __init__(self, cluster: ClusterHere, endpoint: EndpointAtWork) -> None:
        self._cluster = cluster
        self._endpoint = endpoint
        self._upstream: ServerStream | None = None
        self._begun = False
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._ended: Headers | None = None
        self._over = False
        self._timer: Timer | None = None
        endpoint.active += 1

    def start(self, loop: Loop, request: Request, ended: bool, client: Client) -> None:
        """Sends the head."""
        self._timer = loop.call_later(_SECONDS, self.cancel)
        try:
            upstream, begun = self._cluster.pool(self._endpoint).send(unsampled(request), ended, self, client)
        except Unreachable:
            self.cancel()
            return
        if ended:
            self._ended = []
        if not self._over:
            self._upstream, self._begun = upstream, begun

    def send(self, data: bytes) -> None:
        """A piece of the body."""
        upstream = self._upstream
        if self._over or upstream is None:
            return
        if not self._begun:
            self._early.append(data)
            self._early_bytes += len(data)
        elif not upstream.is_full:
            upstream.send(data)
            return
        if self._begun or self._early_bytes > _EARLY_BYTES:
            self.cancel()

    def end(self, trailers: Headers) -> None:
        """The request is complete."""
        if self._ended is None:
            self._ended = trailers
            if self._begun and self._upstream is not None:
                self._upstream.end(trailers)

    def cancel(self) -> None:
        """Gives it up."""
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        self._early.clear()
        self._endpoint.active -= 1
        self._cluster.work.breakers.release_request()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.cancel()

    def upstream_ready(self, stream: ServerStream) -> None:
        if self._over:
            stream.cancel()
            return
        self._upstream, self._begun = stream, True
        for piece in self._early:
            stream.send(piece)
        self._early.clear()
        if self._ended is not None:
            stream.end(self._ended)

    def upstream_interim(self, response: Response) -> None:
        pass

    def upstream_response(self, response: Response, ended: bool) -> None:
        if ended:
            self._done()

    def upstream_data(self, data: bytes) -> None:
        pass

    def upstream_ended(self, trailers: Headers) -> None:
        self._done()

    def upstream_failed(self, reason: ResetReason, text: str) -> None:
        self._done()

    def upstream_writable(self) -> None:
        pass

    def _done(self) -> None:
        self._upstream = None
        self.cancel()


class Copies:
    """All copies of one request."""

    __slots__ = ("_copies",)

    def __init__(self, copies: list[Copy]) -> None:
        self._copies = copies

    def send(self, data: bytes) -> None:
        """A piece of the body."""
        for copy in self._copies:
            copy.send(data)

    def end(self, trailers: Headers) -> None:
        """The request is complete."""
        for copy in self._copies:
            copy.end(trailers)

    def cancel(self) -> None:
        """The request will never be complete."""
        for copy in self._copies:
            copy.cancel()


def mirror(engine: Engine, mirrors: Sequence[Mirror], request: Request, client: Client, ended: bool) -> Copies | None:
    """Begins the copies of a request that the dice ask for."""
    copies: list[Copy] = []
    for each in mirrors:
        if each.share < 1.0 and engine.dice() >= each.share:
            continue
        cluster = engine.clusters.get(each.cluster)
        if cluster is None:
            continue
        endpoint = cluster.work.pick(PickContext(), engine.loop.now)
        if isinstance(endpoint, Shortage) or not cluster.work.breakers.admit_request():
            continue
        copied = Request(
            request.method, request.path, request.authority, list(request.headers), scheme=request.scheme, version=request.version
        )
        copy = Copy(cluster, endpoint)
        copies.append(copy)
        copy.start(engine.loop, copied, ended, client)
    return Copies(copies) if copies else None
