"""VirtualService as it is read: every row of the table, every default, every exclusion."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from tests.kit.builders import Json
from tests.kit.mesh_l7 import istio
from ztunnel.mesh.errors import ManifestError
from ztunnel.mesh.l7.routes import (
    DEFAULT_RETRY,
    Cors,
    DirectResponse,
    Fault,
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
from ztunnel.mesh.manifests.virtual_service import (
    HttpMatch,
    HttpRule,
    L4Rule,
    Target,
    VirtualServiceObject,
    WeightedTarget,
    Where,
)
from ztunnel.mesh.rules import Cidr

TO_WEB = [{"destination": {"host": "web"}}]
TO_B = {"request": {"set": {"Host": "b"}}}
D = {"exact": "d"}
PRESENT = TextMatch(TextKind.PRESENT)


def exact(text: str) -> TextMatch:
    return TextMatch(TextKind.EXACT, text)


def virtual(**spec: object) -> VirtualServiceObject:
    found = parse({**istio("VirtualService"), "spec": {"hosts": ["web"]} | spec}, "test")
    assert isinstance(found, VirtualServiceObject)
    return found


def rule(**fields: object) -> HttpRule:
    action = {} if {"redirect", "directResponse", "delegate"} & fields.keys() else {"route": TO_WEB}
    (only,) = virtual(http=[action | fields]).http
    return only


def test_hosts_gateways_and_defaults() -> None:
    found = virtual(hosts=["Web", "*.a.example"], gateways=["mesh", "infra/gw"], exportTo=["."], http=[{"route": TO_WEB}])
    assert (found.hosts, found.gateways, found.export_to) == (("web", "*.a.example"), ("mesh", "infra/gw"), (".",))
    assert found.http == (HttpRule(targets=(WeightedTarget(Target("web")),), retry=DEFAULT_RETRY),)
    assert virtual(http=[{"route": TO_WEB}]).gateways == ("mesh",)


def test_destinations_and_weights() -> None:
    shares = [
        {
            "destination": {"host": "a", "subset": "v1", "port": {"number": 80}},
            "weight": 25,
            "headers": {"request": {"set": {"Host": "b"}}},
        },
        {"destination": {"host": "b"}, "weight": 0},
        {"destination": {"host": "c"}, "weight": 75, "headers": {"response": {"remove": ["X"]}}},
        {"destination": {"host": "d"}},
    ]
    assert rule(route=shares).targets == (
        WeightedTarget(Target("a", "v1", 80), 25, authority="b"),
        WeightedTarget(Target("c"), 75, response=HeaderEdits(remove=("x",))),
    )
    assert rule(route=[{"destination": {"host": "a"}, "weight": 0}]).targets == (WeightedTarget(Target("a"), 1),)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({}, RequestMatch()),
        ({"uri": {"exact": "/a"}}, RequestMatch(PathMatch(PathKind.EXACT, "/a"))),
        ({"uri": {"prefix": "/a"}, "ignoreUriCase": True}, RequestMatch(PathMatch(PathKind.PREFIX, "/a", ignore_case=True))),
        ({"uri": {"regex": "/a.*"}, "ignoreUriCase": True}, RequestMatch(PathMatch(PathKind.REGEX, "/a.*"))),
        ({"method": {"exact": "GET"}}, RequestMatch(method=exact("GET"))),
        ({"scheme": {"exact": "http"}}, RequestMatch(headers=(NamedMatch(":scheme", exact("http")),))),
        ({"authority": {"prefix": "a"}}, RequestMatch(headers=(NamedMatch(":authority", TextMatch(TextKind.PREFIX, "a")),))),
        ({"headers": {"X-User": {"regex": "a|b"}}}, RequestMatch(headers=(NamedMatch("x-user", TextMatch(TextKind.REGEX, "a|b")),))),
        ({"headers": {"x": {}}}, RequestMatch(headers=(NamedMatch("x", PRESENT),))),
        ({"headers": {"x": {"regex": "*"}}}, RequestMatch(headers=(NamedMatch("x", PRESENT),))),
        ({"withoutHeaders": {"x": {"exact": "a"}}}, RequestMatch(headers=(NamedMatch("x", exact("a"), inverted=True),))),
        ({"headers": {"@request.auth.claims.a.b": {"exact": "c"}}}, RequestMatch(headers=(NamedMatch("", exact("c"), claim=("a", "b")),))),
        (
            {"headers": {"@request.auth.claims[a.b][c]": {"exact": "d"}}},
            RequestMatch(headers=(NamedMatch("", exact("d"), claim=("a.b", "c")),)),
        ),
        ({"queryParams": {"Q": {"exact": "a"}}}, RequestMatch(query=(NamedMatch("Q", exact("a")),))),
        ({"queryParams": {"q": {}}}, RequestMatch(query=(NamedMatch("q", PRESENT),))),
        ({"name": "n", "statPrefix": "s"}, RequestMatch(name="n")),
    ],
)
def test_matches(match: Json, expected: RequestMatch) -> None:
    assert rule(match=[match]).matches == (HttpMatch(expected),)


def test_matches_of_the_place() -> None:
    match = {"port": 80, "gateways": ["mesh"], "sourceLabels": {"a": "b"}, "sourceNamespace": "c"}
    assert rule(match=[match]).matches == (HttpMatch(RequestMatch(), Where(80, ("mesh",), (("a", "b"),), "c")),)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"redirect": {"uri": "/a"}}, {"redirect": Redirect(301, derive_port="FROM_HOST", path="/a")}),
        (
            {"redirect": {"authority": "b", "scheme": "https", "port": 8443, "redirectCode": 307}},
            {"redirect": Redirect(307, "https", "b", 8443)},
        ),
        (
            {"redirect": {"prefixRewrite": "/a", "derivePort": "FROM_REQUEST_PORT"}},
            {"redirect": Redirect(301, derive_port="FROM_REQUEST_PORT", prefix="/a")},
        ),
        ({"directResponse": {"status": 418}}, {"direct": DirectResponse(418)}),
        ({"directResponse": {"status": 200, "body": {"string": "ä"}}}, {"direct": DirectResponse(200, "ä".encode())}),
        ({"directResponse": {"status": 200, "body": {"bytes": "aGk="}}}, {"direct": DirectResponse(200, b"hi")}),
        ({"delegate": {"name": "d", "namespace": "n"}}, {"delegate": ("n", "d")}),
        ({"rewrite": {"uri": "/a", "authority": "b"}}, {"rewrite": Rewrite("b", prefix="/a")}),
        ({"rewrite": {"uriRegexRewrite": {"match": "/(.*)", "rewrite": r"/x/\1"}}}, {"rewrite": Rewrite(regex=("/(.*)", r"/x/\1"))}),
        (
            {"headers": {"request": {"set": {"A": "1", ":authority": "h"}, "add": {"b": "%START_TIME%"}, "remove": ["C"]}}},
            {"request": HeaderEdits((("a", "1"),), (("b", "%START_TIME%"),), ("c",)), "authority": "h"},
        ),
        ({"timeout": "0s"}, {"timeout": 0.0}),
        ({"timeout": "1.5s"}, {"timeout": 1.5}),
        ({"retries": {}}, {"retry": None}),
        ({"retries": {"attempts": 0}}, {"retry": None}),
        ({"retries": {"attempts": -1}}, {"retry": None}),
        ({"retries": {"attempts": 3}}, {"retry": replace(DEFAULT_RETRY, attempts=3)}),
        (
            {"retries": {"attempts": 1, "retryOn": "5xx, reset,503", "perTryTimeout": "2s", "backoff": "1s"}},
            {"retry": Retry(1, (RetryOn.FIVE_XX, RetryOn.RESET, RetryOn.RETRIABLE_STATUS_CODES), (503,), 2.0, 1.0, 10.0)},
        ),
        (
            {"retries": {"attempts": 1, "retryRemoteLocalities": True, "retryIgnorePreviousHosts": False}},
            {"retry": replace(DEFAULT_RETRY, attempts=1, remote_localities=True, avoid_previous_hosts=False)},
        ),
        ({"fault": {"delay": {"fixedDelay": "7s", "percentage": {"value": 0.0001}}}}, {"fault": Fault(7.0, 0.000001)}),
        ({"fault": {"delay": {"fixedDelay": "7s"}}}, {"fault": Fault(7.0, 0.0)}),
        ({"fault": {"abort": {"httpStatus": 500, "percentage": {"value": 100}}}}, {"fault": Fault(abort_status=500, abort_share=1.0)}),
        ({"fault": {"abort": {"grpcStatus": "NOT_FOUND", "percentage": {"value": 50}}}}, {"fault": Fault(abort_grpc=5, abort_share=0.5)}),
        ({"fault": {"delay": {"fixedDelay": "1s", "percent": 10}}}, {"fault": Fault(1.0, 0.1)}),
        ({"mirror": {"host": "b", "subset": "v2"}}, {"mirrors": ((Target("b", "v2"), 1.0),)}),
        ({"mirror": {"host": "b"}, "mirrorPercentage": {"value": 12.5}}, {"mirrors": ((Target("b"), 0.125),)}),
        ({"mirror": {"host": "b"}, "mirrorPercentage": {"value": 0}}, {"mirrors": ()}),
        ({"mirror": {"host": "b"}, "mirrorPercent": 10}, {"mirrors": ((Target("b"), 0.1),)}),
        ({"mirror": {"host": "b"}, "mirror_percent": 20}, {"mirrors": ((Target("b"), 0.2),)}),
        (
            {"mirrors": [{"destination": {"host": "b"}}, {"destination": {"host": "c"}, "percentage": {"value": 1}}]},
            {"mirrors": ((Target("b"), 1.0), (Target("c"), 0.01))},
        ),
        (
            {
                "corsPolicy": {
                    "allowOrigins": [{"exact": "a"}, {"regex": "b.*"}],
                    "allowMethods": ["GET"],
                    "allowHeaders": ["x"],
                    "exposeHeaders": ["y"],
                    "maxAge": "24h",
                    "allowCredentials": True,
                    "unmatchedPreflights": "IGNORE",
                }
            },
            {"cors": Cors((exact("a"), TextMatch(TextKind.REGEX, "b.*")), ("GET",), ("x",), ("y",), 86400.0, True, False)},
        ),
        ({"corsPolicy": {"allowOrigin": ["*"]}}, {"cors": Cors((exact("*"),))}),
    ],
)
def test_every_action_and_setting_of_a_rule(fields: Json, expected: Json) -> None:
    found = rule(**fields)
    assert {name: getattr(found, name) for name in expected} == expected


def test_pseudo_headers_are_not_edited_and_that_is_noted() -> None:
    found = virtual(http=[{"route": TO_WEB, "headers": {"request": {"set": {":path": "/x"}}}}])
    assert found.http[0].request == HeaderEdits()
    assert found.notes == ('spec.http[0].headers.request.set[":path"]: :path cannot be edited and stays as it is',)


def test_connections() -> None:
    found = virtual(
        tcp=[{"match": [{"port": 1, "destinationSubnets": ["10.0.0.0/8"]}], "route": [{"destination": {"host": "a"}, "weight": 3}]}],
        tls=[{"match": [{"sniHosts": ["A.b"], "port": 443}], "route": TO_WEB}],
    )
    assert found.tcp == (L4Rule((Where(1, subnets=(Cidr(32, "10.0.0.0", 8),)),), (WeightedTarget(Target("a"), 1),)),)
    assert found.tls == (L4Rule((Where(443, sni=("a.b",)),), (WeightedTarget(Target("web"), 1),)),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "spec: no http, tcp or tls routes"),
        ({"hosts": ["*"], "http": [{"route": TO_WEB}]}, "spec.hosts: * is for gateways, not for the mesh"),
        ({"hosts": [], "gateways": ["a"], "http": [{"route": TO_WEB}]}, "spec.hosts: required"),
        ({"hosts": [], "tcp": [{"route": TO_WEB}]}, "spec.hosts: required"),
        ({"hosts": [], "http": [{"delegate": {"name": "a"}}]}, "a delegate does not delegate again"),
        ({"gateways": ["A"], "http": []}, "spec.gateways[0]: not a name"),
        ({"tcp": [{"route": []}]}, "spec.tcp[0].route: at least one destination"),
        ({"tcp": [{}]}, "spec.tcp[0].route: required"),
        ({"tls": [{"route": TO_WEB}]}, "spec.tls[0].match: required"),
        ({"tls": [{"match": [{"port": 1}], "route": TO_WEB}]}, "sniHosts: required"),
        ({"tcp": [{"match": [{"destinationSubnets": ["x"]}], "route": TO_WEB}]}, "not an address block"),
    ],
)
def test_refusals(spec: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        virtual(**spec)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"route": []}, "route: at least one destination"),
        ({"redirect": {}, "route": TO_WEB}, "exactly one of route, redirect, directResponse, delegate"),
        ({"redirect": {}, "fault": {"delay": {"fixedDelay": "1s"}}}, "fault: not with redirect"),
        ({"redirect": {}, "rewrite": {"uri": "/"}}, "rewrite: not with redirect"),
        ({"directResponse": {"status": 200}, "fault": {}}, "fault: not with directResponse"),
        ({"directResponse": {"status": 200}, "rewrite": {"uri": "/"}}, "rewrite: not with directResponse"),
        ({"directResponse": {"status": 199}}, "not a whole number from 200 to 599: 199"),
        ({"directResponse": {"status": 200, "body": {"string": "x" * 1048577}}}, "more than 1048576 bytes"),
        ({"directResponse": {"status": 200, "body": {"bytes": "!"}}}, "not base64"),
        ({"mirror": {"host": "a"}, "mirrors": []}, "mirrors: mirror or mirrors, not both"),
        ({"mirrorPercentage": {"value": 1}}, "without mirror"),
        ({"redirect": {"redirectCode": 300}}, "redirectCode: not one of 301"),
        ({"redirect": {"uri": "/", "prefixRewrite": "/"}}, "uri or prefixRewrite"),
        ({"redirect": {"port": 1, "derivePort": "FROM_REQUEST_PORT"}}, "port or derivePort"),
        ({"rewrite": {}}, "rewrite: empty"),
        ({"rewrite": {"uri": "/", "uriRegexRewrite": {}}}, "uri or uriRegexRewrite"),
        ({"rewrite": {"uriRegexRewrite": {"match": "(", "rewrite": "x"}}}, "not a regular expression"),
        ({"fault": {}}, "fault: delay, abort or both"),
        ({"fault": {"delay": {"exponentialDelay": "1s"}}}, "exponentialDelay: unknown field"),
        ({"fault": {"abort": {"http2Error": "x"}}}, "http2Error: unknown field"),
        ({"fault": {"abort": {"httpStatus": 500, "grpcStatus": "OK"}}}, "exactly one of httpStatus and grpcStatus"),
        ({"fault": {"abort": {"grpcStatus": "FINE"}}}, "grpcStatus: not one of OK"),
        ({"retries": {"attempts": 1, "retryOn": "sometimes"}}, "'sometimes' is not a condition to retry on"),
        ({"match": [{"uri": {"exact": "/", "prefix": "/"}}]}, "exactly one of exact, prefix, regex"),
        ({"match": [{"uri": {}}]}, "exactly one of exact, prefix, regex"),
        ({"match": [{"headers": {"@request.auth.claims": {}}}]}, "not a claim"),
        ({"match": [{"headers": {"a b": {}}}]}, "not a header name"),
        ({"match": [{"urii": {}}]}, 'unknown field (did you mean "uri"?)'),
        ({"route": [{"destination": {"host": "a"}}, {"destination": {"host": "b"}, "weight": 0}]}, "route: all weights are 0"),
        ({"route": [{"destination": {"host": "a"}, "weight": -1}]}, "weight: not a whole number"),
        ({"headers": {"request": {"set": {"a": "b\nc"}}}}, "not a header value"),
    ],
)
def test_refusals_within_a_rule(fields: Json, message: str) -> None:
    with pytest.raises(ManifestError, match=re.escape(message)):
        rule(**fields)
