"""Requests through a waypoint, from a mesh client's tunnel to an endpoint, over real TLS and sockets."""

from __future__ import annotations

import pytest

from tests.kit.waypoint import CLUSTER, LoopbackWaypoint
from ztunnel.mesh.l7.routes import Backend, PathKind, PathMatch, RequestMatch, Rewrite, Route

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET /path?q=1 HTTP/1.1\r\nHost: app.example\r\nUser-Agent: test\r\n\r\n"


@pytest.mark.parametrize("hbone", [True, False], ids=["hbone", "plain"])
def test_a_request_and_its_answer(waypoint: LoopbackWaypoint, hbone: bool) -> None:
    app = waypoint.app(hbone=hbone).answers(OK)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve()
    client = waypoint.client()
    client.send(GET)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    head, _, body = client.take().partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 200 OK"
    assert b"server: istio-envoy" in lines
    assert body == b"hello"
    (asked,) = app.heads
    lines = asked.split(b"\r\n")
    assert lines[0] == b"GET /path?q=1 HTTP/1.1"
    assert b"host: app.example" in lines
    assert b"user-agent: test" in lines
    assert b"x-forwarded-proto: http" in lines
    assert any(line.startswith(b"x-request-id: ") for line in lines)
    if hbone:
        assert app.authorities == [f"{app.address[0]}:8080"]
    client.send(GET)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert len(app.connections) == 1
    assert len(app.heads) == 2


@pytest.mark.parametrize(
    ("path", "forwarded"), [(b"/api../secret", b""), (b"/api../?q", b""), (b"/api..x", b"/v1/..x"), (b"/api.", b"/v1/.")]
)
def test_a_rewrite_makes_no_way_out_of_the_place_it_leads_to(waypoint: LoopbackWaypoint, path: bytes, forwarded: bytes) -> None:
    app = waypoint.app().answers(OK)
    waypoint.cluster(waypoint.endpoint(app))
    match = RequestMatch(path=PathMatch(PathKind.PREFIX, "/api"))
    waypoint.serve(Route("r", matches=(match,), rewrite=Rewrite(prefix="/v1/"), backends=(Backend(CLUSTER),)))
    answer = waypoint.ask(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200" if forwarded else b"HTTP/1.1 400")
    assert [head.split(b" ")[1] for head in app.heads] == ([forwarded] if forwarded else [])
