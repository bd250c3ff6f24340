"""One `RequestMatch`, compiled: the AND of what a request's path, method, headers, query, claims and sender must be."""

from __future__ import annotations

from waypoint.http.messages import Client, Request
from waypoint.http.path_tests import compile_path
from waypoint.http.texts import TextTest, compile_text
from ztunnel.mesh.l7.routes import NamedMatch, RequestMatch, TextKind


class NamedTest:
    """A condition on a header or query parameter, or on a claim. `exact` not None: it holds for that value only."""

    def __init__(self, match: NamedMatch) -> None:
        self.name = match.name.lower().encode()
        self.claim = match.claim
        self.inverted = match.inverted
        self.only_present = match.match.kind is TextKind.PRESENT
        self.test: TextTest = compile_text(match.match)
        exact = match.match.kind is TextKind.EXACT and not match.match.ignore_case and not match.inverted and not match.claim
        self.exact = match.match.value.encode() if exact else None

    def holds(self, value: bytes | None) -> bool:
        """Of a header's or parameter's value; None where there is none."""
        if value is None:
            # Envoy's treat_missing_header_as_empty goes with the inverted form alone
            return self.inverted and (self.only_present or not self.test.holds(b""))
        return self.test.holds(value) is not self.inverted

    def holds_for_claim(self, request: Request) -> bool:
        """Of the claim of the request's verified token: a text, or one of a list of texts."""
        value: object = None if request.claims is None else request.claims.values
        for key in self.claim:
            value = value.get(key) if isinstance(value, dict) else None
        texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
        found = False
        for text in texts:
            if isinstance(text, str) and self.test.holds(text.encode()):
                found = True
                break
        return found is not self.inverted


class CompiledMatch:
    """A `RequestMatch`, ready. `order`: its place among all matches of a table."""

    def __init__(self, match: RequestMatch, order: int) -> None:
        """
        Raises:
            BadPattern: one of its regular expressions is none.
        """
        self.order = order
        self.path = compile_path(match.path)
        self.any_path = match.path is None
        self.method = None if match.method is None else NamedTest(NamedMatch(":method", match.method))
        named = [NamedTest(each) for each in match.headers]
        self.headers = [test for test in named if not test.claim]
        self.claims = [test for test in named if test.claim]
        self.query = [_parameter(each) for each in match.query]
        self.port = match.port
        self.namespaces = frozenset(match.client_namespaces)

    @property
    def always(self) -> bool:
        """Whether every request is meant."""
        return self.any_path and self.method is None and not (self.headers or self.claims or self.query or self.port or self.namespaces)

    def holds(self, request: Request, client: Client, path: bytes) -> bool:
        """
        Args:
            path: without its query, as it came.
        """
        if not self.any_path:
            test = self.path
            if not test.holds(path.lower() if test.any_case else path):
                return False
        if self.method is not None and not self.method.holds(request.method):
            return False
        for named in self.headers:
            if not named.holds(value_of(request, named.name)):
                return False
        if self.port and self.port != client.service_port:
            return False
        if self.namespaces and client.namespace not in self.namespaces:
            return False
        for parameter in self.query:
            if not parameter.holds(parameter_of(request.path, parameter.name)):
                return False
        for claim in self.claims:  # noqa: SIM110 - compiled, a loop is cheaper than a generator
            if not claim.holds_for_claim(request):
                return False
        return True


def _parameter(match: NamedMatch) -> NamedTest:
    test = NamedTest(match)
    test.name = match.name.encode()  # unlike a header's, its case counts
    return test


def value_of(request: Request, name: bytes) -> bytes | None:
    """A header's value, pseudo-headers and Host included."""
    if name.startswith(b":"):
        if name == b":authority":
            return request.authority
        if name == b":method":
            return request.method
        if name == b":path":
            return request.path
        return request.scheme if name == b":scheme" else None
    if name == b"host":
        return request.authority
    return request.get(name)


def parameter_of(path: bytes, name: bytes) -> bytes | None:
    """The first value of a query parameter as it stands in the path (Envoy decodes none of it); None without one."""
    at = path.find(b"?")
    if at < 0:
        return None
    for pair in path[at + 1 :].partition(b"#")[0].split(b"&"):
        key, _, value = pair.partition(b"=")
        if key == name:
            return value
    return None
