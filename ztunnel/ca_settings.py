"""Every setting of the certificate authority, `ztunnel ca`: name, unit, default and why. As `settings` is for the agent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from ztunnel.configuration import Reader, between, matching
from ztunnel.settings import LogSettings

_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_ACCOUNT = rf"{_NAME}/{_NAME}"
_TRUST_DOMAIN = r"[a-z0-9._-]{1,255}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenSettings:
    """Where callers come in."""

    address: str = "*"
    """An IP literal, or `*` (default) for every IPv4 and IPv6 address."""
    port: int = field(default=15012, metadata=between(0, 65535))
    """gRPC over TLS 1.3; 15012 as istiod, so that agents of either kind find it. 0 picks a free port, which the log tells."""
    names: tuple[str, ...] = field(default=("ztunnel-ca.ztunnel-system.svc",), metadata=matching(_NAME, "a DNS name"))
    """DNS names that callers know the server by; its own certificate is for these."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RootSettings:
    """What signs."""

    given: Path | None = None
    """Directory with an operator's signing certificate, `tls.crt`, `tls.key` and `ca.crt` as cert-manager has them, or Istio's `cacerts`.
    Default none: the authority makes its own root and keeps it in `secret`."""
    secret: str = field(default="ztunnel-ca", metadata=matching(_NAME, "a name"))
    """Secret in our own namespace for the root that we make. Annotate it with a new word, `ztunnel.io/rotate`, for a new root."""
    spread_hours: float = field(default=24.0, metadata=between(0, 24 * 365))
    """From the announcement of a new root to its first signature; 24: as long as a certificate lives by default, so that even a peer
    that hears of roots only when it renews has heard of it. Agents of ours hear within minutes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishSettings:
    """Where peers find the roots that they are to trust."""

    config_map: str = field(default="ztunnel-ca-root-cert", metadata=matching(_NAME, "a name"))
    """Its key is `root-cert.pem`. `istio-ca-root-cert` for programs that know Istio's."""
    namespaces: tuple[str, ...] = field(default=(), metadata=matching(rf"{_NAME}|\*", "a namespace or *"))
    """Where the ConfigMap is kept; default only our own. `*`: in all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """The cluster whose API server vouches for callers."""

    kubeconfig: Path | None = None
    """Default none: the cluster that we run in, as our own service account."""
    namespace: str | None = field(default=None, metadata=matching(_NAME, "a namespace"))
    """Where the Secret and the ConfigMap are. Default: our pod's, or the kubeconfig's context's."""
    audience: str = field(default="istio-ca", metadata=matching(r"[!-~]{1,200}", "an audience"))
    """What tokens must be meant for. Default as Istio."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesSettings:
    """An authority without a cluster. With `callers` nothing is asked of Kubernetes."""

    callers: Path | None = None
    """YAML list of tokens' SHA-256 and whose they are; see `ztunnel/ca/static.py`."""
    pods: Path | None = None
    """Directory with the pods' manifests."""
    state: Path = Path("/var/lib/ztunnel/authority")
    """Directory (mode 0700) for the root that we make. A new word in its file `rotate` asks for a new root."""
    bundle: Path = Path("/var/lib/ztunnel/root-cert.pem")
    """File that is kept with the roots to trust."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSettings:
    """Ports for operators."""

    address: str = "*"
    """An IP literal, or `*` (default) for every address, because kubelet and Prometheus come from elsewhere."""
    metrics_port: int = field(default=15020, metadata=between(0, 65535))
    """Prometheus; 15020 as the agent's. 0 picks a free port."""
    readiness_port: int = field(default=15021, metadata=between(0, 65535))
    """/healthz/ready; 15021 as the agent's. 0 picks a free port."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitsSettings:
    """Bounds on what callers can make us hold or do."""

    connections: int = field(default=1024, metadata=between(1, 100_000))
    """Open connections; one more ends the one that has been idle longest."""
    per_node: float = field(default=5.0, metadata=between(0.01, 10_000))
    """Certificates per second for one node, after a burst. A node of 110 accounts renews two in ten minutes."""
    per_node_burst: float = field(default=500.0, metadata=between(1, 100_000))
    """Certificates at once for one node: an agent that has just started asks for all of its accounts."""
    per_address: float = field(default=20.0, metadata=between(0.01, 10_000))
    """Requests per second from one address, after a burst: each that carries a token costs the API server a review."""
    per_address_burst: float = field(default=500.0, metadata=between(1, 100_000))
    """Requests at once from one address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaServerSettings:
    """Everything that `ztunnel ca` can be told."""

    trust_domain: str = field(default="cluster.local", metadata=matching(_TRUST_DOMAIN, "a trust domain in lower case"))
    """First part of every SPIFFE identity that is signed. Default as Istio."""
    agents: tuple[str, ...] = field(default=("ztunnel-system/ztunnel",), metadata=matching(_ACCOUNT, "namespace/service-account"))
    """Service accounts of node agents: they may ask for the accounts of pods on their own node. Everybody else gets its own only."""
    leaf_hours: float = field(default=24.0, metadata=between(0.01, 24 * 90))
    """Longest life of a certificate; 24 as Istio."""
    poll_seconds: float = field(default=10.0, metadata=between(0.1, 3600))
    """Between two looks at the root and its publication; 10: a rotation is a matter of hours, an API server has other things to do."""
    listen: ListenSettings = ListenSettings()
    root: RootSettings = RootSettings()
    publish: PublishSettings = PublishSettings()
    kubernetes: KubernetesSettings = KubernetesSettings()
    files: FilesSettings = FilesSettings()
    admin: AdminSettings = AdminSettings()
    log: LogSettings = field(default_factory=LogSettings)
    limits: LimitsSettings = LimitsSettings()


def parse(config: Mapping[str, object], environ: Mapping[str, str]) -> CaServerSettings:
    """The authority's settings; see `configuration.Reader.parse`."""
    return _READER.parse(config, environ)


def variable(key: str) -> str:
    """The environment variable that overrides a setting."""
    return _READER.variable(key)


def _contradictions(settings: CaServerSettings) -> Iterator[str]:
    if not settings.listen.names:
        yield "listen.names: at least one name is needed"
    if not settings.agents:
        yield "agents: without any, no node gets certificates for its pods"
    if (settings.files.callers is None) != (settings.files.pods is None):
        yield "files: callers and pods are given together, or neither"
    ports = [settings.listen.port, settings.admin.metrics_port, settings.admin.readiness_port]
    taken = [port for port in ports if port]
    if len(set(taken)) != len(taken):
        yield "listen.port, admin.metrics_port and admin.readiness_port: two of them are the same"
    for key, address in (("listen.address", settings.listen.address), ("admin.address", settings.admin.address)):
        if address != "*":
            try:
                ip_address(address)
            except ValueError:
                yield f"{key}: an IP address or * is expected, found {address[:100]!r}"


_READER = Reader(CaServerSettings, "ZTUNNEL_CA_SERVER_", _contradictions)
