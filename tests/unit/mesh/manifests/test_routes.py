"""Gateway API's routes as they are read: every field, every default of an API server, every refusal."""

from __future__ import annotations

import re

import pytest

from tests.kit.builders import Json, metadata
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.routes import (
    DEFAULT_RETRY,
    Cors,
    HeaderEdits,
    NamedMatch,
    PathKind,
    PathMatch,
    Redirect,
    RequestMatch,
    Retry,
    RetryOn,
    Rewrite,
    TextKind,
    TextMatch,
)
from ztunnel.mesh.manifests.parse import parse
from ztunnel.mesh.manifests.references import BackendRef, Grantee, ParentRef, ReferenceGrantObject
from ztunnel.mesh.manifests.routes import MirrorRef, RouteObject, RouteRule

ROOT = RequestMatch(path=PathMatch(PathKind.SEGMENTS, "/"))
WEB = {"name": "web", "port": 80}
RETRY_ON = (RetryOn.CONNECT_FAILURE, RetryOn.REFUSED_STREAM, RetryOn.UNAVAILABLE, RetryOn.CANCELLED)


def route(kind: str, **spec: object) -> RouteObject:
    found = parse({"apiVersion": "gateway.networking.k8s.io/v1", "kind": kind, "metadata": metadata("x", "shop"), "spec": spec}, "test")
    assert isinstance(found, RouteObject)
    return found


def rule(kind: str = "HTTPRoute", **fields: object) -> RouteRule:
    (only,) = route(kind, rules=[fields]).rules
    return only


def filtered(kind: str, **fields: object) -> Json:
    member = {"URLRewrite": "urlRewrite", "CORS": "cors"}.get(kind, kind[0].lower() + kind[1:])
    return {"type": kind, member: fields}


def test_defaults_of_an_api_server() -> None:
    found = route("HTTPRoute", parentRefs=[{"name": "gw"}, {"group": "", "kind": "Service", "name": "web"}], rules=[{"backendRefs": [WEB]}])
    assert found.parents == (
        ParentRef("gateway.networking.k8s.io", "Gateway", "shop", "gw"),
        ParentRef("", "Service", "shop", "web"),
    )
    assert found.rules == (RouteRule(matches=(ROOT,), backends=(BackendRef("", "Service", "shop", "web", 80, 1),), retry=DEFAULT_RETRY),)
    assert route("HTTPRoute").rules == (RouteRule(matches=(ROOT,)),)
    assert rule("GRPCRoute").matches == (RequestMatch(),)
    assert route("TLSRoute", hostnames=["A.example", "*.b.example"]).hostnames == ("a.example", "*.b.example")


