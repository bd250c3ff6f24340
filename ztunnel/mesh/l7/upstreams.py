"""From destinations to clusters: one for each port, subset and protocol family that something is routed to."""

from __future__ import annotations

from dataclasses import replace

from ztunnel.mesh.l7.clusters import Cluster, Endpoint, LoadBalancing, LocalitySettings
from ztunnel.mesh.l7.destinations import Destination, Registry
from ztunnel.mesh.l7.protocols import upstream_http


class Upstreams:
    """The clusters of one proxy, made as routes ask for them."""

    def __init__(self, registry: Registry, owned: frozenset[str]) -> None:
        """
        Args:
            owned: `Service.key`s of what the proxy serves; anything else is reached as any client would.
        """
        self.clusters: dict[str, Cluster] = {}
        self._owned = owned
        self._registry = registry

    def key(self, destination: Destination, port: int, *, tcp: bool = False, subset: str = "") -> str:
        """The key of the cluster for a port that the destination has; made if it is not there yet."""
        family = "tcp" if tcp else "http"
        key = f"inbound-vip|{port}|{family}{'/' + subset if subset else ''}|{destination.hostname}"
        if destination.service.key not in self._owned:
            key = f"outbound|{port}|{subset}|{destination.hostname}"
        if key not in self.clusters:
            self.clusters[key] = self._cluster(key, destination, port, subset)
        return key

    def _cluster(self, key: str, destination: Destination, port: int, subset: str) -> Cluster:
        declared = destination.port(port)
        assert declared is not None, "asked for a port that is not there"
        balancing = LoadBalancing(locality=LocalitySettings(forced=destination.traffic_distribution))
        return Cluster(
            key=key,
            hostname=destination.hostname,
            namespace=destination.namespace,
            service=destination.key.name,
            port=port,
            subset=subset,
            endpoints=tuple(_bare(each) for each in self._registry.endpoints(destination, port)),
            http=upstream_http(declared.protocol),
            balancing=balancing,
        )


def _bare(endpoint: Endpoint) -> Endpoint:
    """Without labels, which only failover priorities look at."""
    return replace(endpoint, labels=())
