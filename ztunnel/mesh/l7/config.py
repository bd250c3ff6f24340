"""The whole configuration of one waypoint or gateway; its parts are in the modules beside this one."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256

from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.clusters import Cluster, Locality
from ztunnel.mesh.l7.routes import Route, TcpRoute
from ztunnel.mesh.l7.security import ExtensionProvider, JwtAuthentication, L7Policy
from ztunnel.mesh.l7.telemetry import PeerWorkload, TelemetrySettings


class PortProtocol(Enum):
    """What a service port carries. AUTO: looked at (HTTP if it looks like it, else TCP)."""

    HTTP = "http"
    HTTP2 = "http2"
    GRPC = "grpc"
    GRPC_WEB = "grpc-web"
    TCP = "tcp"
    AUTO = "auto"

    @property
    def is_http(self) -> bool:
        return self not in (PortProtocol.TCP, PortProtocol.AUTO)


@dataclass(frozen=True, slots=True)
class ServedPort:
    """One port of a service that this proxy serves. For AUTO both lists count."""

    port: int
    protocol: PortProtocol
    routes: tuple[Route, ...] = ()
    tcp_routes: tuple[TcpRoute, ...] = ()


@dataclass(frozen=True, slots=True)
class ServedService:
    """A service that clients address through this proxy, by one of its VIPs (a DYNAMIC_DNS entry has none: by host)."""

    hostname: str
    namespace: str
    name: str
    vips: tuple[str, ...]
    ports: tuple[ServedPort, ...]
    kind: str = "Service"
    policies: tuple[str, ...] = ()
    """Keys of `ProxyConfig.policies` that apply, those of the proxy itself included."""
    jwt: tuple[str, ...] = ()
    """Keys of `ProxyConfig.authentications`, likewise."""
    telemetry: str = ""
    """Key of `ProxyConfig.telemetry`."""
    host_patterns: tuple[str, ...] = ()
    """DYNAMIC_DNS: hosts that a request may name."""


@dataclass(frozen=True, slots=True)
class ServedWorkload:
    """A pod that clients address through this proxy by its own address. Any port; looked at (AUTO), no routes."""

    uid: str
    addresses: tuple[str, ...]
    identity: SpiffeId | None = None
    hbone: bool = False
    """Reached through a tunnel; False: plain TCP."""
    policies: tuple[str, ...] = ()
    jwt: tuple[str, ...] = ()
    telemetry: str = ""


@dataclass(frozen=True, slots=True)
class TlsServer:
    """What a gateway's HTTPS listener shows, and asks for."""

    certificate: bytes
    """PEM, leaf first."""
    key: bytes = field(repr=False)
    client_roots: bytes = b""
    """PEM; not empty: clients must show a certificate of these."""
    min_version: str = ""
    """TLSV1_2 or TLSV1_3; empty: TLS 1.2."""


class ListenerProtocol(Enum):
    """Of a gateway's port."""

    HTTP = "HTTP"
    HTTPS = "HTTPS"
    TLS = "TLS"
    """By server name: passed through, or with `GatewayServer.tls` ended here, and bytes inside."""
    TCP = "TCP"


@dataclass(frozen=True, slots=True)
class VirtualHost:
    """The hosts of one gateway listener that share routes. `hosts`: exact names, `*.suffix` or `*`; more specific wins."""

    hosts: tuple[str, ...]
    routes: tuple[Route, ...]
    policies: tuple[str, ...] = ()
    jwt: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayServer:
    """One server (Gateway API: listener) of an ingress gateway's port. Several share a port and are told apart by SNI and Host."""

    name: str
    port: int
    protocol: ListenerProtocol
    hosts: tuple[str, ...] = ("*",)
    tls: TlsServer | None = None
    redirect_to_https: bool = False
    virtual_hosts: tuple[VirtualHost, ...] = ()
    tcp_routes: tuple[TcpRoute, ...] = ()
    policies: tuple[str, ...] = ()
    """Of a TLS or TCP server's connections."""
    problem: str = ""
    """Not empty: the port is not served for these hosts (a missing certificate), and why."""


class PathNormalization(Enum):
    """MeshConfig.pathNormalization."""

    NONE = "NONE"
    BASE = "BASE"
    MERGE_SLASHES = "MERGE_SLASHES"
    DECODE_AND_MERGE_SLASHES = "DECODE_AND_MERGE_SLASHES"


@dataclass(frozen=True, slots=True)
class ProxyOptions:
    """What holds for all of a proxy's listeners."""

    path_normalization: PathNormalization = PathNormalization.BASE
    http10: bool = False
    xfcc: bool = False
    """Annotation ambient.istio.io/xfcc-include-client-identity."""
    max_header_bytes: int = 60 * 1024
    max_headers: int = 100


@dataclass(frozen=True, slots=True)
class ProxyConfig:
    """Everything that one waypoint or gateway does, by the keys that its parts use."""

    name: str
    namespace: str
    identity: SpiffeId
    services: tuple[ServedService, ...] = ()
    workloads: tuple[ServedWorkload, ...] = ()
    servers: tuple[GatewayServer, ...] = ()
    clusters: dict[str, Cluster] = field(default_factory=dict)
    policies: dict[str, L7Policy] = field(default_factory=dict)
    authentications: dict[str, JwtAuthentication] = field(default_factory=dict)
    telemetry: dict[str, TelemetrySettings] = field(default_factory=dict)
    providers: dict[str, ExtensionProvider] = field(default_factory=dict)
    peers: dict[str, PeerWorkload] = field(default_factory=dict)
    """Clients' side of telemetry and consumer routes: workloads by address."""
    options: ProxyOptions = ProxyOptions()
    locality: Locality = field(default_factory=Locality)
    node: str = ""


def fingerprint(config: ProxyConfig) -> str:
    """Tells one configuration from another, in whatever process it is asked: has this proxy read what there is to read?"""
    return sha256(repr(config).encode()).hexdigest()[:32]
