"""Asking external authorizers about a request, one after the other, before it goes on.

Each is asked like any endpoint: picked from its cluster, over a pooled connection, within the provider's time. What does not answer,
answers too much or cannot be reached is an error, and the provider says what that means.
"""

from __future__ import annotations

from collections.abc import Callable

from waypoint.data.clusters import ClusterHere, Clusters
from waypoint.data.ends import ResponseUser, ServerStream
from waypoint.data.pools import Unreachable
from waypoint.http.ext_authz import MAX_ANSWER, Allowed, Authorizer
from waypoint.http.messages import Client, Headers, LocalReply, Request, Response
from waypoint.upstream.cluster import PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import Outcome, ResetReason
from ztunnel.dataplane.loop import Loop, Timer

Done = Callable[[Allowed | LocalReply], None]


class Asking(ResponseUser):
    """One question to one authorizer."""

    __slots__ = ("_answer", "_authorizer", "_body", "_cluster", "_clusters", "_done", "_endpoint", "_loop", "_over", "_timer", "_upstream")

    def __init__(self, loop: Loop, clusters: Clusters, authorizer: Authorizer, done: Done) -> None:
        """
        Args:
            done: called exactly once, unless it is cancelled; perhaps before `ask` returns.
        """
        self._loop = loop
        self._clusters = clusters
        self._authorizer = authorizer
        self._done = done
        self._cluster: ClusterHere | None = None
        self._endpoint: EndpointAtWork | None = None
        self._upstream: ServerStream | None = None
        self._timer: Timer | None = None
        self._answer: Response | None = None
        self._body = bytearray()
        self._over = False

    def ask(self, request: Request, client: Client, body: bytes, *, partial: bool) -> None:
        """Begins. `body`, `partial`: see `Authorizer.question`."""
        question, content = self._authorizer.question(request, client, body, partial=partial)
        cluster = self._clusters.get(self._authorizer.provider.cluster)
        if cluster is None:
            self._fail()
            return
        now = self._loop.now
        endpoint = cluster.work.pick(PickContext(), now)
        if isinstance(endpoint, Shortage) or not cluster.work.breakers.admit_request():
            self._fail()
            return
        endpoint.active += 1
        self._cluster, self._endpoint = cluster, endpoint
        self._timer = self._loop.call_later(self._authorizer.provider.timeout, self._timed_out)
        self._body[:] = content
        try:
            upstream, begun = cluster.pool(endpoint).send(question, not content, self)
        except Unreachable as error:
            self.upstream_failed(error.reason, error.text)
            return
        if self._over:
            return
        self._upstream = upstream
        if begun:
            self._send(upstream)

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        self._close(None)

    def _send(self, upstream: ServerStream) -> None:
        content = bytes(self._body)
        self._body.clear()
        if content:
            upstream.send(content)
            upstream.end([])

    # What the authorizer tells

    def upstream_ready(self, stream: ServerStream) -> None:
        if self._over:
            stream.cancel()
            return
        self._upstream = stream
        self._send(stream)

    def upstream_interim(self, response: Response) -> None:
        pass

    def upstream_response(self, response: Response, ended: bool) -> None:
        if self._over:
            return
        self._answer = response
        self._body.clear()
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
        answer = self._answer
        assert answer is not None
        self._upstream = None
        body = bytes(self._body)
        self._close(Outcome(answer.status, answer.headers))
        self._done(self._authorizer.verdict(answer.status, answer.headers, body, trailers))

    def _fail(self, outcome: Outcome | None = None) -> None:
        self._close(outcome)
        self._done(self._authorizer.failed())

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


class Questions:
    """What is asked about one request: all its authorizers must allow it."""

    __slots__ = ("_asking", "_authorizers", "_body", "_client", "_clusters", "_done", "_loop", "_partial", "_request", "allowed")

    def __init__(self, loop: Loop, clusters: Clusters, authorizers: list[Authorizer], request: Request, client: Client, done: Done) -> None:
        """
        Args:
            done: hears a denial, or the last authorizer's permission once the others have been applied to the request.
        """
        self._loop = loop
        self._clusters = clusters
        self._authorizers = authorizers
        self._request = request
        self._client = client
        self._done = done
        self._asking: Asking | None = None
        self._body = b""
        self._partial = False
        self.allowed: list[Allowed] = []
        """What the authorizers want of the answer."""

    @property
    def body_bytes(self) -> int:
        """How much of the request's body is asked about."""
        return max(each.provider.body_bytes for each in self._authorizers)

    @property
    def takes_partial(self) -> bool:
        """Whether all who want a body are content with its beginning."""
        return all(each.provider.body_partial for each in self._authorizers if each.provider.body_bytes)

    def ask(self, body: bytes, *, partial: bool) -> None:
        """Begins."""
        self._body, self._partial = body, partial
        self._next()

    def cancel(self) -> None:
        """Nobody wants to know any more."""
        if self._asking is not None:
            self._asking.cancel()

    def _next(self) -> None:
        authorizer = self._authorizers[len(self.allowed)]
        size = authorizer.provider.body_bytes
        self._asking = Asking(self._loop, self._clusters, authorizer, self._answered)
        self._asking.ask(self._request, self._client, self._body[:size], partial=bool(size) and (self._partial or len(self._body) > size))

    def _answered(self, verdict: Allowed | LocalReply) -> None:
        self._asking = None
        if isinstance(verdict, LocalReply):
            self._done(verdict)
            return
        verdict.apply(self._request)
        self.allowed.append(verdict)
        if len(self.allowed) == len(self._authorizers):
            self._done(verdict)
        else:
            self._next()
