"""Istio's ten series: names, labels, bounds of histograms, and how a worker tells the supervisor what it counted.

A worker counts in `Child`ren, one for each set of labels; from time to time it gives away what came in since the last time.
Source: Istio's standard metrics; Envoy's default histogram buckets.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

from waypoint.telemetry.increments import Increment, Labels
from ztunnel.mesh.l7.telemetry import Metric

BOUNDS: Final = (
    *(0.5, 1.0, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1000.0, 2500.0, 5000.0, 10000.0),
    *(30000.0, 60000.0, 300000.0, 600000.0, 1800000.0, 3600000.0),
)
"""Upper bounds, of milliseconds as of bytes; one more bucket has no bound."""
NAMES: Final = {
    Metric.REQUESTS: "istio_requests",
    Metric.DURATION: "istio_request_duration_milliseconds",
    Metric.REQUEST_SIZE: "istio_request_bytes",
    Metric.RESPONSE_SIZE: "istio_response_bytes",
    Metric.GRPC_REQUESTS: "istio_request_messages",
    Metric.GRPC_RESPONSES: "istio_response_messages",
    Metric.TCP_OPENED: "istio_tcp_connections_opened",
    Metric.TCP_CLOSED: "istio_tcp_connections_closed",
    Metric.TCP_SENT: "istio_tcp_sent_bytes",
    Metric.TCP_RECEIVED: "istio_tcp_received_bytes",
}
"""Without the `_total` of counters."""
HISTOGRAMS: Final = frozenset({Metric.DURATION, Metric.REQUEST_SIZE, Metric.RESPONSE_SIZE})
LABELS: Final = (
    "reporter",
    *("source_workload", "source_canonical_service", "source_canonical_revision", "source_workload_namespace", "source_principal"),
    *("source_app", "source_version", "source_cluster"),
    *("destination_workload", "destination_canonical_service", "destination_canonical_revision", "destination_workload_namespace"),
    *("destination_principal", "destination_app", "destination_version", "destination_cluster"),
    *("destination_service", "destination_service_name", "destination_service_namespace"),
    *("request_protocol", "response_code", "grpc_response_status", "response_flags", "connection_security_policy"),
)
"""Of every series; a label without a value is left out (`grpc_response_status` of what is not gRPC)."""


class Histogram:
    """Observations since the last time."""

    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.buckets = [0] * (len(BOUNDS) + 1)

    def observe(self, value: float) -> None:
        self.count += 1
        self.total += value
        self.buckets[bisect_left(BOUNDS, value)] += 1


class Child:
    """The series of requests, or connections, that are alike. Numbers are what came in since the last time."""

    __slots__ = (
        *("closed", "duration", "labels", "opened", "received", "request_messages", "request_size", "requests"),
        *("response_messages", "response_size", "sent"),
    )

    def __init__(self, labels: dict[Metric, Labels]) -> None:
        """
        Args:
            labels: of each metric that is on.
        """
        self.labels = labels
        self.duration = Histogram()
        self.request_size = Histogram()
        self.response_size = Histogram()
        self.requests = 0
        self.request_messages = 0
        self.response_messages = 0
        self.opened = 0
        self.closed = 0
        self.sent = 0
        self.received = 0

    def take(self) -> list[Increment]:
        """What came in since the last time."""
        numbers = (
            (Metric.REQUESTS, self.requests),
            (Metric.GRPC_REQUESTS, self.request_messages),
            (Metric.GRPC_RESPONSES, self.response_messages),
            (Metric.TCP_OPENED, self.opened),
            (Metric.TCP_CLOSED, self.closed),
            (Metric.TCP_SENT, self.sent),
            (Metric.TCP_RECEIVED, self.received),
        )
        found = [Increment(metric.value, self.labels[metric], amount) for metric, amount in numbers if amount and metric in self.labels]
        self.requests = self.request_messages = self.response_messages = self.opened = self.closed = self.sent = self.received = 0
        if self.duration.count:
            found += self._take_histograms()
        return found

    def _take_histograms(self) -> list[Increment]:
        histograms = (
            (Metric.DURATION, self.duration),
            (Metric.REQUEST_SIZE, self.request_size),
            (Metric.RESPONSE_SIZE, self.response_size),
        )
        self.duration, self.request_size, self.response_size = Histogram(), Histogram(), Histogram()
        return [
            Increment(metric.value, self.labels[metric], histogram.count, histogram.total, tuple(histogram.buckets))
            for metric, histogram in histograms
            if metric in self.labels
        ]
