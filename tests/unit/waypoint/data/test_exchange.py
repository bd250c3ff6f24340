"""What happens to a request between its client and its endpoint: tries, times, faults, copies, limits, TLS."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.waypoint import CLUSTER, App, Bytes, LoopbackWaypoint
from waypoint.data.mirrors import Copy
from ztunnel.mesh.l7.clusters import Outlier, PoolLimits
from ztunnel.mesh.l7.routes import (
    Backend,
    Cors,
    DirectResponse,
    Fault,
    HeaderEdits,
    Mirror,
    PathKind,
    PathMatch,
    RateLimit,
    Redirect,
    RequestMatch,
    Retry,
    RetryOn,
    Rewrite,
    Route,
    TextKind,
    TextMatch,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
BUSY = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy"
ROUTE = Route("r", backends=(Backend(CLUSTER),))


def get(path: bytes = b"/", *lines: bytes, method: bytes = b"GET") -> bytes:
    return b"\r\n".join([method + b" " + path + b" HTTP/1.1", b"Host: app", *lines, b"", b""])


def answer(waypoint: LoopbackWaypoint, request: bytes = get()) -> bytes:
    """The answer to a request, on a connection of its own that is kept open."""
    client = waypoint.client()
    client.send(request)
    waypoint.run_until(lambda: complete(client) or client.is_over)
    return client.take()


def complete(client: Bytes) -> bool:
    head, found, body = bytes(client.data).partition(b"\r\n\r\n")
    if not found:
        return False
    for line in head.split(b"\r\n"):
        if line.startswith(b"content-length: "):
            return len(body) >= int(line[16:])
    return True


def test_a_try_that_fails_is_made_again_elsewhere(waypoint: LoopbackWaypoint) -> None:
    bad, good = waypoint.app().answers(BUSY), waypoint.app().answers(OK)
    waypoint.cluster(waypoint.endpoint(bad), waypoint.endpoint(good))
    waypoint.serve(replace(ROUTE, retry=Retry(on=(RetryOn.FIVE_XX,), attempts=5, base=0.001, maximum=0.002)))
    for _ in range(10):
        assert answer(waypoint).startswith(b"HTTP/1.1 200 OK")
    assert bad.heads


def test_a_body_is_sent_again_with_its_request(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(replace(ROUTE, retry=Retry(on=(RetryOn.FIVE_XX,), base=0.001, maximum=0.002)))
    client = waypoint.client()
    client.send(get(b"/", b"Content-Length: 6", method=b"POST") + b"abc")
    waypoint.run_until(lambda: app.connections and app.connections[0].data.endswith(b"\r\n\r\nabc"))
    client.send(b"def")
    waypoint.run_until(lambda: app.connections[0].data.endswith(b"\r\n\r\nabcdef"))
    app.connections[0].take()
    app.connections[0].send(BUSY)
    waypoint.run_until(lambda: any(each.data.endswith(b"\r\n\r\nabcdef") for each in app.connections))
    again = next(each for each in app.connections if each.data)
    again.send(OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))


def test_when_no_try_is_left_the_last_answer_is_passed_on(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(BUSY)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(replace(ROUTE, retry=Retry(on=(RetryOn.FIVE_XX,), attempts=2, base=0.001, maximum=0.002)))
    assert answer(waypoint).endswith(b"busy")
    assert len(app.heads) == 3


def test_no_retry_for_what_the_route_does_not_name(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(BUSY)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(ROUTE)
    assert answer(waypoint).endswith(b"busy")
    assert len(app.heads) == 1


def test_the_routes_timeout_ends_the_request(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(replace(ROUTE, timeout=0.05))
    got = answer(waypoint)
    assert got.startswith(b"HTTP/1.1 504 Gateway Timeout")
    assert got.endswith(b"upstream request timeout")
    waypoint.run_until(lambda: app.connections[0].is_over)


def test_the_routes_timeout_ends_an_answer_that_has_begun(waypoint: LoopbackWaypoint, app: App) -> None:
    """As Envoy's route timeout and `timeouts.request` of the Gateway API: until the whole answer is there."""
    app.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhello")
    waypoint.serve(replace(ROUTE, timeout=1e9))
    client = waypoint.client()
    client.send(get())
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    (due,) = [timer.callback for at, _, timer in waypoint.loop._timers if timer.callback is not None and at - waypoint.loop.now > 9e8]
    due()  # years later
    waypoint.run_until(lambda: client.is_over)
    waypoint.run_until(lambda: app.connections[0].is_over)
    breakers = waypoint.engine.clusters.get(CLUSTER).work.breakers  # type: ignore[union-attr]
    assert (breakers.requests, breakers.connections) == (0, 0)


