"""Every metric's name, labels and help, in this one file: they are an interface, and a test spells them out.

Values live in plain dictionaries here and are handed to prometheus_client only when somebody scrapes: adding to a counter is one
dictionary operation, no `_created` series appear, and the number of series of each metric is bounded. Past the bound everything is
summed in one series whose labels all say `overflow`, and `ztunnel_limit_hits_total{limit="metric_series"}` rises.
Source of the `istio_tcp_*` names and labels: Istio's standard metrics; Istio ztunnel `proxy/metrics.rs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

UNKNOWN = "unknown"
OVERFLOW = "overflow"
OPENMETRICS = "application/openmetrics-text"
TEXT_TYPE = "text/plain; charset=utf-8"
LONGEST_LABEL = 512
"""Characters of a label's value; the longest honest one is a SPIFFE id of two Kubernetes names and a domain."""


class Traffic(NamedTuple):
    """Labels of the `istio_tcp_*` metrics, in order. All are always there; what is not known is `unknown`.

    `received` counts bytes from client to server and `sent` bytes back, whichever side reports. A source's principal is given only if
    mutual TLS proved it; a destination's is the one that the mesh knows it by.
    """

    reporter: str = UNKNOWN
    source_workload: str = UNKNOWN
    source_canonical_service: str = UNKNOWN
    source_canonical_revision: str = UNKNOWN
    source_workload_namespace: str = UNKNOWN
    source_principal: str = UNKNOWN
    source_app: str = UNKNOWN
    source_version: str = UNKNOWN
    source_cluster: str = UNKNOWN
    destination_service: str = UNKNOWN
    destination_service_namespace: str = UNKNOWN
    destination_service_name: str = UNKNOWN
    destination_workload: str = UNKNOWN
    destination_canonical_service: str = UNKNOWN
    destination_canonical_revision: str = UNKNOWN
    destination_workload_namespace: str = UNKNOWN
    destination_principal: str = UNKNOWN
    destination_app: str = UNKNOWN
    destination_version: str = UNKNOWN
    destination_cluster: str = UNKNOWN
    request_protocol: str = "tcp"
    response_flags: str = "-"
    connection_security_policy: str = UNKNOWN


class Series:
    """One metric's values by label values.

    Args:
        limit: the most series it may have, the overflow one aside.
        on_overflow: called for each addition that found no room.
    """

    def __init__(
        self, family: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str, labels: tuple[str, ...], limit: int = 1
    ) -> None:
        self.name = name
        self.labels = labels
        self._family = family
        self._text = text
        self._limit = limit
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}
        self._watched: Callable[[], Mapping[tuple[str, ...], float]] | None = None
        self.overflowed = 0
        """How often a value found no room."""

    def add(self, amount: float, *values: str) -> None:
        """Raise (a gauge may also sink). `values` are those of `labels`, in order."""
        self.add_all(amount, 1, values)

    def add_all(self, amount: float, count: int, values: tuple[str, ...]) -> None:
        """What so many calls of `add` do that sum up to this amount. None does nothing."""
        if not count:
            return
        known = self._values.get(values)
        if known is not None:
            self._values[values] = known + amount
        elif len(self._values) < self._limit:
            assert len(values) == len(self.labels), f"{self.name} has the labels {self.labels}"
            self._values[values] = amount
        else:
            self.overflowed += count
            rest = (OVERFLOW,) * len(self.labels)
            self._values[rest] = self._values.get(rest, 0.0) + amount

    def set(self, amount: float, *values: str) -> None:
        """Make it this much."""
        self.add(amount - self._values.get(values, 0.0), *values)

    def watch(self, read: Callable[[], Mapping[tuple[str, ...], float]]) -> None:
        """Ask for the values at each scrape instead of being told them; the first `limit` in order are shown."""
        self._watched = read

    def collect(self) -> Metric:
        """What a scrape shows, in stable order."""
        family = self._family(self.name, self._text, labels=self.labels)
        source = self._values if self._watched is None else dict(sorted(self._watched().items())[: self._limit])
        for values, amount in sorted(source.items()):
            family.add_metric([_label(value) for value in values], amount)
        return family


