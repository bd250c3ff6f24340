"""Asking external authorizers about a request, one after the other, before it goes on.

What one does not answer in its time is an error of its, and the provider says what that means.
"""

from __future__ import annotations

from collections.abc import Callable

from waypoint.data.clusters import Clusters
from waypoint.data.errands import Answer, Errand
from waypoint.http.ext_authz import Allowed, Authorizer
from waypoint.http.messages import Client, LocalReply, Request
from ztunnel.dataplane.loop import Loop

Done = Callable[[Allowed | LocalReply], None]


class Questions:
    """What is asked about one request: all its authorizers must allow it."""

    __slots__ = ("_authorizers", "_body", "_client", "_clusters", "_done", "_errand", "_loop", "_partial", "_request", "allowed")

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
        self._errand: Errand | None = None
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
        if self._errand is not None:
            self._errand.cancel()

    def _next(self) -> None:
        authorizer = self._authorizers[len(self.allowed)]
        provider = authorizer.provider
        size = provider.body_bytes
        partial = bool(size) and (self._partial or len(self._body) > size)
        asked, content = authorizer.question(self._request, self._client, self._body[:size], partial=partial)
        self._errand = Errand(self._loop, self._clusters, self._answered)
        self._errand.send(provider.cluster, asked, content, provider.timeout)

    def _answered(self, answer: Answer | None) -> None:
        self._errand = None
        authorizer = self._authorizers[len(self.allowed)]
        if answer is None:
            verdict = authorizer.failed()
        else:
            verdict = authorizer.verdict(answer.response.status, answer.response.headers, answer.body, answer.trailers)
        if isinstance(verdict, LocalReply):
            self._done(verdict)
            return
        verdict.apply(self._request)
        self.allowed.append(verdict)
        if len(self.allowed) == len(self._authorizers):
            self._done(verdict)
        else:
            self._next()
