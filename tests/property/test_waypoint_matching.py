"""The table of routes against a plain scan in order, for routes of every kind mixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tests.kit.l7 import client, exact, named, regex, request
from waypoint.http.conditions import CompiledMatch
from waypoint.http.matching import RouteTable
from waypoint.http.messages import Client, Request
from ztunnel.mesh.l7.routes import NamedMatch, PathKind, PathMatch, RequestMatch, Route, TextKind, TextMatch

TEXTS = st.sampled_from(["a", "b", "A", "ab", ""])
PATHS = st.lists(st.sampled_from(["a", "b", "A", "ab", ""]), max_size=3).map(lambda parts: "/" + "/".join(parts))
PATTERNS = st.sampled_from(["/a.*", "/(a|b)", ".*b", "(?i)/A", "/a|/b/a", "/a/[ab]+", ""])
TEMPLATES = st.sampled_from(["/{*}", "/a/{**}", "/{**}", "/{*}/a", "/a/{*}/b"])


@st.composite
def path_matches(draw: st.DrawFn) -> PathMatch:
    kind = draw(st.sampled_from(PathKind))
    values = {PathKind.REGEX: PATTERNS, PathKind.TEMPLATE: TEMPLATES}.get(kind, PATHS)
    return PathMatch(kind, draw(values), kind is not PathKind.REGEX and draw(st.booleans()))


@st.composite
def text_matches(draw: st.DrawFn) -> TextMatch:
    kind = draw(st.sampled_from([*TextKind, TextKind.EXACT, TextKind.EXACT, TextKind.EXACT]))
    if kind is TextKind.REGEX:
        return regex(draw(st.sampled_from(["a|b", ".*", "A+"])))
    return replace(exact(draw(TEXTS), ignore_case=draw(st.booleans())), kind=kind)


NAMED: st.SearchStrategy[NamedMatch] = st.builds(
    lambda name, match, inverted: named(name, match, inverted=inverted), st.sampled_from(["x", "y"]), text_matches(), st.booleans()
)
MATCHES = st.builds(
    RequestMatch,
    path=st.none() | path_matches(),
    method=st.none() | st.sampled_from([exact("GET"), exact("PUT")]),
    headers=st.lists(NAMED, max_size=2).map(tuple),
    query=st.lists(NAMED, max_size=1).map(tuple),
    port=st.sampled_from([0, 0, 80, 9080]),
)
ROUTES = st.lists(st.lists(MATCHES, max_size=3).map(tuple), max_size=24)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    query = draw(st.sampled_from(["", "?x=a", "?y=b&x=A", "?x"]))
    headers = {name: draw(TEXTS) for name in draw(st.sets(st.sampled_from(["x", "y"])))}
    return request(draw(PATHS) + query, draw(st.sampled_from(["GET", "PUT"])), **headers)


def scan(routes: Sequence[Route], asked: Request, by: Client) -> tuple[str, RequestMatch | None] | None:
    for route in routes:
        for match in route.matches or (None,):
            if CompiledMatch(match or RequestMatch(), 0).holds(asked, by, asked.path.partition(b"?")[0]):
                return route.name, match
    return None


@given(ROUTES, st.lists(requests(), min_size=1, max_size=5))
def test_a_table_finds_what_a_scan_finds(matches: list[tuple[RequestMatch, ...]], asked: list[Request]) -> None:
    routes = [Route(f"{place}", matches=each) for place, each in enumerate(matches)]
    table = RouteTable(routes)
    by = client()
    for each in asked:
        found = table.find(each, by)
        assert (None if found is None else (found.route.name, found.match)) == scan(routes, each, by)
