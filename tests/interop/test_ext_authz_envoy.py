"""Envoy as the oracle of external authorization: what it asks of an authorizer, and what it makes of the answer, beside what we do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from tests.kit import envoy
from waypoint.http.ext_authz import Allowed, Authorizer
from waypoint.http.messages import Client, Headers, LocalReply, Request
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider

_HTTP = "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
_ROUTER = "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
_AUTHZ = "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthz"


def exact(*names: str) -> tuple[TextMatch, ...]:
    return tuple(TextMatch(TextKind.EXACT, name, ignore_case=True) for name in names)


PROVIDER = ExtensionProvider(
    "opa",
    AuthorizerKind.HTTP,
    "authz",
    path_prefix="/check",
    status_on_error=503,
    include_headers=exact("x-token"),
    headers_upstream=exact("x-user"),
    headers_downstream_deny=exact("x-why"),
    headers_downstream_allow=exact("x-down"),
    body_bytes=8,
    body_partial=True,
)


def patterns(*names: str) -> envoy.Json:
    return {"patterns": [{"exact": name, "ignore_case": True} for name in names]}


def config(port: int) -> envoy.Json:
    """As Istio writes `PROVIDER`. The route says in a header which user the application would see."""
    authz = {
        "@type": _AUTHZ,
        "transport_api_version": "V3",
        "status_on_error": {"code": "ServiceUnavailable"},
        "with_request_body": {"max_request_bytes": 8, "allow_partial_message": True},
        "allowed_headers": patterns("x-token"),
        "http_service": {
            "server_uri": {"uri": "http://authz", "cluster": "authz", "timeout": "30s"},
            "path_prefix": "/check",
            "authorization_response": {
                "allowed_upstream_headers": patterns("x-user"),
                "allowed_client_headers": patterns("x-why"),
                "allowed_client_headers_on_success": patterns("x-down"),
            },
        },
    }
    route = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 200},
        "response_headers_to_add": [{"header": {"key": "x-seen", "value": "%REQ(X-USER)%"}}],
    }
    manager = {
        "@type": _HTTP,
        "stat_prefix": "in",
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [{"name": "authz", "typed_config": authz}, {"name": "router", "typed_config": {"@type": _ROUTER}}],
    }
    endpoint = {"endpoint": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": port}}}}
    cluster = {
        "name": "authz",
        "type": "STATIC",
        "connect_timeout": "30s",
        "load_assignment": {"cluster_name": "authz", "endpoints": [{"lb_endpoints": [endpoint]}]},
    }
    listener = {
        "name": "in",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener], "clusters": [cluster]}}


@dataclass(slots=True)
class Judge:
    """An authorizer: answers each connection's one request with `answer`, and keeps what it was asked."""

    answer: bytes = b""
    asked: list[bytes] = field(default_factory=list)

    def serve(self, server: socket.socket) -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:  # the fixture has shut the listener down
                return
            with connection:
                connection.settimeout(30)
                data = b""
                while not is_whole(data) and (piece := connection.recv(65536)):
                    data += piece
                if data:
                    self.asked.append(data)
                    connection.sendall(self.answer)


def headers_of(message: bytes) -> dict[bytes, bytes]:
    lines = message.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return {line.partition(b": ")[0].lower(): line.partition(b": ")[2] for line in lines}


def is_whole(message: bytes) -> bool:
    _, mark, body = message.partition(b"\r\n\r\n")
    return bool(mark) and len(body) >= int(headers_of(message).get(b"content-length", b"0"))


@dataclass(frozen=True, slots=True)
class Oracle:
    """A running Envoy in front of a judge."""

    judge: Judge
    port: int

    def ask(self, answer: bytes, request: bytes) -> bytes:
        """What a client gets when the authorizer says this."""
        self.judge.answer = answer
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(request)
            got = b""
            while not is_whole(got) and (data := connection.recv(65536)):
                got += data
        return got


@pytest.fixture(scope="module", name="oracle")
def fixture_oracle() -> Iterator[Oracle]:
    judge = Judge()
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=judge.serve, args=(server,), daemon=True)
        thread.start()
        with envoy.running(config(server.getsockname()[1])) as running:
            yield Oracle(judge, running.port("in"))
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)


BODY = b"0123456789"
LINES: Headers = [(b"authorization", b"Bearer x"), (b"x-token", b"t"), (b"x-user", b"forged"), (b"x-other", b"o")]
CLIENT = Client(None, "127.0.0.1")


def request() -> Request:
    return Request(b"POST", b"/a?b=c", b"shop.example", [*LINES, (b"content-length", b"10")])


def wire() -> bytes:
    lines = [b"POST /a?b=c HTTP/1.1", b"host: shop.example", b"content-length: 10", *(name + b": " + value for name, value in LINES)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + BODY


def test_what_an_authorizer_is_asked(oracle: Oracle) -> None:
    oracle.judge.asked.clear()
    oracle.ask(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n", wire())
    (theirs,) = oracle.judge.asked
    ours, body = Authorizer(PROVIDER).question(request(), CLIENT, BODY[:8], partial=True)
    head, _, their_body = theirs.partition(b"\r\n\r\n")
    method, path, _ = head.split(b"\r\n")[0].split(b" ")
    their_headers = headers_of(theirs)
    assert (ours.method, ours.path, ours.authority, body) == (method, path, their_headers[b"host"], their_body)
    of_envoy = {b"host", b"x-request-id", b"x-forwarded-proto", b"x-forwarded-for", b"x-envoy-internal", b"x-envoy-expected-rq-timeout-ms"}
    assert {name: value for name, value in their_headers.items() if name not in of_envoy} == dict(ours.headers)


ANSWERS = [
    b"HTTP/1.1 200 OK\r\nx-user: alice\r\nx-down: 1\r\nx-why: w\r\ncontent-length: 0\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n",
    b"HTTP/1.1 401 Unauthorized\r\nwww-authenticate: Basic\r\nx-why: because\r\nx-down: 1\r\nx-secret: s\r\ncontent-length: 2\r\n",
    b"HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n",
    b"HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 2\r\n",
    b"HTTP/1.1 500 Oops\r\nx-why: broken\r\ncontent-length: 2\r\n",
    b"HTTP/1.1 204 No Content\r\nx-why: n\r\n",
]


@pytest.mark.parametrize("head", ANSWERS, ids=lambda head: head.split(b"\r\n")[0].decode())
def test_what_an_answer_means(oracle: Oracle, head: bytes) -> None:
    body = b"no" if b"content-length: 2" in head else b""
    got = oracle.ask(head + b"connection: close\r\n\r\n" + body, wire())
    status, theirs = int(got.split()[1]), headers_of(got)
    said = headers_of(head)
    listed = [(name, value) for name, value in said.items() if name]
    verdict = Authorizer(PROVIDER).verdict(int(head.split()[1]), listed, body, [])
    watched = (b"x-why", b"x-down", b"x-secret", b"location", b"www-authenticate")
    if isinstance(verdict, Allowed):
        asked = request()
        verdict.apply(asked)
        answer: Headers = []
        verdict.decorate(answer)
        assert (status, theirs[b"x-seen"]) == (200, asked.get(b"x-user"))
        ours = dict(answer)
    else:
        assert isinstance(verdict, LocalReply)
        assert (verdict.status, verdict.body) == (status, got.partition(b"\r\n\r\n")[2])
        ours = dict(verdict.headers)
    assert {name: ours[name] for name in watched if name in ours} == {name: theirs[name] for name in watched if name in theirs}
