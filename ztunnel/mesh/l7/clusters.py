"""Where requests go, as values: clusters, endpoints, balancing, limits. Durations are seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ztunnel.mesh.identity import SpiffeId

UNLIMITED = 2**32 - 1
"""Istio's circuit breakers by default (Envoy's own are 1024)."""


class Balancer(Enum):
    """How an endpoint is chosen."""

    LEAST_REQUEST = "LEAST_REQUEST"
    ROUND_ROBIN = "ROUND_ROBIN"
    RANDOM = "RANDOM"
    PASSTHROUGH = "PASSTHROUGH"
    RING_HASH = "RING_HASH"
    MAGLEV = "MAGLEV"


class HashSource(Enum):
    """What a consistent hash is computed of."""

    HEADER = "header"
    COOKIE = "cookie"
    SOURCE_IP = "source-ip"
    QUERY = "query"


@dataclass(frozen=True, slots=True)
class HashKey:
    """For COOKIE, `ttl` not None: a missing cookie is made (0: a session cookie)."""

    source: HashSource
    name: str = ""
    path: str = ""
    ttl: float | None = None
    attributes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Warmup:
    """Slow start of endpoints that joined within `seconds`."""

    seconds: float
    minimum: float = 0.1
    aggression: float = 1.0


@dataclass(frozen=True, slots=True)
class Locality:
    """Where an endpoint, or this proxy, is."""

    region: str = ""
    zone: str = ""
    subzone: str = ""


@dataclass(frozen=True, slots=True)
class LocalitySettings:
    """Failover is on only with outlier detection or a Service's trafficDistribution (`forced`)."""

    enabled: bool = True
    forced: str = ""
    """A Service's trafficDistribution: PreferSameZone (PreferClose) or PreferSameNode."""
    distribute: tuple[tuple[str, tuple[tuple[str, int], ...]], ...] = ()
    """(from `region/zone/subzone` pattern, ((to, percent), …))"""
    failover: tuple[tuple[str, str], ...] = ()
    failover_priority: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadBalancing:
    """Of one cluster."""

    balancer: Balancer = Balancer.LEAST_REQUEST
    hash_keys: tuple[HashKey, ...] = ()
    ring_minimum: int = 1024
    table_size: int = 65537
    warmup: Warmup | None = None
    locality: LocalitySettings = LocalitySettings()


@dataclass(frozen=True, slots=True)
class Outlier:
    """Passive health checks. A threshold of 0 is off."""

    consecutive_5xx: int = 5
    consecutive_gateway: int = 0
    split_local: bool = False
    consecutive_local: int = 5
    interval: float = 10.0
    base_ejection: float = 30.0
    max_ejection_percent: int = 10
    min_health_percent: int = 0
    http_errors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RetryBudget:
    """Instead of `max_retries`: `share` of active and pending requests, at least `minimum` at once."""

    share: float = 0.2
    minimum: int = 3


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Circuit breakers and connection settings of one cluster."""

    max_connections: int = UNLIMITED
    connect_timeout: float = 10.0
    idle_timeout: float = 3600.0
    max_connection_duration: float = 0.0
    keepalive: tuple[float, float, int] | None = None
    """TCP keep-alive: seconds idle, seconds between probes, probes."""
    max_pending: int = UNLIMITED
    max_requests: int = UNLIMITED
    max_retries: int = UNLIMITED
    max_requests_per_connection: int = 0
    max_concurrent_streams: int = 2**31 - 1
    retry_budget: RetryBudget | None = None


class UpstreamHttp(Enum):
    """Which HTTP the endpoint is spoken to in. CLIENT: the one that the client spoke."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    CLIENT = "client"


@dataclass(frozen=True, slots=True)
class UpstreamTls:
    """TLS inside the tunnel (or to an endpoint outside the mesh)."""

    sni: str = ""
    """Empty: the request's Host."""
    roots: bytes = b""
    """PEM; empty with `system_roots` False and `verify` True refuses everything."""
    system_roots: bool = False
    verify: bool = True
    names: tuple[str, ...] = ()
    """Accepted subject alternative names; empty: `sni`."""
    certificate: bytes = b""
    key: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place that a cluster's requests may go to. `healthy` False: known, not ready."""

    address: str
    port: int
    workload_uid: str = ""
    identity: SpiffeId | None = None
    hbone: bool = False
    healthy: bool = True
    weight: int = 1
    locality: Locality = Locality()
    node: str = ""
    labels: tuple[tuple[str, str], ...] = ()
    waypoint: tuple[str, int] | None = None
    """A gateway's: HBONE goes to this waypoint first, with the service's address as authority (`ingress-use-waypoint`)."""


class Resolution(Enum):
    """STATIC: `endpoints` are all there is. DNS: `names` are resolved by the proxy. ORIGINAL: where the client dialled. DYNAMIC: the host
    that the request names (TLS: its server name), which the proxy resolves; one of `ServedService.host_patterns`."""

    STATIC = "static"
    DNS = "dns"
    ORIGINAL = "original"
    DYNAMIC = "dynamic"


@dataclass(frozen=True, slots=True)
class Cluster:
    """One service port, or a subset of it, as an upstream."""

    key: str
    """As access logs write it: `inbound-vip|PORT|http|HOST`, `inbound-vip|PORT|http/SUBSET|HOST`, `…|tcp|…`."""
    hostname: str
    namespace: str
    service: str
    """The service's short name, for telemetry."""
    port: int
    subset: str = ""
    endpoints: tuple[Endpoint, ...] = ()
    resolution: Resolution = Resolution.STATIC
    names: tuple[tuple[str, int], ...] = ()
    """DNS: (name, port) of each endpoint to resolve."""
    http: UpstreamHttp = UpstreamHttp.HTTP1
    balancing: LoadBalancing = LoadBalancing()
    limits: PoolLimits = PoolLimits()
    outlier: Outlier | None = None
    tls: UpstreamTls | None = None
    proxy_protocol: int = 0
    """Version of the PROXY header in front of the connection's bytes; 0 none."""
    refused: str = ""
    """Not empty: a DestinationRule for it was refused, so nothing may go there (503), and why."""
