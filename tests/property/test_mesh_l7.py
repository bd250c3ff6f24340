"""Whatever parses can be derived: hostile sets of objects give a configuration and statuses, the same in any order."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.builders import gateway, namespace, pod, service_manifest
from tests.kit.l7_samples import L7_SAMPLES
from tests.property.test_mesh_manifests import damaged, parsed
from ztunnel.mesh.derive import MeshOptions, derive
from ztunnel.mesh.l7.bound import bound_to
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.mesh.l7.derive import derive_proxy
from ztunnel.mesh.l7.ingress import GatewayPods, derive_gateway
from ztunnel.mesh.l7.istio_status import istio_statuses
from ztunnel.mesh.l7.route_status import route_statuses
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import Ignored, KubeObject, key, parse
from ztunnel.mesh.waypoints import USE_WAYPOINT

WHO = ObjectKey("Gateway", "default", "a")
PODS = GatewayPods("default", "a", (("a", "b"),))
OPTIONS = MeshOptions()
BASE = [
    parse(body, "base")
    for body in (
        {**namespace("default"), "metadata": {"name": "default", "labels": {USE_WAYPOINT: "a"}}},
        gateway("a"),
        service_manifest("a", "10.0.0.1", selector={"app": "x"}, ports=[{"port": 80, "name": "http"}, {"port": 81}]),
        pod("p", "10.0.0.2", labels={"app": "x", "a": "b"}),
    )
]
GOOD = [parse(body, "sample") for body in L7_SAMPLES]


@st.composite
def objects(draw: st.DrawFn) -> list[KubeObject]:
    """Damaged documents as far as they parse, or what stands in for them, beside some good ones."""
    found = [parsed(body) for body in draw(st.lists(damaged(), min_size=1, max_size=4))]
    chosen = draw(st.lists(st.sampled_from(GOOD), max_size=6, unique_by=key))
    kept = {key(each): each for each in (*BASE, *chosen, *(one for one in found if one is not None and not isinstance(one, Ignored)))}
    return list(kept.values())


def everything(listed: list[KubeObject]) -> tuple[ProxyConfig, ProxyConfig, object, object]:
    found = {key(each): each for each in listed}
    state = derive(found, OPTIONS)
    waypoint_of = {name: WHO for name, each in state.services.items() if each.waypoint is not None}
    return (
        derive_proxy(found, state, OPTIONS, WHO, bound_to(found, OPTIONS, WHO), "node"),
        derive_gateway(found, state, OPTIONS, WHO, PODS),
        route_statuses(found, state, OPTIONS, waypoint_of),
        istio_statuses(found, state, OPTIONS, waypoint_of),
    )


@given(objects(), st.randoms(use_true_random=False))
def test_what_parses_is_derived_and_order_does_not_show(listed: list[KubeObject], dice: Random) -> None:
    first = everything(listed)
    dice.shuffle(listed)
    assert everything(listed) == first
    for config in first[:2]:
        named = [each.cluster for service in config.services for port in service.ports for route in port.routes for each in route.backends]
        named += [
            each.cluster for server in config.servers for host in server.virtual_hosts for route in host.routes for each in route.backends
        ]
        assert config.clusters.keys() >= {name for name in named if name}
