"""Counts requests and connections in a worker: Istio's labels, one look-up for what is alike.

`take` gives what came in since the last time, for the supervisor's exposition. The number of remembered label sets is bounded: when it is
full, what was counted is set aside and counting begins anew, so nothing is lost.
Source: Istio `stats` filter as a waypoint runs it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Final

from waypoint.http.messages import Client, Headers, header
from waypoint.telemetry.access_log import AccessLogger
from waypoint.telemetry.attributes import SummaryAttributes
from waypoint.telemetry.increments import Increment, Labels
from waypoint.telemetry.series import LABELS, Child
from waypoint.telemetry.service import UNKNOWN, ServiceTelemetry
from waypoint.telemetry.spans import Finished, finish
from waypoint.telemetry.summary import Flow, Summary
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.telemetry import Metric, PeerWorkload
from ztunnel.runtime.logs import fields

log = logging.getLogger("waypoint.audit")

MAX_CHILDREN: Final = 8192
MAX_PENDING: Final = 65536
"""Increments that wait to be taken when a worker's supervisor does not ask."""
MAX_LINE_BYTES: Final = 8 << 20
"""Of access logs that wait to be taken."""
MAX_LOGGERS: Final = 4096
MAX_SPANS: Final = 4096
"""That wait for a collector."""
LONGEST_AUDITED: Final = 1024
_HTTP: Final = (
    *(Metric.REQUESTS, Metric.DURATION, Metric.REQUEST_SIZE, Metric.RESPONSE_SIZE),
    *(Metric.GRPC_REQUESTS, Metric.GRPC_RESPONSES),
)
_TCP: Final = (Metric.TCP_OPENED, Metric.TCP_CLOSED, Metric.TCP_SENT, Metric.TCP_RECEIVED)


