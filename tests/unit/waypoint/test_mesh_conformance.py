"""Gateway API's mesh scenarios, from manifests to what the proxy decides: matching, redirects, rewrites, headers, weights, consumers.

The scenarios are those of the project's MESH-HTTP and MESH-GRPC profiles, in our own words; what is on the wire is tested elsewhere.
"""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.kit.builders import Json, service_manifest
from tests.kit.l7 import client, request
from tests.kit.mesh_l7 import gateway_api, waypoint
from waypoint.http.matching import Found, RouteTable, choose_backend
from ztunnel.mesh.l7.config import ProxyConfig

PORTS = [
    {"port": 80, "name": "http", "appProtocol": "http"},
    {"port": 8080, "name": "http-alt"},
    {"port": 443, "name": "https"},
    {"port": 9090, "name": "tcp"},
    {"port": 7070, "name": "grpc"},
]
SERVICES = [service_manifest(name, f"10.96.0.{number}", ports=PORTS) for number, name in enumerate(("echo", "echo-v1", "echo-v2"), 1)]
ECHO = {"group": "", "kind": "Service", "name": "echo"}


def to(name: str, **more: object) -> Json:
    return {"name": name, "port": 80, **more}


def route(*rules: Json, kind: str = "HTTPRoute", parent: Json | None = None, namespace: str = "default") -> Json:
    body = gateway_api(kind, "r", namespace=namespace)
    body["spec"] = {"parentRefs": [parent or ECHO], "rules": list(rules)}
    return body


def table(config: ProxyConfig, name: str = "echo", port: int = 80) -> RouteTable:
    (service,) = [each for each in config.services if each.name == name]
    return RouteTable(next(each.routes for each in service.ports if each.port == port))


def found(*rules: Json, path: str = "/", method: str = "GET", of: str = "default", **headers: str) -> Found | None:
    return table(waypoint(*SERVICES, route(*rules), serves=["echo"])).find(request(path, method, "echo", **headers), client(of, port=80))


def backend(answer: Found | None) -> str:
    """The name of the Service that a request goes to; empty when no route matches."""
    if answer is None:
        return ""
    chosen = choose_backend(answer, lambda: 0.0)
    return str(answer.route.direct and answer.route.direct.status) if chosen is None else chosen.cluster.split("|")[-1].split(".")[0]


def rule(to_whom: str, *matches: Json) -> Json:
    return {"matches": list(matches), "backendRefs": [to(to_whom)]}


def prefix(value: str) -> Json:
    return {"path": {"type": "PathPrefix", "value": value}}


def exactly(value: str) -> Json:
    return {"path": {"type": "Exact", "value": value}}


VERSION: Json = {"headers": [{"name": "version", "value": "two"}]}
MATCHING = [rule("echo-v1", prefix("/"), {"headers": [{"name": "version", "value": "one"}]}), rule("echo-v2", prefix("/v2"), VERSION)]


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/", {}, "echo-v1"),
        ("/example", {}, "echo-v1"),
        ("/", {"version": "one"}, "echo-v1"),
        ("/v2", {}, "echo-v2"),
        ("/v2/", {}, "echo-v2"),
        ("/v2/example", {}, "echo-v2"),
        ("/", {"version": "two"}, "echo-v2"),
        ("/v2example", {}, "echo-v1"),
        ("/foo/v2/example", {}, "echo-v1"),
    ],
)
def test_matching(path: str, headers: dict[str, str], expected: str) -> None:
    assert backend(found(*MATCHING, path=path, **headers)) == expected


def test_no_route_at_all_and_split_by_exact_paths() -> None:
    assert backend(table(waypoint(*SERVICES, serves=["echo"])).find(request(), client(port=80))) == "echo"
    split = [rule("echo-v1", exactly("/v1")), rule("echo-v2", exactly("/v2"))]
    assert [backend(found(*split, path=path)) for path in ("/v1", "/v2", "/v1/", "/")] == ["echo-v1", "echo-v2", "", ""]


def query(*pairs: tuple[str, str]) -> Json:
    return {"queryParams": [{"name": name, "value": value} for name, value in pairs]}


