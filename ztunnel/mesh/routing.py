"""Where an outbound connection goes: one function from (who, where to) to a route or a refusal, with every step in words.

A waypoint in front of a service or workload is asked for before an endpoint is: the Route then ends at one of the waypoint's pods and
its authority is the original destination. Where there should be one and is none, the connection is refused.
Source: Istio ztunnel `proxy/outbound.rs`, `state.rs`; without other networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

from ztunnel.mesh.addresses import is_ipv6, is_loopback
from ztunnel.mesh.balance import Candidate, pick
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.mesh.ports import ILLEGAL_TARGETS, INBOUND_HBONE
from ztunnel.mesh.workloads import Protocol, Service, WaypointRef, Workload

MAX_ROUTES: Final = 512
"""Destinations of which a `Router` remembers routes: there is one for each pod, and a pod may dial what it likes."""


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
    WAYPOINT_NOT_READY = "waypoint_not_ready"


@dataclass(frozen=True, slots=True)
class Route:
    """How to carry one connection."""

    kind: RouteKind
    address: tuple[str, int]
    """What to dial. For HBONE the workload's address and 15008."""
    target: tuple[str, int]
    """Where the connection ends: an application's own address and port. With a waypoint: what was dialled."""
    authority: str
    """`target` as text, `[…]` around IPv6: the `:authority` of the CONNECT request."""
    workload_uid: str | None = None
    expected: tuple[SpiffeId, ...] = ()
    """HBONE only: the tunnel's other end must prove to be one of these."""
    service: str | None = None
    """Hostname of the service that was addressed."""
    service_name: str = ""
    service_namespace: str = ""
    waypoint: str = ""
    """`namespace/name` of the waypoint that it goes to."""
    reasons: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] | None = field(default=None, compare=False, repr=False)
    """Among whom `workload_uid` was picked, if that was the only choice: it can be made again without asking for the rest."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a connection is not carried at all. It is closed, never sent on in plain."""

    reason: RefusalReason
    text: str
    service: str | None = None
    reasons: tuple[str, ...] = ()


