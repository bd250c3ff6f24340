"""A request of the proxy's own to a cluster: to an authorizer, to a collector. Short, whole, within a deadline.

Sent like any other: picked from its cluster, over a pooled connection. What does not answer, answers too much or cannot be reached has no
answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from waypoint.data.clusters import ClusterHere, Clusters
from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.pools import Unreachable
from waypoint.http.messages import Headers, Request, Response
from waypoint.upstream.cluster import PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import Outcome, ResetReason
from ztunnel.dataplane.loop import Loop, Timer

MAX_ANSWER: Final = 256 << 10
"""Bytes of an answer's body; more is none."""


class Answer:
    """What came back, whole."""

    __slots__ = ("body", "response", "trailers")

    def __init__(self, response: Response, body: bytes, trailers: Headers) -> None:
        self.response = response
        self.body = body
        self.trailers = trailers


class Errand(ResponseUser):
    """One request and its answer."""

    __slots__ = ("_body", "_cluster", "_clusters", "_content", "_done", "_endpoint", "_loop", "_over", "_response", "_timer", "_upstream")

    def __init__(self, loop: Loop, clusters: Clusters, done: Callable[[Answer | None], None]) -> None:
        """
        Args:
            done: called exactly once, unless it is cancelled; perhaps before `send` returns. None: there is no answer.
        """
        self._loop = loop
        self._clusters = clusters
        self._done = done
        self._cluster: ClusterHere | None = None
        self._endpoint: EndpointAtWork | None = None
        self._upstream: ServerStream | None = None
        self._timer: Timer | None = None
        self._response: Response | None = None
        self._content = b""
        self._body = bytearray()
        self._over = False

    def send(self, key: str, request: Request, content: bytes, seconds: float) -> None:
        """Begins.

        Args:
            key: of the cluster.
            content: the request's body.
        """
        cluster = self._clusters.get(key)
        if cluster is None:
            self._fail()
            return
        endpoint = cluster.work.pick(PickContext(), self._loop.now)
        if isinstance(endpoint, Shortage) or not cluster.work.breakers.admit_request():
            self._fail()
            return
        endpoint.active += 1
        self._cluster, self._endpoint = cluster, endpoint
        self._timer = self._loop.call_later(seconds, self._timed_out)
        self._content = content
        try:
            upstream, begun = cluster.pool(endpoint).send(request, not content, self)
        except Unreachable as error:
            self.upstream_failed(error.reason, error.text)
            return
        if self._over:
            return
        self._upstream = upstream
        if begun:
            self._begin(upstream)

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        self._close(None)

    def _begin(self, upstream: ServerStream) -> None:
        content, self._content = self._content, b""
        if content:
            upstream.send(content)
            upstream.end([])

    # What the endpoint tells

    def upstream_ready(self, stream: ServerStream) -> None:
        if self._over:
            stream.cancel()
            return
        self._upstream = stream
        self._begin(stream)

    def upstream_interim(self, response: Response) -> None:
        pass

    def upstream_response(self, response: Response, ended: bool) -> None:
        if self._over:
            return
        self._response = response
        if ended:
            self._answered([])

    def upstream_data(self, data: bytes) -> None:
        if self._over:
            return
        self._body += data
        if len(self._body) > MAX_ANSWER:
            self._fail()

    def upstream_ended(self, trailers: Headers) -> None:
        if not self._over:
            self._answered(trailers)

    def upstream_failed(self, reason: ResetReason, text: str) -> None:
        if not self._over:
            self._upstream = None
            self._fail(Outcome(reset=reason))

    def upstream_writable(self) -> None:
        pass

    # The end

    def _timed_out(self) -> None:
        self._timer = None
        if not self._over:
            self._fail(Outcome(timed_out=True))

    def _answered(self, trailers: Headers) -> None:
        response = self._response
        assert response is not None
        self._upstream = None
        self._close(Outcome(response.status, response.headers))
        self._done(Answer(response, bytes(self._body), trailers))

    def _fail(self, outcome: Outcome | None = None) -> None:
        self._close(outcome)
        self._done(None)

    def _close(self, outcome: Outcome | None) -> None:
        if self._over:
            return
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.cancel()
        cluster, endpoint = self._cluster, self._endpoint
        if cluster is not None and endpoint is not None:
            endpoint.active -= 1
            cluster.work.breakers.release_request()
            if outcome is not None and cluster.watches:
                cluster.work.done(endpoint, outcome, self._loop.now)
