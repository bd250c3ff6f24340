"""Which route a request takes: each comparison, their order, and that a thousand cost what a few cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.l7 import client, exact, named, path, regex, request, route
from waypoint.http.matching import RouteTable, choose_backend
from waypoint.http.messages import Client, Request
from ztunnel.mesh.l7.patterns import BadPattern
from ztunnel.mesh.l7.routes import Backend, NamedMatch, PathKind, RateLimit, RequestMatch, Route, TextKind, TextMatch
from ztunnel.mesh.l7.security import Claims

ANYTHING = RequestMatch()
PRESENT = TextMatch(TextKind.PRESENT)


def taken(table: RouteTable, asked: Request, by: Client | None = None) -> str | None:
    found = table.find(asked, by or client())
    return None if found is None else found.route.name


@pytest.mark.parametrize(
    ("match", "matching", "others"),
    [
        (path("/v2"), ["/v2", "/v2/x", "/v2x", "/v2?q"], ["/v1", "/V2", "/"]),
        (path("/v2", PathKind.SEGMENTS), ["/v2", "/v2/", "/v2/x", "/v2?x=/"], ["/v2x", "/v", "/"]),
        (path("/v2/", PathKind.SEGMENTS), ["/v2", "/v2/", "/v2/x"], ["/v2x"]),
        (path("/", PathKind.SEGMENTS), ["/", "/anything"], []),
        (path("/v2", PathKind.EXACT), ["/v2", "/v2?a=b"], ["/v2/", "/v", "/V2"]),
        (path("/V2", PathKind.EXACT, ignore_case=True), ["/v2", "/V2"], ["/v2/"]),
        (path("/V2", ignore_case=True), ["/v2x", "/V2"], ["/v1"]),
        (path("/v[0-9]+/a.*", PathKind.REGEX), ["/v12/a", "/v1/abc?x"], ["/v1/b", "/x/v1/a", "/v/a"]),
        (path("/a|/b", PathKind.REGEX), ["/a", "/b"], ["/ab", "/a/b"]),
        (path("/a/{*}/c", PathKind.TEMPLATE), ["/a/b/c"], ["/a//c", "/a/b/b/c", "/a/c", "/a/b"]),
        (path("/a/{**}", PathKind.TEMPLATE), ["/a/", "/a/b", "/a/b/c"], ["/a", "/b/"]),
        (path("/a/{**}/z", PathKind.TEMPLATE), ["/a/z", "/a/b/c/z"], ["/a/b", "/a", "/z"]),
        (path("/a/{**}/{*}/z", PathKind.TEMPLATE), ["/a/b/z", "/a/b/c/z"], ["/a/z", "/a//z"]),
    ],
    ids=str,
)
def test_paths(match: RequestMatch, matching: list[str], others: list[str]) -> None:
    table = RouteTable([route("it", match)])
    assert [each for each in matching if taken(table, request(each)) != "it"] == []
    assert [each for each in others if taken(table, request(each)) is not None] == []


@pytest.mark.parametrize(
    ("test", "asked", "holds"),
    [
        (named("x-user", exact("jason")), request(x_user="jason"), True),
        (named("X-User", exact("jason")), request(x_user="jason"), True),
        (named("x-user", exact("jason")), request(x_user="Jason"), False),
        (named("x-user", exact("JASON", ignore_case=True)), request(x_user="Jason"), True),
        (named("x-user", exact("jason")), request(), False),
        (named("x-user", TextMatch(TextKind.PREFIX, "ja")), request(x_user="jason"), True),
        (named("x-user", TextMatch(TextKind.SUFFIX, "son")), request(x_user="jason"), True),
        (named("x-user", TextMatch(TextKind.SUFFIX, "ja")), request(x_user="jason"), False),
        (named("x-user", regex("ja|jason")), request(x_user="jason"), True),
        (named("x-user", regex("ja")), request(x_user="jason"), False),
        (named("x-user", PRESENT), request(x_user=""), True),
        (named("x-user", PRESENT), request(), False),
        (named("x-user", PRESENT, inverted=True), request(x_user="a"), False),
        (named("x-user", PRESENT, inverted=True), request(), True),
        (named("x-user", exact("jason"), inverted=True), request(x_user="jason"), False),
        (named("x-user", exact("jason"), inverted=True), request(x_user="amy"), True),
        # a missing header is the empty text where the match is inverted
        (named("x-user", exact("jason"), inverted=True), request(), True),
        (named("x-user", exact(""), inverted=True), request(), False),
        (named("x-user", exact("")), request(), False),
        (named(":authority", exact("shop")), request(authority="shop"), True),
        (named("host", exact("shop")), request(authority="shop"), True),
        (named(":method", exact("PUT")), request(method="PUT"), True),
        (named(":scheme", exact("http")), request(), True),
        (named(":path", exact("/a?b")), request("/a?b"), True),
        (named(":status", exact("200")), request(), False),
    ],
    ids=str,
)
def test_headers(test: NamedMatch, asked: Request, holds: bool) -> None:
    assert (taken(RouteTable([route("it", RequestMatch(headers=(test,)))]), asked) == "it") is holds


def test_values_of_a_repeated_header_are_joined() -> None:
    asked = request()
    asked.headers = [(b"x-a", b"1"), (b"x-a", b"2")]
    assert taken(RouteTable([route("it", RequestMatch(headers=(named("x-a", exact("1,2")),)))]), asked) == "it"


@pytest.mark.parametrize(
    ("test", "path", "holds"),
    [
        (named("q", exact("1")), "/?q=1", True),
        (named("q", exact("1")), "/?a=2&q=1#x", True),
        (named("q", exact("1")), "/?q=2&q=1", False),  # the first counts
        (named("q", exact("1")), "/", False),
        (named("q", exact("1")), "/?Q=1", False),
        (named("q", PRESENT), "/?q", True),
        (named("q", PRESENT), "/?qq=1", False),
        (named("q", regex("[0-9]+")), "/?q=17", True),
    ],
    ids=str,
)
def test_query(test: NamedMatch, path: str, holds: bool) -> None:
    assert (taken(RouteTable([route("it", RequestMatch(query=(test,)))]), request(path)) == "it") is holds


@pytest.mark.parametrize(
    ("claim", "value", "inverted", "holds"),
    [
        (("group",), {"group": "dev"}, False, True),
        (("group",), {"group": ["ops", "dev"]}, False, True),
        (("group",), {"group": ["ops"]}, False, False),
        (("group",), {"group": 7}, False, False),
        (("a", "b"), {"a": {"b": "dev"}}, False, True),
        (("a", "b"), {"a": "dev"}, False, False),
        (("group",), {"group": "dev"}, True, False),
        (("group",), {}, True, True),
        (("group",), None, False, False),
    ],
)
def test_claims(claim: tuple[str, ...], value: dict[str, object] | None, inverted: bool, holds: bool) -> None:
    asked = request()
    asked.claims = None if value is None else Claims("me", "you", values=value)
    match = RequestMatch(headers=(NamedMatch("", exact("dev"), inverted, claim),))
    assert (taken(RouteTable([route("it", match)]), asked) == "it") is holds


def test_everything_of_a_match_must_hold() -> None:
    match = RequestMatch(method=exact("GET"), port=9080, client_namespaces=("shop", "bank"))
    table = RouteTable([route("it", match)])
    assert taken(table, request(), client("shop")) == "it"
    assert taken(table, request(method="PUT"), client("shop")) is None
    assert taken(table, request(), client("shop", port=80)) is None
    assert taken(table, request(), client("other")) is None


def test_the_first_in_order_wins_whatever_the_index_holds_first() -> None:
    routes = [
        route("header", RequestMatch(headers=(named("x-a", exact("1")),))),
        route("prefix", path("/a")),
        route("exact", path("/a/b", PathKind.EXACT)),
        route("either", path("/x"), path("/y", ignore_case=True)),
        route("rest"),
        route("never", path("/a")),
    ]
    table = RouteTable(routes)
    assert taken(table, request("/a/b", x_a="1")) == "header"
    assert taken(table, request("/a/b")) == "prefix"
    assert taken(table, request("/Y")) == "either"
    assert taken(table, request("/z")) == "rest"
    assert taken(RouteTable(routes[2:]), request("/a/b")) == "exact"
    assert taken(RouteTable([]), request()) is None
    assert taken(RouteTable([route("all"), *routes]), request("/a/b")) == "all"


class Counted(Request):
    """A request that counts how often a header of it is asked for."""

    asked = 0

    def get(self, name: bytes) -> bytes | None:
        self.asked += 1
        return super().get(name)


@pytest.mark.parametrize("kind", ["header", "method", "query", "path"])
def test_a_thousand_routes_are_not_asked_one_by_one(kind: str) -> None:
    def match(number: int) -> RequestMatch:
        test = named("x-v", exact(f"{number}"))
        return {
            "header": RequestMatch(headers=(test, named("x-w", exact("w")))),
            "method": RequestMatch(method=exact(f"M{number}"), headers=(named("x-w", exact("w")),)),
            "query": RequestMatch(query=(test,), headers=(named("x-w", exact("w")),)),
            "path": RequestMatch(path=path(f"/p/{number}", PathKind.SEGMENTS).path, headers=(named("x-w", exact("w")),)),
        }[kind]

    table = RouteTable([*(route(f"{number}", match(number)) for number in range(1000)), route("rest")])
    asked = Counted(b"M777", b"/p/777?x-v=777", b"a", [(b"x-v", b"777"), (b"x-w", b"w")])
    assert taken(table, asked) == "777"
    assert asked.asked < 10
    asked.headers[1] = (b"x-w", b"another")
    assert taken(table, asked) == "rest"


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(BadPattern, match="missing"):
        RouteTable([route("it", path("/(", PathKind.REGEX))])


@pytest.mark.parametrize(
    ("weights", "dice", "chosen"),
    [
        ([90, 10], 0.0, 0), ([90, 10], 0.899, 0), ([90, 10], 0.9, 1), ([90, 10], 0.999, 1),
        ([0, 1], 0.0, 1), ([1, 0], 0.99, 0), ([1], 0.5, 0), ([3, 1, 1], 0.59, 0), ([3, 1, 1], 0.6, 1), ([3, 1, 1], 0.8, 2),
        ([0, 0], 0.5, None), ([0], 0.5, None), ([], 0.5, None),
    ],
)  # fmt: skip
def test_backends_by_weight(weights: list[int], dice: float, chosen: int | None) -> None:
    backends = tuple(Backend(f"{place}", weight) for place, weight in enumerate(weights))
    found = RouteTable([Route("it", backends=backends)]).find(request(), client())
    assert found is not None
    backend = choose_backend(found, lambda: dice)
    assert (None if backend is None else int(backend.cluster)) == chosen


def test_limits_of_a_route_that_stays_go_on_counting() -> None:
    once = RateLimit(1, 60.0, 1)
    limited = Route("it", origin="HTTPRoute/a", rate_limits=(once,))
    table = RouteTable([limited])
    assert admitted(table, "it") == 1
    table = RouteTable([route("other"), limited], table)
    assert admitted(table, "it") == 0
    assert admitted(RouteTable([replace(limited, rate_limits=(RateLimit(2, 60.0, 1),))], table), "it") == 1
    assert admitted(RouteTable([limited], RouteTable([], table)), "it") == 1


def test_limits_of_an_object_are_shared_by_its_routes() -> None:
    shared = RateLimit(1, 60.0, 1, origin="Service default/a")
    one, other = (Route(name, rate_limits=(shared,)) for name in ("one", "other"))
    table = RouteTable(
        [one, other, Route("third", rate_limits=(RateLimit(1, 60.0, 1),)), Route("fourth", rate_limits=(RateLimit(1, 60.0, 1),))]
    )
    assert [admitted(table, name) for name in ("one", "other", "third", "fourth")] == [1, 0, 1, 1]


def admitted(table: RouteTable, name: str) -> int:
    limiter = next(each.limiter for each in table.routes if each.route.name == name)
    assert limiter is not None
    return sum(limiter.take(client(), 0.0) for _ in range(3))
