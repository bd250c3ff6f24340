"""From destinations to clusters: one for each port, subset and protocol family that something is routed to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ztunnel.mesh.l7.backend_tls import BackendTls
from ztunnel.mesh.l7.clusters import (
    Balancer,
    Cluster,
    Endpoint,
    LoadBalancing,
    PoolLimits,
    Resolution,
    RetryBudget,
    UpstreamHttp,
    UpstreamTls,
)
from ztunnel.mesh.l7.config import PortProtocol
from ztunnel.mesh.l7.credentials import Credentials
from ztunnel.mesh.l7.destination_rules import DestinationRules
from ztunnel.mesh.l7.destinations import Destination, Registry
from ztunnel.mesh.l7.front import IngressWaypoints
from ztunnel.mesh.l7.protocols import upstream_http
from ztunnel.mesh.manifests.destination_rule import ClientTls, Pool, TrafficPolicy


class Upstreams:
    """The clusters of one proxy, made as routes ask for them."""

    def __init__(
        self,
        registry: Registry,
        rules: DestinationRules,
        backend_tls: BackendTls,
        credentials: Credentials,
        owned: frozenset[str],
        front: IngressWaypoints | None = None,
    ) -> None:
        """
        Args:
            credentials: of the proxy's namespace.
            owned: `Service.key`s of what the proxy serves; anything else is reached as any client would.
            front: a gateway's: the waypoints that it goes through.
        """
        self.clusters: dict[str, Cluster] = {}
        self._front = front
        self._owned = owned
        self._registry = registry
        self._rules = rules
        self._backend_tls = backend_tls
        self._credentials = credentials

    def key(self, destination: Destination, port: int, *, tcp: bool = False, subset: str = "") -> str:
        """The key of the cluster for a port that the destination has; made if it is not there yet."""
        family = "tcp" if tcp else "http"
        key = f"inbound-vip|{port}|{family}{'/' + subset if subset else ''}|{destination.hostname}"
        if destination.service.key not in self._owned:
            key = f"outbound|{port}|{subset}|{destination.hostname}"
        if key not in self.clusters:
            self.clusters[key] = self._cluster(key, destination, port, subset)
        return key

    def find(self, hostname: str, namespace: str, port: int, *, grpc: bool = False) -> str:
        """The key of the cluster for a port of a host that configuration names; empty if there is no such host or port.

        Args:
            grpc: it is spoken to in gRPC, whatever its port says.
        """
        destination = self._registry.named(hostname, namespace)
        if destination is None or destination.port(port) is None:
            return ""
        key = self.key(destination, port)
        cluster = self.clusters[key]
        if not grpc or cluster.http is UpstreamHttp.HTTP2:
            return key
        spoken = f"{key}|grpc"
        self.clusters[spoken] = replace(cluster, key=spoken, http=UpstreamHttp.HTTP2)
        return spoken

    def has_subset(self, destination: Destination, name: str) -> bool:
        """Whether a DestinationRule defines this subset."""
        return self._rules.subset(destination, name) is not None

    def _cluster(self, key: str, destination: Destination, port: int, subset: str) -> Cluster:
        declared = destination.port(port)
        assert declared is not None, "asked for a port that is not there"
        front = self._front.endpoints(destination, port) if self._front else None
        if front is not None:
            # Everything that is said of the destination is the waypoint's to do.
            return Cluster(
                key=key,
                hostname=destination.hostname,
                namespace=destination.namespace,
                service=destination.key.name,
                port=port,
                subset=subset,
                endpoints=() if isinstance(front, str) else front,
                http=upstream_http(declared.protocol),
                refused=front if isinstance(front, str) else "",
            )
        policy = self._rules.policy(destination, port, subset)
        balancing = policy.balancing or LoadBalancing()
        locality = replace(balancing.locality, forced=destination.traffic_distribution)
        named = self._rules.subset(destination, subset) if subset else None
        endpoints = _with_labels(self._registry.endpoints(destination, port), named.labels if named else {})
        tls, refused = self._tls(policy, destination, port)
        return Cluster(
            key=key,
            hostname=destination.hostname,
            namespace=destination.namespace,
            service=destination.key.name,
            port=port,
            subset=subset,
            endpoints=tuple(endpoints) if locality.failover_priority else tuple(_bare(each) for each in endpoints),
            resolution=Resolution.ORIGINAL if balancing.balancer is Balancer.PASSTHROUGH else destination.resolution,
            names=self._registry.names(destination, port),
            http=_http(declared.protocol, policy.pool),
            balancing=replace(balancing, locality=locality),
            limits=_limits(policy, self._backend_tls.retry_budget(destination)),
            outlier=policy.outlier,
            tls=tls,
            proxy_protocol=policy.proxy_protocol or 0,
            refused=policy.refused or refused,
        )

    def _tls(self, policy: TrafficPolicy, destination: Destination, port: int) -> tuple[UpstreamTls | None, str]:
        """TLS towards a port's endpoints, and why nothing may go there. A DestinationRule is more particular than a BackendTLSPolicy."""
        if policy.tls is not None:
            return self._client_tls(policy.tls)
        return self._backend_tls.settings(destination, port)

    def _client_tls(self, client: ClientTls) -> tuple[UpstreamTls | None, str]:
        if client.mode not in ("SIMPLE", "MUTUAL"):
            # The tunnel is mutual TLS already.
            return None, ""
        if not client.credential:
            return UpstreamTls(client.sni, system_roots=True, verify=client.verify, names=client.names), ""
        found = self._credentials.secret(client.credential)
        if isinstance(found, str):
            return None, found
        if client.mode == "MUTUAL" and not (found.certificate and found.key):
            return None, f"Secret {client.credential} has no certificate with its key"
        mutual = client.mode == "MUTUAL"
        return UpstreamTls(
            sni=client.sni,
            roots=found.roots,
            system_roots=not found.roots,
            verify=client.verify,
            names=client.names,
            certificate=found.certificate if mutual else b"",
            key=found.key if mutual else b"",
        ), ""


def _with_labels(endpoints: Iterable[Endpoint], labels: dict[str, str]) -> list[Endpoint]:
    wanted = labels.items()
    return [each for each in endpoints if wanted <= dict(each.labels).items()]


def _bare(endpoint: Endpoint) -> Endpoint:
    """Without labels, which only failover priorities look at."""
    return replace(endpoint, labels=())


def _http(protocol: PortProtocol, pool: Pool | None) -> UpstreamHttp:
    declared = upstream_http(protocol)
    if pool is None or declared is UpstreamHttp.HTTP2:
        return declared
    if pool.upgrade == "UPGRADE":
        return UpstreamHttp.HTTP2
    if pool.client_protocol:
        return UpstreamHttp.CLIENT
    return declared


def _limits(policy: TrafficPolicy, budget: RetryBudget | None) -> PoolLimits:
    limits = policy.pool.limits if policy.pool else PoolLimits()
    return replace(limits, retry_budget=policy.retry_budget or budget)