ANIMALS = [
    rule("echo-v1", query(("animal", "whale"))),
    rule("echo-v2", query(("animal", "dolphin"))),
    rule("echo", query(("animal", "dolphin"), ("color", "blue"))),
    rule("echo-v2", {**query(("ultramarine", "x")), **prefix("/path")}),
    rule("echo-v1", {**query(("animal", "hydra")), **prefix("/path"), "headers": [{"name": "version", "value": "one"}]}),
]


@pytest.mark.parametrize(
    ("path", "headers", "expected"),
    [
        ("/?animal=whale", {}, "echo-v1"),
        ("/?animal=dolphin", {}, "echo-v2"),
        ("/?animal=whale&otherparam=irrelevant", {}, "echo-v1"),
        ("/?animal=dolphin&color=yellow", {}, "echo-v2"),
        ("/?animal=dolphin&color=blue", {}, "echo"),
        ("/?color=blue", {}, ""),
        ("/?animal=whaledolphin", {}, ""),
        ("/", {}, ""),
        ("/path?ultramarine=x", {}, "echo-v2"),
        ("/path?animal=hydra", {}, ""),
        ("/path?animal=hydra", {"version": "one"}, "echo-v1"),
    ],
)
def test_query_parameters(path: str, headers: dict[str, str], expected: str) -> None:
    assert backend(found(*ANIMALS, path=path, **headers)) == expected


def test_ports_of_a_parent() -> None:
    config = waypoint(*SERVICES, route(rule("echo-v1"), parent={**ECHO, "port": 80}), serves=["echo"])
    assert backend(table(config, port=80).find(request(), client(port=80))) == "echo-v1"
    assert backend(table(config, port=8080).find(request(), client(port=8080))) == "echo"


def test_weights() -> None:
    weighted: Json = {"backendRefs": [to("echo-v1", weight=70), to("echo-v2", weight=30), to("echo", weight=0)]}
    answer = found(weighted)
    assert answer is not None
    dice = Random(1).random
    counted = Counter(chosen.cluster.split("|")[-1].split(".")[0] for _ in range(1000) if (chosen := choose_backend(answer, dice)))
    assert counted.keys() == {"echo-v1", "echo-v2"}
    assert abs(counted["echo-v1"] - 700) < 50


def redirecting(**fields: object) -> Json:
    return {"matches": [prefix("/old")], "filters": [{"type": "RequestRedirect", "requestRedirect": fields}]}


def replacing(kind: str, value: str) -> Json:
    return {"type": kind, ("replaceFullPath" if kind == "ReplaceFullPath" else "replacePrefixMatch"): value}


@pytest.mark.parametrize(
    ("fields", "path", "status", "location"),
    [
        ({"hostname": "example.org"}, "/old", 302, "http://example.org/old"),
        ({"hostname": "example.org", "statusCode": 301}, "/old?a=b", 301, "http://example.org/old?a=b"),
        ({"path": replacing("ReplacePrefixMatch", "/new")}, "/old/lemon", 302, "http://echo/new/lemon"),
        ({"path": replacing("ReplaceFullPath", "/full")}, "/old/lemon", 302, "http://echo/full"),
        (
            {"path": replacing("ReplacePrefixMatch", "/new"), "hostname": "example.org", "statusCode": 301},
            "/old",
            301,
            "http://example.org/new",
        ),
        ({"port": 8083}, "/old", 302, "http://echo:8083/old"),
        ({"port": 8083, "hostname": "example.org"}, "/old", 302, "http://example.org:8083/old"),
        ({"scheme": "https"}, "/old", 302, "https://echo/old"),
        ({"scheme": "https", "hostname": "example.org", "statusCode": 308}, "/old", 308, "https://example.org/old"),
    ],
)
def test_redirects(fields: Json, path: str, status: int, location: str) -> None:
    answer = found(redirecting(**fields), path=path)
    assert answer is not None
    assert answer.redirect is not None
    reply = answer.redirect.answer(request(path, authority="echo"), client(port=80))
    assert (reply.status, dict(reply.headers)[b"location"]) == (status, location.encode())


