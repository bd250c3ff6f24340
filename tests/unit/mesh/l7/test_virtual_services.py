"""VirtualServices at a waypoint: whom they are for, what a rule comes to, how they add up and delegate, their conditions."""

from __future__ import annotations

import pytest

from tests.kit.builders import Json, mesh, service_manifest
from tests.kit.mesh_l7 import WAYPOINT, gateway_api, hostname, istio, read_all, waypoint
from ztunnel.mesh.derive import MeshOptions
from ztunnel.mesh.l7.istio_status import istio_statuses
from ztunnel.mesh.l7.routes import Backend, HeaderEdits, Mirror, PathKind, PathMatch, RequestMatch, Route, TcpRoute
from ztunnel.mesh.manifests.metadata import ObjectKey

PORTS = [{"port": 80, "name": "http"}, {"port": 8080, "name": "http-alt"}, {"port": 9090, "name": "tcp"}]
ONE = [{"port": 80, "name": "http"}]
WEB = service_manifest("web", "10.96.0.1", ports=PORTS)
OTHER = service_manifest("other", "10.96.0.2", ports=ONE)
SUBSETS = istio("DestinationRule", "web", host="web", subsets=[{"name": "v1", "labels": {"version": "v1"}}, {"name": "v2", "labels": {}}])
BASE = [WEB, OTHER, SUBSETS]
TO_OTHER = [{"destination": {"host": "other"}}]
OTHER_CLUSTER = f"outbound|80||{hostname('other')}"


def virtual(*rules: Json, name: str = "x", namespace: str = "default", created: str = "", **spec: object) -> Json:
    known: Json = {"hosts": ["web"], **({"http": list(rules)} if rules else {})}
    return {**istio("VirtualService", name, namespace=namespace, created=created), "spec": known | spec}


def to(host: str = "other", **more: object) -> Json:
    return {"route": [{"destination": {"host": host, **more}}]}


def routes(*bodies: Json, port: int = 80) -> tuple[Route, ...]:
    (service,) = waypoint(*BASE, *bodies).services
    return next(each.routes for each in service.ports if each.port == port)


def tcp(*bodies: Json) -> TcpRoute:
    (service,) = waypoint(*BASE, *bodies).services
    (only,) = next(each.tcp_routes for each in service.ports if each.port == 9090)
    return only


def names(found: tuple[Route, ...]) -> list[str]:
    return [each.name for each in found]


def test_rules_in_the_order_of_the_list() -> None:
    first, second = routes(virtual({"match": [{"uri": {"prefix": "/a"}}], **to()}, {"name": "rest", **to("web", subset="v1")}))
    assert (first.name, first.origin, first.backends) == ("default/x/rule-0", "VirtualService default/x", (Backend(OTHER_CLUSTER),))
    assert first.matches == (RequestMatch(PathMatch(PathKind.PREFIX, "/a")),)
    assert (second.name, second.matches) == ("rest", ())
    assert second.backends == (Backend(f"inbound-vip|80|http/v1|{hostname('web')}"),)


@pytest.mark.parametrize(
    ("body", "applies"),
    [
        (virtual(to()), True),
        (virtual(to(), hosts=[hostname("web")]), True),
        (virtual(to(), hosts=["*.default.svc.cluster.local"]), True),
        (virtual(to(), hosts=["other"]), False),
        (virtual(to(), gateways=["gw"]), False),
        (virtual(to(), gateways=["gw", "mesh"]), True),
        (virtual(to(), namespace="elsewhere", hosts=[hostname("web")]), False),
        (virtual(to(), exportTo=["elsewhere"]), False),
        (virtual(to(), exportTo=["."]), True),
        (virtual({"match": [{"port": 8080}], **to()}), False),
        (virtual({"match": [{"port": 80}], **to()}), True),
        (virtual({"match": [{"gateways": ["gw"]}], **to()}), False),
        (virtual({"match": [{"gateways": ["mesh"]}], **to()}), True),
        (virtual({"match": [{"sourceLabels": {"a": "b"}}], **to()}), False),
    ],
)
def test_whom_a_virtual_service_is_for(body: Json, applies: bool) -> None:
    assert names(routes(body)) == (["default/x/rule-0"] if applies else ["default"])


def test_clients_by_namespace() -> None:
    (only,) = routes(virtual({"match": [{"sourceNamespace": "shop"}], **to()}))
    assert only.matches == (RequestMatch(client_namespaces=("shop",)),)


def test_a_rule_of_the_waypoints_namespace() -> None:
    service = service_manifest("far", "10.96.0.9", namespace="shop", ports=ONE)
    body = virtual(to(), hosts=[hostname("far", "shop")])
    (served,) = waypoint(*BASE, service, body, serves=["far"], namespace="shop").services
    assert names(served.ports[0].routes) == ["default/x/rule-0"]


