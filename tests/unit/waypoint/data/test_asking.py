"""CUSTOM policies in the data path: requests wait for their authorizers, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.kit.http2 import H2End
from tests.kit.waypoint import App, LoopbackWaypoint
from ztunnel.mesh.l7.clusters import UpstreamHttp
from ztunnel.mesh.l7.config import ServedService
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import AuthorizerKind, ExtensionProvider, L7Action, L7Policy, L7Rule, Operation
from ztunnel.rpc.protobuf import bytes_field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET /path?q=1 HTTP/1.1\r\nHost: app.example\r\nX-Token: t\r\nConnection: close\r\n\r\n"
PROVIDER = ExtensionProvider(
    "opa",
    AuthorizerKind.HTTP,
    "authz",
    path_prefix="/check",
    include_headers=(TextMatch(TextKind.EXACT, "x-token"),),
    headers_upstream=(TextMatch(TextKind.EXACT, "x-user"),),
    headers_downstream_allow=(TextMatch(TextKind.EXACT, "x-down"),),
)
POLICY = L7Policy("ask", "default", L7Action.CUSTOM, (L7Rule(),), (L7Rule(),), provider="opa")


class Guarded:
    """A waypoint in front of one application and one authorizer."""

    def __init__(self, waypoint: LoopbackWaypoint) -> None:
        self.waypoint = waypoint
        self.app = waypoint.app().answers(OK)
        self.authorizer = waypoint.app()
        waypoint.cluster(waypoint.endpoint(self.app))
        waypoint.cluster(waypoint.endpoint(self.authorizer), key="authz")

    def serve(self, answer: bytes, policy: L7Policy = POLICY, provider: dict[str, object] | None = None) -> App:
        self.authorizer.answers(answer)
        self.waypoint.serve()
        services: tuple[ServedService, ...] = tuple(replace(each, policies=(policy.key,)) for each in self.waypoint.config.services)
        asked = replace(PROVIDER, **(provider or {}))  # type: ignore[arg-type]  # a test's keywords
        self.waypoint.update(services=services, policies={policy.key: policy}, providers={"opa": asked})
        return self.authorizer


@pytest.fixture(name="guarded")
def fixture_guarded() -> Iterator[Guarded]:
    waypoint = LoopbackWaypoint()
    yield Guarded(waypoint)
    waypoint.close()


def test_an_allowed_request_goes_on_with_what_the_authorizer_added(guarded: Guarded) -> None:
    authorizer = guarded.serve(b"HTTP/1.1 200 OK\r\nX-User: alice\r\nX-Down: 1\r\nContent-Length: 0\r\n\r\n")
    answer = guarded.waypoint.ask(GET)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"\r\nx-down: 1\r\n" in answer
    (asked,) = authorizer.heads
    assert asked.startswith(b"GET /check/path?q=1 HTTP/1.1\r\n")
    assert b"\r\nhost: app.example" in asked
    assert b"\r\nx-token: t" in asked
    (head,) = guarded.app.heads
    assert b"\r\nx-user: alice" in head


def test_a_denied_request_goes_nowhere(guarded: Guarded) -> None:
    guarded.serve(b"HTTP/1.1 401 Unauthorized\r\nX-Why: because\r\nContent-Length: 2\r\n\r\nno")
    answer = guarded.waypoint.ask(GET)
    assert answer.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nx-why: because\r\n" in answer
    assert answer.endswith(b"\r\n\r\nno")
    assert guarded.app.heads == []


@pytest.mark.parametrize(
    ("provider", "status"),
    [({}, b"403"), ({"status_on_error": 503}, b"503"), ({"fail_open": True}, b"200"), ({"cluster": "gone"}, b"403")],
)
def test_an_authorizer_that_fails(guarded: Guarded, provider: dict[str, object], status: bytes) -> None:
    guarded.serve(b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n", provider=provider)
    assert guarded.waypoint.ask(GET).startswith(b"HTTP/1.1 " + status)


def test_an_authorizer_that_does_not_answer_in_time(guarded: Guarded) -> None:
    authorizer = guarded.serve(b"", provider={"timeout": 0.1})
    assert guarded.waypoint.ask(GET).startswith(b"HTTP/1.1 403 ")
    assert len(authorizer.heads) == 1


def test_an_answer_without_end_is_an_error(guarded: Guarded) -> None:
    guarded.serve(b"HTTP/1.1 200 OK\r\nContent-Length: 9999999\r\n\r\n" + b"x" * (300 << 10))
    assert guarded.waypoint.ask(GET).startswith(b"HTTP/1.1 403 ")


def test_without_a_provider_the_request_is_denied(guarded: Guarded) -> None:
    guarded.serve(OK, replace(POLICY, provider="none"))
    assert guarded.waypoint.ask(GET).startswith(b"HTTP/1.1 403 ")
    assert guarded.app.heads == []


def test_requests_that_no_custom_policy_matches_are_not_asked_about(guarded: Guarded) -> None:
    rule = L7Rule(operations=(Operation(methods=(TextMatch(TextKind.EXACT, "PUT"),)),))
    authorizer = guarded.serve(b"", replace(POLICY, rules=(rule,)))
    assert guarded.waypoint.ask(GET).startswith(b"HTTP/1.1 200 ")
    assert authorizer.heads == []


@pytest.mark.parametrize(
    ("provider", "status", "asked"),
    [
        ({"body_bytes": 10}, b"200", b"abcdef"),
        ({"body_bytes": 4, "body_partial": True}, b"200", b"abcd"),
        ({"body_bytes": 4}, b"413", b""),
    ],
)
def test_a_body_that_the_authorizer_wants_to_see(guarded: Guarded, provider: dict[str, object], status: bytes, asked: bytes) -> None:
    authorizer = guarded.serve(b"", provider=provider)
    seen: list[bytes] = []

    def judge(end: object) -> None:
        data = bytes(authorizer.connections[0].data)
        _, mark, body = data.partition(b"\r\n\r\n")
        if mark and len(body) == len(asked):
            seen.append(body)
            authorizer.connections[0].send(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    authorizer.on_data = judge
    client = guarded.waypoint.client()
    client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 6\r\nConnection: close\r\n\r\nabc")
    guarded.waypoint.turn()
    client.send(b"def")
    guarded.waypoint.run_until(lambda: client.is_over)
    assert bytes(client.data).startswith(b"HTTP/1.1 " + status)
    assert seen == ([asked] if asked else [])


def test_a_client_that_leaves_meanwhile(guarded: Guarded) -> None:
    authorizer = guarded.serve(b"")
    client = guarded.waypoint.client()
    client.send(GET)
    guarded.waypoint.run_until(lambda: authorizer.heads)
    client.close()
    guarded.waypoint.run_until(lambda: not guarded.waypoint.proxy.connections.http)


def test_an_authorizer_that_speaks_grpc(guarded: Guarded) -> None:
    waypoint, authorizer = guarded.waypoint, guarded.authorizer
    waypoint.cluster(waypoint.endpoint(authorizer), key="authz", http=UpstreamHttp.HTTP2)
    guarded.serve(b"", provider={"kind": AuthorizerKind.GRPC, "authority": "authz.shop"})
    authorizer.on_data = lambda _end: None
    client = waypoint.client()
    client.send(GET)
    waypoint.run_until(lambda: authorizer.connections)
    server = H2End(authorizer.connections[0], client=False)
    waypoint.run_until(lambda: 1 in server.ended)
    head = dict(server.heads[1])
    assert (head[b":path"], head[b":authority"]) == (b"/envoy.service.auth.v3.Authorization/Check", b"authz.shop")
    assert b"/path?q=1" in server.data[1]
    user = bytes_field(1, bytes_field(1, "x-user") + bytes_field(2, "alice"))
    message = bytes_field(3, bytes_field(2, user))
    server.respond(1, (b"content-type", b"application/grpc"))
    server.send(1, b"\0" + len(message).to_bytes(4, "big") + message)
    server.end_with(1, (b"grpc-status", b"0"))
    waypoint.run_until(lambda: client.is_over)
    assert bytes(client.data).startswith(b"HTTP/1.1 200 OK\r\n")
    (head_at_app,) = guarded.app.heads
    assert b"\r\nx-user: alice" in head_at_app