def rewriting(match: str, **fields: object) -> Json:
    return {"matches": [prefix(match)], "filters": [{"type": "URLRewrite", "urlRewrite": fields}], "backendRefs": [to("echo-v1")]}


@pytest.mark.parametrize(
    ("match", "how", "value", "path", "expected"),
    [
        ("/prefix/one", "ReplacePrefixMatch", "/one", "/prefix/one/two", "/one/two"),
        ("/strip-prefix", "ReplacePrefixMatch", "/", "/strip-prefix/three", "/three"),
        ("/strip-prefix", "ReplacePrefixMatch", "/", "/strip-prefix", "/"),
        ("/full", "ReplaceFullPath", "/one", "/full/one/two", "/one"),
    ],
)
def test_rewrites(match: str, how: str, value: str, path: str, expected: str) -> None:
    answer = found(rewriting(match, path=replacing(how, value), hostname="other.example"), path=path)
    assert answer is not None
    assert answer.rewrite is not None
    asked = request(path, authority="echo")
    answer.rewrite.apply(asked)
    assert (asked.path, asked.authority) == (expected.encode(), b"other.example")


MODIFIER = {
    "set": [{"name": "X-Set", "value": "new"}],
    "add": [{"name": "x-add", "value": "b"}],
    "remove": ["X-Remove"],
}


@pytest.mark.parametrize("level", ["rule", "backend"])
def test_header_modifiers(level: str) -> None:
    filters = [{"type": "RequestHeaderModifier", "requestHeaderModifier": MODIFIER}]
    own: Json = {"backendRefs": [to("echo-v1", **({"filters": filters} if level == "backend" else {}))]}
    answer = found({**own, **({"filters": filters} if level == "rule" else {})})
    assert answer is not None
    chosen = choose_backend(answer, lambda: 0.0)
    assert chosen is not None
    lines = [(b"x-set", b"old"), (b"x-add", b"a"), (b"x-remove", b"1"), (b"x-other", b"2")]
    (answer.compiled.request if level == "rule" else chosen.request).apply(lines)
    asked = request()
    asked.headers = lines
    assert [asked.get(name) for name in (b"x-set", b"x-add", b"x-remove", b"x-other")] == [b"new", b"a,b", None, b"2"]


def test_a_consumers_route_changes_only_its_namespaces_requests() -> None:
    far = service_manifest("far", "10.96.1.1", namespace="consumer", ports=PORTS)
    body = route({"backendRefs": [to("far")]}, parent={**ECHO, "namespace": "default"}, namespace="consumer")
    routes = table(waypoint(*SERVICES, far, body, serves=["echo"]))
    assert backend(routes.find(request(), client("consumer", port=80))) == "far"
    assert backend(routes.find(request(), client("default", port=80))) == "echo"


def test_grpc_by_method_and_header() -> None:
    rules = [
        rule("echo-v1", {"method": {"service": "echo.Echo", "method": "One"}}),
        rule("echo-v2", {"method": {"service": "echo.Echo"}, "headers": [{"name": "color", "value": "blue"}]}),
    ]
    routes = table(waypoint(*SERVICES, route(*rules, kind="GRPCRoute", parent={**ECHO, "port": 7070}), serves=["echo"]), port=7070)

    def asked(path: str, **headers: str) -> str:
        return backend(routes.find(request(path, "POST", "echo", **headers), client(port=7070)))

    assert [asked("/echo.Echo/One"), asked("/echo.Echo/Two", color="blue"), asked("/echo.Echo/Two"), asked("/other.Echo/One")] == [
        "echo-v1",
        "echo-v2",
        "",
        "",
    ]


def test_invalid_backends_have_their_share_of_500s() -> None:
    answer = found({"backendRefs": [to("echo-v1"), to("gone")]})
    assert answer is not None
    chosen = [choose_backend(answer, lambda point=point: point) for point in (0.2, 0.7)]  # type: ignore[misc]  # a default argument
    assert [each.status for each in chosen if each] == [0, 500]
