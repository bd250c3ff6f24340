"""ServiceEntries and WorkloadEntries as services and workloads of the mesh, virtual addresses included.

An entry without addresses gets one of each family out of ranges that nobody else uses, from a hash of its name: every agent of a mesh
comes to the same one without asking anybody. Where two hash alike, the later name moves on to the next free place.
Source: Istio `pilot/pkg/serviceregistry/ambient` (service entries), its address allocation (240.240.0.0/16, 2001:2::/48).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address
from typing import Protocol as Seam

from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.manifests.core import ServicePortObject
from ztunnel.mesh.manifests.metadata import Metadata
from ztunnel.mesh.manifests.service_entry import (
    AUTO_ALLOCATE,
    TUNNEL,
    EntryEndpoint,
    EntryPort,
    ServiceEntryObject,
    WorkloadEntryObject,
)
from ztunnel.mesh.waypoints import Waypoints
from ztunnel.mesh.workloads import Endpoint, Protocol, Service, ServicePort, Workload

_FIRST_4 = int(IPv4Address("240.240.0.0"))
_FIRST_6 = int(IPv6Address("2001:2::"))
PLACES = 2**16 - 2
"""Virtual addresses to give: without the range's first and last."""


class EntryOptions(Seam):
    """What of the mesh's options counts here."""

    @property
    def trust_domain(self) -> str: ...
    @property
    def cluster(self) -> str: ...
    @property
    def waypoint_fails_open(self) -> bool: ...


def allocate(entries: Iterable[ServiceEntryObject]) -> dict[tuple[str, str, str], tuple[str, ...]]:
    """The virtual addresses of each host, by namespace, name and host: given, assigned before, or allocated now; none where it has none."""
    found: dict[tuple[str, str, str], tuple[str, ...]] = {}
    wanting: list[tuple[str, str, str]] = []
    taken: set[int] = set()
    for entry in sorted(entries, key=lambda each: (each.metadata.namespace, each.metadata.name)):
        for host in entry.hosts:
            key = (entry.metadata.namespace, entry.metadata.name, host)
            assigned = tuple(value for name, value in entry.assigned if name in ("", host))
            found[key] = entry.addresses or (assigned if _wants(entry) else ())
            taken.update(place for place in map(_place_of, found[key]) if place)
            if not found[key] and _wants(entry):
                wanting.append(key)
    for key in wanting:
        place = _free(key, taken)
        if place:
            taken.add(place)
            found[key] = (str(IPv4Address(_FIRST_4 + place)), str(IPv6Address(_FIRST_6 + place)))
    return found


def _wants(entry: ServiceEntryObject) -> bool:
    return not entry.blocks and entry.resolution != "NONE" and entry.metadata.labels.get(AUTO_ALLOCATE) != "false"


def _free(key: tuple[str, str, str], taken: set[int]) -> int:
    if len(taken) >= PLACES:
        return 0
    place = int.from_bytes(hashlib.sha256("/".join(key).encode()).digest()[:8], "big") % PLACES + 1
    while place in taken:
        place = place % PLACES + 1
    return place


def _place_of(address: str) -> int:
    """Which place of ours an address is at; 0 for any other address."""
    if ":" in address:
        offset = int(IPv6Address(address)) - _FIRST_6
    else:
        offset = int(IPv4Address(address)) - _FIRST_4
    return offset if 1 <= offset <= PLACES else 0


def entry_ports(ports: Iterable[EntryPort], endpoint: EntryEndpoint) -> tuple[tuple[int, int], ...]:
    """(service port, this endpoint's port)."""
    return tuple((each.number, endpoint.ports.get(each.name) or each.target or each.number) for each in ports)


def service_entry_ports(ports: Iterable[ServicePortObject], endpoint: EntryEndpoint) -> tuple[tuple[int, int], ...]:
    """The same for a Kubernetes Service that selects a WorkloadEntry; a named target is looked up among the entry's ports."""
    found = []
    for each in ports:
        named = endpoint.ports.get(each.target) if isinstance(each.target, str) else each.target
        target = endpoint.ports.get(each.name) or named
        if target:
            found.append((each.port, target))
    return tuple(found)


Selected = tuple[str, bool, EntryEndpoint]
"""UID of a workload, whether it is ready, and what says its ports."""