class Registry:
    """A program's metrics, on a registry of its own.

    Args:
        component, version: what istio_build says.
        max_series: bound of every labelled metric.
    """

    def __init__(self, component: str, version: str, max_series: int) -> None:
        self._max_series = max_series
        self._series: list[Series] = []
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        ProcessCollector(registry=self.registry)
        self.limit_hits = self.counter("ztunnel_limit_hits", "How often a bound on what others can make us hold was reached", "limit")
        self.bugs = self.counter("ztunnel_bugs", "Errors of our own that cost a connection or a request; each has a traceback in the log")
        self.gauge("istio_build", "Always 1; the tag is the version", "component", "tag").set(1, component, version)

    def counter(self, name: str, text: str, *labels: str) -> Series:
        """A new counter."""
        return self._keep(Series(CounterMetricFamily, name, text, labels, self._max_series))

    def gauge(self, name: str, text: str, *labels: str) -> Series:
        """A new gauge."""
        return self._keep(Series(GaugeMetricFamily, name, text, labels, self._max_series))

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        overflowed = sum(series.overflowed for series in self._series)
        if overflowed:
            self.limit_hits.set(overflowed, "metric_series")
        for series in self._series:
            yield series.collect()

    def names(self) -> dict[str, tuple[str, ...]]:
        """Every metric's name with its labels."""
        return {series.name: series.labels for series in self._series}

    def exposition(self, accept: str) -> tuple[str, bytes]:
        """Content type and body for a scrape: OpenMetrics if the Accept header mentions it, else the older text."""
        if OPENMETRICS in accept:
            return OPENMETRICS_TYPE, generate_openmetrics(self.registry)  # type: ignore[no-untyped-call]  # published without types
        return TEXT_TYPE, generate_latest(self.registry)

    def _keep(self, series: Series) -> Series:
        self._series.append(series)
        return series


class Metrics(Registry):
    """All metrics of a node agent.

    Args:
        version: the `tag` of istio_build.
        max_series: bound of every labelled metric.
    """

    def __init__(self, version: str = UNKNOWN, max_series: int = 20_000) -> None:
        super().__init__("ztunnel", version, max_series)
        counter, gauge = self.counter, self.gauge
        traffic = Traffic._fields
        self.tcp_opened = counter("istio_tcp_connections_opened", "TCP connections opened", *traffic)
        self.tcp_closed = counter("istio_tcp_connections_closed", "TCP connections closed, for whatever reason", *traffic)
        self.tcp_failed = counter("istio_tcp_connections_failed", "TCP connections that ended with a response flag", *traffic)
        self.tcp_received_bytes = counter("istio_tcp_received_bytes", "Bytes from client to server", *traffic)
        self.tcp_sent_bytes = counter("istio_tcp_sent_bytes", "Bytes from server to client", *traffic)
        self.tcp_sockets_open = gauge("istio_tcp_sockets_open", "Connections open now", "reporter")
        self.enrolled_pods = gauge("ztunnel_enrolled_pods", "Pods of this node whose traffic is captured")
        self.certificates_expiry = gauge(
            "ztunnel_certificates_expiry_seconds", "Seconds until a workload certificate expires; negative when there is none", "identity"
        )
        self.refused_manifests = gauge("ztunnel_refused_manifests", "Documents of the sources that are not in force as written")
        self.redirection_repairs = counter("ztunnel_redirection_repairs", "Pods whose redirection rules were found changed and restored")
        self.worker_restarts = counter("ztunnel_worker_restarts", "Data-plane processes that ended unasked and were started again")
        self.kube_requests = counter("ztunnel_kubernetes_requests", "Requests to the API server; code 0: no answer", "verb", "code")
        self.kube_events = counter("ztunnel_kubernetes_events", "Events of watches, those at their beginning left out", "kind")
        self.kube_failures = counter("ztunnel_kubernetes_failures", "Lists and watches that failed and were tried again", "kind")
        self.kube_following = gauge("ztunnel_kubernetes_following", "1 while a kind is followed (or not installed), else 0", "kind")
        self.cni_requests = counter("ztunnel_cni_requests", "Calls of the CNI plugin, by how they were answered", "command", "answer")


class AuthorityMetrics(Registry):
    """All metrics of a certificate authority.

    Args:
        version: the `tag` of istio_build.
    """

    def __init__(self, version: str = UNKNOWN) -> None:
        super().__init__("ztunnel-ca", version, 1000)
        self.requests = self.counter("ztunnel_ca_requests", "Requests for a certificate, by how they ended", "result")
        self.root_expiry = self.gauge(
            "ztunnel_ca_root_expiry_seconds", "Seconds until the signing certificate expires; negative when there is none"
        )
        self.roots = self.gauge("ztunnel_ca_roots", "Roots that peers are told to trust")
        self.pods = self.gauge("ztunnel_ca_pods", "Pods whose place is known; -1 while they are not")


class ControllerMetrics(Registry):
    """All metrics of a controller.

    Args:
        version: the `tag` of istio_build.
    """

    def __init__(self, version: str = UNKNOWN) -> None:
        super().__init__("ztunnel-controller", version, 1000)
        self.leader = self.gauge("ztunnel_controller_leader", "Whether this replica is the one that works")
        self.writes = self.counter("ztunnel_controller_writes", "Objects and statuses written, and those refused", "result")
        self.looks = self.counter("ztunnel_controller_looks", "How often everything was looked at")


def _label(value: str) -> str:
    """Bounded, and encodable: peers' and manifests' text may hold lone surrogates."""
    return value[:LONGEST_LABEL].encode("utf-8", "replace").decode("utf-8")
