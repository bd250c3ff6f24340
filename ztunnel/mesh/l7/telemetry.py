"""Telemetry resources as values, already merged (root namespace, proxy's namespace, service's namespace, targetRefs) for one service."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ztunnel.mesh.identity import SpiffeId


@dataclass(frozen=True, slots=True)
class PeerWorkload:
    """What telemetry says of one side of a request: Istio's labels, none of them empty (`unknown`)."""

    uid: str
    name: str
    namespace: str
    workload: str
    """What made the pod (Deployment's name)."""
    workload_type: str = "pod"
    app: str = "unknown"
    version: str = "unknown"
    canonical_service: str = "unknown"
    canonical_revision: str = "latest"
    cluster: str = "Kubernetes"
    identity: SpiffeId | None = None
    node: str = ""


class Metric(Enum):
    """The ten series; the value is the enumerator's name in the Telemetry API."""

    REQUESTS = "REQUEST_COUNT"
    DURATION = "REQUEST_DURATION"
    REQUEST_SIZE = "REQUEST_SIZE"
    RESPONSE_SIZE = "RESPONSE_SIZE"
    GRPC_REQUESTS = "GRPC_REQUEST_MESSAGES"
    GRPC_RESPONSES = "GRPC_RESPONSE_MESSAGES"
    TCP_OPENED = "TCP_OPENED_CONNECTIONS"
    TCP_CLOSED = "TCP_CLOSED_CONNECTIONS"
    TCP_SENT = "TCP_SENT_BYTES"
    TCP_RECEIVED = "TCP_RECEIVED_BYTES"


@dataclass(frozen=True, slots=True)
class MetricOverride:
    """Of one series: off, or its labels changed. `tags`: (label, CEL expression), None removes the label."""

    metric: Metric
    disabled: bool = False
    tags: tuple[tuple[str, str | None], ...] = ()


@dataclass(frozen=True, slots=True)
class AccessLog:
    """One log that is on. `format` TEXT or JSON; `template` empty: Istio's default."""

    provider: str = "envoy"
    json: bool = False
    template: str = ""
    fields: tuple[tuple[str, str], ...] = ()
    filter: str = ""
    """CEL; empty: everything."""


@dataclass(frozen=True, slots=True)
class CustomTag:
    """A tag of every span: `kind` literal, environment, header or formatter."""

    name: str
    kind: str
    value: str
    default: str = ""


class Collector(Enum):
    """How spans are sent. NONE: there is no tracing, and requests' trace headers are nobody's business."""

    NONE = ""
    OTLP_HTTP = "otlp-http"
    OTLP_GRPC = "otlp-grpc"
    ZIPKIN = "zipkin"


@dataclass(frozen=True, slots=True)
class Tracing:
    """Spans. `percent` of new traces are sampled; an incoming decision is kept."""

    percent: float = 1.0
    collector: Collector = Collector.NONE
    authority: str = ""
    """The collector's host name."""
    cluster: str = ""
    """Key of the collector's cluster; empty: nothing is reported, context is still propagated."""
    http_path: str = "/v1/traces"
    provider: str = ""
    report: bool = True
    propagate: bool = True
    custom_tags: tuple[CustomTag, ...] = ()
    use_request_id: bool = True


@dataclass(frozen=True, slots=True)
class TelemetrySettings:
    """Of one service (or of the proxy, for what has none of its own)."""

    overrides: tuple[MetricOverride, ...] = ()
    access_logs: tuple[AccessLog, ...] = ()
    tracing: Tracing = Tracing()
    metrics: bool = True
