"""Every setting of the L7 proxy: its name, unit, default and why, in one place. Read as the node agent's are (`ztunnel.configuration`).

What the proxy does with traffic is not here but in the mesh's manifests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import ip_address
from pathlib import Path

from ztunnel.configuration import Reader, between, matching
from ztunnel.settings import CaSettings, LogSettings, RedirectionStatus, source_contradictions

_DNS_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_TRUST_DOMAIN = r"[a-z0-9._-]{1,255}"


class Kind(Enum):
    """What a proxy is."""

    WAYPOINT = "waypoint"
    GATEWAY = "gateway"


@dataclass(frozen=True, slots=True, kw_only=True)
class SourcesSettings:
    """What the mesh is read from: `files` or `kubernetes`, one of them."""

    files: Path | None = None
    """Directory of Kubernetes manifests (.yaml, .yml, .json), watched for change: the same that the node agents read."""
    kubernetes: bool = False
    """Follow the API server of the cluster that we run in, as our pod's service account, or the one that `kubeconfig` names. Secrets and
    ConfigMaps are read in the Gateway's own namespace only, and MeshConfig's in the root namespace."""
    kubeconfig: Path | None = None
    """Default none: KUBECONFIG, else the pod's own service account, else ~/.kube/config."""
    context: str | None = field(default=None, metadata=matching(r"[^\x00-\x1f]{1,253}", "a context's name"))
    """Of the kubeconfig; default its current one."""
    redirection_status: RedirectionStatus | None = None
    """How it learns that a pod can be reached by HBONE: as the node agents' setting of this name, with the same defaults."""
    poll_seconds: float = field(default=0.25, metadata=between(0.02, 60))
    """Seconds between two looks at the directory; 0.25: a change is in force in under a second, a look costs microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """Where traffic comes in."""

    address: str = "*"
    """An IP literal, or `*` (default) for every IPv4 and IPv6 address."""
    hbone_port: int = field(default=15008, metadata=between(0, 65535))
    """Tunnels of the mesh's clients; 15008 as every mesh peer expects. 0 picks a free port (tests)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """Ports for operators."""

    socket: Path = field(default=Path("/run/waypoint/waypoint.sock"), metadata={"max_bytes": 107})
    """Unix socket (mode 0600) that answers with the configuration and state of this proxy; the kernel allows 107 bytes of path."""
    address: str = "*"
    """Where the metrics and readiness ports listen: an IP literal, or `*` (default) for every IPv4 and IPv6 address, because
    kubelet and Prometheus come from elsewhere."""
    metrics_port: int = field(default=15020, metadata=between(0, 65535))
    """Prometheus; 15020 as Istio, so existing scrape configurations fit. 0 picks a free port."""
    readiness_port: int = field(default=15021, metadata=between(0, 65535))
    """/healthz/ready; 15021 as Istio. 0 picks a free port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TunnelSettings:
    """HBONE tunnels, in and out."""

    own_records: bool = True
    """Our own TLS records after the handshake (default: fewer copies); false: OpenSSL's, the reference and the fallback."""
    idle_seconds: float = field(default=3600.0, metadata=between(1, 86400))
    """An outbound tunnel without connections is closed after this; an hour as Istio's waypoints."""
    max_streams: int = field(default=100, metadata=between(1, 1000))
    """Connections in one outbound tunnel before another is opened; 100 as Istio, and what most peers allow."""
    handshake_seconds: float = field(default=10.0, metadata=between(0.1, 300))
    """TLS and HTTP/2 preface, both directions; 10: a healthy one takes milliseconds."""
    ping_seconds: float = field(default=10.0, metadata=between(0.1, 3600))
    """A tunnel that has been silent for this long is asked for a sign of life; 10 as Istio."""
    ping_timeout_seconds: float = field(default=20.0, metadata=between(0.1, 3600))
    """A peer that owes such a sign for this long is gone; 20 as Istio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSettings:
    """Bounds on what others can make us hold. One that is hit shows in the metrics, or as a refused manifest."""

    manifest_bytes: int = field(default=16 << 20, metadata=between(1024, 1 << 30))
    """Largest manifest file; 16 MiB holds about ten thousand pods."""
    manifest_files: int = field(default=10_000, metadata=between(1, 1_000_000))
    """Files in the manifest directory; more is a directory that was given by mistake."""
    manifest_documents: int = field(default=100_000, metadata=between(1, 10_000_000))
    """Objects in one file; bounds memory that small documents can take."""
    tunnels: int = field(default=10_000, metadata=between(1, 1_000_000))
    """Tunnels of clients in each worker; each client pod has one or two. Further ones are reset."""
    handshakes: int = field(default=512, metadata=between(1, 100_000))
    """TLS handshakes under way in each worker; each may hold 64 KiB until its deadline."""
    connections: int = field(default=20_000, metadata=between(1, 10_000_000))
    """Connections that clients of a gateway may have open in each worker. Further ones are reset."""
    tunnels_per_endpoint: int = field(default=64, metadata=between(1, 10_000))
    """Outbound tunnels to one endpoint: 64 times tunnel.max_streams connections."""
    metric_series: int = field(default=20_000, metadata=between(100, 1_000_000))
    """Label combinations of one metric; further ones are summed in a series labelled `overflow`. 20 000: a scrape stays under 15 MB."""
    admin_connections: int = field(default=64, metadata=between(1, 10_000))
    """Open connections on each of the metrics, readiness and control listeners; scrapers need two or three."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that `waypoint run` can be told."""

    name: str = field(metadata=matching(_DNS_NAME, "the name of a Gateway"))
    """The Gateway that this proxy is; also its service account's name. Required."""
    namespace: str = field(metadata=matching(_DNS_NAME, "a namespace"))
    """The Gateway's namespace. Required."""
    kind: Kind = Kind.WAYPOINT
    """`waypoint` (default): serves the mesh's clients on 15008. `gateway`: serves clients outside the mesh on its listeners' ports."""
    service_account: str = field(default="", metadata=matching(f"({_DNS_NAME})?", "a service account"))
    """Whose identity it has. Default: the Gateway's name, for a gateway with `-istio` behind it, as its pods are made."""
    labels: tuple[str, ...] = ()
    """Of a gateway's pods, each `name=value`: Gateways of networking.istio.io select by them."""
    node: str = field(default="", metadata=matching(f"({_DNS_NAME})?", "a node name"))
    """Where it runs, as in pods' spec.nodeName: for localities. Default: not known."""
    trust_domain: str = field(default="cluster.local", metadata=matching(_TRUST_DOMAIN, "a trust domain in lower case"))
    """First part of every SPIFFE identity; peers of another trust domain are refused. Default as Istio."""
    cluster: str = field(default="Kubernetes", metadata=matching(r"[A-Za-z0-9._-]{1,253}", "a cluster name"))
    """Cluster name in metrics and logs. Default as Istio."""
    cluster_domain: str = field(default="cluster.local", metadata=matching(_DNS_NAME, "a DNS domain"))
    """DNS suffix of services. Default as Kubernetes."""
    root_namespace: str = field(default="istio-system", metadata=matching(_DNS_NAME, "a namespace"))
    """Where objects count for the whole mesh. Default as Istio."""
    linger_seconds: float = field(default=2.0, metadata=between(0, 3600))
    """After SIGTERM, how long it takes new connections as before, though it says that it is not ready; 2: clients hear of it a little
    later, and until then they come."""
    drain_seconds: float = field(default=5.0, metadata=between(0, 3600))
    """After that, how long live requests and connections may finish; 5 as Istio's terminationDrainDuration."""
    workers: int = field(default=1, metadata=between(0, 64))
    """Worker processes: 1 (default), one per core at most, or 0 to run the same loop inside the supervisor, for debugging. Each has
    connections, circuit breakers and outlier detection of its own."""
    sources: SourcesSettings = SourcesSettings()
    listen: ListenSettings = ListenSettings()
    ca: CaSettings = field(default_factory=CaSettings)
    admin: AdminSettings = AdminSettings()
    tunnel: TunnelSettings = TunnelSettings()
    log: LogSettings = field(default_factory=LogSettings)
    limits: LimitsSettings = LimitsSettings()


def _contradictions(settings: Settings) -> Iterator[str]:
    for label in settings.labels:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,316}=[A-Za-z0-9._-]{0,63}", label):
            yield f"labels: name=value is expected, found {label[:100]!r}"
    yield from source_contradictions(settings.sources)
    ports = [settings.listen.hbone_port, settings.admin.metrics_port, settings.admin.readiness_port]
    fixed = [port for port in ports if port]
    if len(set(fixed)) < len(fixed):
        yield "listen.hbone_port, admin.metrics_port and admin.readiness_port: each wants a port of its own"
    for key, address in (("listen.address", settings.listen.address), ("admin.address", settings.admin.address)):
        if address != "*":
            try:
                ip_address(address)
            except ValueError:
                yield f"{key}: an IP address or * is expected, found {address[:100]!r}"


_READER = Reader(Settings, "WAYPOINT_", _contradictions)


def parse(config: Mapping[str, object], environ: Mapping[str, str]) -> Settings:
    """The proxy's settings; see `configuration.Reader.parse`."""
    return _READER.parse(config, environ)


def variable(key: str) -> str:
    """The environment variable that overrides a setting."""
    return _READER.variable(key)
