"""Which routes of Gateway API are attached to which listener of an ingress gateway, under which host names, and why others are not.

Source: Gateway API, `ParentReference`, `AllowedRoutes`, `Listener.hostname`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ztunnel.mesh.l7.attachments import NO_PARENT, Attached
from ztunnel.mesh.manifests.core import Namespace
from ztunnel.mesh.manifests.gateway import GATEWAY_GROUP, GatewayObject, Listener
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import ParentRef
from ztunnel.mesh.manifests.routes import RouteObject
from ztunnel.mesh.manifests.virtual_hosts import covers

NOT_ALLOWED, NO_HOSTNAME = "NotAllowedByListeners", "NoMatchingListenerHostname"
ANY_HOST = "*"


@dataclass(frozen=True, slots=True)
class Place:
    """A listener that takes a route, and the host names that both have; a name is as narrow as the narrower of the two."""

    listener: Listener
    hosts: tuple[str, ...]


@dataclass(slots=True)
class ListenerRoutes:
    """What one listener has: the routes under each host name, the oldest first."""

    by_host: dict[str, list[Attached]] = field(default_factory=dict)
    routes: list[RouteObject] = field(default_factory=list)


class Listeners:
    """The listeners of one Gateway and their routes."""

    def __init__(self, gateway: GatewayObject, routes: Iterable[RouteObject], objects: Mapping[ObjectKey, KubeObject]) -> None:
        """
        Args:
            routes: the oldest first.
        """
        self._gateway = gateway
        self._labels = {each.metadata.name: each.metadata.labels for each in objects.values() if isinstance(each, Namespace)}
        self.by_name: dict[str, ListenerRoutes] = {each.name: ListenerRoutes() for each in gateway.listeners}
        for route in routes:
            for parent in route.parents:
                for place in self.places(route, parent)[0]:
                    self._attach(route, place)

    def is_parent(self, parent: ParentRef) -> bool:
        """Whether a reference means this Gateway."""
        own = self._gateway.metadata
        return (parent.group, parent.kind, parent.namespace, parent.name) == (GATEWAY_GROUP, "Gateway", own.namespace, own.name)

    def places(self, route: RouteObject, parent: ParentRef) -> tuple[tuple[Place, ...], str, str]:
        """The listeners that take a route by one of its parents; without any, a reason and words."""
        if not self.is_parent(parent):
            return (), NO_PARENT, "another Gateway"
        named = [
            each
            for each in self._gateway.listeners
            if (not parent.section or each.name == parent.section) and (not parent.port or each.port == parent.port)
        ]
        if not named:
            return (), NO_PARENT, f"Gateway {parent.namespace}/{parent.name} has no such listener"
        allowed = [each for each in named if self._admits(each, route)]
        if not allowed:
            return (), NOT_ALLOWED, f"no such listener of Gateway {parent.namespace}/{parent.name} takes a {route.kind} of this namespace"
        found = tuple(Place(each, hosts) for each in allowed if (hosts := shared_hosts(each.hostname, route)))
        if not found:
            return (), NO_HOSTNAME, "no listener has one of its hostnames"
        return found, "", ""

    def _admits(self, listener: Listener, route: RouteObject) -> bool:
        namespace = route.metadata.namespace
        if not listener.allowed.admits(self._gateway.metadata.namespace, namespace, self._labels.get(namespace, {})):
            return False
        return route.kind in allowed_kinds(listener)

    def _attach(self, route: RouteObject, place: Place) -> None:
        found = self.by_name[place.listener.name]
        if route not in found.routes:
            found.routes.append(route)
        for host in place.hosts:
            listed = found.by_host.setdefault(host, [])
            if all(each.route is not route for each in listed):
                listed.append(Attached(route))


def shared_hosts(hostname: str, route: RouteObject) -> tuple[str, ...]:
    """The names that a listener's host name (empty: any) and a route have in common."""
    if route.kind == "TCPRoute":
        return (ANY_HOST,)
    own = hostname or ANY_HOST
    if not route.hostnames:
        return (own,)
    return tuple(
        dict.fromkeys(other if covers(own, other) else own for other in route.hostnames if covers(own, other) or covers(other, own))
    )


def allowed_kinds(listener: Listener) -> tuple[str, ...]:
    """The kinds of routes that a listener takes: of those that its protocol has, the ones that it allows."""
    if not listener.allowed.kinds:
        return _kinds(listener)
    return tuple(kind for group, kind in listener.allowed.kinds if group == GATEWAY_GROUP and kind in _kinds(listener))


def _kinds(listener: Listener) -> tuple[str, ...]:
    match listener.protocol:
        case "HTTP" | "HTTPS":
            return ("HTTPRoute", "GRPCRoute")
        case "TLS":
            return ("TLSRoute",) if listener.tls is not None and listener.tls.mode == "Passthrough" else ("TCPRoute", "TLSRoute")
        case "TCP":
            return ("TCPRoute",)
        case _:
            return ()
