"""Gateway API's routes at a waypoint: attachment, precedence, backends, consumers, conditions."""

from __future__ import annotations

import pytest

from tests.kit.builders import Json, mesh, metadata, service_manifest
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.config import ProxyConfig
from ztunnel.mesh.l7.derive import Bound, derive_proxy
from ztunnel.mesh.l7.route_status import route_statuses
from ztunnel.mesh.l7.routes import Backend, Mirror, Route
from ztunnel.mesh.manifests.metadata import ObjectKey
from ztunnel.mesh.manifests.parse import key, parse

WAYPOINT = ObjectKey("Gateway", "default", "waypoint")
ECHO = {"group": "", "kind": "Service", "name": "echo"}
HTTP = {"port": 80, "name": "http"}
SERVICES = [
    service_manifest("echo", "10.96.0.1", ports=[HTTP, {"port": 8080, "name": "http-alt"}, {"port": 9090, "name": "tcp"}]),
    service_manifest("v1", "10.96.0.2", ports=[HTTP]),
    service_manifest("v2", "10.96.0.3", ports=[HTTP]),
    service_manifest("far", "10.96.0.4", namespace="other", ports=[HTTP]),
]
ECHO_KEY = "default/echo.default.svc.cluster.local"


def to(name: str, **more: object) -> Json:
    return {"name": name, "port": 80, **more}


def cluster(name: str, namespace: str = "default") -> str:
    return f"outbound|80||{name}.{namespace}.svc.cluster.local"


def route(
    name: str, *rules: Json, kind: str = "HTTPRoute", parents: object = (ECHO,), namespace: str = "default", created: str = ""
) -> Json:
    meta = metadata(name, namespace, **({"creationTimestamp": created} if created else {}))
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": kind,
        "metadata": meta,
        "spec": {"parentRefs": list(parents), "rules": list(rules)},  # type: ignore[call-overload]  # a list of anything
    }


def grant(namespace: str, *, of: str = "default", kind: str = "HTTPRoute", name: str | None = None) -> Json:
    target = {"group": "", "kind": "Service", **({"name": name} if name else {})}
    spec = {"from": [{"group": "gateway.networking.k8s.io", "kind": kind, "namespace": of}], "to": [target]}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1beta1",
        "kind": "ReferenceGrant",
        "metadata": metadata("grant", namespace),
        "spec": spec,
    }


def proxy(*bodies: Json) -> ProxyConfig:
    everything = [*SERVICES, *bodies]
    objects = {key(each): each for each in (parse(body, "test") for body in everything)}
    return derive_proxy(objects, mesh(*everything), MeshOptions(), WAYPOINT, Bound(frozenset((ECHO_KEY,))))


def routes(*bodies: Json, port: int = 80) -> tuple[Route, ...]:
    (service,) = proxy(*bodies).services
    return next(each.routes for each in service.ports if each.port == port)


def conditions(*bodies: Json, name: str = "r", kind: str = "HTTPRoute", namespace: str = "default", bound: bool = True) -> dict[str, str]:
    """The first parent's conditions: reason by type, with `!` where it does not hold."""
    everything = [*SERVICES, *bodies]
    objects = {key(each): each for each in (parse(body, "test") for body in everything)}
    waypoint_of = {ECHO_KEY: WAYPOINT} if bound else {}
    found = route_statuses(objects, mesh(*everything), MeshOptions(), waypoint_of)[ObjectKey(kind, namespace, name)]
    return {each.type: ("" if each.status else "!") + each.reason for each in found.parents[0].conditions}


def matched(**match: object) -> Json:
    return {"matches": [match], "backendRefs": [to("v1")]}


def path(value: str, kind: str = "PathPrefix") -> Json:
    return {"type": kind, "value": value}


def test_a_route_takes_the_place_of_the_default_route() -> None:
    (only,) = routes(route("r", {"backendRefs": [to("v1", weight=7), to("v2", weight=3), to("echo", weight=0)]}))
    assert (only.name, only.origin) == ("default/r/rule-0", "HTTPRoute default/r")
    assert only.backends == (
        Backend(cluster("v1"), 7),
        Backend(cluster("v2"), 3),
        Backend("inbound-vip|80|http|echo.default.svc.cluster.local", 0),
    )


