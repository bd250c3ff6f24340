"""Services as L7 sees them: by host name, with what their ports carry and where their endpoints are.

A registry is built once from a set of objects; every derivation of routes and clusters asks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.entries import entry_ports
from ztunnel.mesh.l7.clusters import Endpoint, Locality, Resolution
from ztunnel.mesh.l7.config import PortProtocol
from ztunnel.mesh.l7.protocols import declared_protocol, port_protocol
from ztunnel.mesh.manifests.core import Node, Pod, ServiceObject
from ztunnel.mesh.manifests.metadata import Metadata, ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.service_entry import EntryEndpoint, ServiceEntryObject, WorkloadEntryObject
from ztunnel.mesh.manifests.virtual_hosts import covers
from ztunnel.mesh.workloads import Protocol, Service, Workload

REGION, ZONE, SUBZONE = "topology.kubernetes.io/region", "topology.kubernetes.io/zone", "topology.istio.io/subzone"
_POD_LOCALITY = "istio-locality"
_RESOLUTIONS = {
    "NONE": Resolution.ORIGINAL,
    "STATIC": Resolution.STATIC,
    "DNS": Resolution.DNS,
    "DNS_ROUND_ROBIN": Resolution.DNS,
    "DYNAMIC_DNS": Resolution.DYNAMIC,
}


@dataclass(frozen=True, slots=True)
class DestinationPort:
    """One port of a destination."""

    number: int
    name: str
    protocol: PortProtocol


@dataclass(frozen=True, slots=True)
class Destination:
    """What a route may name: one Service, or one host of a ServiceEntry."""

    key: ObjectKey
    hostname: str
    service: Service
    metadata: Metadata
    ports: tuple[DestinationPort, ...]
    traffic_distribution: str = ""
    resolution: Resolution = Resolution.STATIC
    entry: ServiceEntryObject | None = None

    @property
    def namespace(self) -> str:
        return self.key.namespace

    def port(self, number: int) -> DestinationPort | None:
        """Its port with this number."""
        return next((each for each in self.ports if each.number == number), None)


class Registry:
    """All destinations of a mesh, by name and by key."""

    def __init__(self, objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions) -> None:
        self.options = options
        self._state = state
        self._pods = {each.metadata.uid: each for each in objects.values() if isinstance(each, Pod)}
        self._entries = _entry_endpoints(objects.values())
        nodes = (each for each in objects.values() if isinstance(each, Node))
        self._localities = {each.metadata.name: _node_locality(each.metadata.labels) for each in nodes}
        self._by_host: dict[str, list[Destination]] = {}
        self._by_object: dict[ObjectKey, list[Destination]] = {}
        self._by_key: dict[str, Destination] = {}
        for destination in _destinations(objects, state, options):
            self._by_key[destination.service.key] = destination
            self._by_object.setdefault(destination.key, []).append(destination)
            self._by_host.setdefault(destination.hostname, []).append(destination)

    def all(self) -> Iterable[Destination]:
        """In order of their keys."""
        return [value for _, value in sorted(self._by_key.items())]

    def by_key(self, key: str) -> Destination | None:
        """By `Service.key`."""
        return self._by_key.get(key)

    def named(self, hostname: str, namespace: str) -> Destination | None:
        """The destination with this full host name; where several claim it, the one of `namespace` first."""
        found = self._by_host.get(hostname, [])
        return next((each for each in found if each.namespace == namespace), found[0] if found else None)

    def covered(self, host: str) -> list[Destination]:
        """The destinations that a host, or what its wildcard stands for, names."""
        if not host.startswith("*"):
            return list(self._by_host.get(host, ()))
        return [each for each in self.all() if covers(host, each.hostname)]

    def service(self, namespace: str, name: str) -> Destination | None:
        """The Kubernetes Service with this name."""
        return self._by_key.get(f"{namespace}/{name}.{namespace}.svc.{self.options.cluster_domain}")

    def entries(self, namespace: str, name: str) -> tuple[Destination, ...]:
        """The hosts of a ServiceEntry."""
        return tuple(self._by_object.get(ObjectKey("ServiceEntry", namespace, name), ()))

    def entry(self, namespace: str, name: str) -> Destination | None:
        """The first host of a ServiceEntry."""
        return next(iter(self.entries(namespace, name)), None)

    def endpoints(self, destination: Destination, port: int) -> tuple[Endpoint, ...]:
        """The places that serve a port of a destination, with all their labels; those that are not ready are not healthy."""
        found: list[Endpoint] = []
        for each in destination.service.endpoints:
            workload = self._state.workloads.get(each.workload_uid)
            number = next((target for service_port, target in each.ports if service_port == port), 0)
            if workload is not None and workload.addresses and number:
                found.append(replace(self._endpoint(workload, number), healthy=each.ready))
        return tuple(found)

    def names(self, destination: Destination, port: int) -> tuple[tuple[str, int], ...]:
        """What the proxy is to resolve itself: (name, port)."""
        entry = destination.entry
        if entry is None or destination.resolution is not Resolution.DNS:
            return ()
        endpoints = entry.endpoints or (EntryEndpoint("", False),)
        wanted = [(each.address or destination.hostname, dict(entry_ports(entry.ports, each))) for each in endpoints if not each.is_address]
        return tuple(dict.fromkeys((name, ports[port]) for name, ports in wanted if port in ports))

    def locality_of_node(self, node: str) -> Locality:
        """Where a node is, by its labels."""
        return self._localities.get(node, Locality())

    def _endpoint(self, workload: Workload, number: int) -> Endpoint:
        pod, (entry, labels) = self._pods.get(workload.uid), self._entries.get(workload.uid, (None, {}))
        labels = pod.metadata.labels if pod else labels
        own = (entry.locality if entry else "") or labels.get(_POD_LOCALITY, "")
        hbone = workload.protocol is Protocol.HBONE
        return Endpoint(
            address=workload.addresses[0],
            port=number,
            workload_uid=workload.uid,
            identity=workload.identity if hbone else None,
            hbone=hbone,
            locality=parse_locality(own) if own else self.locality_of_node(workload.node),
            node=workload.node,
            weight=entry.weight if entry else 1,
            labels=tuple(sorted(labels.items())),
        )


def parse_locality(text: str) -> Locality:
    """`region/zone/subzone`; a pod's label has dots where the slashes are, for labels cannot hold those."""
    parts = text.split("/" if "/" in text else ".", 2)
    return Locality(*parts)


