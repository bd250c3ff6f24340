"""ServiceEntries and WorkloadEntries in the mesh: virtual addresses, endpoints, routes of the node agent, destinations of a waypoint."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from tests.kit.builders import Json, gateway, index_of, labelled, mesh, namespace, pod, service_manifest, workload
from tests.kit.mesh_l7 import WAYPOINT, istio, only_cluster, read_all, waypoint
from ztunnel.mesh.derive import Derivation, MeshOptions, MeshState
from ztunnel.mesh.entries import PLACES, allocate
from ztunnel.mesh.l7.bound import bound_to
from ztunnel.mesh.l7.clusters import Endpoint, Locality, Resolution
from ztunnel.mesh.l7.config import PortProtocol
from ztunnel.mesh.manifests.metadata import Metadata
from ztunnel.mesh.manifests.service_entry import ServiceEntryObject
from ztunnel.mesh.routing import Refusal, Route, RouteKind, resolve
from ztunnel.mesh.waypoints import USE_WAYPOINT
from ztunnel.mesh.workloads import Protocol

NUMERIC = {"address": "2.2.2.2"}
HTTP = {"number": 80, "name": "http", "protocol": "HTTP", "targetPort": 8080}
SOURCE = workload("source", "10.0.0.99")


def entry(name: str = "x", namespace: str = "default", meta: Mapping[str, object] | None = None, **spec: object) -> Json:
    body = {
        **istio("ServiceEntry", name, namespace=namespace),
        "spec": {"hosts": ["a.example"], "ports": [HTTP], "resolution": "STATIC"} | spec,
    }
    body["metadata"] = {"name": name, "namespace": namespace, **(meta or {})}
    return body


def route(state: MeshState, address: str, port: int = 80) -> Route | Refusal:
    return resolve(index_of(state), SOURCE, (address, port), lambda _: 0, lambda _: 0)


def an_entry(
    name: str, resolution: str = "STATIC", labels: dict[str, str] | None = None, assigned: str = "", hosts: tuple[str, ...] = ()
) -> ServiceEntryObject:
    given = (("", assigned),) if assigned else ()
    return ServiceEntryObject(Metadata(name, "default", labels=labels or {}), hosts or (f"{name}.example",), (), resolution, assigned=given)


def test_virtual_addresses_are_the_same_for_everybody() -> None:
    entries = [an_entry(f"e{number}") for number in range(500)]
    found = allocate(entries)
    assert allocate(reversed(entries)) == found
    assert len(set(found.values())) == 500
    assert all(one.startswith("240.240.") and other.startswith("2001:2::") for one, other in found.values())
    # Another entry does not move those that are there, unless it hashes to the place of one.
    more = allocate([*entries, an_entry("z")])
    assert {key: more[key] for key in found} == found


def test_places_that_are_taken() -> None:
    (vips,) = allocate([an_entry("a")]).values()
    first, second = allocate([an_entry("a"), an_entry("0", assigned=vips[0])]).values()
    assert first == (vips[0],)
    assert second != vips
    assert PLACES == 65534


@pytest.mark.parametrize(
    ("item", "allocated"),
    [
        (an_entry("a", "NONE"), False),
        (an_entry("a", "DNS"), True),
        (an_entry("a", labels={"networking.istio.io/enable-autoallocate-ip": "false"}), False),
    ],
)
def test_who_gets_a_virtual_address(item: ServiceEntryObject, allocated: bool) -> None:
    (vips,) = allocate([item]).values()
    assert bool(vips) is allocated


def test_each_host_has_its_own() -> None:
    found = allocate([an_entry("a", "DNS", hosts=("one.example", "two.example"))])
    assert len(set(found.values())) == 2


def test_endpoints_that_stand_in_the_entry() -> None:
    endpoints = [{"address": "2.2.2.2"}, {"address": "3.3.3.3", "ports": {"http": 9080}, "labels": {"networking.istio.io/tunnel": "http"}}]
    state = mesh(entry(addresses=["1.1.1.1"], endpoints=endpoints))
    service = state.services["default/a.example"]
    assert (service.name, service.vips) == ("x", ("1.1.1.1",))
    assert [each.ports for each in service.endpoints] == [((80, 8080),), ((80, 9080),)]
    assert [(each.addresses, each.protocol) for each in state.workloads.values()] == [
        (("2.2.2.2",), Protocol.TCP),
        (("3.3.3.3",), Protocol.HBONE),
    ]
    found = route(state, "1.1.1.1")
    assert isinstance(found, Route)
    assert (found.kind, found.address) == (RouteKind.TCP, ("2.2.2.2", 8080))


VM = {
    **istio("WorkloadEntry", "vm"),
    "spec": {"address": "10.9.9.9", "labels": {"app": "web"}, "serviceAccount": "vm", "ports": {"http": 7070}},
}
POD = pod("p", "10.0.0.1", labels={"app": "web"})
SELECTING = entry(addresses=["1.1.1.1"], workloadSelector={"labels": {"app": "web"}})


def test_endpoints_that_are_selected() -> None:
    state = mesh(namespace("default"), SELECTING, VM, POD, pod("other", "10.0.0.2"))
    service = state.services["default/a.example"]
    assert [(each.workload_uid, each.ports) for each in service.endpoints] == [
        ("uid-p", ((80, 8080),)),
        ("default.vm.workloadentry", ((80, 7070),)),
    ]
    assert state.workloads["default.vm.workloadentry"].identity.service_account == "vm"


def test_a_service_selects_workload_entries_too() -> None:
    ports = [{"port": 80, "name": "http", "targetPort": 8080}, {"port": 81, "targetPort": "named"}]
    service = service_manifest("web", "10.96.0.1", selector={"app": "web"}, ports=ports)
    (only,) = mesh(service, VM).services.values()
    assert [(each.workload_uid, each.ports) for each in only.endpoints] == [("default.vm.workloadentry", ((80, 7070),))]


def test_pods_that_come_and_go_reach_what_selects_them() -> None:
    derivation = Derivation(MeshOptions())
    objects = read_all([namespace("default"), SELECTING, POD])
    derivation.update({key: item for key, item in objects.items() if key.kind != "Pod"})
    assert derivation.state.services["default/a.example"].endpoints == ()
    (key,) = [key for key in objects if key.kind == "Pod"]
    assert len(derivation.update({key: objects[key]}).services["default/a.example"].endpoints) == 1
    assert derivation.update({key: None}).services["default/a.example"].endpoints == ()


def test_nothing_is_resolved_here() -> None:
    state = mesh(entry("none", hosts=["n.example"], resolution="NONE", addresses=["1.1.1.1"]), entry("dns", resolution="DNS"))
    passed = route(state, "1.1.1.1")
    assert isinstance(passed, Route)
    assert (passed.kind, passed.address, passed.service) == (RouteKind.PASSTHROUGH, ("1.1.1.1", 80), "n.example")
    refused = route(state, state.services["default/a.example"].vips[0])
    assert isinstance(refused, Refusal)


def test_a_service_is_before_an_entry_with_its_name() -> None:
    host = "web.default.svc.cluster.local"
    state = mesh(service_manifest("web", "10.96.0.1"), entry(hosts=[host], addresses=["1.1.1.1"]))
    assert state.services[f"default/{host}"].vips == ("10.96.0.1",)


@pytest.mark.parametrize(
    ("spec", "resolution", "names"),
    [
        ({"resolution": "DNS"}, Resolution.DNS, (("a.example", 8080),)),
        (
            {"resolution": "DNS_ROUND_ROBIN", "endpoints": [{"address": "b.example"}]},
            Resolution.DNS,
            (("b.example", 8080),),
        ),
        (
            {"resolution": "DNS", "endpoints": [{"address": "b", "ports": {"http": 1}}, {"address": "2.2.2.2"}]},
            Resolution.DNS,
            (("b", 1),),
        ),
        ({"resolution": "NONE", "addresses": ["1.1.1.1"]}, Resolution.ORIGINAL, ()),
        ({"resolution": "STATIC", "ports": [{"number": 80, "name": "x", "protocol": "TLS"}]}, Resolution.STATIC, ()),
    ],
)
def test_a_waypoint_in_front_of_an_entry(spec: Json, resolution: Resolution, names: tuple[object, ...]) -> None:
    known = {"hosts": ["a.example"], "ports": [HTTP]}
    config = waypoint({**istio("ServiceEntry"), "spec": known | spec}, serves=["a.example"])
    (service,) = config.services
    assert (service.kind, service.name, service.hostname, service.host_patterns) == ("ServiceEntry", "x", "a.example", ())
    assert service.ports[0].protocol is (PortProtocol.HTTP if spec.get("ports") is None else PortProtocol.TCP)
    cluster = only_cluster(config)
    assert (cluster.resolution, cluster.names) == (resolution, names)


def test_endpoints_of_an_entry_at_a_waypoint() -> None:
    endpoint = {"address": "2.2.2.2", "weight": 5, "locality": "r/z"}
    cluster = only_cluster(waypoint(entry(endpoints=[endpoint]), serves=["a.example"]))
    assert cluster.endpoints == (Endpoint("2.2.2.2", 8080, "default.x.serviceentry.0", weight=5, locality=Locality("r", "z")),)


def test_hosts_that_only_requests_name() -> None:
    config = waypoint(entry(hosts=["*.example"], resolution="DYNAMIC_DNS"), serves=["*.example"])
    assert config.services[0].host_patterns == ("*.example",)
    assert only_cluster(config).resolution is Resolution.DYNAMIC


def test_routes_go_to_entries() -> None:
    rules = [{"backendRefs": [{"group": "networking.istio.io", "kind": "ServiceEntry", "name": "x", "port": 80}]}]
    parent = {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "x"}
    body: Json = {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": {"name": "r"},
        "spec": {"parentRefs": [parent], "rules": rules},
    }
    (service,) = waypoint(entry(), body, serves=["a.example"]).services
    (only,) = service.ports[0].routes
    assert (only.name, only.backends[0].cluster) == ("default/r/rule-0", "inbound-vip|80|http|a.example")


def test_what_is_bound_to_a_waypoint() -> None:
    use = {"labels": {USE_WAYPOINT: "waypoint"}}
    bodies = [
        namespace("default"),
        gateway("waypoint", traffic="all"),
        entry(meta=use, hosts=["a.example", "b.example"]),
        entry("free", hosts=["c.example"]),
        labelled(VM, labels={USE_WAYPOINT: "waypoint"}),
    ]
    bound = bound_to(read_all(bodies), MeshOptions(), WAYPOINT)
    assert bound.services == frozenset(("default/a.example", "default/b.example"))
    assert bound.workloads == frozenset(("default.vm.workloadentry",))