def test_named_rules_and_mirrors() -> None:
    mirror = {"type": "RequestMirror", "requestMirror": {"backendRef": to("v2"), "percent": 50}}
    nothing = {"type": "RequestMirror", "requestMirror": {"backendRef": to("v2"), "percent": 0}}
    lost = {"type": "RequestMirror", "requestMirror": {"backendRef": to("gone")}}
    (only,) = routes(route("r", {"name": "mine", "filters": [mirror, nothing, lost], "backendRefs": [to("v1")]}))
    assert (only.name, only.mirrors) == ("mine", (Mirror(cluster("v2"), 0.5),))


@pytest.mark.parametrize(
    ("parent", "ports"),
    [(ECHO, {80, 8080}), ({**ECHO, "port": 80}, {80}), ({**ECHO, "sectionName": "http-alt"}, {8080}), ({"name": "waypoint"}, {80, 8080})],
)
def test_parents_and_their_ports(parent: Json, ports: set[int]) -> None:
    (service,) = proxy(route("r", {"backendRefs": [to("v1")]}, parents=[parent])).services
    assert {each.port for each in service.ports if each.routes and each.routes[0].name != "default"} == ports


def test_precedence_over_all_routes_of_a_service() -> None:
    """Exact, the longest prefix, regular expression, method, more headers, more parameters, age, name, order."""
    header, other = {"name": "a", "value": "b"}, {"name": "c", "value": "d"}
    listed = [
        matched(path=path("/")),
        matched(path=path("/v")),
        matched(path=path("/v.*", "RegularExpression")),
        matched(path=path("/v2/x")),
        matched(path=path("/v2", "Exact")),
        matched(headers=[header]),
        matched(queryParams=[header]),
        matched(headers=[header, other]),
        matched(method="GET"),
    ]
    found = routes(route("a", *listed, created="2026-01-02T00:00:00Z"), route("b", matched(path=path("/")), created="2026-01-01T00:00:00Z"))
    assert [each.name for each in found] == [
        *(f"default/a/rule-{number}" for number in (4, 3, 1, 2, 8, 7, 5, 6)),
        "default/b/rule-0",
        "default/a/rule-0",
    ]
    by_name = routes(route("b", matched(path=path("/"))), route("a", matched(path=path("/"))))
    assert [each.name for each in by_name] == ["default/a/rule-0", "default/b/rule-0"]


@pytest.mark.parametrize(
    ("backend", "more", "reason"),
    [
        (to("gone"), [], "!BackendNotFound"),
        (to("v1", port=81), [], "!BackendNotFound"),
        (to("v1", group="example.com", kind="Bucket"), [], "!InvalidKind"),
        (to("far", namespace="other"), [], "!RefNotPermitted"),
        (to("far", namespace="other"), [grant("other", kind="GRPCRoute")], "!RefNotPermitted"),
        (to("far", namespace="other"), [grant("other", name="near")], "!RefNotPermitted"),
        (to("far", namespace="other"), [grant("other", of="third")], "!RefNotPermitted"),
        (to("far", namespace="other"), [grant("other")], "ResolvedRefs"),
        (to("far", namespace="other"), [grant("other", name="far")], "ResolvedRefs"),
        (to("far.other.svc.cluster.local", group="networking.istio.io", kind="Hostname"), [], "ResolvedRefs"),
        (to("gone.example", group="networking.istio.io", kind="Hostname"), [], "!BackendNotFound"),
        (to("entry", group="networking.istio.io", kind="ServiceEntry"), [], "!BackendNotFound"),
    ],
)
def test_backends_that_lead_nowhere_keep_their_share(backend: Json, more: list[Json], reason: str) -> None:
    body = route("r", {"backendRefs": [to("v1"), backend]})
    (only,) = routes(body, *more)
    good = cluster("far", "other") if reason == "ResolvedRefs" else ""
    assert only.backends == (Backend(cluster("v1")), Backend(good, status=0 if good else 500))
    assert conditions(body, *more)["ResolvedRefs"] == reason


@pytest.mark.parametrize("rule", [{}, {"backendRefs": []}])
def test_no_backends_are_no_fault_of_the_references(rule: Json) -> None:
    assert routes(route("r", rule))[0].backends == ()
    assert conditions(route("r", rule))["ResolvedRefs"] == "ResolvedRefs"


