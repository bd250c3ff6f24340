"""Where connections go: the decision tree, step by step, with its reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit import builders
from tests.kit.builders import identity, service, workload
from ztunnel.mesh.delta import Delta
from ztunnel.mesh.index import Index
from ztunnel.mesh.routing import MAX_ROUTES, Refusal, RefusalReason, Route, RouteKind, Router, authority, resolve
from ztunnel.mesh.workloads import Endpoint, Protocol, ServicePort, Workload

CLIENT = workload("client", "10.0.0.9", "fd00::9")
A = workload("a", "10.0.0.1", "fd00::1", account="a")
PLAIN = workload("plain", "10.0.0.3", hbone=False)


def ask(index: Index, address: str, port: int, source: Workload = CLIENT) -> Route | Refusal:
    return resolve(index, source, (address, port), lambda _: 0, lambda _: 0)


def route(index: Index, address: str, port: int) -> Route:
    found = ask(index, address, port)
    assert isinstance(found, Route)
    return found


def refusal(index: Index, address: str, port: int) -> Refusal:
    found = ask(index, address, port)
    assert isinstance(found, Refusal)
    return found


def test_authority_brackets_ipv6() -> None:
    assert authority("10.0.0.1", 80) == "10.0.0.1:80"
    assert authority("fd00::1", 80) == "[fd00::1]:80"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("port", [15001, 15006, 15008])
def test_the_proxy_does_not_call_itself(address: str, port: int) -> None:
    assert refusal(Index(), address, port).reason is RefusalReason.LOOP


def test_loopback_elsewhere_is_passed_through() -> None:
    assert route(Index(), "127.0.0.1", 80).kind is RouteKind.PASSTHROUGH
    assert route(Index(), "10.9.9.9", 15008).kind is RouteKind.PASSTHROUGH


def test_unknown_destinations_are_passed_through() -> None:
    assert route(Index(), "fd99::1", 443) == Route(
        RouteKind.PASSTHROUGH,
        address=("fd99::1", 443),
        target=("fd99::1", 443),
        authority="[fd99::1]:443",
        reasons=("fd99::1 is neither a service nor a workload of the mesh: passed through",),
    )


def test_a_service_goes_to_an_endpoint_through_a_tunnel() -> None:
    index = builders.index(A, service("web", "10.1.0.1", behind=(A,)))
    assert route(index, "10.1.0.1", 80) == Route(
        RouteKind.HBONE,
        address=("10.0.0.1", 15008),
        target=("10.0.0.1", 8080),
        authority="10.0.0.1:8080",
        workload_uid="uid-a",
        expected=(identity("default", "a"),),
        service="web.default.svc.cluster.local",
        service_name="web",
        service_namespace="default",
        reasons=(
            "10.1.0.1 is service web.default.svc.cluster.local",
            "endpoint default/a port 8080, one of 1 that can serve port 80",
            "it is in the mesh: HBONE to 10.0.0.1:15008, expecting spiffe://cluster.local/ns/default/sa/a",
        ),
    )


def test_the_endpoints_address_is_of_the_clients_family() -> None:
    only_v4 = workload("b", "10.0.0.2")
    index = builders.index(A, only_v4, service("web", "10.1.0.1", "fd01::1", behind=(A,)), service("four", "fd01::2", behind=(only_v4,)))
    assert route(index, "fd01::1", 80).address == ("fd00::1", 15008)
    assert route(index, "10.1.0.1", 80).address == ("10.0.0.1", 15008)
    assert route(index, "fd01::2", 80).address == ("10.0.0.2", 15008), "another family is better than none"


def test_an_endpoint_outside_the_mesh_is_dialled_in_plain() -> None:
    found = route(builders.index(PLAIN, service("web", "10.1.0.1", behind=(PLAIN,))), "10.1.0.1", 80)
    assert (found.kind, found.address, found.expected) == (RouteKind.TCP, ("10.0.0.3", 8080), ())
    assert found.reasons[-1] == "it is not in the mesh: plain TCP to 10.0.0.3:8080"


def test_a_workloads_own_address_needs_no_service() -> None:
    found = route(builders.index(A), "fd00::1", 9999)
    assert (found.kind, found.address, found.target, found.service) == (RouteKind.HBONE, ("fd00::1", 15008), ("fd00::1", 9999), None)
    assert found.reasons[0] == "fd00::1 is workload default/a"
    assert route(builders.index(PLAIN), "10.0.0.3", 15008).kind is RouteKind.TCP


def test_an_endpoint_of_a_headless_service_is_a_workload() -> None:
    found = route(builders.index(A, service("web", behind=(A,))), "10.0.0.1", 8080)
    assert (found.kind, found.service) == (RouteKind.HBONE, None)


def test_ones_own_service_may_lead_back_to_oneself() -> None:
    found = route(builders.index(CLIENT, service("self", "10.1.0.1", behind=(CLIENT,))), "10.1.0.1", 80)
    assert (found.kind, found.address) == (RouteKind.HBONE, ("10.0.0.9", 15008))


def test_load_decides_between_endpoints() -> None:
    b = workload("b", "10.0.0.2")
    index = builders.index(A, b, service("web", "10.1.0.1", behind=(A, b)))
    found = resolve(index, CLIENT, ("10.1.0.1", 80), {"uid-a": 3, "uid-b": 1}.__getitem__, lambda _: 0)
    assert isinstance(found, Route)
    assert found.workload_uid == "uid-b"


def test_a_port_that_is_not_declared_is_refused() -> None:
    web = service("web", "10.1.0.1", behind=(A,))
    refused = refusal(builders.index(A, web), "10.1.0.1", 81)
    assert (refused.reason, refused.service) == (RefusalReason.PORT_NOT_DECLARED, web.hostname)
    assert refused.text == "service web.default.svc.cluster.local does not declare port 81 (declared: 80)"
    assert "(declared: none)" in refusal(builders.index(service("web", "10.1.0.1", ports={})), "10.1.0.1", 81).text


def test_a_service_without_healthy_endpoints_is_refused_and_says_why() -> None:
    unready = workload("u", "10.0.0.4", ready=False)
    base = service("web", "10.1.0.1")
    named = replace(base, ports=(ServicePort(80, 0),), endpoints=(Endpoint("uid-a", ()),))
    for web, why in (
        (base, "no endpoints: its selector matches no running pod"),
        (service("web", "10.1.0.1", behind=(unready,)), "1 endpoints, none of them ready"),
        (named, "1 ready endpoints, none of which has a number for that port"),
    ):
        refused = refusal(builders.index(A, unready, web), "10.1.0.1", 80)
        assert refused.reason is RefusalReason.NO_HEALTHY_UPSTREAM
        assert refused.text == f"no healthy upstream: service {web.hostname} port 80 has {why}"
        assert refused.reasons == (f"10.1.0.1 is service {web.hostname}", refused.text)


def test_a_service_without_a_selector_is_for_kube_proxy_to_resolve() -> None:
    """`kubernetes`, for one: nothing that selects says what is behind it, and pods must reach it."""
    ports = [{"name": "https", "port": 443, "targetPort": 6443}]
    index = builders.index_of(builders.mesh(builders.service_manifest("kubernetes", "10.96.0.1", ports=ports)))
    found = route(index, "10.96.0.1", 443)
    assert (found.kind, found.address, found.service) == (
        RouteKind.PASSTHROUGH,
        ("10.96.0.1", 443),
        "kubernetes.default.svc.cluster.local",
    )
    assert refusal(index, "10.96.0.1", 80).reason is RefusalReason.PORT_NOT_DECLARED


def test_an_address_that_is_both_is_the_service_first_then_the_workload() -> None:
    b = workload("b", "10.0.0.2")
    index = builders.index(A, b, service("web", "10.0.0.1", behind=(b,)))
    assert route(index, "10.0.0.1", 80).workload_uid == "uid-b"
    found = route(index, "10.0.0.1", 9999)
    assert (found.workload_uid, found.target, found.service) == ("uid-a", ("10.0.0.1", 9999), None)
    assert "10.0.0.1 is also a workload's own address" in found.reasons


def test_a_shared_vip_is_the_service_of_the_clients_namespace() -> None:
    b = workload("b", "10.0.0.2", namespace="other")
    index = builders.index(A, b, service("web", "10.1.0.1", behind=(A,)), service("web", "10.1.0.1", namespace="other", behind=(b,)))
    assert route(index, "10.1.0.1", 80).workload_uid == "uid-a"
    found = ask(index, "10.1.0.1", 80, source=b)
    assert isinstance(found, Route)
    assert found.workload_uid == "uid-b"


class TestRouter:
    """What it remembers is what it would be told again."""

    b = workload("b", "10.0.0.2", account="b")
    mesh = builders.index(CLIENT, A, b, service("web", "10.96.0.1", behind=(A, b)))

    def asked(self, router: Router, place: int, address: str = "10.96.0.1") -> Route:
        found = router.resolve(CLIENT, (address, 80), lambda _: 0, lambda count: min(place, count - 1))
        assert isinstance(found, Route)
        return found

    def test_the_same_answer_is_the_same_object_and_each_endpoint_has_its_turn(self) -> None:
        router = Router(self.mesh)
        first, second = self.asked(router, 0), self.asked(router, 1)
        assert {first.workload_uid, second.workload_uid} == {"uid-a", "uid-b"}
        assert self.asked(router, 0) is first
        assert self.asked(router, 1) is second
        assert self.asked(router, 0, "10.0.0.1") is self.asked(router, 0, "10.0.0.1")

    def test_an_endpoint_that_has_no_route_yet_is_as_likely_as_the_others(self) -> None:
        behind = [workload(f"w{number}", f"10.1.0.{number + 1}") for number in range(3)]
        router = Router(builders.index(CLIENT, *behind, service("web", "10.96.0.1", behind=behind)))
        for number in range(3):
            assert self.asked(router, number).workload_uid == f"uid-w{number}"
        drawn: list[int] = []

        def draw(count: int) -> int:
            drawn.append(count)
            return 0

        fresh = Router(builders.index(CLIENT, *behind, service("web", "10.96.0.1", behind=behind)))
        for _ in range(4):
            fresh.resolve(CLIENT, ("10.96.0.1", 80), lambda _: 0, draw)
        assert len(drawn) == 4 * 2

    def test_a_change_of_the_mesh_is_seen_at_once(self) -> None:
        index = builders.index(CLIENT, A)
        router = Router(index)
        assert self.asked(router, 0, "10.0.0.1").kind is RouteKind.HBONE
        index.apply(Delta(workloads=(replace(A, protocol=Protocol.TCP),)))
        assert self.asked(router, 0, "10.0.0.1").kind is RouteKind.TCP

    def test_a_pod_that_dials_everything_fills_no_memory(self) -> None:
        many = [workload(f"w{number}", f"10.1.{number >> 8}.{number & 255}") for number in range(MAX_ROUTES + 9)]
        router = Router(builders.index(CLIENT, *many))
        for each in many:
            self.asked(router, 0, each.addresses[0])
        assert len(router._known) <= MAX_ROUTES
