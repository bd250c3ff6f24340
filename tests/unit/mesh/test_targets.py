"""Whether a policy's targets go through a waypoint."""

from __future__ import annotations

import pytest

from tests.kit.builders import gateway, labelled, namespace, service_manifest
from ztunnel.mesh.manifests.core import ServiceObject
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.targets import Target, target_condition
from ztunnel.mesh.waypoints import USE_WAYPOINT, Binding, Waypoints

OBJECTS = [
    parse(body, "test")
    for body in (
        namespace("default"),
        gateway("waypoint", "10.96.0.9"),
        labelled(service_manifest("web"), labels={USE_WAYPOINT: "waypoint"}),
        labelled(service_manifest("lost"), labels={USE_WAYPOINT: "missing"}),
        service_manifest("plain"),
    )
]
WAYPOINTS = Waypoints.of(OBJECTS)
SERVICES = {each.metadata.name: each for each in OBJECTS if isinstance(each, ServiceObject)}


def find(kind: str, name: str) -> Binding | str | None:
    return WAYPOINTS.for_service(SERVICES[name].metadata) if kind == "Service" and name in SERVICES else ""


@pytest.mark.parametrize(
    ("targets", "namespace", "status", "reason", "words"),
    [
        ([Target("Service", "web")], "default", True, "Accepted", "bound to default/waypoint"),
        ([Target("Gateway", "waypoint"), Target("Service", "web")], "default", True, "Accepted", "bound to default/waypoint"),
        ([Target("Service", "plain")], "default", False, "AncestorNotBound", "not bound to a waypoint"),
        ([Target("Service", "lost")], "default", False, "AncestorNotBound", "no such Gateway"),
        ([Target("Service", "nobody")], "default", False, "TargetNotFound", "Service default/nobody not found"),
        ([Target("Gateway", "nobody")], "default", False, "TargetNotFound", "Gateway default/nobody not found"),
        ([Target("GatewayClass", "istio-waypoint")], "default", False, "Invalid", "root namespace"),
        ([Target("GatewayClass", "istio-waypoint")], "istio-system", True, "Accepted", "istio-waypoint"),
        ([Target("GatewayClass", "istio")], "istio-system", False, "Invalid", "not a class of waypoints"),
        ([Target("Pod", "web")], "default", False, "Invalid", "can target"),
        (
            [Target("Service", "web"), Target("Service", "plain")],
            "default",
            True,
            "PartiallyInvalid",
            "Invalid targetRefs: Service default/plain",
        ),
    ],
)
def test_each_target(targets: list[Target], namespace: str, status: bool, reason: str, words: str) -> None:
    condition = target_condition(namespace, targets, WAYPOINTS, find)
    assert (condition.type, condition.status, condition.reason) == ("WaypointAccepted", status, reason)
    assert words in condition.message
