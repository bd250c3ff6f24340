"""HTTP/1.1 through a waypoint: bodies, trailers, interim answers, upgrades, pipelining, and what is refused."""

from __future__ import annotations

import os

import pytest

from tests.kit.waypoint import App, Bytes, LoopbackWaypoint

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


def get(path: bytes = b"/", *lines: bytes, method: bytes = b"GET", version: bytes = b"1.1") -> bytes:
    return b"\r\n".join([method + b" " + path + b" HTTP/" + version, b"Host: app", *lines, b"", b""])


def head_of(data: bytes | bytearray) -> tuple[bytes, list[bytes]]:
    """First line and header lines."""
    lines = bytes(data).partition(b"\r\n\r\n")[0].split(b"\r\n")
    return lines[0], lines[1:]


def upstream(waypoint: LoopbackWaypoint, app: App, number: int = 0) -> Bytes:
    """The endpoint's end of a connection, once there is a whole head on it."""
    waypoint.run_until(lambda: len(app.connections) > number and b"\r\n\r\n" in app.connections[number].data)
    return app.connections[number]


def test_a_body_of_known_length_passes_as_it_is(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Content-Length: 4", method=b"POST") + b"bo")
    far = upstream(waypoint, app)
    client.send(b"dy")
    waypoint.run_until(lambda: far.data.endswith(b"body"))
    assert b"content-length: 4" in head_of(far.take())[1]
    far.send(OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert b"content-length: 5" in head_of(client.take())[1]


def test_chunks_and_trailers_pass_both_ways(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Transfer-Encoding: chunked", b"TE: trailers, gzip", method=b"POST") + b"3;ext=1\r\nabc\r\n")
    far = upstream(waypoint, app)
    client.send(b"2\r\nde\r\n0\r\nX-Sum: 5\r\nConnection: x\r\n\r\n")
    waypoint.run_until(lambda: far.data.endswith(b"0\r\nx-sum: 5\r\n\r\n"))
    _, lines = head_of(far.data)
    assert b"transfer-encoding: chunked" in lines
    assert b"te: trailers" in lines
    assert far.take().partition(b"\r\n\r\n")[2] == b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-sum: 5\r\n\r\n"
    far.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwiki\r\n")
    waypoint.run_until(lambda: b"wiki" in client.data)
    far.send(b"0\r\nX-End: yes\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"0\r\nx-end: yes\r\n\r\n"))
    assert b"transfer-encoding: chunked" in head_of(client.data)[1]


def test_large_bodies_arrive_whole(waypoint: LoopbackWaypoint, app: App) -> None:
    there, back = os.urandom(3_000_000), os.urandom(3_000_000)
    client = waypoint.client()
    client.send(get(b"/", b"Content-Length: %d" % len(there), method=b"PUT") + there)
    far = upstream(waypoint, app)
    waypoint.run_until(lambda: far.data.endswith(there[-100:]))
    assert far.take().partition(b"\r\n\r\n")[2] == there
    far.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(back) + back)
    waypoint.run_until(lambda: client.data.endswith(back[-100:]))
    assert client.take().partition(b"\r\n\r\n")[2] == back


def test_an_endpoint_that_does_not_read_makes_the_client_wait(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Content-Length: 100000000", method=b"PUT"))
    far = upstream(waypoint, app)
    assert far.stream is not None
    far.stream.pause()
    sent = 0
    assert client.stream is not None
    while not client.stream.is_full and sent < 90_000_000:
        client.send(bytes(1 << 18))
        sent += 1 << 18
        waypoint.turn(5)
    assert sent < 40_000_000, "windows and socket buffers only"
    far.stream.resume()
    waypoint.run_until(lambda: len(far.data) > sent)


def test_a_client_that_does_not_read_makes_the_endpoint_wait(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    assert client.stream is not None
    client.stream.pause()
    far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n")
    sent = 0
    assert far.stream is not None
    while not far.stream.is_full and sent < 90_000_000:
        far.send(bytes(1 << 18))
        sent += 1 << 18
        waypoint.turn(5)
    assert sent < 40_000_000
    client.stream.resume()
    waypoint.run_until(lambda: len(client.data) > sent)


def test_the_connection_is_kept_and_the_endpoints_too(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    for number in range(5):
        client.send(get(b"/%d" % number))
        waypoint.run_until(lambda: client.data.endswith(b"hello"))
        client.take()
    assert len(app.connections) == 1
    assert [head.split(b" ")[1] for head in app.heads] == [b"/0", b"/1", b"/2", b"/3", b"/4"]


def test_pipelined_requests_are_answered_in_order(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(b"".join(get(b"/%d" % number) for number in range(50)))
    far = upstream(waypoint, app)
    for number in range(50):
        waypoint.run_until(lambda: b"\r\n\r\n" in far.data)
        assert far.take().startswith(b"GET /%d " % number)
        far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n%03d" % number)
    waypoint.run_until(lambda: client.data.endswith(b"049"))
    assert [client.data.count(b"%03d" % number) for number in (0, 25, 49)] == [1, 1, 1]
    assert client.data.count(b"HTTP/1.1 200 OK") == 50


@pytest.mark.parametrize("lines", [(b"HTTP/1.1 204 No Content",), (b"HTTP/1.1 304 Not Modified", b"Content-Length: 5")])
def test_answers_without_a_body_leave_the_connection_for_the_next(waypoint: LoopbackWaypoint, app: App, lines: tuple[bytes, ...]) -> None:
    app.answers(b"\r\n".join([*lines, b"", b""]))
    client = waypoint.client()
    for _ in range(2):
        client.send(get())
        waypoint.run_until(lambda: client.data.endswith(b"\r\n\r\n"))
        head, said = head_of(client.take())
        assert head == lines[0]
        assert b"transfer-encoding: chunked" not in said
    assert len(app.connections) == 1


def test_head_has_the_length_and_no_body(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n")
    client = waypoint.client()
    for _ in range(2):
        client.send(get(method=b"HEAD"))
        waypoint.run_until(lambda: client.data.endswith(b"\r\n\r\n"))
        assert b"content-length: 5000" in head_of(client.take())[1]
    app.answers(OK)
    client.send(get())
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert len(app.connections) == 1


def test_a_client_hears_100_of_the_endpoint_and_then_sends(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Expect: 100-continue", b"Content-Length: 4", method=b"POST"))
    far = upstream(waypoint, app)
    assert b"expect: 100-continue" in head_of(far.take())[1]
    far.send(b"HTTP/1.1 100 Continue\r\n\r\n")
    waypoint.run_until(lambda: client.data == b"HTTP/1.1 100 Continue\r\n\r\n")
    client.take()
    client.send(b"body")
    waypoint.run_until(lambda: far.data == b"body")
    far.send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert client.data.startswith(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert not client.is_over


def test_whoever_is_refused_without_100_loses_the_connection(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Expect: 100-continue", b"Content-Length: 4", method=b"POST"))
    far = upstream(waypoint, app)
    far.send(b"HTTP/1.1 417 Expectation Failed\r\nContent-Length: 0\r\n\r\n")
    waypoint.run_until(lambda: client.is_over)
    assert b"connection: close" in head_of(client.data)[1]


def test_an_answer_in_front_of_the_bodys_end_leaves_the_clients_connection(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Content-Length: 8", method=b"POST") + b"half")
    far = upstream(waypoint, app)
    far.send(OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    client.take()
    client.send(b"half" + get(b"/next"))
    second = upstream(waypoint, app, 1)
    assert second.data.startswith(b"GET /next ")
    waypoint.run_until(lambda: far.is_over)


def test_websocket_bytes_pass_both_ways_after_101(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/chat", b"Connection: keep-alive, Upgrade", b"Upgrade: WebSocket", b"Sec-WebSocket-Key: k") + b"early")
    far = upstream(waypoint, app)
    waypoint.run_until(lambda: far.data.endswith(b"early"))
    _, lines = head_of(far.take())
    assert {b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: k"} <= set(lines)
    far.send(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: a\r\n\r\nwelcome")
    waypoint.run_until(lambda: client.data.endswith(b"welcome"))
    head, lines = head_of(client.take())
    assert head == b"HTTP/1.1 101 Switching Protocols"
    assert {b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-accept: a"} <= set(lines)
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    far.send(b"0\r\n\r\n")
    waypoint.run_until(lambda: client.data == b"0\r\n\r\n" and far.data == b"GET / HTTP/1.1\r\n\r\n")
    far.end()
    waypoint.run_until(lambda: client.is_over and far.is_over)
    assert far.error is None


def test_a_refused_upgrade_is_an_answer(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/chat", b"Connection: Upgrade", b"Upgrade: websocket"))
    far = upstream(waypoint, app)
    far.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno")
    waypoint.run_until(lambda: client.is_over)
    assert client.data.startswith(b"HTTP/1.1 403 Forbidden")
    assert client.data.endswith(b"no")


def test_an_offer_of_h2c_is_not_taken(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk")
    client.send(get(b"/1", *offer) + get(b"/2"))
    waypoint.run_until(lambda: client.data.count(b"hello") == 2)
    assert not any(name in app.heads[0].lower() for name in (b"upgrade", b"http2-settings"))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (get(version=b"1.0"), b"426 Upgrade Required"),
        (b"GET /\r\n\r\n", b"426 Upgrade Required"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400 Bad Request"),
        (get(b"/", b"Host: other"), b"400 Bad Request"),
        (get(b"/", b"Content-Length: 3", b"Transfer-Encoding: chunked"), b"400 Bad Request"),
        (get(b"/", b"Transfer-Encoding: chunked", b"Content-Length: 3"), b"400 Bad Request"),
        (get(b"/", b"Content-Length: 3", b"Content-Length: 4"), b"400 Bad Request"),
        (get(b"/", b"Content-Length: 3, 3"), b"400 Bad Request"),
        (get(b"/", b"Content-Length: +3"), b"400 Bad Request"),
        (get(b"/", b"Content-Length: 0x3"), b"400 Bad Request"),
        (get(b"/", b"Transfer-Encoding: gzip, chunked"), b"501 Not Implemented"),
        (get(b"/", b"Transfer-Encoding: chunked, identity"), b"400 Bad Request"),
        (get(b"/", b"Transfer-Encoding: identity, chunked"), b"501 Not Implemented"),
        (get(b"/", b"Transfer-Encoding : chunked"), b"400 Bad Request"),
        (get(b"/", b"X: a\r\n b"), b"400 Bad Request"),
        (get(b"/", b"X: a\nY: b"), b"400 Bad Request"),
        (get(b"/", b"X: a\0b"), b"400 Bad Request"),
        (get(b"/", b"X: a\rb"), b"400 Bad Request"),
        (get(b"/", b"X y: a"), b"400 Bad Request"),
        (get(b"/a b"), b"400 Bad Request"),
        (get(b"/#fragment"), b"400 Bad Request"),
        (get(b"relative"), b"400 Bad Request"),
        (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", b"400 Bad Request"),
        (b"GET / HTTP/1.1\nHost: a\n\n", b"400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", b"400 Bad Request"),
        (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", b"400 Bad Request"),
        (b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", b"403 Forbidden"),
        (get(b"/", b"Connection: upgrade", b"Upgrade: foo"), b"403 Forbidden"),
        (get(b"/", b"X: " + b"x" * (61 << 10)), b"431 Request Header Fields Too Large"),
        (get(b"/" + b"x" * (61 << 10)), b"431 Request Header Fields Too Large"),
        (get(b"/", *(b"X%d: y" % number for number in range(101))), b"431 Request Header Fields Too Large"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * (130 << 10), b"431 Request Header Fields Too Large"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400 Bad Request"),
    ],
)
def test_what_is_no_request_is_refused_and_the_connection_ends(
    waypoint: LoopbackWaypoint, app: App, request_: bytes, status: bytes
) -> None:
    client = waypoint.client()
    client.send(request_ + b"GET /smuggled HTTP/1.1\r\nHost: app\r\n\r\n")
    waypoint.run_until(lambda: client.is_over)
    head, lines = head_of(client.data)
    assert head == b"HTTP/1.1 " + status
    assert {b"server: istio-envoy", b"connection: close"} <= set(lines)
    assert client.data.count(b"HTTP/1.1 ") == 1
    assert not app.connections


def test_a_path_that_cannot_be_normalised_costs_its_request_only(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    client.send(get(b"/%00") + get(b"/a/%2e%2e/b"))
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert client.data.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert app.heads[0].startswith(b"GET /b ")


@pytest.mark.parametrize(
    "chunks",
    [
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"0x3\r\nabc\r\n",
        b"3 \r\nabc\r\n",
        b"3\nabc\r\n",
        b"-3\r\nabc",
        b"g\r\n",
        b"fffffffffffffffff\r\n",
        b"0\r\nContent-Length: 3\r\n\r\n",
    ],
)
def test_a_broken_body_cuts_the_request(waypoint: LoopbackWaypoint, app: App, chunks: bytes) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Transfer-Encoding: chunked", method=b"POST"))
    far = upstream(waypoint, app)
    client.send(chunks)
    waypoint.run_until(lambda: client.is_over and far.is_over)
    assert not far.data.endswith(b"0\r\n\r\n"), "it must not look whole"


def test_headers_of_one_hop_do_not_pass(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: X-Mine, keep-alive\r\nX-Mine: 1\r\nKeep-Alive: timeout=5\r\n"
        b"Proxy-Connection: a\r\nUpgrade: h2\r\nServer: nginx\r\nX-Envoy-Peer-Metadata: m\r\nX-Other: 2\r\n\r\n"
    )
    client = waypoint.client()
    client.send(
        get(
            b"/",
            b"Connection: X-Hop, Host, Authorization, close",
            b"X-Hop: 1",
            b"Keep-Alive: 1",
            b"Proxy-Connection: keep-alive",
            b"Authorization: mine",
            b"X-Forwarded-Client-Cert: forged",
            b"X-Envoy-Peer-Metadata: forged",
            b"TE: gzip",
            b"X-Request-Id: mine",
        )
    )
    waypoint.run_until(lambda: client.is_over)
    asked = {line.partition(b":")[0] for line in app.heads[0].split(b"\r\n")[1:]}
    assert asked == {b"host", b"authorization", b"x-forwarded-proto", b"x-request-id"}
    assert b"x-request-id: mine" in app.heads[0]
    _, lines = head_of(client.data)
    names = {line.partition(b":")[0] for line in lines}
    assert names == {b"content-length", b"x-other", b"server", b"x-envoy-upstream-service-time", b"date", b"connection"}
    assert b"server: istio-envoy" in lines


def test_an_absolute_target_names_the_host(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    client.send(b"GET http://other.example:81/x?y HTTP/1.1\r\nHost: app\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert app.heads[0].startswith(b"GET /x?y HTTP/1.1\r\nhost: other.example:81\r\n")


def test_an_answer_that_ends_with_the_connection(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    far.send(b"HTTP/1.1 200 OK\r\n\r\nuntil the")
    far.send(b" end")
    far.end()
    waypoint.run_until(lambda: client.data.endswith(b"0\r\n\r\n"))
    assert b"transfer-encoding: chunked" in head_of(client.data)[1]
    assert not client.is_over


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (b"", b"connection termination"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", b"connection termination"),
        (b"nonsense\r\n\r\n", b"protocol error"),
        (b"HTTP/1.1 000 x\r\nContent-Length: 0\r\n\r\n", b"protocol error"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", b"protocol error"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", b"protocol error"),
        (b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n", b"protocol error"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70000 + b"\r\n\r\n", b"protocol error"),
    ],
)
def test_an_endpoint_without_a_good_answer_is_503_or_502(waypoint: LoopbackWaypoint, app: App, answer: bytes, body: bytes) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    far.send(answer)
    far.end()
    waypoint.run_until(lambda: b"\r\n\r\n" in client.data)
    head, _ = head_of(client.data)
    assert head == b"HTTP/1.1 " + (b"502 Bad Gateway" if body == b"protocol error" else b"503 Service Unavailable")
    assert b"reset reason: " + body in client.data
    assert not client.is_over


def test_an_answer_that_is_cut_is_cut_for_the_client(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    far.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
    waypoint.run_until(lambda: client.data.endswith(b"half"))
    far.close()
    waypoint.run_until(lambda: client.error is not None)


def test_what_an_endpoint_says_unasked_is_nobodys_answer(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    far.send(OK + b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil")
    waypoint.run_until(lambda: client.data.endswith(b"hello") and far.is_over)
    client.take()
    client.send(get(b"/second"))
    second = upstream(waypoint, app, 1)
    assert b"evil" not in client.data
    second.send(OK)
    waypoint.run_until(lambda: client.data.endswith(b"hello"))


@pytest.mark.parametrize("how", ["end", "close"])
def test_a_client_that_goes_takes_its_request_along(waypoint: LoopbackWaypoint, app: App, how: str) -> None:
    client = waypoint.client()
    client.send(get())
    far = upstream(waypoint, app)
    getattr(client, how)()
    waypoint.run_until(lambda: far.is_over)


def test_nobody_listening_is_503(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app()
    assert app.acceptor is not None
    app.acceptor.close()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve()
    client = waypoint.client()
    client.send(get())
    waypoint.run_until(lambda: b"\r\n\r\n" in client.data)
    assert client.data.startswith(b"HTTP/1.1 503 Service Unavailable")
    assert b"retried and the latest reset reason: remote connection failure" in client.data


@pytest.mark.slow
def test_a_flood_of_requests_that_nobody_reads_the_answers_of_stops(waypoint: LoopbackWaypoint) -> None:
    waypoint.serve()
    client = waypoint.client()
    assert client.stream is not None
    client.stream.pause()
    sent = 0
    while not client.stream.is_full and sent < 90_000_000:
        client.send(get() * 4000)
        sent += 4000 * len(get())
        waypoint.turn(5)
    assert sent < 60_000_000
    client.close()


def test_a_client_that_ends_between_requests_is_answered_with_an_end_and_no_reset(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(OK)
    client = waypoint.client()
    client.send(get())
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    client.end()
    waypoint.run_until(lambda: client.is_over)
    assert (client.has_ended, client.error) == (True, None)


def test_a_drain_ends_connections_behind_what_they_are_doing(waypoint: LoopbackWaypoint, app: App) -> None:
    idle, busy = waypoint.client(), waypoint.client()
    idle.send(get(b"/idle"))
    far = upstream(waypoint, app)
    far.take()
    far.send(OK)
    waypoint.run_until(lambda: idle.data.endswith(b"hello"))
    busy.send(get(b"/busy"))
    waypoint.run_until(lambda: any(b"/busy" in each.data for each in app.connections))
    waypoint.proxy.drain()
    waypoint.run_until(lambda: idle.has_ended)
    assert waypoint.proxy.live() > 0
    next(each for each in app.connections if b"/busy" in each.data).send(OK)
    waypoint.run_until(lambda: busy.has_ended)
    assert b"connection: close\r\n" in busy.data
    assert busy.data.endswith(b"hello")
    idle.end()
    busy.end()
    waypoint.run_until(lambda: waypoint.proxy.live() == 0)


def test_a_connection_header_of_nothing_but_commas_names_nothing(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(b"HTTP/1.1 200 OK\r\nConnection: ,\r\nContent-Length: 5\r\n\r\nhello")
    client = waypoint.client()
    client.send(get(b"/", b"Connection: , ,"))
    waypoint.run_until(lambda: client.data.endswith(b"hello") or client.is_over)
    assert head_of(client.data)[0] == b"HTTP/1.1 200 OK"


def test_trailers_say_nothing_that_is_judged_among_the_headers(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(get(b"/", b"Transfer-Encoding: chunked", method=b"POST"))
    far = upstream(waypoint, app)
    far.take()
    forged = b"X-Forwarded-Client-Cert: URI=x\r\nAuthorization: Bearer x\r\nCookie: a=b\r\nX-Forwarded-For: 10.0.0.1\r\n"
    client.send(b"0\r\n" + forged + b"X-Sum: 5\r\n\r\n")
    waypoint.run_until(lambda: far.data.endswith(b"\r\n\r\n"))
    assert bytes(far.data) == b"0\r\nx-sum: 5\r\n\r\n"


def test_a_large_head_passes_in_pieces_as_it_does_in_one(waypoint: LoopbackWaypoint, app: App) -> None:
    large = b"X-Large: " + b"x" * (50 << 10)

    def send(end: Bytes, data: bytes) -> None:
        for at in range(0, len(data), 20_000):
            end.send(data[at : at + 20_000])
            waypoint.turn()

    client = waypoint.client()
    send(client, get(b"/", large))
    far = upstream(waypoint, app)
    assert large.lower() in far.take().lower()
    send(far, b"HTTP/1.1 200 OK\r\n" + large + b"\r\nContent-Length: 5\r\n\r\nhello")
    waypoint.run_until(lambda: client.data.endswith(b"hello"))
    assert head_of(client.data)[0] == b"HTTP/1.1 200 OK"