def test_references_in_full() -> None:
    parent = {"group": "core", "kind": "Service", "namespace": "b", "name": "c", "sectionName": "http", "port": 8080}
    backend = {"group": "networking.istio.io", "kind": "Hostname", "name": "Api.example", "port": 1, "weight": 0}
    found = route("TCPRoute", parentRefs=[parent, parent], rules=[{"name": "one", "backendRefs": [backend]}])
    assert found.parents == (ParentRef("", "Service", "b", "c", "http", 8080),)
    assert found.rules == (RouteRule("one", backends=(BackendRef("networking.istio.io", "Hostname", "shop", "api.example", 1, 0),)),)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, ROOT),
        ({"path": {"value": "/v2/"}}, RequestMatch(path=PathMatch(PathKind.SEGMENTS, "/v2"))),
        ({"path": {"type": "Exact", "value": "/v2/"}}, RequestMatch(path=PathMatch(PathKind.EXACT, "/v2/"))),
        ({"path": {"type": "RegularExpression", "value": "/v[12]"}}, RequestMatch(path=PathMatch(PathKind.REGEX, "/v[12]"))),
        ({"method": "PATCH"}, RequestMatch(ROOT.path, TextMatch(TextKind.EXACT, "PATCH"))),
        (
            {"headers": [{"name": "Version", "value": "one"}, {"name": "version", "value": "two"}]},
            RequestMatch(ROOT.path, headers=(NamedMatch("version", TextMatch(TextKind.EXACT, "one")),)),
        ),
        (
            {"queryParams": [{"type": "RegularExpression", "name": "Animal", "value": "wh.*"}]},
            RequestMatch(ROOT.path, query=(NamedMatch("Animal", TextMatch(TextKind.REGEX, "wh.*")),)),
        ),
    ],
)
def test_matches(match: Json, expected: RequestMatch) -> None:
    assert rule(matches=[match]).matches == (expected,)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"service": "a.B", "method": "C"}, PathMatch(PathKind.EXACT, "/a.B/C")),
        ({"service": "a.B"}, PathMatch(PathKind.PREFIX, "/a.B/")),
        ({"method": "C"}, PathMatch(PathKind.REGEX, "/[^/]+/C")),
        ({"type": "RegularExpression", "service": "a.+"}, PathMatch(PathKind.REGEX, "/a.+/[^/]+")),
    ],
)
def test_grpc_methods(method: Json, expected: PathMatch) -> None:
    assert rule("GRPCRoute", matches=[{"method": method}]).matches == (RequestMatch(path=expected),)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {
                "filters": [
                    filtered("RequestHeaderModifier", set=[{"name": "X-A", "value": "1"}], add=[{"name": "b", "value": ""}], remove=["C"])
                ]
            },
            {"request": HeaderEdits((("x-a", "1"),), (("b", ""),), ("c",))},
        ),
        (
            {"filters": [filtered("ResponseHeaderModifier", set=[{"name": "a", "value": "1"}, {"name": "A", "value": "2"}])]},
            {"response": HeaderEdits((("a", "1"),))},
        ),
        ({"filters": [filtered("RequestRedirect", hostname="Example.org")]}, {"redirect": Redirect(302, authority="example.org")}),
        (
            {
                "filters": [
                    filtered(
                        "RequestRedirect",
                        scheme="https",
                        port=8443,
                        statusCode=308,
                        path={"type": "ReplaceFullPath", "replaceFullPath": "/x"},
                    )
                ]
            },
            {"redirect": Redirect(308, scheme="https", port=8443, path="/x")},
        ),
        (
            {"filters": [filtered("RequestRedirect", path={"type": "ReplacePrefixMatch", "replacePrefixMatch": ""})]},
            {"redirect": Redirect(302, prefix="/")},
        ),
        (
            {"filters": [filtered("URLRewrite", hostname="a.b", path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/x"})]},
            {"rewrite": Rewrite(authority="a.b", prefix="/x")},
        ),
        (
            {"filters": [filtered("RequestMirror", backendRef=WEB), filtered("RequestMirror", backendRef=WEB, percent=20)]},
            {
                "mirrors": (
                    MirrorRef(BackendRef("", "Service", "shop", "web", 80)),
                    MirrorRef(BackendRef("", "Service", "shop", "web", 80), 0.2),
                )
            },
        ),
        (
            {"filters": [filtered("RequestMirror", backendRef=WEB, fraction={"numerator": 1, "denominator": 4})]},
            {"mirrors": (MirrorRef(BackendRef("", "Service", "shop", "web", 80), 0.25),)},
        ),
        (
            {
                "filters": [
                    filtered(
                        "CORS",
                        allowOrigins=["https://*.a.example", "*"],
                        allowMethods=["GET"],
                        allowHeaders=["x"],
                        exposeHeaders=["y"],
                        allowCredentials=True,
                    )
                ]
            },
            {
                "cors": Cors(
                    (TextMatch(TextKind.REGEX, r"https://[^/]+\.a\.example"), TextMatch(TextKind.EXACT, "*")),
                    ("GET",),
                    ("x",),
                    ("y",),
                    5,
                    True,
                    False,
                )
            },
        ),
        ({"timeouts": {"request": "1m"}}, {"timeout": 60.0}),
        ({"timeouts": {"request": "0s"}}, {"timeout": 0.0}),
        ({"timeouts": {"request": "1s", "backendRequest": "500ms"}}, {"timeout": 1.0, "retry": Retry(per_try=0.5)}),
        ({"timeouts": {"backendRequest": "500ms"}, "retry": {"attempts": 0}}, {"timeout": 0.5, "retry": None}),
        (
            {"retry": {"codes": [503, 503], "attempts": 3, "backoff": "100ms"}},
            {"retry": Retry(3, (*RETRY_ON, RetryOn.RETRIABLE_STATUS_CODES), (503,), base=0.1, maximum=1.0)},
        ),
        ({"retry": {}}, {"retry": Retry(2, RETRY_ON)}),
        (
            {"filters": [{"type": "ExtensionRef", "extensionRef": {"group": "a", "kind": "B", "name": "c"}}]},
            {"problem": "spec.rules[0].filters[0]: filter ExtensionRef is not supported"},
        ),
        (
            {"sessionPersistence": {"type": "Cookie"}},
            {"problem": "spec.rules[0].sessionPersistence: not supported; use a DestinationRule's consistentHash"},
        ),
        (
            {
                "backendRefs": [
                    {**WEB, "filters": [filtered("RequestHeaderModifier", remove=["a"]), filtered("ResponseHeaderModifier", remove=["b"])]}
                ]
            },
            {"backends": (BackendRef("", "Service", "shop", "web", 80, 1, HeaderEdits(remove=("a",)), HeaderEdits(remove=("b",))),)},
        ),
        (
            {"backendRefs": [{**WEB, "filters": [filtered("URLRewrite")]}]},
            {
                "backends": (
                    BackendRef(
                        "",
                        "Service",
                        "shop",
                        "web",
                        80,
                        problem="spec.rules[0].backendRefs[0].filters[0]: URLRewrite is not done on a backend",
                    ),
                )
            },
        ),
    ],
)
def test_every_filter_and_setting_of_a_rule(fields: Json, expected: Json) -> None:
    found = rule("HTTPRoute", **fields)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("HTTPRoute", {"mathces": []}, 'spec.rules[0].mathces: unknown field (did you mean "matches"?)'),
        ("HTTPRoute", {"matches": [{"path": {"value": "v2"}}]}, 'path.value: not a path (it starts with /): "v2"'),
        ("HTTPRoute", {"matches": [{"path": {"type": "Prefix"}}]}, "path.type: not one of Exact, PathPrefix, RegularExpression"),
        ("HTTPRoute", {"matches": [{"path": {"type": "RegularExpression", "value": "("}}]}, "path.value: not a regular expression of RE2"),
        ("HTTPRoute", {"matches": [{"method": "get"}]}, "method: not one of GET"),
        ("HTTPRoute", {"matches": [{"headers": [{"name": "a b", "value": "c"}]}]}, "headers[0].name: not a header name"),
        ("HTTPRoute", {"backendRefs": [{"name": "web"}]}, "backendRefs[0].port: required for a Service"),
        ("HTTPRoute", {"backendRefs": [{**WEB, "weight": -1}]}, "weight: not a whole number from 0 to 1000000: -1"),
        ("HTTPRoute", {"filters": [{"type": "URLRewrite"}]}, "filters[0].urlRewrite: required"),
        ("HTTPRoute", {"filters": [filtered("URLRewrite"), filtered("URLRewrite")]}, "filters[1]: URLRewrite a second time"),
        ("HTTPRoute", {"filters": [filtered("RequestRedirect"), filtered("URLRewrite")]}, "goes neither with URLRewrite nor"),
        ("HTTPRoute", {"filters": [filtered("RequestRedirect")], "backendRefs": [WEB]}, "nor with backendRefs"),
        ("HTTPRoute", {"filters": [filtered("RequestRedirect", statusCode=300)]}, "statusCode: not one of 301, 302, 303, 307, 308: 300"),
        ("HTTPRoute", {"filters": [filtered("RequestMirror", backendRef=WEB, percent=1, fraction={})]}, "percent or fraction, not both"),
        (
            "HTTPRoute",
            {
                "matches": [{"path": {"type": "Exact"}}],
                "filters": [filtered("URLRewrite", path={"type": "ReplacePrefixMatch", "replacePrefixMatch": "/"})],
            },
            "ReplacePrefixMatch needs exactly one match, by PathPrefix",
        ),
        ("HTTPRoute", {"filters": [filtered("URLRewrite", path={"type": "ReplaceFullPath"})]}, "ReplaceFullPath wants"),
        ("HTTPRoute", {"filters": [filtered("CORS", allowOrigins=["https://a.*.b"])]}, "not an origin"),
        ("HTTPRoute", {"timeouts": {"request": "1s", "backendRequest": "2s"}}, "longer than the whole request may take"),
        ("HTTPRoute", {"timeouts": {"request": "soon"}}, "not a duration"),
        ("HTTPRoute", {"retry": {"codes": [200]}}, "codes[0]: not a whole number from 400 to 599: 200"),
        ("HTTPRoute", {"retry": {"backoff": "0s"}}, "backoff: not more than nothing"),
        ("GRPCRoute", {"timeouts": {}}, "timeouts: unknown field"),
        ("GRPCRoute", {"matches": [{"method": {}}]}, "names neither a service nor a method"),
        ("GRPCRoute", {"matches": [{"method": {"service": "a/b"}}]}, "not a name of gRPC"),
        ("TCPRoute", {"filters": []}, "filters: unknown field"),
    ],
)
def test_refusals(kind: str, fields: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        rule(kind, **fields)


def test_a_grpc_route_does_not_redirect() -> None:
    assert (
        rule("GRPCRoute", filters=[filtered("RequestRedirect")]).problem
        == "spec.rules[0].filters[0]: filter RequestRedirect is not supported"
    )


def test_reference_grants() -> None:
    spec = {
        "from": [{"group": "gateway.networking.k8s.io", "kind": "HTTPRoute", "namespace": "shop"}],
        "to": [{"group": "", "kind": "Service"}, {"group": "", "kind": "Secret", "name": "tls"}],
    }
    body = {"apiVersion": "gateway.networking.k8s.io/v1beta1", "kind": "ReferenceGrant", "metadata": metadata("x", "b"), "spec": spec}
    found = parse(body, "test")
    assert isinstance(found, ReferenceGrantObject)
    assert found.sources == (Grantee("gateway.networking.k8s.io", "HTTPRoute", "shop"),)
    assert found.targets == (("", "Service", ""), ("", "Secret", "tls"))


def test_default_gateways_are_not_supported() -> None:
    assert route("TCPRoute", useDefaultGateways="None").parents == ()
    with pytest.raises(ManifestError, match="useDefaultGateways: default Gateways are not supported"):
        route("HTTPRoute", useDefaultGateways="All")