class Entries:
    """The ServiceEntries and WorkloadEntries of a set of objects."""

    def __init__(self, listed: Iterable[object]) -> None:
        self.entries: list[ServiceEntryObject] = []
        self.selecting: set[str] = set()
        """Namespaces in which one selects workloads by their labels."""
        self._workloads: dict[str, list[WorkloadEntryObject]] = {}
        for each in listed:
            if isinstance(each, ServiceEntryObject):
                self.entries.append(each)
                if each.selector is not None:
                    self.selecting.add(each.metadata.namespace)
            elif isinstance(each, WorkloadEntryObject):
                self._workloads.setdefault(each.metadata.namespace, []).append(each)

    def selected(self, namespace: str, selector: Mapping[str, str]) -> list[Selected]:
        """The WorkloadEntries of a namespace that a selector selects; without a selector, none."""
        wanted = selector.items()
        entries = self._workloads.get(namespace, ()) if selector else ()
        return [(each.uid, not each.metadata.deleting, each.endpoint) for each in entries if wanted <= each.labels.items()]

    def services(
        self, pods: Callable[[str, Mapping[str, str]], list[Selected]], waypoints: Waypoints, options: EntryOptions
    ) -> Iterator[Service]:
        """What entries are as services, one for each host, in the order of the entries' names.

        Args:
            pods: those of a namespace that a selector selects.
        """
        vips = allocate(self.entries)
        for entry in self.entries:
            metadata, selector = entry.metadata, entry.selector or {}
            endpoints = _endpoints(entry, [*pods(metadata.namespace, selector), *self.selected(metadata.namespace, selector)])
            binding = waypoints.for_service(metadata, private=entry.private)
            nobody = SpiffeId(options.trust_domain, metadata.namespace, "default")
            for host in entry.hosts:
                yield Service(
                    name=metadata.name,
                    namespace=metadata.namespace,
                    hostname=host,
                    vips=vips[metadata.namespace, metadata.name, host],
                    ports=tuple(ServicePort(each.number, each.target or each.number, each.name) for each in entry.ports),
                    endpoints=endpoints,
                    waypoint=binding.reference(nobody, fails_open=options.waypoint_fails_open) if binding else None,
                    canary=binding.canary.reference() if binding and binding.canary else None,
                    canary_weight=binding.canary_weight if binding else 0,
                    passthrough=entry.resolution == "NONE",
                    declared=True,
                )

    def workloads(self, waypoints: Waypoints, options: EntryOptions) -> Iterator[Workload]:
        """What entries and their endpoints are as workloads, where an address is said."""
        for each in (one for own in self._workloads.values() for one in own):
            if each.endpoint.is_address:
                binding = waypoints.for_pod(each.metadata, each.endpoint.service_account)
                workload = _workload(each.uid, each.metadata, each.endpoint, each.labels, options, hbone=each.hbone)
                reference = binding.reference(workload.identity, fails_open=options.waypoint_fails_open) if binding else None
                yield replace(workload, waypoint=reference, ready=not each.metadata.deleting)
        for entry in self.entries:
            for index, endpoint in enumerate(entry.endpoints):
                if endpoint.is_address:
                    hbone = endpoint.labels.get(TUNNEL) == "http"
                    yield _workload(entry.endpoint_uid(index), entry.metadata, endpoint, endpoint.labels, options, hbone=hbone)


def _endpoints(entry: ServiceEntryObject, selected: Iterable[Selected]) -> tuple[Endpoint, ...]:
    """The endpoints of an entry whose addresses are known: those that stand in it, or those that its selector selects."""
    if entry.selector is not None:
        return tuple(Endpoint(uid, entry_ports(entry.ports, each), ready) for uid, ready, each in selected)
    inline = enumerate(entry.endpoints)
    return tuple(Endpoint(entry.endpoint_uid(index), entry_ports(entry.ports, each)) for index, each in inline if each.is_address)


def _workload(
    uid: str, metadata: Metadata, endpoint: EntryEndpoint, labels: Mapping[str, str], options: EntryOptions, *, hbone: bool
) -> Workload:
    return Workload(
        uid=uid,
        name=metadata.name,
        namespace=metadata.namespace,
        identity=SpiffeId(options.trust_domain, metadata.namespace, endpoint.service_account),
        node="",
        addresses=(endpoint.address,),
        protocol=Protocol.HBONE if hbone else Protocol.TCP,
        cluster=options.cluster,
        canonical_name=labels.get("app") or metadata.name,
        canonical_revision=labels.get("version") or "latest",
        workload_name=metadata.name,
    )
