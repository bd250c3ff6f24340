"""The life of one request: judged, routed, edited, sent upstream, perhaps again, answered.

Order: path normalisation, CUSTOM authorization, tokens, authorization, route, rate limit, fault, CORS, redirect or direct answer,
backend, rewrite and edits, tries. Whatever is asked of somebody else on the way (a delay, an authorizer) leaves the exchange waiting: the
request's body is kept meanwhile, up to a bound, and then the client waits too. Source: Istio's order of Envoy's HTTP filters.

Length: one state machine over two streams; what each side tells changes what may be told to the other.
"""

from __future__ import annotations

import time
from typing import Final

from waypoint.data.answers import answer
from waypoint.data.asking import Questions
from waypoint.data.clusters import ClusterHere
from waypoint.data.ends import ClientStream, RequestUser, ResponseUser, ServerStream
from waypoint.data.engine import SERVER, Engine
from waypoint.data.mirrors import Copies, mirror
from waypoint.data.names import cluster_of, serves
from waypoint.data.pools import Unreachable
from waypoint.data.served import PortAtWork
from waypoint.data.tls import host_of
from waypoint.http import fault, replies
from waypoint.http.arrival import arrive
from waypoint.http.authorization import Ask
from waypoint.http.cors import CorsAllowed
from waypoint.http.editing import CompiledEdits
from waypoint.http.ext_authz import Allowed
from waypoint.http.hashing import hash_of
from waypoint.http.matching import CompiledBackend, Found, choose_backend
from waypoint.http.messages import Client, Headers, LocalReply, Request, Response
from waypoint.http.paths import normalize
from waypoint.http.replies import grpc_reply
from waypoint.http.retry import RetryState
from waypoint.http.variables import Variables
from waypoint.telemetry.summary import MessageCounter, Summary
from waypoint.telemetry.tracing import begin
from waypoint.upstream.cluster import PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import Outcome, ResetReason
from ztunnel.dataplane.loop import Timer
from ztunnel.mesh.l7.clusters import Cluster, Resolution
from ztunnel.mesh.l7.telemetry import Collector

MAX_KEPT: Final = 1 << 20
"""Bytes of a request's body that are kept for another try; a larger one is tried once. As Envoy's buffer limit."""
_HELD: Final = 64 << 10
"""Bytes of a body that wait for a decision before the client has to."""
_STRIPPED_OF_RESPONSES: Final = frozenset(
    (b"server", b"x-envoy-upstream-service-time", b"x-envoy-peer-metadata", b"x-envoy-peer-metadata-id", b"x-envoy-decorator-operation")
)
_CANCEL: Final = 0x8


