"""Every setting of the controller, `ztunnel controller`: name, unit, default and why. As `settings` is for the agent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

from ztunnel.configuration import Reader, between, matching
from ztunnel.settings import LogSettings

_NAME = r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
_TRUST_DOMAIN = r"[a-z0-9._-]{1,255}"
_QUANTITY = r"(cpu|memory|ephemeral-storage)=[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi)?"


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesSettings:
    """The cluster."""

    kubeconfig: Path | None = None
    """Default none: the cluster that we run in, as our own service account."""
    namespace: str | None = field(default=None, metadata=matching(_NAME, "a namespace"))
    """Where the Lease is. Default: our pod's, or the kubeconfig's context's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ElectionSettings:
    """Which of several replicas works."""

    lease: str = field(default="ztunnel-controller", metadata=matching(_NAME, "a name"))
    """Lease in our namespace that the working replica holds."""
    identity: str | None = field(default=None, metadata=matching(r"[!-~]{1,253}", "a name"))
    """Who we are in it; no two replicas may have the same. Default: our host name, which in a pod is the pod's name."""
    lease_seconds: float = field(default=15.0, metadata=between(2, 600))
    """After so long without a renewal another replica takes over; 15 as Kubernetes' own controllers."""
    renew_seconds: float = field(default=10.0, metadata=between(1, 599))
    """A replica that could not renew for so long stops working; 10: well before another begins."""
    retry_seconds: float = field(default=2.0, metadata=between(0.05, 60))
    """Between two tries to take or to renew the Lease."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewaySettings:
    """Pods that Gateways get."""

    image: str = field(default="ztunnel:latest", metadata=matching(r"[!-~]{1,512}", "an image"))
    """Image of the L7 proxy: our own."""
    pull_policy: str = field(default="IfNotPresent", metadata=matching("Always|IfNotPresent|Never", "Always, IfNotPresent or Never"))
    """As in Kubernetes."""
    environment: tuple[str, ...] = field(default=(), metadata=matching(r"[A-Z][A-Z0-9_]{0,127}=[^\x00]{0,1024}", "NAME=value"))
    """Further variables: every setting of `waypoint` has one (WAYPOINT_LOG_LEVEL=debug)."""
    requests: tuple[str, ...] = field(default=("cpu=100m", "memory=128Mi"), metadata=matching(_QUANTITY, "cpu=… or memory=…"))
    """What a pod asks for. Default as Istio's waypoints."""
    limits: tuple[str, ...] = field(default=("memory=1Gi",), metadata=matching(_QUANTITY, "cpu=… or memory=…"))
    """What it may have at most."""
    ca_address: str = field(default="ztunnel-ca.ztunnel-system.svc:15012", metadata=matching(r"[!-~]{1,260}", "host:port"))
    """The authority that they get their certificate from: `ztunnel ca`, or istiod."""
    roots_config_map: str = field(default="ztunnel-ca-root-cert", metadata=matching(_NAME, "a name"))
    """ConfigMap with the authority's roots that is in every namespace: its `publish.config_map`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodesSettings:
    """Nodes whose agent is not ready."""

    taints: bool = False
    """Take the taint cni.ztunnel.io/agent-not-ready from nodes whose agent is ready, and put it back when a node has booted again. Wants
    the rights to list, watch and patch nodes, and to list pods in our namespace."""
    agents: str = field(default="app.kubernetes.io/name=ztunnel", metadata=matching(r"[!-~ ]{1,512}", "a selector of labels"))
    """The agents' pods, in our namespace."""


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
class ControllerSettings:
    """Everything that `ztunnel controller` can be told."""

    trust_domain: str = field(default="cluster.local", metadata=matching(_TRUST_DOMAIN, "a trust domain in lower case"))
    """First part of every SPIFFE identity. Default as Istio."""
    cluster_domain: str = field(default="cluster.local", metadata=matching(_NAME, "a DNS domain"))
    """DNS suffix of services. Default as Kubernetes."""
    root_namespace: str = field(default="istio-system", metadata=matching(_NAME, "a namespace"))
    """Where policies count for the whole mesh. Default as Istio."""
    kubernetes: KubernetesSettings = KubernetesSettings()
    election: ElectionSettings = ElectionSettings()
    gateways: GatewaySettings = GatewaySettings()
    nodes: NodesSettings = NodesSettings()
    admin: AdminSettings = AdminSettings()
    log: LogSettings = field(default_factory=LogSettings)


def parse(config: Mapping[str, object], environ: Mapping[str, str]) -> ControllerSettings:
    """The controller's settings; see `configuration.Reader.parse`."""
    return _READER.parse(config, environ)


def variable(key: str) -> str:
    """The environment variable that overrides a setting."""
    return _READER.variable(key)


def _contradictions(settings: ControllerSettings) -> Iterator[str]:
    if settings.election.renew_seconds >= settings.election.lease_seconds:
        yield "election.renew_seconds must be less than election.lease_seconds: else two replicas work at once"
    if settings.election.retry_seconds * 2 > settings.election.renew_seconds:
        yield "election.retry_seconds must be at most half of election.renew_seconds: one try that fails must not end the work"
    ports = [port for port in (settings.admin.metrics_port, settings.admin.readiness_port) if port]
    if len(set(ports)) != len(ports):
        yield "admin.metrics_port and admin.readiness_port are the same"
    if settings.admin.address != "*":
        try:
            ip_address(settings.admin.address)
        except ValueError:
            yield f"admin.address: an IP address or * is expected, found {settings.admin.address[:100]!r}"


_READER = Reader(ControllerSettings, "ZTUNNEL_CONTROLLER_", _contradictions)