class Recorder:
    """Of one worker."""

    def __init__(self, max_children: int = MAX_CHILDREN, hostname: str = "") -> None:
        """
        Args:
            hostname: of this proxy's pod.
            max_children: sets of labels that are remembered.
        """
        self._max_children = max_children
        self._hostname = hostname
        self._loggers: dict[int, tuple[ServiceTelemetry, list[AccessLogger]]] = {}
        self._lines: list[bytes] = []
        self._line_bytes = 0
        self._spans: list[Finished] = []
        self._own: Mapping[str, str] = {}
        self._reporter = "waypoint"
        """`source` for an ingress gateway."""
        self._peers: Mapping[str, PeerWorkload] = {}
        self._children: dict[object, Child] = {}
        self._pending: list[Increment] = []
        self._flows: set[Flow] = set()
        self.dropped = 0
        """Increments and lines that nobody took in time."""
        self.shadow: dict[tuple[str, str, str], int] = {}
        """Verdicts of dry-run policies since the last `take_shadow`: (policy, action, result)."""

    def update(self, peers: Mapping[str, PeerWorkload], reporter: str = "waypoint", own: Mapping[str, str] | None = None) -> None:
        """From now on.

        Args:
            peers: workloads by address.
            own: tags of spans that say who this proxy is.
        """
        self._own = own or {}
        self._set_aside()
        self._reporter = reporter
        self._peers = peers

    # Events

    def request_done(self, summary: Summary) -> None:
        """A request has come to its end."""
        if summary.mirrored:
            return
        for verdict in summary.shadow:
            self.shadow[verdict] = self.shadow.get(verdict, 0) + 1
        is_grpc = summary.is_grpc
        if is_grpc and summary.grpc_status is None:
            summary.grpc_status = grpc_status_of(summary)
        child = self._child_of(summary, is_grpc)
        child.requests += 1
        child.duration.observe(summary.duration * 1000.0)
        child.request_size.observe(summary.bytes_in)
        child.response_size.observe(summary.bytes_out)
        if is_grpc:
            child.request_messages += summary.request_messages
            child.response_messages += summary.response_messages
        if summary.audited:
            self._audit(summary)
        if summary.service.settings.access_logs:
            self._log(summary)
        span = summary.span
        if span is not None and span.is_reported:
            if len(self._spans) >= MAX_SPANS:
                self.dropped += 1
            else:
                self._spans.append(finish(span, summary, self.attributes(summary), self._own))

    def tcp_opened(self, flow: Flow) -> None:
        """A connection goes to its endpoint (or was refused: `tcp_closed` follows at once)."""
        self._flows.add(flow)
        self._tcp_child(flow, "").opened += 1

    def tcp_closed(self, flow: Flow) -> None:
        """It has ended; `flow.flags` say how."""
        self._flows.discard(flow)
        self._moved(flow)
        self._tcp_child(flow, flow.flags).closed += 1
        if flow.service.settings.access_logs:
            self._log(flow)

    def take(self) -> list[Increment]:
        """What came in since the last time, bytes of live connections included."""
        for flow in self._flows:
            self._moved(flow)
        self._set_aside(keep=True)
        found, self._pending = self._pending, []
        return found

    def take_shadow(self) -> dict[tuple[str, str, str], int]:
        """Verdicts of dry-run policies since the last time."""
        found, self.shadow = self.shadow, {}
        return found

    def take_log(self) -> bytes:
        """Lines of access logs since the last time."""
        lines, self._lines = self._lines, []
        self._line_bytes = 0
        return b"".join(lines)

    def take_spans(self, most: int) -> list[Finished]:
        """The oldest spans that wait for a collector."""
        found = self._spans[:most]
        del self._spans[:most]
        return found

    # Logging

    def _log(self, known: Summary | Flow) -> None:
        service = known.service
        loggers = self._loggers.get(id(service))
        if loggers is None:
            if len(self._loggers) >= MAX_LOGGERS:
                self._loggers.clear()
            # The service stays alive for as long as it is found by its identity.
            made = [AccessLogger(log, self._hostname) for log in service.settings.access_logs]
            loggers = self._loggers[id(service)] = (service, made)
        attributes = self.attributes(known)
        for logger in loggers[1]:
            line = logger.line(known, attributes)
            if line is None:
                continue
            if self._line_bytes + len(line) > MAX_LINE_BYTES:
                self.dropped += 1
            else:
                self._lines.append(line)
                self._line_bytes += len(line)

    def _audit(self, summary: Summary) -> None:
        request, client = summary.request, summary.client
        log.info(
            "a policy audits this request",
            extra=fields(
                policies=", ".join(summary.audited),
                source=client.principal or client.address,
                service=summary.service.hostname,
                method=request.method.decode("ascii", "backslashreplace"),
                path=request.original_path[:LONGEST_AUDITED].decode("ascii", "backslashreplace"),
                status=summary.status,
            ),
        )

    # Counting

    def _child_of(self, summary: Summary, is_grpc: bool) -> Child:
        client, endpoint = summary.client, summary.endpoint
        key: tuple[object, ...] = (
            id(summary.service),
            client.address,
            client.principal,
            "" if endpoint is None else endpoint.address,
            summary.status,
            summary.flags,
            summary.grpc_status if is_grpc else -1,
        )
        if summary.service.changes:
            key = (*key, *self._changed_values(summary))
        child = self._children.get(key)
        if child is None:
            protocol = "grpc" if is_grpc else "http"
            grpc = str(summary.grpc_status) if is_grpc and summary.grpc_status is not None else ""
            said = (protocol, str(summary.status), grpc, summary.flags or "-")
            child = self._add(key, summary, said, _HTTP if is_grpc else _HTTP[:4])
        return child

    def _tcp_child(self, flow: Flow, flags: str) -> Child:
        client, endpoint = flow.client, flow.endpoint
        key: tuple[object, ...] = (
            id(flow.service),
            client.address,
            client.principal,
            "" if endpoint is None else endpoint.address,
            "tcp",
            flags,
        )
        if flow.service.changes:
            key = (*key, *self._changed_values(flow))
        return self._children.get(key) or self._add(key, flow, ("tcp", "0", "", flags or "-"), _TCP)

    def _moved(self, flow: Flow) -> None:
        received, sent = flow.received - flow.reported_received, flow.sent - flow.reported_sent
        if received or sent:
            child = self._tcp_child(flow, "")
            child.received += received
            child.sent += sent
            flow.reported_received, flow.reported_sent = flow.received, flow.sent

    def _add(self, key: object, summary: Summary | Flow, said: tuple[str, str, str, str], metrics: tuple[Metric, ...]) -> Child:
        if len(self._children) >= self._max_children:
            self._set_aside()
        service, client, endpoint = summary.service, summary.client, summary.endpoint
        values = (
            self._reporter,
            *self._source(client),
            *self._destination(endpoint),
            *(service.hostname, service.name, service.namespace),
            *said,
            "mutual_tls" if client.identity is not None and client.tls and self._reporter == "waypoint" else UNKNOWN,
        )
        plain: Labels = tuple((name, value) for name, value in zip(LABELS, values, strict=True) if value)
        labels = {metric: self._changed(plain, metric, summary) for metric in metrics if metric not in service.disabled}
        # The key holds the service's identity: the child keeps what it belongs to alive for as long as it is found by it.
        child = _ServiceChild(labels, service)
        self._children[key] = child
        return child

    def _set_aside(self, *, keep: bool = False) -> None:
        for child in self._children.values():
            self._pending += child.take()
        if not keep:
            self._children = {}
        excess = len(self._pending) - MAX_PENDING
        if excess > 0:
            del self._pending[:excess]
            self.dropped += excess

    # Labels

    def _source(self, client: Client) -> tuple[str, ...]:
        principal = UNKNOWN if client.identity is None else client.identity.uri
        peer = self.peer_of_client(client)
        if peer is None:
            return UNKNOWN, UNKNOWN, "latest", client.namespace or UNKNOWN, principal, UNKNOWN, UNKNOWN, UNKNOWN
        return (
            *(peer.workload, peer.canonical_service, peer.canonical_revision, peer.namespace),
            *(principal, peer.app, peer.version, peer.cluster),
        )

    def _destination(self, endpoint: Endpoint | None) -> tuple[str, ...]:
        principal = UNKNOWN if endpoint is None or endpoint.identity is None else endpoint.identity.uri
        peer = self.peer_of_endpoint(endpoint)
        if peer is None:
            return UNKNOWN, UNKNOWN, "latest", UNKNOWN, principal, UNKNOWN, UNKNOWN, UNKNOWN
        return (
            *(peer.workload, peer.canonical_service, peer.canonical_revision, peer.namespace),
            *(principal, peer.app, peer.version, peer.cluster),
        )

    def peer_of_client(self, client: Client) -> PeerWorkload | None:
        """The client's workload, if what its certificate says agrees with what the mesh knows of its address."""
        peer = self._peers.get(client.address)
        if peer is None or (client.identity is not None and peer.identity is not None and peer.identity != client.identity):
            return None
        return peer

    def peer_of_endpoint(self, endpoint: Endpoint | None) -> PeerWorkload | None:
        """The endpoint's workload."""
        return None if endpoint is None else self._peers.get(endpoint.address)

    def attributes(self, summary: Summary | Flow) -> SummaryAttributes:
        """What expressions may ask about it."""
        return SummaryAttributes(summary, self.peer_of_client(summary.client), self.peer_of_endpoint(summary.endpoint))

    def _changed_values(self, summary: Summary | Flow) -> list[str]:
        """Values of all labels that expressions make: requests that differ in them are not alike."""
        attributes = self.attributes(summary)
        changes = summary.service.changes.values()
        return [expression.label(attributes) for several in changes for _, expression in several if expression is not None]

    def _changed(self, labels: Labels, metric: Metric, summary: Summary | Flow) -> Labels:
        changes = summary.service.changes.get(metric)
        if not changes:
            return labels
        attributes = self.attributes(summary)
        known = dict(labels)
        for name, expression in changes:
            if expression is None:
                known.pop(name, None)
            else:
                known[name] = expression.label(attributes)
        return tuple(known.items())


class _ServiceChild(Child):
    __slots__ = ("service",)

    def __init__(self, labels: dict[Metric, Labels], service: ServiceTelemetry) -> None:
        super().__init__(labels)
        self.service = service


def grpc_status_of(summary: Summary) -> int | None:
    """What the trailers, or an answer of trailers only, say."""
    text = header(summary.trailers, b"grpc-status") or _in_head(None if summary.response is None else summary.response.headers)
    return int(text) if text is not None and text.isdigit() and len(text) <= 4 else None


def _in_head(headers: Headers | None) -> bytes | None:
    return None if headers is None else header(headers, b"grpc-status")