class Exchange(RequestUser, ResponseUser):
    """One request and its answer."""

    __slots__ = (
        "_admitted", "_awaits_body", "_backend", "_body", "_body_size", "_client", "_client_paused", "_cluster", "_context", "_cookie",
        "_copies", "_cors", "_counters", "_done", "_endpoint", "_engine", "_forwarding", "_found", "_hold", "_keeps", "_port",
        "_questions", "_request", "_responded", "_retry", "_retrying", "_stream", "_timer", "_total", "_trailers", "_try_at", "_upgraded",
        "_upstream", "_upstream_paused", "began", "complete", "summary",
    )  # fmt: skip

    def __init__(self, engine: Engine, stream: ClientStream, request: Request, client: Client, port: PortAtWork, ended: bool) -> None:
        self._engine = engine
        self._stream = stream
        self._request = request
        self._client = client
        self._port = port
        self._found: Found | None = None
        self._backend: CompiledBackend | None = None
        self._cluster: ClusterHere | None = None
        self._context: PickContext | None = None
        self._cookie: bytes | None = None
        """For consistent hashing, to be set at the client."""
        self._endpoint: EndpointAtWork | None = None
        self._admitted = False
        """A try is counted by the cluster and the endpoint."""
        self._retrying = False
        """It is counted as a retry, too."""
        self._upstream: ServerStream | None = None
        self._retry: RetryState | None = None
        self._cors: CorsAllowed | None = None
        self._body: list[bytes] = []
        """Of the request: what waits to be sent, or is kept for another try."""
        self._body_size = 0
        self._trailers: Headers = []
        self._copies: Copies | None = None
        """Of the request, for mirrors."""
        self._questions: Questions | None = None
        """To external authorizers, where a policy wants them asked."""
        self._awaits_body = False
        """They wait for the request's body."""
        self._hold = _HELD
        self.complete = ended
        """The whole request has come."""
        self._keeps = True
        """The body is kept from its beginning."""
        self._forwarding = False
        """The request has been sent upstream, as far as it has come."""
        self._responded = False
        """The answer's head has gone to the client."""
        self._upgraded = False
        self._client_paused = False
        self._upstream_paused = False
        self._timer: Timer | None = None
        self._total: Timer | None = None
        self._done = False
        self.began = engine.loop.now
        self._try_at = 0.0
        self.summary = Summary(port.telemetry, request, client, time.time())
        self._counters: tuple[MessageCounter, MessageCounter] | None = None
        """Of gRPC messages, both ways."""

    # Deciding

    def start(self) -> None:
        """Takes the request on its way."""
        request = self._request
        path = normalize(request.path, self._engine.served.options.path_normalization)
        if path is None:
            self._reply(replies.bad_path())
            return
        request.path = request.original_path = path
        self._identify(request)
        if self.summary.is_grpc:
            self._counters = (MessageCounter(), MessageCounter())
        asked = self._port.guard.custom(request, self._client)
        if asked is None:
            self._authenticate()
        elif isinstance(asked, Ask):
            self._ask(asked)
        else:
            self._reply(asked.reply())

    def _ask(self, asked: Ask) -> None:
        """External authorizers are asked; some want the request's body, too."""
        engine = self._engine
        authorizers = [engine.authorizer(provider) for provider in asked.providers]
        questions = Questions(engine.loop, engine.clusters, authorizers, self._request, self._client, self._authorized)
        self._questions = questions
        if questions.body_bytes and not self.complete:
            self._awaits_body = True
            self._hold = max(_HELD, questions.body_bytes + 1)
        else:
            self._put_questions(questions)

    def _put_questions(self, questions: Questions) -> None:
        self._awaits_body = False
        wanted = questions.body_bytes
        body = b"".join(self._body) if wanted else b""
        if len(body) > wanted and not questions.takes_partial:
            self._reply(replies.too_large())
            return
        questions.ask(body, partial=not self.complete)

    def _authorized(self, verdict: Allowed | LocalReply) -> None:
        if self._done:
            return
        if isinstance(verdict, LocalReply):
            self._reply(verdict)
        else:
            self._authenticate()

    def _authenticate(self) -> None:
        request = self._request
        gate = self._port.gate
        if gate is not None:
            checked = gate.check(request, time.time())
            if isinstance(checked, LocalReply):
                self._reply(checked)
                return
            request.claims = checked
        verdict = self._port.guard.decide(request, self._client, request.claims)
        self.summary.audited = verdict.audited
        if verdict.shadow:
            self.summary.shadow = tuple((each.policy, each.action.value, each.result) for each in verdict.shadow)
        if not verdict.allowed:
            self._reply(verdict.reply())
            return
        self._route()

    def _identify(self, request: Request) -> None:
        has_id = arrive(request, self._client, self._engine.served.told_identity)
        if not has_id:
            request.headers.append((b"x-request-id", self._engine.request_id()))
        tracing = self._port.telemetry.settings.tracing
        if tracing.collector is not Collector.NONE:
            self.summary.span = begin(tracing, request, self._engine.randrange)

    def _route(self) -> None:
        request, client, engine = self._request, self._client, self._engine
        found = self._port.routes.find(request, client)
        if found is None:
            self._reply(replies.no_route())
            return
        self._found = found
        route = found.compiled
        if route.limiter is not None and not route.limiter.take(client, engine.loop.now):
            self._reply(replies.rate_limited())
            return
        if found.route.fault is not None:
            delay, abort = fault.plan(found.route.fault, engine.dice)
            if delay > 0:
                self.summary.flags = "DI"
                self._timer = engine.loop.call_later(delay, lambda: self._after_fault(abort))
                return
            if abort is not None:
                self._reply(abort)
                return
        self._after_fault(None)

    def _after_fault(self, abort: LocalReply | None) -> None:
        if self._done:
            return
        if abort is not None:
            self._reply(abort)
            return
        found = self._found
        assert found is not None
        request, client = self._request, self._client
        if found.compiled.cors is not None:
            answer = found.compiled.cors.check(request)
            if isinstance(answer, LocalReply):
                self._reply(answer)
                return
            self._cors = answer
        if found.redirect is not None:
            self._reply(found.redirect.answer(request, client), edited=True)
        elif found.route.direct is not None:
            self._reply(replies.direct(found.route.direct), edited=True)
        else:
            self._choose(found)

    def _choose(self, found: Found) -> None:
        backend = choose_backend(found, self._engine.dice)
        if backend is None:
            self._reply(replies.no_backends())
            return
        if backend.status:
            self._reply(replies.backend_status(backend.status))
            return
        cluster = self._engine.clusters.get(backend.cluster)
        if cluster is None and self._port.cluster is not None and backend.cluster == self._port.cluster.key:
            cluster = self._engine.clusters.own(self._port.cluster)
        if cluster is None:
            self._reply(replies.no_cluster())
        elif cluster.cluster.resolution is Resolution.DYNAMIC:
            self._resolve(found, backend, cluster.cluster)
        else:
            self._prepare(found, backend, cluster)

    def _resolve(self, found: Found, backend: CompiledBackend, cluster: Cluster) -> None:
        """The host that the request names is looked up, if it is one of the service's."""
        engine, service = self._engine, self._port.service
        host = host_of(self._request.authority.decode("ascii", "replace")).lower()

        def resolved(addresses: tuple[str, ...]) -> None:
            if self._done:
                return
            if addresses:
                self._prepare(found, backend, engine.clusters.own(cluster_of(cluster, host, addresses)))
            else:
                self._reply(replies.dns_failure())

        if service is None or not serves(service.host_patterns, host):
            self._reply(replies.no_route())
        else:
            engine.names.resolve(host, resolved)

    def _prepare(self, found: Found, backend: CompiledBackend, cluster: ClusterHere) -> None:
        self._backend, self._cluster = backend, cluster
        request, route = self._request, found.compiled
        # whoever comes to a gateway from outside has no identity, and no say in how often and how long we try
        self._retry = RetryState(route.retry, request, found.route.timeout, trusted=self._client.identity is not None)
        if backend.authority:
            request.authority = backend.authority
        if found.rewrite is not None and not found.rewrite.apply(request):
            self._reply(replies.bad_path())
            return
        if not (backend.request.empty and route.request.empty):
            headers = list(request.headers)
            self._edit(backend.request, headers)
            self._edit(route.request, headers)
            request.headers = headers
        self._keeps = self._retry.may_retry and not request.upgrade
        key = None
        if cluster.work.hashed:
            key, self._cookie = hash_of(cluster.cluster.balancing.hash_keys, request, self._client, self._engine.randrange)
        client = self._client
        self._context = PickContext(
            key, (client.destination, client.service_port), remote=route.retry.remote_localities, avoids=self._retry.avoids_previous
        )
        if found.route.mirrors:
            self._mirror(found)
        if self.complete:
            self._start_total()
        self._try()

    def _mirror(self, found: Found) -> None:
        ended = self.complete and not self._body and not self._trailers
        self._copies = mirror(self._engine, found.route.mirrors, self._request, self._client, ended)
        if self._copies is not None and not ended:
            for piece in self._body:
                self._copies.send(piece)
            if self.complete:
                self._copies.end(self._trailers)

    def _edit(self, edits: CompiledEdits, headers: Headers, response: Response | None = None) -> None:
        if edits.empty:
            return
        variables = None
        if edits.dynamic:
            found = self._found
            name = "" if found is None else found.route.name
            variables = Variables(self._request, self._client, time.time(), name, self._engine.hostname)
            variables.response = response
            if self._cluster is not None:
                variables.cluster = self._cluster.cluster.key
            if self._endpoint is not None:
                variables.upstream = self._endpoint.key
        edits.apply(headers, variables)

    # Trying

    def _start_total(self) -> None:
        retry = self._retry
        if retry is not None and retry.timeout > 0 and self._total is None:
            self._total = self._engine.loop.call_later(retry.timeout, self._timed_out)

    def _timed_out(self) -> None:
        self._total = None
        if self._done:
            return
        self._cancel_upstream()
        self._over(Outcome(timed_out=True))
        reply = replies.request_timeout()
        if self._responded:  # the timeout is the whole answer's: the client sees a reset
            self.summary.flags, self.summary.details = reply.flag, reply.details
        if self._retry is not None and self._retry.grpc_deadline:
            reply.grpc_status = 4
        self._reply(reply)

    def _try(self) -> None:
        cluster, retry = self._cluster, self._retry
        assert cluster is not None
        assert retry is not None
        work, context, now = cluster.work, self._context, self._engine.loop.now
        assert context is not None
        endpoint = work.pick(context, now)
        if isinstance(endpoint, Shortage):
            self._reply(replies.no_healthy_upstream())
            return
        if not work.breakers.admit_request():
            self._reply(replies.overflow())
            return
        self._admitted = True
        endpoint.active += 1
        self._endpoint = endpoint
        if retry.may_retry:
            context.tried.append(endpoint)
        self._try_at = now
        ended = self.complete and not self._body and not self._trailers
        try:
            upstream, begun = cluster.pool(endpoint).send(self._request, ended, self, self._client)
        except Unreachable as error:
            self.upstream_failed(error.reason, error.text)
            return
        self._upstream = upstream
        if retry.per_try > 0:
            self._timer = self._engine.loop.call_later(retry.per_try, self._try_timed_out)
        if begun:
            self._begun(upstream, ended)

    def upstream_ready(self, stream: ServerStream) -> None:
        if self._done:
            stream.cancel()
            return
        self._upstream = stream
        self._begun(stream, self.complete and not self._body and not self._trailers)

    def _begun(self, upstream: ServerStream, ended: bool) -> None:
        self._forwarding = True
        if not ended:
            self._send_kept(upstream)

    def _over(self, outcome: Outcome | None) -> None:
        """A try is over: the cluster and the endpoint have one less, and hear what came of it."""
        cluster, endpoint = self._cluster, self._endpoint
        if cluster is None:
            return
        if self._retrying:
            self._retrying = False
            cluster.work.breakers.release_retry()
        if not self._admitted or endpoint is None:
            return
        self._admitted = False
        endpoint.active -= 1
        cluster.work.breakers.release_request()
        if outcome is not None and cluster.watches:
            cluster.work.done(endpoint, outcome, self._engine.loop.now)

    def _send_kept(self, upstream: ServerStream) -> None:
        body = self._body
        if not self._keeps:
            self._body = []
        for piece in body:
            upstream.send(piece)
        if self.complete:
            upstream.end(self._trailers)
        elif upstream.is_full:
            self._pause_client()
        else:
            self._resume_client()

    def _try_timed_out(self) -> None:
        self._timer = None
        if self._done or self._responded:
            return
        self._cancel_upstream()
        outcome = Outcome(timed_out=True)
        if self._again(outcome):
            return
        self._over(outcome)
        assert self._retry is not None
        self._reply(replies.per_try_timeout(exhausted=self._retry.exhausted))

    def _cancel_upstream(self) -> None:
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.cancel()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _again(self, outcome: Outcome) -> bool:
        """Whether there is another try."""
        retry = self._retry
        if retry is None or self._responded or not self._keeps:
            return False
        delay = retry.wants(outcome, self._engine.dice)
        if delay is None:
            return False
        cluster = self._cluster
        self._over(outcome)
        if cluster is None or not cluster.work.breakers.admit_retry():
            retry.give_up()
            return False
        self._retrying = True
        self._forwarding = False
        self._timer = self._engine.loop.call_later(delay, self._retry_now)
        return True

    def _retry_now(self) -> None:
        self._timer = None
        if not self._done:
            self._try()

    # What the client tells

    def request_data(self, data: bytes) -> None:
        if self._done:
            return
        size = len(data)
        self.summary.bytes_in += size
        if self._counters is not None:
            self._counters[0].feed(data)
        if self._copies is not None:
            self._copies.send(data)
        if self._keeps:
            if self._body_size + size > MAX_KEPT and self._forwarding:
                self._keeps = False
                self._body = []
            else:
                self._body.append(data)
                self._body_size += size
        elif not self._forwarding:
            self._body.append(data)
            self._body_size += size
        upstream = self._upstream
        if upstream is not None and self._forwarding:
            upstream.send(data)
            if upstream.is_full:
                self._pause_client()
        elif not self._forwarding:
            if self._body_size >= self._hold:
                self._pause_client()
            if self._awaits_body and self._questions is not None and self._body_size > self._questions.body_bytes:
                self._put_questions(self._questions)

    def request_ended(self, trailers: Headers) -> None:
        if self._done:
            return
        self.complete = True
        self._trailers = trailers
        if self._copies is not None:
            self._copies.end(trailers)
        if self._awaits_body and self._questions is not None:
            self._put_questions(self._questions)
            return
        if self._upstream is not None and self._forwarding:
            self._upstream.end(trailers)
        if self._retry is not None and not self._responded:
            self._start_total()

    def client_lost(self, why: str) -> None:
        if self._done:
            return
        self._cancel_upstream()
        self.summary.flags = "DC"
        self.summary.details = why
        self._finish()

    def client_writable(self) -> None:
        if self._upstream_paused and self._upstream is not None:
            self._upstream_paused = False
            self._upstream.resume()

    def _pause_client(self) -> None:
        if not self._client_paused:
            self._client_paused = True
            self._stream.pause()

    def _resume_client(self) -> None:
        if self._client_paused:
            self._client_paused = False
            self._stream.resume()

    # What the endpoint tells

    def upstream_interim(self, response: Response) -> None:
        if not self._done and not self._responded:
            self._stream.interim(response)

    def upstream_response(self, response: Response, ended: bool) -> None:
        if self._done:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        retry = self._retry
        cluster, endpoint, status = self._cluster, self._endpoint, response.status
        # gRPC's status is among the headers of an answer without a body only.
        if retry is not None and (status >= 400 or ended or retry.names_headers) and self._again(Outcome(status, response.headers)):
            upstream, self._upstream = self._upstream, None
            if upstream is not None and not ended:
                upstream.cancel()
            return
        if retry is not None and retry.exhausted:
            self.summary.flags = "URX"
        if cluster is not None and cluster.watches and self._admitted and endpoint is not None:
            cluster.work.done(endpoint, Outcome(status, response.headers), self._engine.loop.now)
        if self._total is not None and response.status == 101:
            self._total.cancel()
            self._total = None
        self._keeps = False
        self._body = []
        if ended:
            self._upstream = None
        self._respond(response, ended)

    def _respond(self, response: Response, ended: bool) -> None:
        engine = self._engine
        self._responded = True
        summary = self.summary
        summary.status = response.status
        summary.response = response
        summary.upstream_seconds = engine.loop.now - self._try_at
        if response.status == 101:
            self._upgraded = True
        headers = [line for line in response.headers if line[0] not in _STRIPPED_OF_RESPONSES]
        response.headers = headers
        backend, found = self._backend, self._found
        if backend is not None and not backend.response.empty:
            self._edit(backend.response, headers, response)
        if found is not None and not found.compiled.response.empty:
            self._edit(found.compiled.response, headers, response)
        if self._questions is not None:
            for allowed in self._questions.allowed:
                allowed.decorate(headers)
        if self._cookie is not None:
            headers.append((b"set-cookie", self._cookie))
        if self._cors is not None and found is not None and found.compiled.cors is not None:
            found.compiled.cors.decorate(headers, self._cors)
        headers.append((b"server", SERVER))
        headers.append((b"x-envoy-upstream-service-time", b"%d" % int(summary.upstream_seconds * 1000)))
        if response.get(b"date") is None:
            headers.append((b"date", engine.date()))
        self._stream.respond(response, ended)
        if ended:
            self._finish()

    def upstream_data(self, data: bytes) -> None:
        if self._done:
            return
        self.summary.bytes_out += len(data)
        if self._counters is not None:
            self._counters[1].feed(data)
        stream = self._stream
        stream.send(data)
        if stream.is_full and not self._upstream_paused and self._upstream is not None:
            self._upstream_paused = True
            self._upstream.pause()

    def upstream_ended(self, trailers: Headers) -> None:
        if self._done:
            return
        if not self._upgraded:
            self._upstream = None
        self.summary.trailers = trailers
        self._stream.end(trailers)
        self._finish()

    def upstream_failed(self, reason: ResetReason, text: str) -> None:
        if self._done:
            return
        self._upstream = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._responded:
            self.summary.flags = "UC" if reason is ResetReason.CONNECTION_TERMINATION else "UR"
            self.summary.details = f"upstream_reset_after_response_started{{{'_'.join(reason.value.split())}}}"
            self._over(Outcome(reset=reason))
            self._stream.reset()
            self._finish()
            return
        outcome = Outcome(reset=reason, request_begun=self._forwarding)
        if self._again(outcome):
            return
        self._over(outcome)
        retry = self._retry
        retried = retry is not None and retry.retries > 0
        exhausted = retry is not None and retry.exhausted
        self.summary.transport_failure = text
        self._reply(replies.upstream_reset(reason, retried=retried, exhausted=exhausted, transport=text))

    def upstream_writable(self) -> None:
        self._resume_client()

    # Answering

    def _reply(self, reply: LocalReply, *, edited: bool = False) -> None:
        """The proxy's own answer, the last thing of this exchange."""
        if self._responded:
            self._stream.reset()
            self._finish()
            return
        self.summary.flags = reply.flag or self.summary.flags
        self.summary.details = reply.details
        if self.summary.is_grpc:
            reply = grpc_reply(reply)
            self.summary.grpc_status = reply.grpc_status
        self.summary.status = reply.status
        self.summary.bytes_out += len(reply.body)
        self._responded = True
        self._cancel_upstream()
        answer(self._engine, self._stream, reply, self._edit_own if edited else None)
        self._finish()

    def _edit_own(self, headers: Headers, response: Response) -> None:
        """A route's edits of its own answer (a redirect's, a direct one's)."""
        if self._found is not None:
            self._edit(self._found.compiled.response, headers, response)

    def _finish(self) -> None:
        if self._done:
            return
        self._done = True
        if self._total is not None:
            self._total.cancel()
        if self._questions is not None:
            self._questions.cancel()
        self._cancel_upstream()
        self._over(None)
        self._body = []
        if self._copies is not None and not self.complete:
            self._copies.cancel()
        self._sum_up()

    def _sum_up(self) -> None:
        """What metrics, logs and spans tell of it."""
        engine, summary, retry = self._engine, self.summary, self._retry
        summary.duration = engine.loop.now - self.began
        if self._cluster is not None:
            summary.cluster = self._cluster.cluster.key
        if self._endpoint is not None:
            summary.endpoint = self._endpoint.endpoint
            summary.attempts = 1 if retry is None else retry.retries + 1
        if self._found is not None:
            summary.route = self._found.route.name
        if self._counters is not None:
            summary.request_messages, summary.response_messages = self._counters[0].count, self._counters[1].count
        engine.recorder.request_done(summary)