def test_what_is_not_supported_is_answered_500_and_told() -> None:
    body = route("r", {"filters": [{"type": "ExtensionRef"}], "matches": [{"path": path("/x")}]}, {"backendRefs": [to("v1")]})
    first, second = routes(body)
    assert first.direct is not None
    assert first.direct.status == 500
    assert second.backends == (Backend(cluster("v1")),)
    assert conditions(body)["Accepted"] == "!UnsupportedValue"
    backend = route("r", {"backendRefs": [to("v1", filters=[{"type": "CORS"}])]})
    assert routes(backend)[0].backends == (Backend("", status=500),)
    assert conditions(backend)["Accepted"] == "!UnsupportedValue"


def test_a_consumers_route_is_for_its_namespace_only() -> None:
    parent = {**ECHO, "namespace": "default"}
    consumer = route("c", {"matches": [{"path": path("/x")}], "backendRefs": [to("far")]}, parents=[parent], namespace="other")
    first, end, rest = routes(consumer)
    assert (first.matches[0].client_namespaces, first.backends) == (("other",), (Backend(cluster("far", "other")),))
    assert (end.matches[0].client_namespaces, end.direct and end.direct.status) == (("other",), 404)
    assert (rest.name, rest.matches) == ("default", ())
    assert [each.name for each in routes(consumer, route("p", {"backendRefs": [to("v1")]}))][-1] == "default/p/rule-0"


def test_http_and_grpc_routes_do_not_share_a_port() -> None:
    old = route("old", {"backendRefs": [to("v1")]}, kind="GRPCRoute", created="2026-01-01T00:00:00Z", parents=[{**ECHO, "port": 80}])
    new = route("r", {"backendRefs": [to("v2")]}, created="2026-01-02T00:00:00Z")
    assert [each.origin for each in routes(old, new)] == ["GRPCRoute default/old"]
    assert [each.origin for each in routes(old, new, port=8080)] == ["HTTPRoute default/r"]
    assert conditions(old, new)["Accepted"] == "!Conflicted"
    assert conditions(old, new, name="old", kind="GRPCRoute")["Accepted"] == "Accepted"


@pytest.mark.parametrize("kind", ["TCPRoute", "TLSRoute"])
def test_connections_are_shared_out_by_weight(kind: str) -> None:
    body = route("r", {"backendRefs": [to("v1", weight=3), to("v2"), to("gone")]}, kind=kind)
    (service,) = proxy(body, route("h", {"backendRefs": [to("v1")]})).services
    (tcp,) = [each for each in service.ports if each.port == 9090]
    assert tcp.routes == ()
    (only,) = tcp.tcp_routes
    assert (only.name, only.backends) == ("default/r/rule-0", (Backend(cluster("v1"), 3), Backend(cluster("v2")), Backend("", status=500)))
    assert conditions(body, kind=kind)["Accepted"] == "Accepted"


@pytest.mark.parametrize(
    ("parent", "namespace", "bound", "expected"),
    [
        (ECHO, "default", True, {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs", "ResolvedWaypoints": "ResolvedWaypoints"}),
        (ECHO, "default", False, {"Accepted": "Accepted", "ResolvedWaypoints": "!MissingUseWaypointLabel"}),
        ({**ECHO, "name": "gone"}, "default", True, {"Accepted": "!NoMatchingParent", "ResolvedWaypoints": "!NoMatchingParent"}),
        ({**ECHO, "port": 81}, "default", True, {"Accepted": "!NoMatchingParent"}),
        ({**ECHO, "port": 9090}, "default", True, {"Accepted": "!NoMatchingParent"}),
        ({"kind": "Bucket", "group": "a.b", "name": "x"}, "default", True, {"Accepted": "!NoMatchingParent"}),
        (
            {"group": "networking.istio.io", "kind": "ServiceEntry", "name": "x"},
            "default",
            True,
            {"Accepted": "!NoMatchingParent", "ResolvedWaypoints": "!NoMatchingParent"},
        ),
        ({"name": "waypoint", "namespace": "default"}, "other", True, {"Accepted": "!NotAllowedByListeners"}),
    ],
)
def test_conditions_of_a_parent(parent: Json, namespace: str, bound: bool, expected: dict[str, str]) -> None:
    backend = "far" if namespace == "other" else "v1"
    found = conditions(route("r", {"backendRefs": [to(backend)]}, parents=[parent], namespace=namespace), namespace=namespace, bound=bound)
    assert {name: found[name] for name in expected} == expected


def test_other_controllers_gateways_are_not_ours_to_judge() -> None:
    body = parse(route("r", parents=[{"name": "somebody-elses"}]), "test")
    assert route_statuses({key(body): body}, mesh(*SERVICES), MeshOptions(), {ECHO_KEY: WAYPOINT}) == {}