def test_several_add_up_the_particular_host_first_then_the_older() -> None:
    old, new = "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"
    wide = virtual(to(), name="wide", hosts=["*.cluster.local"], created=old)
    found = routes(virtual(to(), name="a", created=new), virtual(to(), name="b", created=old), wide)
    assert names(found) == ["default/b/rule-0", "default/a/rule-0", "default/wide/rule-0"]


@pytest.mark.parametrize(
    ("destination", "key"),
    [
        ({"host": "gone"}, ""),
        ({"host": "web", "subset": "v3"}, ""),
        ({"host": "other", "port": {"number": 81}}, ""),
        ({"host": "other", "port": {"number": 80}}, OTHER_CLUSTER),
        ({"host": "other"}, OTHER_CLUSTER),
        ({"host": "web"}, f"inbound-vip|8080|http|{hostname('web')}"),
        ({"host": "web", "port": {"number": 80}}, f"inbound-vip|80|http|{hostname('web')}"),
        ({"host": hostname("other")}, OTHER_CLUSTER),
    ],
)
def test_destinations(destination: Json, key: str) -> None:
    (only,) = routes(virtual({"route": [{"destination": destination}]}), port=8080)
    assert only.backends == (Backend(key, status=0 if key else 503),)


def test_what_a_rule_does() -> None:
    (only,) = routes(
        virtual(
            {
                "route": [{"destination": {"host": "other"}, "headers": {"request": {"set": {"Host": "b", "x": "y"}}}}],
                "headers": {"request": {"set": {"Host": "a"}}, "response": {"remove": ["z"]}},
                "timeout": "2s",
                "retries": {"attempts": 1, "perTryTimeout": "2s"},
                "mirrors": [{"destination": {"host": "web", "subset": "v2"}}, {"destination": {"host": "gone"}}],
                "rewrite": {"uri": "/new"},
            }
        )
    )
    assert only.matches == (RequestMatch(PathMatch(PathKind.PREFIX, "/")),)
    assert only.rewrite is not None
    assert (only.rewrite.authority, only.rewrite.prefix) == ("a", "/new")
    assert only.backends == (Backend(OTHER_CLUSTER, request=HeaderEdits((("x", "y"),)), authority="b"),)
    assert only.mirrors == (Mirror(f"inbound-vip|80|http/v2|{hostname('web')}"),)
    assert (only.timeout, only.retry and only.retry.per_try, only.response) == (2.0, 0.0, HeaderEdits(remove=("z",)))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"tcp": [{"route": TO_OTHER}]}, "default/x/tcp-0"),
        ({"tcp": [{"match": [{"port": 80}], "route": TO_OTHER}, {"match": [{"port": 9090}], "route": TO_OTHER}]}, "default/x/tcp-1"),
        ({"tcp": [{"match": [{"destinationSubnets": ["10.96.0.0/24"]}], "route": TO_OTHER}]}, "default/x/tcp-0"),
        ({"tcp": [{"match": [{"destinationSubnets": ["10.97.0.0/24"]}], "route": TO_OTHER}]}, "default"),
        ({"tcp": [{"match": [{"sourceSubnet": "10.0.0.0/8"}], "route": TO_OTHER}]}, "default"),
        ({"tls": [{"match": [{"sniHosts": ["web"]}], "route": TO_OTHER}], "tcp": [{"route": TO_OTHER}]}, "default/x/tls-0"),
        ({"tls": [{"match": [{"sniHosts": ["web", "other"]}], "route": TO_OTHER}]}, "default"),
        ({"tls": [{"match": [{"sniHosts": ["other"]}], "route": TO_OTHER}]}, "default"),
    ],
)
def test_connections(spec: Json, name: str) -> None:
    found = tcp({**virtual(), "spec": {"hosts": ["web"]} | spec})
    assert found.name == name
    if name != "default":
        assert found.backends == (Backend(OTHER_CLUSTER),)


def delegating(rule: Json, *leaves: Json, **leaf_spec: object) -> list[Json]:
    leaf = {**istio("VirtualService", "leaf"), "spec": {"http": list(leaves), **leaf_spec}}
    return [virtual({"delegate": {"name": "leaf"}, **rule}), leaf]


@pytest.mark.parametrize(
    ("root", "leaf", "paths"),
    [
        ({}, {}, [()]),
        ({"match": [{"uri": {"prefix": "/a"}}]}, {}, [("/a",)]),
        ({"match": [{"uri": {"prefix": "/a"}}]}, {"match": [{"uri": {"prefix": "/a/b"}}, {"uri": {"exact": "/ab"}}]}, [("/a/b", "/ab")]),
        ({"match": [{"uri": {"prefix": "/a"}}]}, {"match": [{"uri": {"prefix": "/b"}}]}, []),
        ({"match": [{"uri": {"regex": "/a"}}]}, {"match": [{"uri": {"prefix": "/b"}}]}, []),
        ({"match": [{"uri": {"prefix": "/a"}}]}, {"match": [{"uri": {"regex": "/a"}}]}, []),
        ({"match": [{"headers": {"x": {"exact": "1"}}}]}, {"match": [{"headers": {"x": {"exact": "2"}}}]}, []),
        ({"match": [{"method": {"exact": "GET"}}]}, {"match": [{"method": {"exact": "PUT"}}]}, []),
        ({"match": [{"port": 80}]}, {"match": [{"port": 81}]}, []),
        ({"match": [{"sourceNamespace": "a"}]}, {"match": [{"sourceNamespace": "b"}]}, []),
        ({"match": [{"sourceLabels": {"a": "b"}}]}, {"match": [{"sourceLabels": {"a": "c"}}]}, []),
    ],
)
def test_matches_of_delegates(root: Json, leaf: Json, paths: list[tuple[str, ...]]) -> None:
    found = routes(*delegating(root, {**leaf, **to()}))
    assert [tuple(match.path.value if match.path else "" for match in each.matches) for each in found if each.name != "default"] == paths


