"""ServiceEntry and WorkloadEntry: services and endpoints that Kubernetes does not know.

Source: Istio API reference of ServiceEntry and WorkloadEntry, and their validation (`pkg/config/validation`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ztunnel.mesh.addresses import canonical, parse_block
from ztunnel.mesh.manifests.fields import Field
from ztunnel.mesh.manifests.metadata import Metadata, read_metadata
from ztunnel.mesh.manifests.selectors import SPEC
from ztunnel.mesh.manifests.values import choice, hostname, integer
from ztunnel.mesh.manifests.virtual_hosts import read_export_to, read_host
from ztunnel.mesh.rules import Cidr

AUTO_ALLOCATE = "networking.istio.io/enable-autoallocate-ip"
TUNNEL = "networking.istio.io/tunnel"
"""A WorkloadEntry's label: `http` for one that takes HBONE."""
REDIRECTION = "ambient.istio.io/redirection"
RESOLUTIONS = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")
MAX_ENDPOINTS = 1000
_ENTRY = ("address", "ports", "labels", "network", "locality", "weight", "serviceAccount")
_PROTOCOLS = ("HTTP", "HTTPS", "HTTP2", "GRPC", "GRPC-WEB", "MONGO", "REDIS", "MYSQL", "TCP", "TLS", "UDP")
_READABLE = ("HTTP", "HTTP2", "GRPC", "GRPC-WEB", "HTTPS", "TLS")
"""What says by itself which host it is for."""


@dataclass(frozen=True, slots=True)
class EntryEndpoint:
    """One endpoint. `address` is canonical, or a DNS name, or empty (the entry's own host)."""

    address: str
    is_address: bool
    ports: dict[str, int] = field(default_factory=dict)
    """Numbers by the names of the service's ports."""
    labels: dict[str, str] = field(default_factory=dict)
    locality: str = ""
    weight: int = 1
    service_account: str = "default"


@dataclass(frozen=True, slots=True)
class WorkloadEntryObject:
    """One WorkloadEntry."""

    metadata: Metadata
    endpoint: EntryEndpoint
    hbone: bool = False

    @property
    def uid(self) -> str:
        """Its workload's."""
        return f"{self.metadata.namespace}.{self.metadata.name}.workloadentry"

    @property
    def labels(self) -> dict[str, str]:
        """What selectors look at."""
        return self.metadata.labels | self.endpoint.labels


@dataclass(frozen=True, slots=True)
class EntryPort:
    """One port; `target` 0 is the same number."""

    number: int
    name: str
    protocol: str
    target: int = 0


@dataclass(frozen=True, slots=True)
class ServiceEntryObject:
    """One ServiceEntry; each of its hosts is a service of its own."""

    metadata: Metadata
    hosts: tuple[str, ...]
    ports: tuple[EntryPort, ...]
    resolution: str = "NONE"
    addresses: tuple[str, ...] = ()
    blocks: tuple[Cidr, ...] = ()
    """Addresses that are blocks of more than one."""
    endpoints: tuple[EntryEndpoint, ...] = ()
    selector: dict[str, str] | None = None
    export_to: tuple[str, ...] = ()
    assigned: tuple[tuple[str, str], ...] = ()
    """(host, address) that a controller has written into its status."""
    notes: tuple[str, ...] = ()
    """What of it is not done, and why."""

    @property
    def private(self) -> bool:
        """Visible in its own namespace only."""
        return self.export_to == (".",)

    def endpoint_uid(self, index: int) -> str:
        """The UID of the workload of an endpoint that stands in the entry itself."""
        return f"{self.metadata.namespace}.{self.metadata.name}.serviceentry.{index}"


def read_workload_entry(document: Field) -> WorkloadEntryObject:
    """A WorkloadEntry."""
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(_ENTRY)
    endpoint = _endpoint(spec)
    tunnel = metadata.labels.get(TUNNEL) or endpoint.labels.get(TUNNEL)
    return WorkloadEntryObject(metadata, endpoint, tunnel == "http" or metadata.annotations.get(REDIRECTION) == "enabled")


def read_service_entry(document: Field) -> ServiceEntryObject:
    """A ServiceEntry."""
    document.only(SPEC)
    metadata = read_metadata(document)
    spec = document.get("spec")
    spec.only(
        (
            *("hosts", "addresses", "ports", "location", "resolution", "endpoints", "workloadSelector", "exportTo", "subjectAltNames"),
            "connectStrategy",
        )
    )
    choice(spec.get("location"), ("MESH_EXTERNAL", "MESH_INTERNAL"), "MESH_EXTERNAL")
    hosts = tuple(dict.fromkeys(read_host(item) for item in spec.get("hosts").items()))
    if not hosts or "*" in hosts:
        raise spec.get("hosts").error("at least one, and not *")
    resolution = choice(spec.get("resolution"), RESOLUTIONS, "NONE")
    addresses, blocks = _addresses(spec.get("addresses"))
    selector = spec.get("workloadSelector")
    selector.only(("labels",))
    endpoints: list[EntryEndpoint] = []
    for item in spec.get("endpoints").items(MAX_ENDPOINTS):
        item.only(_ENTRY)
        endpoints.append(_endpoint(item))
    found = ServiceEntryObject(
        metadata=metadata,
        hosts=hosts,
        ports=_ports(spec.get("ports")),
        resolution=resolution,
        addresses=addresses,
        blocks=blocks,
        endpoints=tuple(endpoints),
        selector=None if selector.absent else selector.get("labels").labels(),
        export_to=read_export_to(spec.get("exportTo")),
        assigned=_assigned(document.get("status").get("addresses")),
        notes=tuple(_notes(spec, blocks)),
    )
    _check(spec, found)
    return found


