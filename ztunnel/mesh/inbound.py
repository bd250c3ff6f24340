"""What an inbound connection is for, and whether it may be: the target that a CONNECT request's authority names, the service behind a
port, the verdict.

The target's address is always the one that the tunnel came to: a peer cannot make a pod's proxy dial anywhere else. A foreign proxy
that serves as a waypoint (`Workload.sandwich`) is asked for what it serves, and gets it all at its own address.
Source: Istio ztunnel `proxy/inbound.rs` (`validate_destination`, `find_inbound_upstream`).
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol

from ztunnel.mesh.addresses import canonical
from ztunnel.mesh.errors import BadConnect
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.policy import Connection, Verdict
from ztunnel.mesh.ports import ILLEGAL_TARGETS
from ztunnel.mesh.workloads import Sandwich, Service, Workload

_BAD_REQUEST: Final = 400
_UNAVAILABLE: Final = 503
_MAX_ADMISSIONS: Final = 64
"""Requests of one tunnel whose answers are remembered: there is one for each port, and a peer may ask for what it likes."""


class HostPort(Protocol):
    """A parsed authority: an address or a host name, and a port."""

    @property
    def host(self) -> str: ...

    @property
    def port(self) -> int: ...


class InboundTarget(NamedTuple):
    """Where an inbound stream ends."""

    address: str
    port: int
    service: Service | None
    original: tuple[str, int] | None = None
    """For a PROXY header: what the client wants, where that is another address than the pod's own or the proxy wants to know."""


class Admission:
    """What the mesh says to one request."""

    __slots__ = ("authority", "endpoint", "original", "service", "source_uid", "verdict", "workload")

    def __init__(self, workload: Workload, authority: str, target: InboundTarget, source_uid: str, verdict: Verdict) -> None:
        self.workload = workload
        self.authority = authority
        """As text."""
        self.endpoint = (target.address, target.port)
        self.service = target.service
        self.original = target.original
        self.source_uid = source_uid
        """The workload at the tunnel's other end, empty if none is known."""
        self.verdict = verdict


class Admissions:
    """What the requests of one tunnel are told, remembered until the mesh changes.

    Whatever else an answer depends on stays the same for as long as the tunnel lives: the addresses of its ends, and who its peer is.
    """

    def __init__(self, index: Index, uid: str, destination_ip: str, source_ip: str, identity: SpiffeId | None) -> None:
        """Of a tunnel to the pod `uid`, to whose address `destination_ip` it came; `identity` is what its peer has proven to be."""
        self._index = index
        self._uid = uid
        self._destination_ip = destination_ip
        self._source_ip = source_ip
        self._identity = identity
        self._generation = index.generation
        self._known: dict[tuple[str, int, str], Admission] = {}

    def ask(self, authority: HostPort, service_host: str = "") -> Admission:
        """The answer to one CONNECT, whose verdict may be no.

        Raises:
            BadConnect: see `resolve_inbound`; 503 when nothing is known of the pod.
        """
        if self._generation != self._index.generation:
            self._generation = self._index.generation
            self._known.clear()
        asked = (authority.host, authority.port, service_host)
        known = self._known.get(asked)
        if known is None:
            known = self._decide(authority, service_host)
            if len(self._known) >= _MAX_ADMISSIONS:
                self._known.clear()
            self._known[asked] = known
        return known

    def _decide(self, authority: HostPort, service_host: str) -> Admission:
        index = self._index
        workload = index.workload(self._uid)
        if workload is None:
            raise BadConnect("local workload information is not available", _UNAVAILABLE)
        target = resolve_inbound(index, workload, self._destination_ip, authority, service_host)
        source = index.workload_at(self._source_ip)
        # The address only says who it was if the certificate agrees: addresses are re-used, identities are proven.
        source_uid = source.uid if source is not None and source.identity == self._identity else ""
        verdict = index.decide(workload, Connection(self._source_ip, self._identity, target.address, target.port))
        return Admission(workload, str(authority), target, source_uid, verdict)


def resolve_inbound(index: Index, local: Workload, destination_ip: str, authority: HostPort, service_host: str = "") -> InboundTarget:
    """The target of one CONNECT request.

    Args:
        local: the workload in whose pod the tunnel ended.
        destination_ip: the local address of the tunnel's connection, canonical.
        service_host: see `service_for`.
    Raises:
        BadConnect: 400 for another address than the tunnel's; 503 for an unknown host name, a service that has no number for the
            port on this workload, and the proxy's own ports.
    """
    address = canonical(authority.host)
    if local.sandwich is not None:
        return _to_sandwiched(index, local, local.sandwich, destination_ip, authority, address)
    if address is None:
        service = index.service_named(authority.host.lower(), local.namespace)
        if service is None:
            raise BadConnect(f"unknown service {authority.host!r:.100}", _UNAVAILABLE)
        port = _port_behind(service, local, authority.port)
    elif address != destination_ip:
        raise BadConnect(f"ip mismatch: {address} != {destination_ip}", _BAD_REQUEST)
    else:
        port = authority.port
        service = service_for(index, local, port, service_host)
    if port in ILLEGAL_TARGETS:
        raise BadConnect(f"port {port} is the proxy itself", _UNAVAILABLE)
    return InboundTarget(destination_ip, port, service)


def _to_sandwiched(
    index: Index, local: Workload, sandwich: Sandwich, destination_ip: str, authority: HostPort, address: str | None
) -> InboundTarget:
    service = index.service_named(authority.host.lower(), local.namespace) if address is None else index.service_at(address)
    workload = index.workload_at(address) if address is not None and service is None else None
    if address is None and (service is None or not service.vips):
        raise BadConnect(f"unknown service {authority.host!r:.100}", _UNAVAILABLE)
    if address != destination_ip:
        waypoints = (service.waypoint, service.canary) if service else (workload.waypoint if workload else None,)
        if not any(waypoint is not None and index.is_waypoint(waypoint, local) for waypoint in waypoints):
            raise BadConnect(f"this pod is not the waypoint of {authority.host:.100}", _BAD_REQUEST)
    port = sandwich.port or authority.port
    if port in ILLEGAL_TARGETS:
        raise BadConnect(f"port {port} is the proxy itself", _UNAVAILABLE)
    named = address if address is not None or service is None else service.vips[0]
    original = (named or destination_ip, authority.port) if sandwich.protocol == "PROXY" else None
    return InboundTarget(destination_ip, port, service, original)


def service_for(index: Index, local: Workload, port: int, service_host: str = "") -> Service | None:
    """The service through which a connection to a workload's port probably came, for telemetry only.

    Args:
        port: the workload's own port.
        service_host: what the client says (`forwarded: host=`); believed only if it is one of the workload's services.
    """
    services = index.services_of(local.uid)
    for service in services:
        if service_host and service.hostname == service_host:
            return service
    for service in services:
        for endpoint in service.endpoints:
            if endpoint.workload_uid == local.uid and any(number == port for _, number in endpoint.ports):
                return service
    return None


def _port_behind(service: Service, local: Workload, port: int) -> int:
    for endpoint in service.endpoints:
        if endpoint.workload_uid == local.uid:
            for service_port, number in endpoint.ports:
                if service_port == port:
                    return number
    for declared in service.ports:
        if declared.port == port and declared.target_port:
            return declared.target_port
    raise BadConnect(f"service {service.hostname} has no number for port {port} on this workload", _UNAVAILABLE)