def test_settings_of_delegates() -> None:
    root: Json = {
        "name": "r",
        "match": [{"name": "m", "port": 80, "headers": {"a": {"exact": "1"}}}],
        "timeout": "5s",
        "retries": {"attempts": 7},
        "headers": {"request": {"set": {"x": "root", "y": "root"}}},
    }
    leaf: Json = {"name": "l", "match": [{"name": "n", "queryParams": {"q": {}}}], "headers": {"request": {"set": {"x": "leaf"}}}, **to()}
    (only,) = routes(*delegating(root, leaf))
    assert (only.name, only.timeout, only.retry and only.retry.attempts) == ("r-l", 5.0, 7)
    assert only.request.set == (("x", "leaf"), ("y", "root"))
    (match,) = only.matches
    assert (match.name, [each.name for each in match.headers], [each.name for each in match.query]) == ("m-n", ["a"], ["q"])
    (own,) = routes(*delegating(root, {**leaf, "timeout": "1s", "retries": {"attempts": 1}}))
    assert (own.timeout, own.retry and own.retry.attempts) == (1.0, 1)


def conditions(*bodies: Json, kind: str = "VirtualService", name: str = "x", bound: bool = True) -> dict[str, str]:
    everything = [*BASE, *bodies]
    objects = read_all(everything)
    waypoint_of = {f"default/{hostname('web')}": WAYPOINT} if bound else {}
    found = istio_statuses(objects, mesh(*everything), MeshOptions(), waypoint_of)[ObjectKey(kind, "default", name)]
    return {each.type: ("" if each.status else "!") + each.reason for each in found.conditions}


ROUTE = gateway_api(
    "HTTPRoute",
    "r",
    parentRefs=[{"group": "", "kind": "Service", "name": "web"}],
    rules=[{"backendRefs": [{"name": "other", "port": 80}]}],
)


@pytest.mark.parametrize(
    ("bodies", "bound", "expected"),
    [
        ([virtual(to())], True, {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs", "ResolvedWaypoints": "ResolvedWaypoints"}),
        ([virtual(to())], False, {"ResolvedWaypoints": "!MissingUseWaypointLabel"}),
        ([virtual(to(), hosts=["gone"])], True, {"ResolvedWaypoints": "!NoMatchingParent"}),
        ([virtual(to("gone"))], True, {"ResolvedRefs": "!BackendNotFound"}),
        ([virtual(to("web", subset="v3"))], True, {"ResolvedRefs": "!BackendNotFound"}),
        ([virtual(to("web"))], True, {"ResolvedRefs": "ResolvedRefs"}),
        ([virtual({**to(), "mirror": {"host": "gone"}})], True, {"ResolvedRefs": "!BackendNotFound"}),
        ([virtual({"match": [{"sourceLabels": {"a": "b"}}], **to()})], True, {"Accepted": "PartiallyInvalid"}),
        ([virtual({"delegate": {"name": "gone"}})], True, {"Accepted": "PartiallyInvalid"}),
        (delegating({}, to(), exportTo=["elsewhere"]), True, {"Accepted": "PartiallyInvalid"}),
        (delegating({"match": [{"port": 80}]}, {"match": [{"port": 81}], **to()}), True, {"Accepted": "PartiallyInvalid"}),
        ([virtual(to()), ROUTE], True, {"Accepted": "!Conflicted"}),
        ([virtual(to(), gateways=["gw"])], False, {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs"}),
    ],
)
def test_conditions(bodies: list[Json], bound: bool, expected: dict[str, str]) -> None:
    found = conditions(*bodies, bound=bound)
    assert {name: found[name] for name in expected} == expected


def test_a_route_of_gateway_api_takes_the_place_of_virtual_services() -> None:
    assert names(routes(virtual(to()), ROUTE)) == ["default/r/rule-0"]


def test_conditions_of_destination_rules() -> None:
    assert conditions(kind="DestinationRule", name="web") == {"Accepted": "Accepted", "ResolvedRefs": "ResolvedRefs"}
    body = istio("DestinationRule", host="gone", trafficPolicy={"tunnel": {}})
    assert conditions(body, kind="DestinationRule") == {"Accepted": "PartiallyInvalid", "ResolvedRefs": "!BackendNotFound"}
