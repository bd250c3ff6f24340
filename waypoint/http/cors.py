"""Cross-origin requests: preflights that the proxy answers, and what it adds to the application's answers.

Source: Fetch, "CORS protocol"; Envoy `cors_filter.cc`; Istio `unmatchedPreflights`.
"""

from __future__ import annotations

from waypoint.http.messages import Headers, LocalReply, Request
from waypoint.http.texts import TextTest, compile_text
from ztunnel.mesh.l7.routes import Cors, TextKind


class CorsAllowed:
    """A request of an allowed origin: `CompiledCors.decorate` its response."""

    __slots__ = ("origin",)

    def __init__(self, origin: bytes) -> None:
        self.origin = origin


class CompiledCors:
    """One route's policy."""

    __slots__ = ("_credentials", "_expose", "_forward_unmatched", "_headers", "_max_age", "_methods", "_origins")

    def __init__(self, cors: Cors) -> None:
        """
        Raises:
            BadPattern: an origin's regular expression is none.
        """
        self._origins: list[TextTest] = []
        for match in cors.origins:
            if match.kind is TextKind.EXACT and match.value == "*":
                self._origins.append(TextTest())
            else:
                self._origins.append(compile_text(match))
        self._methods = ",".join(cors.methods).encode()
        self._headers = ",".join(cors.headers).encode()
        self._expose = ",".join(cors.expose).encode()
        self._max_age = b"" if cors.max_age is None else str(int(cors.max_age)).encode()
        self._credentials = cors.credentials
        self._forward_unmatched = cors.forward_unmatched_preflights

    def check(self, request: Request) -> LocalReply | CorsAllowed | None:
        """The answer to a preflight, or whether the response is to be decorated. None: no business of CORS."""
        origin = request.get(b"origin")
        if origin is None:
            return None
        allowed = self._allows(origin)
        method = request.get(b"access-control-request-method") if request.method == b"OPTIONS" else None
        if not method:
            return CorsAllowed(origin) if allowed else None
        if not allowed:
            return None if self._forward_unmatched else LocalReply(200, details="cors_response")
        return LocalReply(200, headers=self._preflight(request, origin, method), details="cors_response")

    def decorate(self, headers: Headers, allowed: CorsAllowed) -> None:
        """Adds to a response what tells the browser that the page may read it; what the application said of that goes."""
        names = [b"access-control-allow-origin"]
        made: Headers = [(b"access-control-allow-origin", allowed.origin)]
        if self._credentials:
            names.append(b"access-control-allow-credentials")
            made.append((b"access-control-allow-credentials", b"true"))
        if self._expose:
            names.append(b"access-control-expose-headers")
            made.append((b"access-control-expose-headers", self._expose))
        headers[:] = [line for line in headers if line[0] not in names]
        headers += made

    def _allows(self, origin: bytes) -> bool:
        for test in self._origins:  # noqa: SIM110 - a generator costs more than the test
            if test.holds(origin):
                return True
        return False

    def _preflight(self, request: Request, origin: bytes, method: bytes) -> Headers:
        headers: Headers = [(b"access-control-allow-origin", origin)]
        if self._credentials:
            headers.append((b"access-control-allow-credentials", b"true"))
        methods = method if self._methods == b"*" else self._methods
        if methods:
            headers.append((b"access-control-allow-methods", methods))
        asked = self._headers
        if asked == b"*":
            asked = request.get(b"access-control-request-headers") or b""
        if asked:
            headers.append((b"access-control-allow-headers", asked))
        if self._max_age:
            headers.append((b"access-control-max-age", self._max_age))
        return headers
