"""Header edits, rewrites of paths and authorities, and the variables that values may hold."""

from __future__ import annotations

import pytest

from tests.kit.l7 import client, request
from waypoint.http.editing import CompiledEdits, CompiledRewrite
from waypoint.http.messages import Client, Headers, Response
from waypoint.http.variables import Variables, compile_value, unknown_variables
from ztunnel.mesh.l7.patterns import BadPattern
from ztunnel.mesh.l7.routes import HeaderEdits, PathKind, PathMatch, Rewrite


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        (HeaderEdits(), [("a", "1"), ("b", "2"), ("a", "3")]),
        (HeaderEdits(remove=("a",)), [("b", "2")]),
        (HeaderEdits(set=(("a", "9"),)), [("b", "2"), ("a", "9")]),
        (HeaderEdits(add=(("a", "9"),)), [("a", "1"), ("b", "2"), ("a", "3"), ("a", "9")]),
        (HeaderEdits(remove=("a",), add=(("a", "9"),)), [("b", "2"), ("a", "9")]),
        (HeaderEdits(remove=("a",), set=(("a", "8"),), add=(("a", "9"),)), [("b", "2"), ("a", "8"), ("a", "9")]),
        (HeaderEdits(set=((":path", "/"), ("host", "x")), remove=(":method",)), [("a", "1"), ("b", "2"), ("a", "3")]),
        (HeaderEdits(set=(("c", ""),)), [("a", "1"), ("b", "2"), ("a", "3"), ("c", "")]),
    ],
)
def test_edits(edits: HeaderEdits, expected: list[tuple[str, str]]) -> None:
    headers: Headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    compiled = CompiledEdits(edits)
    compiled.apply(headers)
    assert headers == [(name.encode(), value.encode()) for name, value in expected]
    assert not compiled.dynamic


SEGMENTS, PREFIX, EXACT, REGEX = PathKind.SEGMENTS, PathKind.PREFIX, PathKind.EXACT, PathKind.REGEX


@pytest.mark.parametrize(
    ("kind", "matched", "prefix", "path", "expected"),
    [
        # the table of Gateway API's HTTPPathModifier
        (SEGMENTS, "/foo", "/xyz", "/foo/bar", "/xyz/bar"),
        (SEGMENTS, "/foo", "/xyz/", "/foo/bar", "/xyz/bar"),
        (SEGMENTS, "/foo/", "/xyz", "/foo/bar", "/xyz/bar"),
        (SEGMENTS, "/foo/", "/xyz/", "/foo/bar", "/xyz/bar"),
        (SEGMENTS, "/foo", "/xyz", "/foo", "/xyz"),
        (SEGMENTS, "/foo", "/xyz", "/foo/", "/xyz/"),
        (SEGMENTS, "/foo", "", "/foo/bar", "/bar"),
        (SEGMENTS, "/foo", "", "/foo/", "/"),
        (SEGMENTS, "/foo", "", "/foo", "/"),
        (SEGMENTS, "/foo", "/", "/foo/", "/"),
        (SEGMENTS, "/foo", "/", "/foo", "/"),
        (SEGMENTS, "/foo", "/", "/foo/bar?a=/foo", "/bar?a=/foo"),
        (SEGMENTS, "/", "/xyz", "/foo", "/xyz/foo"),
        # VirtualService: plain text
        (PREFIX, "/foo", "/x", "/foobar?q", "/xbar?q"),
        (PREFIX, "/foo/", "/", "/foo/bar", "/bar"),
        (PREFIX, "/foo", "", "/foo", "/"),
        (None, "", "/x/", "/foo", "/x/foo"),
        (EXACT, "/foo", "/x", "/foo?q", "/x?q"),
        (REGEX, "/f.*", "/x", "/foo", "/x"),
    ],
)
def test_prefixes(kind: PathKind | None, matched: str, prefix: str, path: str, expected: str) -> None:
    asked = request(path)
    CompiledRewrite(Rewrite(prefix=prefix), None if kind is None else PathMatch(kind, matched)).apply(asked)
    assert asked.path == expected.encode()
    assert asked.get(b"x-envoy-original-path") == path.encode()


@pytest.mark.parametrize(
    ("rewrite", "path", "expected"),
    [
        (Rewrite(path="/one"), "/foo/bar?q=1", "/one?q=1"),
        (Rewrite(path="/one?x=2"), "/foo/bar?q=1", "/one?x=2"),
        (Rewrite(regex=("^/service/([^/]+)(/.*)$", "\\2/instance/\\1")), "/service/foo/v1/api?q", "/v1/api/instance/foo?q"),
        (Rewrite(regex=("one", "two")), "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/two/zzz"),
        (Rewrite(regex=("^(.*?)one(.*)$", "\\1two\\2")), "/xxx/one/yyy/one/zzz", "/xxx/two/yyy/one/zzz"),
        (Rewrite(regex=("(?i)/xxx/", "/yyy/")), "/aaa/XxX/bbb", "/aaa/yyy/bbb"),
        (Rewrite(regex=("(a)|(b)", "[\\1\\0\\\\\\9]")), "/ab", "/[aa\\][b\\]"),
        (Rewrite(regex=("x*", "-")), "/a", "-/-a-"),
        (Rewrite(regex=("none", "-")), "/a", "/a"),
    ],
)
def test_paths(rewrite: Rewrite, path: str, expected: str) -> None:
    asked = request(path, x_envoy_original_path="/forged")
    CompiledRewrite(rewrite, PathMatch(PREFIX, "/")).apply(asked)
    assert asked.path == expected.encode()
    assert asked.get(b"x-envoy-original-path") == path.encode()


