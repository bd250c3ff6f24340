"""The conditions of Gateway API's routes, for each parent that is ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.derive import MeshOptions, MeshState
from ztunnel.mesh.l7.attachments import CONFLICTED, MISSING_LABEL, NO_PARENT, Attachments, ParentFound, routes_of
from ztunnel.mesh.l7.destinations import Registry
from ztunnel.mesh.l7.grants import References, Unresolved
from ztunnel.mesh.l7.status import ParentStatus, RouteStatus
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import KubeObject
from ztunnel.mesh.manifests.references import BackendRef
from ztunnel.mesh.manifests.routes import RouteObject


def route_statuses(
    objects: Mapping[ObjectKey, KubeObject], state: MeshState, options: MeshOptions, waypoint_of: Mapping[str, ObjectKey]
) -> dict[ObjectKey, RouteStatus]:
    """What each route is told of its parents that are services or waypoints.

    Args:
        waypoint_of: the waypoint of each service that has one, by `Service.key`.
    """
    registry = Registry(objects, state, options)
    routes = routes_of(objects)
    attachments = Attachments(routes, registry, waypoint_of)
    references = References(objects, registry)
    waypoints = set(waypoint_of.values())
    statuses: dict[ObjectKey, RouteStatus] = {}
    for route in routes:
        parents = tuple(
            ParentStatus(parent, _conditions(route, attachments.parent(route, parent), attachments, references))
            for parent in route.parents
            if parent.kind != "Gateway" or ObjectKey("Gateway", parent.namespace, parent.name) in waypoints
        )
        if parents:
            statuses[ObjectKey(route.kind, route.metadata.namespace, route.metadata.name)] = RouteStatus(parents)
    return statuses


def _conditions(route: RouteObject, found: ParentFound, attachments: Attachments, references: References) -> tuple[Condition, ...]:
    return (_accepted(route, found, attachments), resolved_refs(route, references), _waypoints(found))


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
