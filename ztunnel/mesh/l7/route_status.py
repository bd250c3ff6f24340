"""The conditions of Gateway API's routes for each parent that is ours, and of the listeners of ingress gateways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.l7.attachments import CONFLICTED, MISSING_LABEL, NO_PARENT, Attachments, ParentFound, routes_of
from ztunnel.mesh.l7.config import TlsServer
from ztunnel.mesh.l7.destinations import Registry
from ztunnel.mesh.l7.grants import References, Unresolved
from ztunnel.mesh.l7.listener_tls import listener_server, listener_tls, reference_problem
from ztunnel.mesh.l7.listeners import Listeners, allowed_kinds
from ztunnel.mesh.l7.status import ParentStatus, RouteStatus
from ztunnel.mesh.manifests.gateway import GatewayObject
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import BackendRef
from ztunnel.mesh.manifests.routes import RouteObject

INGRESS_CLASS = "istio"


@dataclass(frozen=True, slots=True)
class ListenerTold:
    """Of one listener: how many routes it has, which kinds it takes, and conditions that follow from what it refers to."""

    attached: int
    kinds: tuple[str, ...]
    conditions: tuple[Condition, ...]


def route_statuses(
    objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions, waypoint_of: Mapping[str, ObjectKey]
) -> dict[ObjectKey, RouteStatus]:
    """What each route is told of its parents that are services, waypoints or ingress gateways.

    Args:
        waypoint_of: the waypoint of each service that has one, by `Service.key`.
    """
    registry = Registry(objects, state, options)
    routes = routes_of(objects)
    attachments = Attachments(routes, registry, waypoint_of)
    references = References(objects, registry)
    waypoints = set(waypoint_of.values())
    gateways = {key: Listeners(item, (), objects) for key, item in objects.items() if isinstance(item, GatewayObject) and is_ingress(item)}
    statuses: dict[ObjectKey, RouteStatus] = {}
    for route in routes:
        parents: list[ParentStatus] = []
        for parent in route.parents:
            key = ObjectKey("Gateway", parent.namespace, parent.name)
            if parent.kind != "Gateway" or key in waypoints:
                found = attachments.parent(route, parent)
                told = (_accepted(route, found, attachments), resolved_refs(route, references), _waypoints(found))
                parents.append(ParentStatus(parent, told))
            elif key in gateways:
                _, reason, message = gateways[key].places(route, parent)
                accepted = Condition("Accepted", False, reason, message) if reason else accepted_value(route)
                parents.append(ParentStatus(parent, (accepted, resolved_refs(route, references)), ingress=True))
        if parents:
            statuses[ObjectKey(route.kind, route.metadata.namespace, route.metadata.name)] = RouteStatus(tuple(parents))
    return statuses


def is_ingress(gateway: GatewayObject) -> bool:
    """Whether a Gateway is an ingress gateway that is ours."""
    return gateway.class_name == INGRESS_CLASS


def listener_told(
    gateway: GatewayObject,
    objects: Mapping[ObjectKey, KubeObject],
    state: MeshState,
    options: MeshOptions,
    *,
    sees_secrets: bool = True,
) -> dict[str, ListenerTold]:
    """What the listeners of an ingress gateway are told, by their names.

    Args:
        sees_secrets: whether Secrets are among the objects; otherwise what they hold is not judged.
    """
    attached = Listeners(gateway, routes_of(objects), objects)
    references = References(objects, Registry(objects, state, options))
    found: dict[str, ListenerTold] = {}
    for listener in gateway.listeners:
        problem = listener_server(gateway, listener, objects, references).problem
        resolved = Condition("ResolvedRefs", True, "ResolvedRefs")
        if listener.protocol == "HTTPS":
            found_tls = listener_tls(gateway, listener.tls, objects, references)
            wrong = reference_problem(gateway, listener.tls, references)
            if wrong is None and sees_secrets and not isinstance(found_tls, TlsServer):
                wrong = found_tls
            problem = wrong[1] if wrong else ""
            if wrong:
                resolved = Condition("ResolvedRefs", False, *wrong)
        kinds = allowed_kinds(listener)
        if listener.allowed.kinds and len(kinds) < len(listener.allowed.kinds):
            resolved = Condition("ResolvedRefs", False, "InvalidRouteKinds", "a kind of route that this listener does not take")
        programmed = Condition("Programmed", not problem, "Invalid" if problem else "Programmed", problem)
        routes = [each for each in attached.by_name[listener.name].routes if not unsupported(each)]
        found[listener.name] = ListenerTold(len(routes), kinds, (resolved, programmed))
    return found


def _accepted(route: RouteObject, found: ParentFound, attachments: Attachments) -> Condition:
    if found.reason and found.reason != MISSING_LABEL:
        return Condition("Accepted", False, found.reason, found.message)
    conflict = attachments.conflict(route, found.places)
    if conflict:
        return Condition("Accepted", False, CONFLICTED, conflict)
    return accepted_value(route)


def accepted_value(route: RouteObject) -> Condition:
    """Accepted, unless something in the route itself is not supported."""
    problem = unsupported(route)
    return Condition("Accepted", False, "UnsupportedValue", problem) if problem else Condition("Accepted", True, "Accepted")


def unsupported(route: RouteObject) -> str:
    """The first thing in a route that cannot be done; empty: none."""
    for rule in route.rules:
        for problem in (rule.problem, *(ref.problem for ref in rule.backends)):
            if problem:
                return problem
    return ""


def resolved_refs(route: RouteObject, references: References) -> Condition:
    """Whether all backends and mirrors of a route are there and permitted."""
    for ref in _refs(route):
        found = references.backend(ref, route.kind, route.metadata.namespace)
        if isinstance(found, Unresolved):
            return Condition("ResolvedRefs", False, found.reason, found.message)
    return Condition("ResolvedRefs", True, "ResolvedRefs")


def _refs(route: RouteObject) -> Iterator[BackendRef]:
    for rule in route.rules:
        yield from rule.backends
        yield from (each.backend for each in rule.mirrors)


def _waypoints(found: ParentFound) -> Condition:
    if found.reason in (MISSING_LABEL, NO_PARENT):
        return Condition("ResolvedWaypoints", False, found.reason, found.message)
    return Condition("ResolvedWaypoints", True, "ResolvedWaypoints")