def _notes(spec: Field, blocks: tuple[Cidr, ...]) -> list[str]:
    notes = []
    if not spec.get("subjectAltNames").absent:
        notes.append("spec.subjectAltNames: use those of a DestinationRule's TLS settings")
    if spec.get("connectStrategy").text("DEFAULT") not in ("DEFAULT", "FIRST_HEALTHY_RACE"):
        raise spec.get("connectStrategy").wrong("not one of DEFAULT, FIRST_HEALTHY_RACE")
    if spec.get("connectStrategy").value == "FIRST_HEALTHY_RACE":
        notes.append("spec.connectStrategy: addresses are tried one after the other")
    if blocks:
        notes.append("spec.addresses: blocks of more than one address are passed through, not routed to a waypoint")
    return notes


def _check(spec: Field, found: ServiceEntryObject) -> None:
    """What goes with what. Source: Istio's validation of ServiceEntry."""
    wildcards = [host for host in found.hosts if host.startswith("*")]
    if found.selector is not None and found.endpoints:
        raise spec.get("endpoints").error("endpoints or workloadSelector, not both")
    match found.resolution:
        case "NONE":
            if found.endpoints:
                raise spec.get("endpoints").error("not with resolution NONE")
        case "STATIC":
            if not all(each.is_address for each in found.endpoints):
                raise spec.get("endpoints").error("with resolution STATIC they have IP addresses")
        case "DYNAMIC_DNS":
            if found.endpoints or found.selector is not None or not wildcards:
                raise spec.get("resolution").error("DYNAMIC_DNS is for hosts with a wildcard, without endpoints")
            if any(port.protocol not in _READABLE for port in found.ports):
                raise spec.get("ports").error("with DYNAMIC_DNS only protocols that name their host (HTTP, TLS)")
        case _:
            if found.selector is not None:
                raise spec.get("workloadSelector").error(f"not with resolution {found.resolution}")
            if wildcards and not found.endpoints:
                raise spec.get("hosts").error("a host with a wildcard cannot be resolved; give endpoints")
            if found.resolution == "DNS_ROUND_ROBIN" and len(found.endpoints) > 1:
                raise spec.get("endpoints").error("at most one with DNS_ROUND_ROBIN")


def _endpoint(place: Field) -> EntryEndpoint:
    address = place.get("address")
    text = "" if address.absent or address.value == "" else address.text()
    if text.startswith("unix://"):
        raise address.wrong("Unix sockets are not reached")
    numeric = canonical(text) if text else None
    ports = {}
    for name, member in place.get("ports").texts():
        ports[name] = member.port()
    return EntryEndpoint(
        address=numeric or (hostname(address) if text else ""),
        is_address=numeric is not None,
        ports=ports,
        labels=place.get("labels").labels(),
        locality=place.get("locality").text(""),
        weight=integer(place.get("weight"), 0, 2**31 - 1, 0) or 1,
        service_account=place.get("serviceAccount").name("default"),
    )


def _ports(place: Field) -> tuple[EntryPort, ...]:
    ports: dict[int, EntryPort] = {}
    for item in place.items():
        item.only(("number", "protocol", "name", "targetPort"))
        number = item.get("number").port()
        protocol = item.get("protocol")
        if protocol.text("TCP").upper() not in _PROTOCOLS:
            raise protocol.wrong(f"not one of {', '.join(_PROTOCOLS)}")
        if protocol.text("TCP").upper() == "UDP":
            continue
        if number in ports:
            raise item.get("number").error(f"port {number} is listed twice")
        target = item.get("targetPort")
        unset = target.absent or target.value == 0
        ports[number] = EntryPort(number, item.get("name").label_value(), protocol.text("TCP").upper(), 0 if unset else target.port())
    return tuple(ports.values())


def _addresses(place: Field) -> tuple[tuple[str, ...], tuple[Cidr, ...]]:
    single: dict[str, None] = {}
    blocks: dict[Cidr, None] = {}
    for item in place.items():
        block = parse_block(item.text())
        if block is None:
            raise item.wrong("not an address, nor a block of them")
        if block.prefix == block.bits:
            single[block.network] = None
        else:
            blocks[block] = None
    return tuple(single), tuple(blocks)


def _assigned(place: Field) -> tuple[tuple[str, str], ...]:
    found = []
    for item in place.items():
        host = item.get("host")
        found.append(("" if host.absent or host.value == "" else read_host(host), item.get("value").address()))
    return tuple(found)