def _node_locality(labels: Mapping[str, str]) -> Locality:
    return Locality(labels.get(REGION, ""), labels.get(ZONE, ""), labels.get(SUBZONE, ""))


def _destinations(objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions) -> Iterable[Destination]:
    for key, item in objects.items():
        if isinstance(item, ServiceObject):
            service = state.services.get(f"{key.namespace}/{key.name}.{key.namespace}.svc.{options.cluster_domain}")
            if service is not None:
                declared = (
                    DestinationPort(each.port, each.name, port_protocol(each.port, each.name, each.app_protocol)) for each in item.ports
                )
                yield Destination(key, service.hostname, service, item.metadata, tuple(declared), item.traffic_distribution)
        elif isinstance(item, ServiceEntryObject):
            ports = tuple(DestinationPort(each.number, each.name, declared_protocol(each.protocol)) for each in item.ports)
            for host in item.hosts:
                service = state.services.get(f"{key.namespace}/{host}")
                if service is not None and service.name == key.name:
                    yield Destination(key, host, service, item.metadata, ports, resolution=_RESOLUTIONS[item.resolution], entry=item)


def _entry_endpoints(items: Iterable[KubeObject]) -> dict[str, tuple[EntryEndpoint, dict[str, str]]]:
    """What entries say of their endpoints beyond what a workload holds, and their labels, by UID."""
    found: dict[str, tuple[EntryEndpoint, dict[str, str]]] = {}
    for item in items:
        if isinstance(item, WorkloadEntryObject):
            found[item.uid] = (item.endpoint, item.labels)
        elif isinstance(item, ServiceEntryObject):
            found.update((item.endpoint_uid(index), (each, each.labels)) for index, each in enumerate(item.endpoints))
    return found
