"""Which route a request takes: the first in order whose match holds, found without asking them all.

Matches are indexed by their path (exact, or by what every matching path begins with), and where many share a path by the header, method or
parameter that most of them compare exactly. What the index leaves is asked in order, so the result is that of a plain scan
(tests/property/test_waypoint_matching.py), and 1,000 routes cost about what ten cost.

A table is made for each list of routes of a configuration by `RouteTable(routes, previous)`: rate limits that stay go on counting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from waypoint.http.conditions import CompiledMatch, NamedTest, parameter_of, value_of
from waypoint.http.cors import CompiledCors
from waypoint.http.editing import CompiledEdits, CompiledRewrite
from waypoint.http.messages import Client, Request
from waypoint.http.rate_limit import LimitAtWork, Limiter
from waypoint.http.redirects import CompiledRedirect
from waypoint.http.retry import CompiledRetry
from ztunnel.mesh.l7.routes import Backend, PathMatch, RateLimit, RequestMatch, Route

_SCANNED = 4
"""So many matches are asked one after the other; more are indexed."""


class CompiledBackend:
    """A `Backend`, ready."""

    __slots__ = ("authority", "cluster", "request", "response", "status", "until")

    def __init__(self, backend: Backend, until: int) -> None:
        self.cluster = backend.cluster
        self.status = backend.status
        self.authority = backend.authority.encode()
        self.request = CompiledEdits(backend.request)
        self.response = CompiledEdits(backend.response)
        self.until = until
        """Sum of the weights up to and with this one."""


class CompiledRoute:
    """A `Route`, ready. What needs no preparation is in `route`."""

    __slots__ = ("backends", "cors", "limiter", "request", "response", "retry", "route", "weights")

    def __init__(self, route: Route, limiter: Limiter | None = None) -> None:
        """
        Raises:
            BadPattern: one of its regular expressions is none.
        """
        self.route = route
        self.request = CompiledEdits(route.request)
        self.response = CompiledEdits(route.response)
        self.cors = None if route.cors is None else CompiledCors(route.cors)
        self.retry = CompiledRetry(route.retry)
        self.limiter = limiter
        self.backends: list[CompiledBackend] = []
        self.weights = 0
        for backend in route.backends:
            if backend.weight > 0:
                self.weights += backend.weight
                self.backends.append(CompiledBackend(backend, self.weights))


class Found:
    """A route and how the request came to it: made once for each match, so finding one makes nothing."""

    __slots__ = ("compiled", "match", "redirect", "rewrite", "route")

    def __init__(self, compiled: CompiledRoute, match: RequestMatch | None) -> None:
        route = compiled.route
        path: PathMatch | None = None if match is None else match.path
        self.route = route
        self.compiled = compiled
        self.match = match
        """None: the route has no matches and takes everything."""
        self.rewrite = None if route.rewrite is None else CompiledRewrite(route.rewrite, path)
        self.redirect = None if route.redirect is None else CompiledRedirect(route.redirect, path)


def choose_backend(found: Found, dice: Callable[[], float]) -> CompiledBackend | None:
    """Where this request goes, by weight: once, all its tries go there. None: no backend, or weights of 0 only (500).

    Args:
        dice: uniform in [0, 1).
    """
    backends = found.compiled.backends
    if len(backends) <= 1:
        return backends[0] if backends else None
    point = int(dice() * found.compiled.weights)
    low, high = 0, len(backends) - 1
    while low < high:
        middle = (low + high) // 2
        if point < backends[middle].until:
            high = middle
        else:
            low = middle + 1
    return backends[low]


class RouteTable:
    """The routes of one port or virtual host, in the order in which they win."""

    __slots__ = (
        "_always",
        "_end",
        "_exact",
        "_exact_lower",
        "_founds",
        "_lengths",
        "_lengths_lower",
        "_starts",
        "_starts_lower",
        "limits",
        "routes",
    )

    def __init__(self, routes: Sequence[Route], previous: RouteTable | None = None) -> None:
        """
        Args:
            previous: the table that this one replaces.
        Raises:
            BadPattern: a regular expression is none (`derive` refuses such routes with their objects' names).
        """
        before = {} if previous is None else previous.limits
        self.limits: dict[tuple[str, RateLimit], LimitAtWork] = {}
        """By whose they are: of an object, or of one route."""
        self.routes: list[CompiledRoute] = []
        self._founds: list[Found] = []
        matches: list[CompiledMatch] = []
        for route in routes:
            limits: list[LimitAtWork] = []
            for limit in route.rate_limits:
                whose = (limit.origin or f"{route.origin}/{route.name}", limit)
                if whose not in self.limits:
                    self.limits[whose] = before.get(whose) or LimitAtWork(limit)
                if self.limits[whose] not in limits:
                    limits.append(self.limits[whose])
            compiled = CompiledRoute(route, Limiter(limits) if limits else None)
            self.routes.append(compiled)
            for match in route.matches or (None,):
                matches.append(CompiledMatch(match or RequestMatch(), len(matches)))
                self._founds.append(Found(compiled, match))
        self._end = len(matches)
        self._always: Found | None = self._founds[0] if matches and matches[0].always else None
        self._exact = _by_text([each for each in matches if each.path.exact is not None and not each.path.any_case])
        self._exact_lower = _by_text([each for each in matches if each.path.exact is not None and each.path.any_case])
        self._starts = _by_text([each for each in matches if each.path.exact is None and not each.path.any_case])
        self._starts_lower = _by_text([each for each in matches if each.path.exact is None and each.path.any_case])
        self._lengths = sorted({len(start) for start in self._starts})
        self._lengths_lower = sorted({len(start) for start in self._starts_lower})

    def find(self, request: Request, client: Client) -> Found | None:
        """The request's route; None without one (404, flag NR)."""
        if self._always is not None:
            return self._always
        path = request.path
        at = path.find(b"?")
        if at >= 0:
            path = path[:at]
        best = _look(self._exact, self._starts, self._lengths, request, client, path, path, self._end)
        if self._exact_lower or self._starts_lower:
            best = _look(self._exact_lower, self._starts_lower, self._lengths_lower, request, client, path, path.lower(), best)
        return None if best == self._end else self._founds[best]


def _look(  # noqa: PLR0913 - the hottest function here: arguments are cheaper than an object
    exact: dict[bytes, _Node],
    starts: dict[bytes, _Node],
    lengths: list[int],
    request: Request,
    client: Client,
    path: bytes,
    key: bytes,
    best: int,
) -> int:
    node = exact.get(key)
    if node is not None:
        best = node.first_of(request, client, path, best)
    size = len(key)
    for length in lengths:
        if length > size:
            break
        node = starts.get(key[:length])
        if node is not None:
            best = node.first_of(request, client, path, best)
    return best


def _by_text(matches: list[CompiledMatch]) -> dict[bytes, _Node]:
    groups: dict[bytes, list[CompiledMatch]] = {}
    for match in matches:
        key = match.path.start if match.path.exact is None else match.path.exact
        groups.setdefault(key, []).append(match)
    return {key: _Node(group, frozenset()) for key, group in groups.items()}


_Key = tuple[int, bytes]
"""What a node is split by: (1 a header, 2 a parameter; its name). The method is the header `:method`."""


class _Node:
    """Matches that share a path, in order; many are split by the values of one header or parameter."""

    __slots__ = ("_by", "_name", "_rest", "_scanned", "_values", "first")

    def __init__(self, matches: list[CompiledMatch], used: frozenset[_Key]) -> None:
        self.first = matches[0].order
        self._scanned = matches
        self._rest: _Node | None = None
        self._values: dict[bytes, _Node] = {}
        self._by = 0
        self._name = b""
        if len(matches) <= _SCANNED:
            return
        key = _best_key(matches, used)
        if key is None:
            return
        self._by, self._name = key
        groups: dict[bytes, list[CompiledMatch]] = {}
        rest: list[CompiledMatch] = []
        for match in matches:
            value = _exact_value(match, key)
            if value is None:
                rest.append(match)
            else:
                groups.setdefault(value, []).append(match)
        used |= {key}
        self._scanned = []
        self._values = {value: _Node(group, used) for value, group in groups.items()}
        self._rest = _Node(rest, used) if rest else None

    def first_of(self, request: Request, client: Client, path: bytes, best: int) -> int:
        """The least order below `best` of a match here that holds, or `best`."""
        if self.first >= best:
            return best
        if self._by:
            value = value_of(request, self._name) if self._by == 1 else parameter_of(request.path, self._name)
            if value is not None:
                node = self._values.get(value)
                if node is not None:
                    best = node.first_of(request, client, path, best)
            return best if self._rest is None else self._rest.first_of(request, client, path, best)
        for match in self._scanned:
            if match.order >= best:
                break
            if match.holds(request, client, path):
                return match.order
        return best


def _tests(match: CompiledMatch) -> list[tuple[_Key, NamedTest]]:
    tests: list[tuple[_Key, NamedTest]] = [((1, test.name), test) for test in match.headers]
    tests += [((2, test.name), test) for test in match.query]
    if match.method is not None:
        tests.append(((1, b":method"), match.method))
    return tests


def _exact_value(match: CompiledMatch, key: _Key) -> bytes | None:
    for each, test in _tests(match):
        if each == key and test.exact is not None:
            return test.exact
    return None


def _best_key(matches: list[CompiledMatch], used: frozenset[_Key]) -> _Key | None:
    """What is compared with the most different values; None where nothing is with two."""
    values: dict[_Key, set[bytes]] = {}
    for match in matches:
        for key, test in _tests(match):
            if test.exact is not None and key not in used:
                values.setdefault(key, set()).add(test.exact)
    if not values:
        return None
    key = max(values, key=lambda each: len(values[each]))
    return key if len(values[key]) > 1 else None
