"""Whether what a policy is attached to (`targetRefs`) goes through a waypoint that can enforce it: condition WaypointAccepted.

Source: Istio `pilot/pkg/serviceregistry/ambient/authorization.go` (status of policies for waypoints).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

from ztunnel.mesh.conditions import Condition
from ztunnel.mesh.waypoints import CLASS_CONTROLLERS, MESH_CONTROLLER, Binding, Waypoints

WAYPOINT_ACCEPTED = "WaypointAccepted"


class Target(NamedTuple):
    """One of `targetRefs`: the namespace is the policy's."""

    kind: str
    name: str


FindBinding = Callable[[str, str], Binding | str | None]
"""Kind and name of a service in the policy's namespace: its binding, None without one, or text that says why there is no such object."""


def target_condition(
    namespace: str, targets: Iterable[Target], waypoints: Waypoints, find: FindBinding, root_namespace: str = "istio-system"
) -> Condition:
    """The condition of a policy with targetRefs.

    Args:
        namespace: the policy's.
        find: see `FindBinding`.
    """
    bound: list[str] = []
    problems: list[tuple[str, str]] = []
    for target in targets:
        found = _judge(namespace, target, waypoints, find, root_namespace)
        if isinstance(found, str):
            bound.append(found)
        else:
            problems.append(found)
    invalid = "; ".join(text for _, text in problems)
    if not problems:
        return Condition(WAYPOINT_ACCEPTED, True, "Accepted", f"bound to {', '.join(dict.fromkeys(bound))}")
    if bound:
        text = f"bound to {', '.join(dict.fromkeys(bound))}. Invalid targetRefs: {invalid}"
        return Condition(WAYPOINT_ACCEPTED, True, "PartiallyInvalid", text)
    return Condition(WAYPOINT_ACCEPTED, False, problems[0][0], invalid)


def _judge(namespace: str, target: Target, waypoints: Waypoints, find: FindBinding, root_namespace: str) -> str | tuple[str, str]:
    """The waypoint that enforces it, or a reason and what is wrong."""
    where = f"{target.kind} {namespace}/{target.name}"
    match target.kind:
        case "GatewayClass":
            if namespace != root_namespace:
                return "Invalid", f"GatewayClass {target.name}: only policies of the root namespace {root_namespace} can target a class"
            if CLASS_CONTROLLERS.get(target.name) != MESH_CONTROLLER:
                return "Invalid", f"GatewayClass {target.name} is not a class of waypoints"
            return f"GatewayClass {target.name}"
        case "Gateway":
            waypoint = waypoints.by_key.get(f"{namespace}/{target.name}")
            return ("TargetNotFound", f"{where} not found") if waypoint is None else waypoint.key
        case "Service" | "ServiceEntry":
            binding = find(target.kind, target.name)
            if isinstance(binding, str):
                return "TargetNotFound", f"{where} not found{f': {binding}' if binding else ''}"
            if binding is None:
                return "AncestorNotBound", f"{where} is not bound to a waypoint"
            if binding.waypoint is None:
                return "AncestorNotBound", f"{where}: {binding.message}"
            return binding.waypoint.key
        case _:
            return "Invalid", f"{where}: policies can target Gateway, GatewayClass, Service and ServiceEntry only"