class Router:
    """`resolve` for one worker: remembers what the same source was told of the same destination, until the mesh changes."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._generation = index.generation
        self._known: dict[tuple[str, tuple[str, int]], tuple[tuple[Candidate, ...], dict[str | None, Route]]] = {}

    def resolve(
        self, source: Workload, destination: tuple[str, int], active: Callable[[str], int], random: Callable[[int], int]
    ) -> Route | Refusal:
        """As the function of this name; the same object for the same answer."""
        if self._generation != self._index.generation:
            self._generation = self._index.generation
            self._known.clear()
        asked = (source.uid, destination)
        known = self._known.get(asked)
        if known is not None:
            candidates, routes = known
            chosen = pick(candidates, active, random) if candidates else None
            route = routes.get(chosen.workload.uid if chosen is not None else None)
            if route is not None:
                return route
            if chosen is not None:
                # The choice is made: asking anew would make another, and those that have no route yet would get too few connections.
                active, random = _nobody, _Told((candidates.index(chosen), 0))
        found = resolve(self._index, source, destination, active, random)
        if isinstance(found, Route) and found.candidates is not None:
            if known is None:
                if len(self._known) >= MAX_ROUTES:
                    self._known.clear()
                known = self._known[asked] = (found.candidates, {})
            known[1][found.workload_uid if found.candidates else None] = found
        return found


def _nobody(_: str) -> int:
    return 0


class _Told:
    """Dice that fall as they are told."""

    def __init__(self, numbers: tuple[int, ...]) -> None:
        self._numbers = iter(numbers)

    def __call__(self, _: int) -> int:
        return next(self._numbers)


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
    asked = _Asked(index, source, active, random)
    if service is not None:
        routed = _to_service(asked, service, destination)
        if isinstance(routed, Route) or workload is None or routed.reason is RefusalReason.WAYPOINT_NOT_READY:
            return routed
        # The address is a pod's as well: the pod is there even if the service that claims its address has nothing behind it.
        return _to_workload(asked, workload, destination, (*routed.reasons, f"{address} is also a workload's own address"))
    if workload is not None:
        return _to_workload(asked, workload, destination, ())
    text = f"{address} is neither a service nor a workload of the mesh: passed through"
    return Route(RouteKind.PASSTHROUGH, destination, destination, authority(address, port), reasons=(text,))


@dataclass(frozen=True, slots=True)
class _Asked:
    """Who asks, and what the answer depends on besides."""

    index: Index
    source: Workload
    active: Callable[[str], int]
    random: Callable[[int], int]


def _to_service(asked: _Asked, service: Service, destination: tuple[str, int]) -> Route | Refusal:
    address, port = destination
    known = f"{address} is service {service.hostname}"
    if all(declared.port != port for declared in service.ports):
        ports = ", ".join(str(declared.port) for declared in service.ports) or "none"
        text = f"service {service.hostname} does not declare port {port} (declared: {ports})"
        return Refusal(RefusalReason.PORT_NOT_DECLARED, text, service=service.hostname, reasons=(known, text))
    reasons: tuple[str, ...] = (known,)
    if service.waypoint is not None:
        routed = _to_waypoint(asked, _primary_or_canary(service, service.waypoint, asked.random), destination, service, reasons)
        if not isinstance(routed, str):
            return replace(routed, candidates=None) if isinstance(routed, Route) and service.canary is not None else routed
        reasons = (known, routed)
    if service.passthrough:
        text = f"what is behind {address} is not said (no selector, or resolution NONE): passed through"
        return Route(
            RouteKind.PASSTHROUGH, destination, destination, authority(address, port), service=service.hostname, reasons=(*reasons, text)
        )
    candidates = asked.index.candidates(service, port)
    if not candidates:
        text = f"no healthy upstream: service {service.hostname} port {port} has {_shortage(service)}"
        return Refusal(RefusalReason.NO_HEALTHY_UPSTREAM, text, service=service.hostname, reasons=(*reasons, text))
    chosen = pick(candidates, asked.active, asked.random)
    workload = chosen.workload
    picked = f"endpoint {_name(workload)} port {chosen.port}, one of {len(candidates)} that can serve port {port}"
    target = (_nearest(workload, address), chosen.port)
    reasons = (*reasons, picked)
    if workload.waypoint is not None and workload.waypoint_always and service.waypoint is None:
        routed = _to_waypoint(asked, workload.waypoint, target, service, (*reasons, f"{_name(workload)}'s service account has a waypoint"))
        if not isinstance(routed, str):
            return replace(routed, candidates=None) if isinstance(routed, Route) else routed
        reasons = (*reasons, routed)
    return _dial(workload, target, service, reasons, candidates if service.canary is None else None)


def _primary_or_canary(service: Service, primary: WaypointRef, random: Callable[[int], int]) -> WaypointRef:
    if service.canary is not None and service.canary_weight and random(100) < service.canary_weight:
        return service.canary
    return primary


def _to_waypoint(
    asked: _Asked, waypoint: WaypointRef, destination: tuple[str, int], service: Service | None, before: tuple[str, ...]
) -> Route | Refusal | str:
    """By way of a waypoint, or no way; text: why it is left out.

    Args:
        destination: what the waypoint is to be told.
    """
    index, hostname = asked.index, service.hostname if service else None
    if waypoint.problem:
        if waypoint.fails_open:
            return f"without its waypoint, as waypoint.fallback l4 says: {waypoint.problem}"
        text = f"{waypoint.problem}; connections are refused until it is (waypoint.fallback l4 lets them go on without)"
        return Refusal(RefusalReason.WAYPOINT_NOT_READY, text, service=hostname, reasons=(*before, text))
    if index.is_waypoint(waypoint, asked.source):
        return f"its waypoint {waypoint.name} is the pod that sends this"
    candidates = index.waypoint_candidates(waypoint)
    uid: str | None = None
    if candidates is None:
        candidates = ()
        if not waypoint.addresses:
            text = f"unknown waypoint: nothing is known of {', '.join(waypoint.hostnames)}, the address of {waypoint.name}"
            return Refusal(RefusalReason.WAYPOINT_NOT_READY, text, service=hostname, reasons=(*before, text))
        dialled, expected, whom = (waypoint.addresses[0], INBOUND_HBONE), waypoint.identity, "at its own address"
    elif not candidates:
        text = f"no healthy upstream: waypoint {waypoint.name} has no ready pod"
        return Refusal(RefusalReason.WAYPOINT_NOT_READY, text, service=hostname, reasons=(*before, text))
    else:
        chosen = pick(candidates, asked.active, asked.random)
        uid, expected = chosen.workload.uid, chosen.workload.identity
        dialled = (_nearest(chosen.workload, destination[0]), chosen.port)
        whom = f"pod {_name(chosen.workload)}, one of {len(candidates)}"
    name = authority(*destination)
    how = f"by way of waypoint {waypoint.name}, {whom}: HBONE to {authority(*dialled)} for {name}, expecting {expected}"
    return Route(
        kind=RouteKind.HBONE,
        address=dialled,
        target=destination,
        authority=name,
        workload_uid=uid,
        expected=(expected,),
        service=hostname,
        service_name=service.name if service else "",
        service_namespace=service.namespace if service else "",
        waypoint=waypoint.name,
        reasons=(*before, how),
        candidates=candidates,
    )


def _shortage(service: Service) -> str:
    if not service.endpoints:
        return "no endpoints: its selector matches no running pod"
    ready = [endpoint for endpoint in service.endpoints if endpoint.ready]
    if not ready:
        return f"{len(service.endpoints)} endpoints, none of them ready"
    return f"{len(ready)} ready endpoints, none of which has a number for that port"


def _to_workload(asked: _Asked, workload: Workload, destination: tuple[str, int], before: tuple[str, ...]) -> Route | Refusal:
    reasons = (*before, f"{destination[0]} is workload {_name(workload)}")
    if workload.waypoint is not None:
        routed = _to_waypoint(asked, workload.waypoint, destination, None, reasons)
        if not isinstance(routed, str):
            return routed
        reasons = (*reasons, routed)
    return _dial(workload, destination, None, reasons, ())


def _dial(
    workload: Workload,
    target: tuple[str, int],
    service: Service | None,
    reasons: tuple[str, ...],
    candidates: tuple[Candidate, ...] | None,
) -> Route:
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
        candidates=candidates,
    )


def _nearest(workload: Workload, dialled: str) -> str:
    """The workload's address of the family that the client dialled, else its first."""
    family = is_ipv6(dialled)
    return next((address for address in workload.addresses if is_ipv6(address) is family), workload.addresses[0])


def _name(workload: Workload) -> str:
    return f"{workload.namespace}/{workload.name}"
