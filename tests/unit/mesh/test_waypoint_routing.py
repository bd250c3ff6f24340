"""Connections by way of waypoints: which, whom to expect there, and what happens when there is none."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from tests.kit import builders
from tests.kit.builders import (
    Json,
    gateway,
    identity,
    index_of,
    labelled,
    mesh,
    namespace,
    pod,
    service,
    service_account,
    service_manifest,
    workload,
)
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.errors import BadConnect
from ztunnel.mesh.inbound import InboundTarget, resolve_inbound
from ztunnel.mesh.index import Index
from ztunnel.mesh.routing import Refusal, RefusalReason, Route, RouteKind, resolve
from ztunnel.mesh.waypoints import CANARY, CANARY_WEIGHT, GATEWAY_NAME, INBOUND_BINDING, MANAGED, MANAGED_WAYPOINT, USE_WAYPOINT
from ztunnel.mesh.workloads import Sandwich, Service, WaypointRef, Workload

CLIENT = workload("client", "10.0.0.9", "fd00::9")
WEB = workload("web", "10.0.0.1", "fd00::1", account="web")
PROXY = workload("proxy", "10.0.0.5", "fd00::5", account="waypoint", hbone=False)
SECOND = workload("second", "10.0.0.6", account="waypoint", hbone=False)
REFERENCE = WaypointRef("default/waypoint", identity("default", "waypoint"), ("10.96.0.9",), ("waypoint.default.svc.cluster.local",))

BY_WAY = (
    "by way of waypoint default/waypoint, pod default/proxy, one of 1: HBONE to 10.0.0.5:15008 for 10.96.0.1:80, "
    "expecting spiffe://cluster.local/ns/default/sa/waypoint"
)


def front(*pods: Workload) -> Service:
    return service("waypoint", "10.96.0.9", ports={15008: 15008}, behind=pods)


def behind(waypoint: WaypointRef | None = REFERENCE) -> Service:
    return replace(service("web", "10.96.0.1", ports={80: 8080}, behind=(WEB,)), waypoint=waypoint)


def ask(index: Index, address: str, port: int = 80, source: Workload = CLIENT, dice: int = 0) -> Route | Refusal:
    return resolve(index, source, (address, port), lambda _: 0, lambda n: min(dice, n - 1))


def route(index: Index, address: str, port: int = 80, source: Workload = CLIENT, dice: int = 0) -> Route:
    found = ask(index, address, port, source, dice)
    assert isinstance(found, Route), found
    return found


def refusal(index: Index, address: str, port: int = 80) -> Refusal:
    found = ask(index, address, port)
    assert isinstance(found, Refusal), found
    return found


def test_a_service_is_reached_by_way_of_its_waypoint() -> None:
    found = route(builders.index(WEB, PROXY, front(PROXY), behind()), "10.96.0.1")
    assert found == Route(
        RouteKind.HBONE,
        address=("10.0.0.5", 15008),
        target=("10.96.0.1", 80),
        authority="10.96.0.1:80",
        workload_uid=PROXY.uid,
        expected=(PROXY.identity,),
        service="web.default.svc.cluster.local",
        service_name="web",
        service_namespace="default",
        waypoint="default/waypoint",
        reasons=(
            "10.96.0.1 is service web.default.svc.cluster.local",
            BY_WAY,
        ),
    )


def test_a_port_that_the_service_does_not_declare_is_refused_before() -> None:
    assert refusal(builders.index(WEB, PROXY, front(PROXY), behind()), "10.96.0.1", 81).reason is RefusalReason.PORT_NOT_DECLARED


def test_a_pods_own_address_does_not_go_by_its_services_waypoint() -> None:
    assert route(builders.index(WEB, PROXY, front(PROXY), behind()), "10.0.0.1", 8080).waypoint == ""


def test_a_workload_is_reached_by_way_of_its_own_waypoint_with_any_port() -> None:
    bound = replace(WEB, waypoint=REFERENCE)
    index = builders.index(bound, PROXY, front(PROXY), service("web", "10.96.0.1", behind=(bound,)))
    found = route(index, "10.0.0.1", 9999)
    assert (found.authority, found.address, found.waypoint) == ("10.0.0.1:9999", ("10.0.0.5", 15008), "default/waypoint")
    assert found.service is None
    assert route(index, "fd00::1", 9999).address == ("fd00::5", 15008)
    assert route(index, "10.96.0.1").waypoint == "", "a service's traffic does not use a workload's waypoint"


def test_a_service_accounts_waypoint_for_all_is_on_every_way_to_its_pods() -> None:
    bound = replace(WEB, waypoint=REFERENCE, waypoint_always=True)
    index = builders.index(bound, PROXY, front(PROXY), service("web", "10.96.0.1", behind=(bound,)))
    found = route(index, "10.96.0.1")
    assert (found.authority, found.waypoint, found.service) == ("10.0.0.1:8080", "default/waypoint", "web.default.svc.cluster.local")
    own = replace(behind(), waypoint=replace(REFERENCE, name="default/own"))
    assert route(builders.index(bound, PROXY, front(PROXY), own), "10.96.0.1").waypoint == "default/own", "there is one hop only"


def test_replicas_share_the_connections() -> None:
    index = builders.index(WEB, PROXY, SECOND, front(PROXY, SECOND), behind())
    load = {PROXY.uid: 3, SECOND.uid: 1}
    found = resolve(index, CLIENT, ("10.96.0.1", 80), load.__getitem__, lambda _: 0)
    assert isinstance(found, Route)
    assert found.workload_uid == SECOND.uid


def test_only_replicas_that_are_ready_count() -> None:
    index = builders.index(WEB, replace(PROXY, ready=False), SECOND, front(replace(PROXY, ready=False), SECOND), behind())
    assert route(index, "10.96.0.1").workload_uid == SECOND.uid
    none = refusal(builders.index(WEB, PROXY, front(), behind()), "10.96.0.1")
    assert none.reason is RefusalReason.WAYPOINT_NOT_READY
    assert "no ready pod" in none.text


@pytest.mark.parametrize("hostnames", [(), ("unknown.default.svc.cluster.local",)])
def test_by_address_where_no_name_helps(hostnames: tuple[str, ...]) -> None:
    reference = replace(REFERENCE, hostnames=hostnames)
    assert route(builders.index(WEB, PROXY, front(PROXY), behind(reference)), "10.96.0.1").address == ("10.0.0.5", 15008)
    by_pod = replace(reference, addresses=("10.0.0.5",))
    assert route(builders.index(WEB, PROXY, behind(by_pod)), "10.96.0.1").workload_uid == PROXY.uid


def test_an_address_that_nobody_of_the_mesh_has_must_prove_to_be_the_waypoint() -> None:
    outside = replace(REFERENCE, addresses=("192.0.2.1",), hostnames=())
    found = route(builders.index(WEB, behind(outside)), "10.96.0.1")
    assert (found.address, found.expected, found.workload_uid) == (("192.0.2.1", 15008), (identity("default", "waypoint"),), None)


def test_a_name_that_nobody_knows_is_an_error() -> None:
    found = refusal(builders.index(WEB, behind(replace(REFERENCE, addresses=()))), "10.96.0.1")
    assert found.reason is RefusalReason.WAYPOINT_NOT_READY
    assert "unknown waypoint" in found.text


@pytest.mark.parametrize(
    ("dice", "chosen"), [(0, "default/canary"), (24, "default/canary"), (25, "default/waypoint"), (99, "default/waypoint")]
)
def test_a_canary_gets_its_share_of_connections(dice: int, chosen: str) -> None:
    canary = replace(REFERENCE, name="default/canary")
    served = replace(behind(), canary=canary, canary_weight=25)
    assert route(builders.index(WEB, PROXY, front(PROXY), served), "10.96.0.1", dice=dice).waypoint == chosen


def test_what_a_waypoint_sends_does_not_come_back_to_it() -> None:
    inside = replace(PROXY, waypoint=None)
    bound = replace(WEB, waypoint=REFERENCE)
    index = builders.index(bound, inside, front(inside), behind())
    for address in ("10.96.0.1", "10.0.0.1"):
        found = route(index, address, source=inside)
        assert found.waypoint == ""
        assert any("is the pod that sends this" in reason for reason in found.reasons)
    by_address = builders.index(replace(bound, waypoint=replace(REFERENCE, addresses=("10.0.0.5",), hostnames=())), inside)
    assert route(by_address, "10.0.0.1", source=inside).waypoint == ""


def test_without_a_waypoint_that_should_be_there_nothing_goes() -> None:
    missing = replace(REFERENCE, addresses=(), hostnames=(), problem='waypoint "default/waypoint" is not ready')
    found = refusal(builders.index(WEB, behind(missing)), "10.96.0.1")
    assert found.reason is RefusalReason.WAYPOINT_NOT_READY
    assert 'waypoint "default/waypoint" is not ready' in found.text
    assert refusal(builders.index(replace(WEB, waypoint=missing)), "10.0.0.1").reason is RefusalReason.WAYPOINT_NOT_READY
    shared = replace(behind(missing), vips=("10.0.0.1",))
    assert refusal(builders.index(WEB, shared), "10.0.0.1").reason is RefusalReason.WAYPOINT_NOT_READY, "not by the pod's address either"


def test_where_the_operator_says_so_it_goes_without() -> None:
    missing = replace(REFERENCE, problem="waypoint is not ready", fails_open=True)
    found = route(builders.index(WEB, behind(missing)), "10.96.0.1")
    assert (found.address, found.waypoint) == (("10.0.0.1", 15008), "")
    assert found.reasons[1] == "without its waypoint, as waypoint.fallback l4 says: waypoint is not ready"


# From manifests


MANIFESTS: tuple[Json, ...] = (
    namespace("default"),
    pod("client", "10.0.0.9"),
    pod("web", "10.0.0.1", labels={"app": "web"}),
    pod("proxy", "10.0.0.5", labels={GATEWAY_NAME: "waypoint", MANAGED: MANAGED_WAYPOINT, "istio.io/dataplane-mode": "none"}),
    labelled(service_manifest("web", "10.96.0.1", selector={"app": "web"}), labels={USE_WAYPOINT: "waypoint"}),
    labelled(
        service_manifest("waypoint", "10.96.0.9", selector={GATEWAY_NAME: "waypoint"}, ports=[{"port": 15008}]),
        labels={MANAGED: MANAGED_WAYPOINT},
    ),
)
GATEWAY = gateway("waypoint", "10.96.0.9", "waypoint.default.svc.cluster.local")


def routed(*bodies: Json, fails_open: bool = False, address: str = "10.96.0.1") -> Route | Refusal:
    state = mesh(*bodies, options=MeshOptions(waypoint_fails_open=fails_open))
    return ask(index_of(state), address, source=state.workloads["uid-client"])


def test_manifests_lead_to_the_waypoint_or_to_a_refusal() -> None:
    found = routed(*MANIFESTS, GATEWAY)
    assert isinstance(found, Route)
    assert (found.waypoint, found.workload_uid) == ("default/waypoint", "uid-proxy")
    closed = routed(*MANIFESTS)
    assert isinstance(closed, Refusal)
    assert "there is no such Gateway" in closed.text
    opened = routed(*MANIFESTS, fails_open=True)
    assert isinstance(opened, Route)
    assert opened.address == ("10.0.0.1", 15008)


def test_a_waypoint_for_other_traffic_is_not_missed() -> None:
    found = routed(*MANIFESTS, gateway("waypoint", "10.96.0.9", traffic="workload"))
    assert isinstance(found, Route)
    assert found.waypoint == ""


@pytest.mark.parametrize(("traffic", "by_service"), [("all", True), ("workload", False)])
def test_a_service_account_with_a_waypoint(traffic: str, by_service: bool) -> None:
    account = labelled(service_account("default"), labels={USE_WAYPOINT: "waypoint"})
    plain = [body for body in MANIFESTS if body is not MANIFESTS[4]]
    bodies = (
        *plain,
        service_manifest("web", "10.96.0.1", selector={"app": "web"}),
        account,
        gateway("waypoint", "10.96.0.9", traffic=traffic),
    )
    by_address, by_name = routed(*bodies, address="10.0.0.1"), routed(*bodies)
    assert isinstance(by_address, Route)
    assert isinstance(by_name, Route)
    assert (by_address.waypoint, by_name.waypoint) == ("default/waypoint", "default/waypoint" if by_service else "")


def test_a_canary_of_manifests() -> None:
    served = labelled(MANIFESTS[4], labels={CANARY: "canary"}, annotations={CANARY_WEIGHT: "30"})
    state = mesh(*MANIFESTS[:4], served, GATEWAY, gateway("canary", "10.96.0.8"))
    found = state.services["default/web.default.svc.cluster.local"]
    assert found.canary is not None
    assert (found.canary.name, found.canary_weight) == ("default/canary", 30)


# Foreign proxies


@dataclass(frozen=True)
class Authority:
    host: str
    port: int


def sandwiched(binding: str) -> tuple[Index, Workload]:
    front_pod = pod("proxy", "10.0.0.5", labels={GATEWAY_NAME: "waypoint"})
    bodies = [body for body in MANIFESTS if body is not MANIFESTS[3]]
    state = mesh(*bodies, front_pod, labelled(GATEWAY, annotations={INBOUND_BINDING: binding}), service_manifest("other", "10.96.0.3"))
    return index_of(state), state.workloads["uid-proxy"]


def test_a_foreign_proxy_gets_what_it_serves_at_its_own_address() -> None:
    index, local = sandwiched("PROXY/15088")
    assert local.sandwich == Sandwich("PROXY", 15088)
    web = index.service_at("10.96.0.1")
    asked = resolve_inbound(index, local, "10.0.0.5", Authority("10.96.0.1", 80))
    assert asked == InboundTarget("10.0.0.5", 15088, web, ("10.96.0.1", 80))
    named = resolve_inbound(index, local, "10.0.0.5", Authority("web.default.svc.cluster.local", 80))
    assert named.original == ("10.96.0.1", 80)
    plain, local = sandwiched("NONE")
    assert resolve_inbound(plain, local, "10.0.0.5", Authority("10.96.0.1", 80)) == InboundTarget("10.0.0.5", 80, web, None)
    assert resolve_inbound(plain, local, "10.0.0.5", Authority("10.0.0.5", 81)).port == 81


@pytest.mark.parametrize(
    ("host", "port", "status"),
    [
        ("10.96.0.3", 80, 400),
        ("10.0.0.1", 80, 400),
        ("192.0.2.1", 80, 400),
        ("other.default.svc.cluster.local", 80, 400),
        ("nobody.default.svc.cluster.local", 80, 503),
        ("10.96.0.1", 15001, 503),
    ],
)
def test_a_foreign_proxy_gets_nothing_that_it_does_not_serve(host: str, port: int, status: int) -> None:
    index, local = sandwiched("NONE")
    with pytest.raises(BadConnect) as caught:
        resolve_inbound(index, local, "10.0.0.5", Authority(host, port))
    assert caught.value.status == status


def test_only_a_foreign_proxy_may_be_asked_for_others() -> None:
    index = builders.index(WEB, PROXY, front(PROXY), behind())
    with pytest.raises(BadConnect):
        resolve_inbound(index, PROXY, "10.0.0.5", Authority("10.96.0.1", 80))
