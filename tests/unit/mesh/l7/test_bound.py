"""What one waypoint serves."""

from __future__ import annotations

from tests.kit.builders import gateway, labelled, namespace, pod, service_manifest
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.bound import bound_to
from ztunnel.mesh.l7.derive import Bound
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse
from ztunnel.mesh.waypoints import USE_WAYPOINT

WHO = ObjectKey("Gateway", "default", "waypoint")


def test_services_and_pods_by_the_keys_of_the_mesh_even_before_there_is_an_address() -> None:
    bodies = [
        labelled(namespace("default"), labels={USE_WAYPOINT: "waypoint"}),
        gateway("waypoint", traffic="all"),
        service_manifest("web", "10.96.0.1"),
        labelled(service_manifest("plain", "10.96.0.2"), labels={USE_WAYPOINT: "none"}),
        pod("a", "10.0.0.1"),
        pod("b", "10.0.0.2", labels={USE_WAYPOINT: "other"}),
    ]
    objects = {key(each): each for each in (parse(body, "test") for body in bodies)}
    bound = Bound(frozenset({"default/web.default.svc.cluster.local"}), frozenset({"uid-a"}))
    assert bound_to(objects, MeshOptions(), WHO) == bound