def test_the_time_of_one_try(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(replace(ROUTE, retry=Retry(attempts=1, per_try=0.05, on=(RetryOn.RESET, RetryOn.GATEWAY_ERROR), base=0.001)))
    assert answer(waypoint).startswith(b"HTTP/1.1 504 Gateway Timeout")
    assert len(app.connections) == 2


def test_a_delay_and_an_abort(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    waypoint.serve(replace(ROUTE, fault=Fault(delay=0.02, delay_share=1.0)))
    began = waypoint.loop.now
    assert answer(waypoint).endswith(b"hello")
    assert waypoint.loop.now - began >= 0.02
    waypoint.serve(replace(ROUTE, fault=Fault(delay=0.001, delay_share=1.0, abort_status=418, abort_share=1.0)))
    got = answer(waypoint)
    assert got.startswith(b"HTTP/1.1 418 ")
    assert got.endswith(b"fault filter abort")


def test_a_client_that_leaves_during_a_delay(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.serve(replace(ROUTE, fault=Fault(delay=0.05, delay_share=1.0)))
    client = waypoint.client()
    client.send(get())
    waypoint.run_until(lambda: waypoint.proxy.connections.http)
    client.close()
    waypoint.run_until(lambda: not waypoint.proxy.connections.http)
    waypoint.run_until(lambda: not [each for each in waypoint.loop._timers if each[2].callback is not None and each[0] < 0.1])
    assert not app.connections


def test_redirects_direct_answers_and_routes_without_backends(waypoint: LoopbackWaypoint, app: App) -> None:
    def match(path: str) -> tuple[RequestMatch, ...]:
        return (RequestMatch(path=PathMatch(PathKind.EXACT, path)),)

    waypoint.serve(
        Route("a", matches=match("/old"), redirect=Redirect(status=301, path="/new"), response=HeaderEdits(set=(("x-route", "a"),))),
        Route("b", matches=match("/said"), direct=DirectResponse(418, b"teapot"), response=HeaderEdits(set=(("x-route", "b"),))),
        Route("c", matches=match("/none")),
        Route("d", matches=match("/unknown"), backends=(Backend("no such cluster"),)),
        Route("e", matches=match("/invalid"), backends=(Backend("", status=500),)),
    )
    moved = answer(waypoint, get(b"/old?q"))
    assert moved.startswith(b"HTTP/1.1 301 Moved Permanently")
    assert b"location: http://app/new?q\r\n" in moved
    assert b"x-route: a\r\n" in moved
    said = answer(waypoint, get(b"/said"))
    assert said.endswith(b"teapot")
    assert b"x-route: b\r\n" in said
    statuses = {path: answer(waypoint, get(path))[9:12] for path in (b"/none", b"/unknown", b"/invalid", b"/elsewhere")}
    assert statuses == {b"/none": b"500", b"/unknown": b"503", b"/invalid": b"500", b"/elsewhere": b"404"}


def test_edits_and_rewrites_reach_both_sides(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    edits = HeaderEdits(set=(("x-set", "%REQ(:path)%"),), add=(("x-add", "1"),), remove=("x-gone",))
    waypoint.serve(
        replace(ROUTE, request=edits, response=HeaderEdits(set=(("x-back", "yes"),)), rewrite=Rewrite(authority="inner", path="/in"))
    )
    got = answer(waypoint, get(b"/out?q", b"X-Gone: 1", b"X-Add: 0"))
    lines = app.heads[0].split(b"\r\n")
    assert lines[0] == b"GET /in?q HTTP/1.1"
    assert {b"host: inner", b"x-add: 0", b"x-add: 1", b"x-envoy-original-path: /out?q"} <= set(lines)
    assert not any(line.startswith(b"x-gone") for line in lines)
    assert b"x-back: yes\r\n" in got


def test_cors_preflights_are_answered_here(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    cors = Cors(origins=(TextMatch(TextKind.EXACT, "https://page"),), methods=("GET",))
    waypoint.serve(replace(ROUTE, cors=cors))
    preflight = answer(waypoint, get(b"/", b"Origin: https://page", b"Access-Control-Request-Method: GET", method=b"OPTIONS"))
    assert preflight.startswith(b"HTTP/1.1 200 OK")
    assert b"access-control-allow-origin: https://page\r\n" in preflight
    assert not app.connections
    assert b"access-control-allow-origin: https://page\r\n" in answer(waypoint, get(b"/", b"Origin: https://page"))


def test_a_rate_limit(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    waypoint.serve(replace(ROUTE, rate_limits=(RateLimit(tokens=1, seconds=3600.0, burst=2),)))
    assert [answer(waypoint)[9:12] for _ in range(3)] == [b"200", b"200", b"429"]


def test_copies_go_to_mirrors_and_their_answers_nowhere(waypoint: LoopbackWaypoint, app: App) -> None:
    copy = waypoint.app()
    waypoint.cluster(waypoint.endpoint(copy), key="copy")
    waypoint.serve(replace(ROUTE, mirrors=(Mirror("copy"), Mirror("no such cluster")), request=HeaderEdits(set=(("x-edited", "1"),))))
    client = waypoint.client()
    client.send(get(b"/m", b"Content-Length: 4", method=b"POST") + b"bo")
    waypoint.run_until(lambda: app.connections and copy.connections)
    client.send(b"dy")
    for each in (app, copy):
        waypoint.run_until(lambda each=each: each.connections[0].data.endswith(b"\r\n\r\nbody"))  # type: ignore[misc]
        assert b"x-edited: 1\r\n" in each.connections[0].data
    copy.connections[0].send(BUSY)
    app.connections[0].send(OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert b"busy" not in client.data
    # A copy that is answered leaves nothing behind, no deadline either.
    waypoint.run_until(lambda: not any(isinstance(getattr(t.callback, "__self__", None), Copy) for _, _, t in waypoint.loop._timers))


def test_a_mirror_that_is_slow_or_gone_costs_nothing(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    copy = waypoint.app()
    assert copy.acceptor is not None
    copy.acceptor.close()
    waypoint.cluster(waypoint.endpoint(copy), key="copy")
    waypoint.serve(replace(ROUTE, mirrors=(Mirror("copy"),)))
    assert answer(waypoint).endswith(b"hello")


def test_requests_over_a_circuit_breaker_are_refused(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.cluster(waypoint.endpoint(app), limits=PoolLimits(max_requests=1))
    waypoint.serve()
    first = waypoint.client()
    first.send(get())
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    refused = answer(waypoint)
    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b"x-envoy-overloaded: true\r\n" in refused
    assert refused.endswith(b"reset reason: overflow")
    app.connections[0].send(OK)
    waypoint.run_until(lambda: first.data.endswith(b"hello"))
    app.answers(OK)
    assert answer(waypoint).endswith(b"hello")


def test_requests_wait_for_a_connection_and_then_have_it(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.cluster(waypoint.endpoint(app), limits=PoolLimits(max_connections=1, max_pending=1))
    waypoint.serve()
    first, second = waypoint.client(), waypoint.client()
    first.send(get(b"/1"))
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    second.send(get(b"/2", b"Content-Length: 4", method=b"POST") + b"body")
    waypoint.run_until(lambda: waypoint.engine.clusters.get(CLUSTER).work.breakers.pending == 1)  # type: ignore[union-attr]
    assert answer(waypoint, get(b"/3")).endswith(b"reset reason: overflow")
    app.connections[0].take()
    app.connections[0].send(OK)
    waypoint.run_until(lambda: first.data.endswith(b"hello") and app.connections[0].data.endswith(b"\r\n\r\nbody"))
    app.connections[0].send(OK)
    waypoint.run_until(lambda: second.data.endswith(b"hello"))
    assert len(app.connections) == 1
    assert waypoint.engine.clusters.get(CLUSTER).work.breakers.pending == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("under_way", [True, False])
def test_an_idle_connection_of_another_client_makes_room(waypoint: LoopbackWaypoint, app: App, under_way: bool) -> None:
    """With PROXY headers a connection is one client's; its idle one must neither hold up another client nor be taken for free."""
    waypoint.cluster(waypoint.endpoint(app), limits=PoolLimits(max_connections=1), proxy_protocol=1)
    waypoint.serve()
    breakers = waypoint.engine.clusters.get(CLUSTER).work.breakers  # type: ignore[union-attr]
    first, second = waypoint.client(), waypoint.client(account="other")
    first.send(get(b"/1"))
    waypoint.run_until(lambda: app.connections and app.connections[0].data.endswith(b"\r\n\r\n"))
    if under_way:
        second.send(get(b"/2"))
        waypoint.run_until(lambda: breakers.pending == 1)
    app.connections[0].send(OK)
    waypoint.run_until(lambda: first.data.endswith(b"hello"))
    if not under_way:
        second.send(get(b"/2"))
    waypoint.run_until(lambda: len(app.connections) == 2 and app.connections[1].data.endswith(b"\r\n\r\n"))
    assert app.connections[1].data.startswith(b"PROXY ")
    app.connections[1].send(OK)
    waypoint.run_until(lambda: second.data.endswith(b"hello"))
    assert (breakers.connections, breakers.pending) == (1, 0)


def test_a_waiting_request_whose_client_leaves_waits_no_longer(waypoint: LoopbackWaypoint, app: App) -> None:
    waypoint.cluster(waypoint.endpoint(app), limits=PoolLimits(max_connections=1))
    waypoint.serve()
    first, second = waypoint.client(), waypoint.client()
    first.send(get(b"/1"))
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    second.send(get(b"/2"))
    breakers = waypoint.engine.clusters.get(CLUSTER).work.breakers  # type: ignore[union-attr]
    waypoint.run_until(lambda: breakers.pending == 1)
    second.close()
    waypoint.run_until(lambda: breakers.pending == 0)
    first.close()
    waypoint.run_until(lambda: (breakers.requests, breakers.connections) == (0, 0))


def test_an_endpoint_that_answers_wrongly_is_left_alone(waypoint: LoopbackWaypoint) -> None:
    bad, good = waypoint.app().answers(BUSY), waypoint.app().answers(OK)
    outlier = Outlier(consecutive_5xx=2, max_ejection_percent=100)
    waypoint.cluster(waypoint.endpoint(bad), waypoint.endpoint(good), outlier=outlier)
    waypoint.serve(replace(ROUTE, retry=None))
    for _ in range(30):
        answer(waypoint)
    assert len(bad.heads) == 2
    assert len(good.heads) == 28


def test_a_connection_is_used_for_so_many_requests_only(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    waypoint.cluster(waypoint.endpoint(app), limits=PoolLimits(max_requests_per_connection=2))
    waypoint.serve()
    for _ in range(5):
        answer(waypoint)
    assert len(app.connections) == 3


def test_endpoints_that_are_gone_lose_their_idle_connections(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    answer(waypoint)
    waypoint.cluster()
    waypoint.serve()
    waypoint.run_until(lambda: app.connections[0].is_over)
    got = answer(waypoint)
    assert got.startswith(b"HTTP/1.1 503 ")
    assert got.endswith(b"no healthy upstream")


@pytest.mark.parametrize("version", [1, 2])
def test_a_proxy_header_names_the_client_of_each_connection(waypoint: LoopbackWaypoint, app: App, version: int) -> None:
    waypoint.cluster(waypoint.endpoint(app), proxy_protocol=version)
    waypoint.serve()
    client = waypoint.client()
    client.send(get())
    waypoint.run_until(lambda: app.connections and b"HTTP/1.1\r\n" in app.connections[0].data)
    if version == 1:
        assert app.connections[0].data.startswith(b"PROXY TCP4 127.0.0.1 10.96.0.1 ")
    else:
        assert app.connections[0].data.startswith(b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c\x7f\x00\x00\x01\x0a\x60\x00\x01")
    client.close()