def test_an_authority() -> None:
    asked = request("/a")
    rewrite = CompiledRewrite(Rewrite(authority="other:80"), None)
    rewrite.apply(asked)
    assert (asked.authority, asked.path, asked.headers) == (b"other:80", b"/a", [])


def test_a_rewrite_that_is_no_pattern_is_refused() -> None:
    with pytest.raises(BadPattern):
        CompiledRewrite(Rewrite(regex=("(", "")), None)


def known() -> Variables:
    asked = request("/p?q", x_user="jason", x_long="abcdefgh")
    made = Variables(asked, client("shop", "web", address="fd00::9"), 1767225600.125, "the-route", "waypoint-1")
    made.cluster, made.upstream = "inbound-vip|80|http|a", "10.0.0.1:8080"
    return made


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("plain 100%% sure", "plain 100% sure"),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://cluster.local/ns/shop/sa/web"),
        ("%DOWNSTREAM_REMOTE_ADDRESS%", "[fd00::9]:40000"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "fd00::9"),
        ("%DOWNSTREAM_REMOTE_PORT%", "40000"),
        ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%", "[fd00::9]:40000"),
        ("%DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT%", "fd00::9"),
        ("%DOWNSTREAM_LOCAL_ADDRESS%", "10.96.0.1:9080"),
        ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT%", "10.96.0.1"),
        ("%DOWNSTREAM_LOCAL_PORT%", "9080"),
        ("%REQUESTED_SERVER_NAME%", ""),
        ("%PROTOCOL%", "HTTP/1.1"),
        ("%REQ(X-User)%", "jason"),
        ("%REQ(x-missing?x-user)%", "jason"),
        ("%REQ(x-long):3%", "abc"),
        ("%REQ(:authority)% %REQ(:path)% %REQ(:method)% %REQ(:scheme)%", "reviews:9080 /p?q GET http"),
        ("%REQ(:nothing)%", ""),
        ("%RESPONSE_CODE%", "201"),
        ("%RESP(x-a)%/%RESP(:status)%", "1/201"),
        ("%ROUTE_NAME%@%HOSTNAME%", "the-route@waypoint-1"),
        ("%UPSTREAM_CLUSTER% %UPSTREAM_HOST% %UPSTREAM_REMOTE_ADDRESS%", "inbound-vip|80|http|a 10.0.0.1:8080 10.0.0.1:8080"),
        ("%START_TIME%", "2026-01-01T00:00:00.125Z"),
        ("%START_TIME(%Y/%m/%d %3f)%", "2026/01/01 125"),
        ("%NO_SUCH_THING% and %", "%NO_SUCH_THING% and %"),
    ],
)
def test_variables(value: str, expected: str) -> None:
    exchange = known()
    exchange.response = Response(201, [(b"x-a", b"1")])
    headers: Headers = []
    CompiledEdits(HeaderEdits(add=(("x", value),))).apply(headers, exchange)
    assert headers == ([(b"x", expected.encode())] if expected else [])


def test_what_is_not_known_yet_is_empty() -> None:
    exchange = known()
    exchange.client = Client(None, "10.0.0.1")
    edits = CompiledEdits(HeaderEdits(add=(("x", "%RESPONSE_CODE%%RESP(a)%%DOWNSTREAM_PEER_URI_SAN%"),)))
    headers: Headers = []
    edits.apply(headers, exchange)
    assert edits.dynamic
    assert headers == []
    edits.apply(headers)
    assert headers == []


def test_values_speak_of_the_message_as_it_came() -> None:
    exchange = known()
    CompiledEdits(HeaderEdits(set=(("x-user", "was %REQ(x-user)%"),))).apply(exchange.request.headers, exchange)
    assert exchange.request.get(b"x-user") == b"was jason"


def test_unknown_variables_are_named() -> None:
    assert unknown_variables("%REQ(a)% %NO_SUCH% %% %OTHER(x)%") == ["NO_SUCH", "OTHER"]
    assert compile_value("%%") == b"%"


def test_a_value_ends_no_line() -> None:
    exchange = known()
    exchange.route = "a\r\nb: c"
    headers: Headers = []
    CompiledEdits(HeaderEdits(add=(("x", "%ROUTE_NAME%"),))).apply(headers, exchange)
    assert headers == [(b"x", b"ab: c")]
