"""Which routes of Gateway API apply to which port of which service, for whom, and why others do not.

A route applies through its parents: a Service, a ServiceEntry, or the waypoint (then all that it serves). A route in the namespace of
the service or of the waypoint is a producer's, for everybody; one in any other namespace is a consumer's, for clients of that namespace.
Source: Gateway API (GEP-1294, GEP-1324); Istio `pilot/pkg/config/kube/gateway`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ztunnel.mesh.l7.config import PortProtocol
from ztunnel.mesh.l7.destinations import Destination, DestinationPort, Registry
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import NETWORKING_GROUP, ParentRef
from ztunnel.mesh.manifests.routes import RouteObject

MISSING_LABEL, NO_PARENT, CONFLICTED = "MissingUseWaypointLabel", "NoMatchingParent", "Conflicted"


@dataclass(frozen=True, slots=True)
class Attached:
    """A route at one port of a service."""

    route: RouteObject
    clients: tuple[str, ...] = ()
    """Consumer's: the namespace whose clients it is for. Empty: everybody."""


@dataclass(frozen=True, slots=True)
class ParentFound:
    """What a parent reference leads to; `reason` says why nowhere."""

    places: tuple[tuple[Destination, DestinationPort], ...] = ()
    reason: str = ""
    message: str = ""


def routes_of(objects: Mapping[ObjectKey, KubeObject]) -> list[RouteObject]:
    """All routes, the oldest first: the order in which they win."""
    found = [each for each in objects.values() if isinstance(each, RouteObject)]
    return sorted(found, key=lambda each: (each.metadata.created, each.metadata.namespace, each.metadata.name, each.kind))


class Attachments:
    """The routes of a set of objects at the services that waypoints serve."""

    def __init__(self, routes: Iterable[RouteObject], registry: Registry, waypoint_of: Mapping[str, ObjectKey]) -> None:
        """
        Args:
            waypoint_of: the waypoint (a Gateway) of each service that has one, by `Service.key`.
        """
        self._registry = registry
        self._waypoint_of = waypoint_of
        self._served: dict[ObjectKey, list[Destination]] = {}
        for destination in registry.all():
            waypoint = waypoint_of.get(destination.service.key)
            if waypoint is not None:
                self._served.setdefault(waypoint, []).append(destination)
        self._at: dict[tuple[str, int], list[Attached]] = {}
        for route in routes:
            for parent in route.parents:
                for destination, port in self.parent(route, parent).places:
                    attached = Attached(route, self._clients(route, destination))
                    listed = self._at.setdefault((destination.service.key, port.number), [])
                    if attached not in listed:
                        listed.append(attached)

    def parent(self, route: RouteObject, parent: ParentRef) -> ParentFound:
        """Where a parent reference leads, as far as waypoints are concerned."""
        if (parent.group, parent.kind) == (GATEWAY_GROUP, "Gateway"):
            return self._gateway(route, parent)
        if (parent.group, parent.kind) == ("", "Service"):
            service = self._registry.service(parent.namespace, parent.name)
            destinations: tuple[Destination, ...] = (service,) if service is not None else ()
        elif (parent.group, parent.kind) == (NETWORKING_GROUP, "ServiceEntry"):
            destinations = self._registry.entries(parent.namespace, parent.name)
        else:
            return ParentFound(reason=NO_PARENT, message=f"a parent of kind {parent.kind} is not supported")
        if not destinations:
            return ParentFound(reason=NO_PARENT, message=f"{parent.kind} {parent.namespace}/{parent.name} is not there")
        bound = [each for each in destinations if each.service.key in self._waypoint_of]
        if not bound:
            return ParentFound(reason=MISSING_LABEL, message=f"{parent.kind} {parent.namespace}/{parent.name} has no waypoint")
        return _places(route, parent, bound)

    def conflict(self, route: RouteObject, places: Iterable[tuple[Destination, DestinationPort]]) -> str:
        """Where an older route of the other kind already is: HTTPRoutes and GRPCRoutes do not share a port. Empty: nowhere."""
        for destination, port in places if route.is_http else ():
            first = self._first(destination, port)
            if first is not None and first.kind != route.kind:
                older = f"{first.kind} {first.metadata.namespace}/{first.metadata.name}"
                return f"{older} is older and has port {port.number} of {destination.hostname}"
        return ""

    def http(self, destination: Destination, port: DestinationPort) -> list[Attached]:
        """The HTTP routes of a port, or the gRPC ones, whichever are older."""
        first = self._first(destination, port)
        return [] if first is None else [each for each in self._listed(destination, port) if each.route.kind == first.kind]

    def tcp(self, destination: Destination, port: DestinationPort) -> list[Attached]:
        """The TCP and TLS routes of a port."""
        return [each for each in self._listed(destination, port) if not each.route.is_http]

    def _first(self, destination: Destination, port: DestinationPort) -> RouteObject | None:
        return next((each.route for each in self._listed(destination, port) if each.route.is_http), None)

    def _listed(self, destination: Destination, port: DestinationPort) -> list[Attached]:
        return self._at.get((destination.service.key, port.number), [])

    def _clients(self, route: RouteObject, destination: Destination) -> tuple[str, ...]:
        producers = (destination.namespace, self._waypoint_of[destination.service.key].namespace)
        return () if route.metadata.namespace in producers else (route.metadata.namespace,)

    def _gateway(self, route: RouteObject, parent: ParentRef) -> ParentFound:
        served = self._served.get(ObjectKey("Gateway", parent.namespace, parent.name), [])
        if not served:
            return ParentFound(reason=NO_PARENT, message=f"Gateway {parent.namespace}/{parent.name} serves nothing")
        if route.metadata.namespace != parent.namespace:
            return ParentFound(reason="NotAllowedByListeners", message=f"a waypoint takes routes of its own namespace, {parent.namespace}")
        return _places(route, parent, served)


def _places(route: RouteObject, parent: ParentRef, destinations: Iterable[Destination]) -> ParentFound:
    wanted = [
        (destination, port)
        for destination in destinations
        for port in destination.ports
        if (not parent.port or port.number == parent.port)
        and (not parent.section or parent.kind == "Gateway" or port.name == parent.section)
    ]
    if not wanted:
        return ParentFound(reason=NO_PARENT, message=f"{parent.kind} {parent.namespace}/{parent.name} has no such port")
    places = [(destination, port) for destination, port in wanted if _carries(route, port)]
    if not places:
        what = "HTTP" if route.is_http else "TCP"
        return ParentFound(reason=NO_PARENT, message=f"no such port of {parent.kind} {parent.namespace}/{parent.name} carries {what}")
    return ParentFound(tuple(places))


def _carries(route: RouteObject, port: DestinationPort) -> bool:
    return port.protocol is not PortProtocol.TCP if route.is_http else not port.protocol.is_http
