"""Where an outbound connection goes: one function from (who, where to) to a route or a refusal, with every step in words.

Source: Istio ztunnel `proxy/outbound.rs`, `state.rs`; without waypoints and other networks. A waypoint is one more
question between "which service or workload is this" and "which endpoint": it belongs in `resolve`, before `_to_service` and
`_to_workload`, and yields a Route whose authority is the original destination.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ztunnel.mesh.addresses import is_ipv6, is_loopback
from ztunnel.mesh.balance import pick
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.ports import ILLEGAL_TARGETS, INBOUND_HBONE
from ztunnel.mesh.workloads import Protocol, Service, Workload


class RouteKind(Enum):
    """How the bytes travel. Closed set: a metrics label."""

    HBONE = "HBONE"
    TCP = "TCP"
    """Plain TCP to a workload that we know and that has no tunnel."""
    PASSTHROUGH = "PASSTHROUGH"
    """Plain TCP to a destination that the mesh knows nothing about."""


class RefusalReason(Enum):
    """Closed set: a metrics label."""

    LOOP = "loop"
    PORT_NOT_DECLARED = "port_not_declared"
    NO_HEALTHY_UPSTREAM = "no_healthy_upstream"


@dataclass(frozen=True, slots=True)
class Route:
    """How to carry one connection."""

    kind: RouteKind
    address: tuple[str, int]
    """What to dial. For HBONE the workload's address and 15008."""
    target: tuple[str, int]
    """Where the connection ends: an application's own address and port."""
    authority: str
    """`target` as text, `[…]` around IPv6: the `:authority` of the CONNECT request."""
    workload_uid: str | None = None
    expected: tuple[SpiffeId, ...] = ()
    """HBONE only: the tunnel's other end must prove to be one of these."""
    service: str | None = None
    """Hostname of the service that was addressed."""
    service_name: str = ""
    service_namespace: str = ""
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is not carried at all. It is closed, never sent on in plain."""

    reason: RefusalReason
    text: str
    service: str | None = None
    reasons: tuple[str, ...] = ()


def authority(address: str, port: int) -> str:
    """`ip:port` or `[ip]:port`, as a CONNECT request names its target."""
    return f"[{address}]:{port}" if is_ipv6(address) else f"{address}:{port}"


def resolve(
    index: Index, source: Workload, destination: tuple[str, int], active: Callable[[str], int], random: Callable[[int], int]
) -> Route | Refusal:
    """The route of one outbound connection.

    Args:
        source: the workload whose pod sent it.
        destination: where the pod dialled, canonical address.
        active, random: see `balance.pick`.
    """
    address, port = destination
    if port in ILLEGAL_TARGETS and is_loopback(address):
        text = f"{authority(address, port)} is the proxy itself"
        return Refusal(RefusalReason.LOOP, text, reasons=(text,))
    service = index.service_at(address, source.namespace)
    workload = index.workload_at(address)
    if service is not None:
        routed = _to_service(index, service, destination, active, random)
        if isinstance(routed, Route) or workload is None:
            return routed
        # The address is a pod's as well: the pod is there even if the service that claims its address has nothing behind it.
        return _to_workload(workload, destination, (*routed.reasons, f"{address} is also a workload's own address"))
    if workload is not None:
        return _to_workload(workload, destination, ())
    text = f"{address} is neither a service nor a workload of the mesh: passed through"
    return Route(RouteKind.PASSTHROUGH, destination, destination, authority(address, port), reasons=(text,))


def _to_service(
    index: Index, service: Service, destination: tuple[str, int], active: Callable[[str], int], random: Callable[[int], int]
) -> Route | Refusal:
    address, port = destination
    known = f"{address} is service {service.hostname}"
    if all(declared.port != port for declared in service.ports):
        ports = ", ".join(str(declared.port) for declared in service.ports) or "none"
        text = f"service {service.hostname} does not declare port {port} (declared: {ports})"
        return Refusal(RefusalReason.PORT_NOT_DECLARED, text, service=service.hostname, reasons=(known, text))
    candidates = index.candidates(service, port)
    if not candidates:
        text = f"no healthy upstream: service {service.hostname} port {port} has {_shortage(service)}"
        return Refusal(RefusalReason.NO_HEALTHY_UPSTREAM, text, service=service.hostname, reasons=(known, text))
    chosen = pick(candidates, active, random)
    picked = f"endpoint {_name(chosen.workload)} port {chosen.port}, one of {len(candidates)} that can serve port {port}"
    target = (_nearest(chosen.workload, address), chosen.port)
    return _dial(chosen.workload, target, service, (known, picked))


def _shortage(service: Service) -> str:
    if not service.endpoints:
        return "no endpoints: its selector matches no running pod"
    ready = [endpoint for endpoint in service.endpoints if endpoint.ready]
    if not ready:
        return f"{len(service.endpoints)} endpoints, none of them ready"
    return f"{len(ready)} ready endpoints, none of which has a number for that port"


def _to_workload(workload: Workload, destination: tuple[str, int], before: tuple[str, ...]) -> Route:
    return _dial(workload, destination, None, (*before, f"{destination[0]} is workload {_name(workload)}"))


def _dial(workload: Workload, target: tuple[str, int], service: Service | None, reasons: tuple[str, ...]) -> Route:
    address, port = target
    tunnelled = workload.protocol is Protocol.HBONE
    if tunnelled:
        dialled = (address, INBOUND_HBONE)
        how = f"it is in the mesh: HBONE to {authority(*dialled)}, expecting {workload.identity}"
    else:
        dialled = target
        how = f"it is not in the mesh: plain TCP to {authority(*dialled)}"
    return Route(
        kind=RouteKind.HBONE if tunnelled else RouteKind.TCP,
        address=dialled,
        target=target,
        authority=authority(address, port),
        workload_uid=workload.uid,
        expected=(workload.identity,) if tunnelled else (),
        service=service.hostname if service else None,
        service_name=service.name if service else "",
        service_namespace=service.namespace if service else "",
        reasons=(*reasons, how),
    )


def _nearest(workload: Workload, dialled: str) -> str:
    """The workload's address of the family that the client dialled, else its first."""
    family = is_ipv6(dialled)
    return next((address for address in workload.addresses if is_ipv6(address) is family), workload.addresses[0])


def _name(workload: Workload) -> str:
    return f"{workload.namespace}/{workload.name}"
