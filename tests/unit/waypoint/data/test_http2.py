"""HTTP/2 through a waypoint, with the `h2` library on both sides: gRPC, streaming both ways, websockets, resets, floods, farewells."""

from __future__ import annotations

import os

import h2.settings
import pytest

from tests.kit.http2 import H2End
from tests.kit.waypoint import App, Bytes, LoopbackWaypoint
from ztunnel.mesh.l7.clusters import UpstreamHttp

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GRPC = (b"content-type", b"application/grpc")
TE = (b"te", b"trailers")


class Pair:
    """A client's connection and the endpoint's, both HTTP/2."""

    def __init__(self, waypoint: LoopbackWaypoint, **settings: int) -> None:
        self.waypoint = waypoint
        self.app = waypoint.app()
        waypoint.cluster(waypoint.endpoint(self.app), http=UpstreamHttp.HTTP2)
        waypoint.serve()
        self.servers: list[H2End] = []
        self.settings: dict[h2.settings.SettingCodes | int, int] = {
            h2.settings.SettingCodes[name]: value for name, value in settings.items()
        }
        self.app.on_data = self._greet
        self.client = H2End(waypoint.client(), client=True)

    def _greet(self, end: Bytes) -> None:
        self.servers.append(H2End(end, client=False, settings=self.settings))

    def asked(self, count: int = 1, server: int = 0) -> H2End:
        """The endpoint's end, once so many requests have come there."""
        self.waypoint.run_until(lambda: len(self.servers) > server and len(self.servers[server].heads) >= count)
        return self.servers[server]

    def answered(self, stream: int) -> None:
        self.waypoint.run_until(lambda: self.client.is_over(stream))


@pytest.fixture(name="pair")
def fixture_pair(waypoint: LoopbackWaypoint) -> Pair:
    return Pair(waypoint)


def test_grpc_with_trailers_and_streams_both_ways(pair: Pair) -> None:
    stream = pair.client.get(b"/pkg.Service/Method", GRPC, TE, method=b"POST", end=False)
    server = pair.asked()
    (number,) = server.heads
    head = dict(server.heads[number])
    assert (head[b":method"], head[b":path"], head[b":authority"], head[b"te"]) == (b"POST", b"/pkg.Service/Method", b"app", b"trailers")
    assert {b"x-request-id", b"x-forwarded-proto"} <= head.keys()
    server.respond(number, GRPC)
    for turn in range(3):
        pair.client.send(stream, b"question %d" % turn)
        pair.waypoint.run_until(lambda turn=turn: server.data[number].endswith(b"question %d" % turn))  # type: ignore[misc]
        server.send(number, b"answer %d" % turn)
        pair.waypoint.run_until(lambda turn=turn: pair.client.data.get(stream, b"").endswith(b"answer %d" % turn))  # type: ignore[misc]
    pair.client.end_with(stream, (b"x-sum", b"3"))
    pair.waypoint.run_until(lambda: number in server.ended)
    assert server.trailers[number] == [(b"x-sum", b"3")]
    server.end_with(number, (b"grpc-status", b"0"), (b"grpc-message", b"fine"))
    pair.answered(stream)
    assert pair.client.trailers[stream] == [(b"grpc-status", b"0"), (b"grpc-message", b"fine")]
    assert dict(pair.client.heads[stream])[b"server"] == b"istio-envoy"


def test_many_requests_share_a_connection(pair: Pair) -> None:
    streams = [pair.client.get(b"/%d" % number) for number in range(50)]
    server = pair.asked(50)
    for number in reversed(list(server.heads)):
        path = dict(server.heads[number])[b":path"]
        server.respond(number)
        server.send(number, path, end=True)
    pair.waypoint.run_until(lambda: all(pair.client.is_over(stream) for stream in streams))
    assert [bytes(pair.client.data[stream]) for stream in streams] == [b"/%d" % number for number in range(50)]
    assert len(pair.servers) == 1


def test_a_second_connection_when_the_first_is_full(waypoint: LoopbackWaypoint) -> None:
    pair = Pair(waypoint, MAX_CONCURRENT_STREAMS=2)
    first = pair.client.get(b"/first")
    server = pair.asked()
    server.respond(1, end=True)
    pair.answered(first)
    for _ in range(3):
        pair.client.get()
    pair.waypoint.run_until(lambda: len(pair.servers) == 2)
    pair.waypoint.run_until(lambda: sum(len(each.heads) for each in pair.servers) == 4)


@pytest.mark.slow
def test_large_bodies_arrive_whole_within_the_windows(pair: Pair) -> None:
    body = os.urandom(2_000_000)
    stream = pair.client.get(method=b"PUT", end=False)
    server = pair.asked()
    sent = 0
    connection = pair.client.connection

    def pump() -> bool:
        nonlocal sent
        room = min(connection.local_flow_control_window(stream), len(body) - sent, 16384)
        if room > 0:
            pair.client.send(stream, body[sent : sent + room])
            sent += room
        return sent == len(body)

    pair.waypoint.run_until(pump)
    pair.client.send(stream, b"", end=True)
    pair.waypoint.run_until(lambda: 1 in server.ended)
    assert server.data[1] == body
    server.respond(1)
    at = 0

    def answer() -> bool:
        nonlocal at
        room = min(server.connection.local_flow_control_window(1), len(body) - at, 16384)
        if room > 0:
            server.send(1, body[at : at + room])
            at += room
        return at == len(body)

    pair.waypoint.run_until(answer)
    server.send(1, b"", end=True)
    pair.answered(stream)
    assert pair.client.data[stream] == body


def test_a_client_that_takes_nothing_stops_the_endpoint(pair: Pair) -> None:
    pair.client.takes = False
    stream = pair.client.get()
    server = pair.asked()
    server.respond(1)
    sent = 0
    while server.connection.local_flow_control_window(1) > 0 and sent < 50_000_000:
        room = min(server.connection.local_flow_control_window(1), 16384)
        server.send(1, bytes(room))
        sent += room
        pair.waypoint.turn(3)
    assert sent < 3_000_000, "our window and a little more"
    pair.client.take()
    pair.waypoint.run_until(lambda: len(pair.client.data[stream]) == sent)


def test_an_endpoint_that_takes_nothing_stops_the_client(pair: Pair) -> None:
    stream = pair.client.get(method=b"PUT", end=False)
    server = pair.asked()
    server.takes = False
    sent = 0
    while pair.client.connection.local_flow_control_window(stream) > 0 and sent < 50_000_000:
        room = min(pair.client.connection.local_flow_control_window(stream), 16384)
        pair.client.send(stream, bytes(room))
        sent += room
        pair.waypoint.turn(3)
    assert sent < 3_000_000
    server.take()
    pair.waypoint.run_until(lambda: len(server.data[1]) == sent)


@pytest.mark.parametrize("http", [UpstreamHttp.HTTP1, UpstreamHttp.CLIENT])
def test_what_the_endpoint_speaks_is_the_clusters_word(waypoint: LoopbackWaypoint, http: UpstreamHttp) -> None:
    app = waypoint.app()
    waypoint.cluster(waypoint.endpoint(app), http=http)
    waypoint.serve()
    client = H2End(waypoint.client(), client=True)
    stream = client.get(b"/x", (b"cookie", b"a=1"), (b"cookie", b"b=2"))
    waypoint.run_until(lambda: app.connections and app.connections[0].data)
    if http is UpstreamHttp.CLIENT:
        assert app.connections[0].data.startswith(b"PRI * HTTP/2.0")
        return
    waypoint.run_until(lambda: b"\r\n\r\n" in app.connections[0].data)
    assert app.connections[0].data.startswith(b"GET /x HTTP/1.1\r\nhost: app\r\n")
    assert b"cookie: a=1; b=2\r\n" in app.connections[0].data
    app.connections[0].send(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    app.connections[0].send(b"5\r\nhello\r\n0\r\nX-End: yes\r\n\r\n")
    waypoint.run_until(lambda: client.is_over(stream))
    assert client.data[stream] == b"hello"
    assert client.trailers[stream] == [(b"x-end", b"yes")]
    assert client.interims == [[(b":status", b"103"), (b"link", b"</x>")]]
    assert not any(name == b"transfer-encoding" for name, _ in client.heads[stream])


def test_a_client_of_http1_reaches_an_endpoint_of_http2(waypoint: LoopbackWaypoint) -> None:
    pair = Pair(waypoint)
    client = waypoint.client()
    client.send(b"POST /a HTTP/1.1\r\nHost: app\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 3\r\n\r\n")
    server = pair.asked()
    pair.waypoint.run_until(lambda: 1 in server.ended)
    assert (bytes(server.data[1]), server.trailers[1]) == (b"abc", [(b"x-sum", b"3")])
    server.respond(1, (b"content-length", b"2"))
    server.send(1, b"ok", end=True)
    waypoint.run_until(lambda: client.data.endswith(b"ok"))
    assert b"content-length: 2\r\n" in client.data


@pytest.mark.parametrize("upstream", [UpstreamHttp.HTTP1, UpstreamHttp.HTTP2])
def test_websockets_by_extended_connect(waypoint: LoopbackWaypoint, upstream: UpstreamHttp) -> None:
    pair = Pair(waypoint, ENABLE_CONNECT_PROTOCOL=1)
    if upstream is UpstreamHttp.HTTP2:
        warm = pair.client.get()
        pair.asked().respond(1, end=True)
        pair.answered(warm)
    else:
        pair.app.on_data = lambda _end: None
        waypoint.cluster(waypoint.endpoint(pair.app), http=upstream)
        waypoint.serve()
    pseudo = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/chat")]
    stream = pair.client.request([*pseudo, (b"sec-websocket-version", b"13")])
    if upstream is UpstreamHttp.HTTP1:
        waypoint.run_until(lambda: pair.app.connections and b"\r\n\r\n" in pair.app.connections[0].data)
        far = pair.app.connections[0]
        head = far.take()
        assert head.startswith(b"GET /chat HTTP/1.1\r\n")
        assert b"sec-websocket-key: " in head
        assert b"upgrade: websocket\r\n" in head
        far.send(b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: x\r\n\r\n")
        waypoint.run_until(lambda: pair.client.status(stream) == b"200")
        assert not any(name == b"sec-websocket-accept" for name, _ in pair.client.heads[stream])
        pair.client.send(stream, b"ping")
        waypoint.run_until(lambda: far.data == b"ping")
        far.send(b"pong")
        waypoint.run_until(lambda: pair.client.data[stream] == b"pong")
        pair.client.send(stream, b"", end=True)
        waypoint.run_until(lambda: far.is_over)
        return
    server = pair.asked(2)
    assert dict(server.heads[3])[b":protocol"] == b"websocket"
    server.respond(3)
    waypoint.run_until(lambda: pair.client.status(stream) == b"200")
    pair.client.send(stream, b"ping", end=True)
    waypoint.run_until(lambda: server.data[3] == b"ping" and 3 in server.ended)
    server.send(3, b"pong", end=True)
    pair.answered(stream)
    assert pair.client.data[stream] == b"pong"


def test_a_websocket_of_http1_over_http2_upstream_is_proved(waypoint: LoopbackWaypoint) -> None:
    pair = Pair(waypoint, ENABLE_CONNECT_PROTOCOL=1)
    warm = pair.client.get()
    pair.asked().respond(1, end=True)
    pair.answered(warm)
    client = waypoint.client()
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    client.send(b"GET /chat HTTP/1.1\r\nHost: app\r\n" + upgrade)
    pair.asked(2).respond(3)
    waypoint.run_until(lambda: b"\r\n\r\n" in client.data)
    assert client.data.startswith(b"HTTP/1.1 101 ")
    assert b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in client.data


def test_a_local_reply_to_grpc_is_trailers_only(waypoint: LoopbackWaypoint) -> None:
    waypoint.serve()
    client = H2End(waypoint.client(), client=True)
    stream = client.get(b"/pkg.S/M", GRPC, TE, method=b"POST", end=False)
    waypoint.run_until(lambda: client.is_over(stream))
    head = dict(client.heads[stream])
    assert head[b":status"] == b"200"
    assert head[b"grpc-status"] == b"14"
    assert stream in client.ended


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b":method", b"CONNECT"), (b":authority", b"app:1")], b"403"),
        ([(b":method", b"G ET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/")], b"400"),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/a b")], b"400"),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/a\x7fb")], b"400"),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"relative")], b"400"),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a b"), (b":path", b"/")], b"400"),
        ([(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/")], b"400"),
        (
            [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/"), (b"content-length", b"x")],
            b"400",
        ),
        (
            [
                (b":method", b"GET"),
                (b":scheme", b"http"),
                (b":authority", b"app"),
                (b":path", b"/"),
                (b"content-length", b"1"),
                (b"content-length", b"2"),
            ],
            b"400",
        ),
        (
            [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", b"/"), *[(b"x", b"y")] * 101],
            b"431",
        ),
    ],
)
def test_what_is_no_request_is_refused(waypoint: LoopbackWaypoint, app: App, headers: list[tuple[bytes, bytes]], status: bytes) -> None:
    client = H2End(waypoint.client(), client=True)
    stream = client.request(headers, end=True)
    waypoint.run_until(lambda: client.is_over(stream))
    assert client.status(stream) == status
    assert not app.connections


@pytest.mark.parametrize("length", [b"3", b"5"])
def test_a_body_that_is_not_what_its_head_said_is_reset(waypoint: LoopbackWaypoint, app: App, length: bytes) -> None:
    client = H2End(waypoint.client(), client=True)
    stream = client.get(b"/", (b"content-length", length), method=b"POST", end=False)
    waypoint.run_until(lambda: app.connections and b"\r\n\r\n" in app.connections[0].data)
    client.connection.config.validate_outbound_headers = False
    client.send(stream, b"four", end=True)
    waypoint.run_until(lambda: client.is_over(stream) and app.connections[0].is_over)
    assert client.resets == {stream: 1}
    assert not app.connections[0].data.endswith(b"four") or length == b"5"


def test_a_reset_of_the_client_reaches_the_endpoint(pair: Pair) -> None:
    stream = pair.client.get(method=b"POST", end=False)
    server = pair.asked()
    pair.client.reset(stream)
    pair.waypoint.run_until(lambda: 1 in server.resets)
    assert server.resets[1] == 8


def test_a_reset_of_the_endpoint_is_503_before_the_answer_and_a_reset_behind_it(pair: Pair) -> None:
    before = pair.client.get()
    pair.asked().reset(1, 2)
    pair.answered(before)
    assert pair.client.status(before) == b"503"
    assert b"remote reset" in pair.client.data[before]
    behind = pair.client.get()
    server = pair.asked(2)
    server.respond(3)
    pair.waypoint.run_until(lambda: pair.client.status(behind) == b"200")
    server.reset(3, 2)
    pair.waypoint.run_until(lambda: behind in pair.client.resets)


def test_a_refused_stream_is_tried_again(pair: Pair) -> None:
    stream = pair.client.get()
    server = pair.asked()
    server.reset(1, 7)
    pair.asked(2)
    server.respond(3, end=True)
    pair.answered(stream)
    assert pair.client.status(stream) == b"200"


def test_an_endpoint_that_goes_away_finishes_its_streams(waypoint: LoopbackWaypoint) -> None:
    pair = Pair(waypoint)
    first = pair.client.get(b"/1")
    server = pair.asked()
    goaway = b"\x00\x00\x08\x07\x00\x00\x00\x00\x00" + (1).to_bytes(4, "big") + bytes(4)
    server.end.send(goaway)
    waypoint.turn(5)
    second = pair.client.get(b"/2")
    other = pair.asked(server=1)
    other.respond(1, end=True)
    pair.answered(second)
    server.respond(1)
    server.send(1, b"late", end=True)
    pair.answered(first)
    assert pair.client.data[first] == b"late"
    waypoint.run_until(lambda: server.end.is_over)


def test_an_answer_in_front_of_the_requests_end_stops_the_request(pair: Pair) -> None:
    stream = pair.client.get(method=b"POST", end=False)
    server = pair.asked()
    server.respond(1, status=b"413", end=True)
    pair.waypoint.run_until(lambda: pair.client.is_over(stream) and 1 in server.resets)
    assert pair.client.status(stream) == b"413"
    assert server.resets[1] == 0
    follow = pair.client.get()
    pair.asked(2).respond(3, end=True)
    pair.answered(follow)


@pytest.mark.slow
def test_a_drain_says_goaway_and_ends_behind_the_last_request(pair: Pair) -> None:
    stream = pair.client.get()
    server = pair.asked()
    pair.waypoint.proxy.connections.drain()
    pair.waypoint.turn(3)
    server.respond(1)
    server.send(1, b"done", end=True)
    pair.waypoint.run_until(lambda: pair.client.goaway == 0 and pair.client.end.is_over)
    assert stream in pair.client.ended
    assert pair.client.data[stream] == b"done"


@pytest.mark.parametrize("flood", ["pings", "settings", "resets", "empty", "priorities"])
def test_floods_end_the_connection(waypoint: LoopbackWaypoint, app: App, flood: str) -> None:
    end = waypoint.client()
    client = H2End(end, client=True)
    opened = client.get(method=b"POST", end=False)
    waypoint.run_until(lambda: app.connections)
    frame = {
        "pings": b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8),
        "settings": b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
        "empty": b"\x00\x00\x00\x00\x00" + opened.to_bytes(4, "big"),
        "priorities": b"\x00\x00\x05\x02\x00" + opened.to_bytes(4, "big") + bytes(4) + b"\x10",
    }.get(flood)
    for number in range(30_000):
        if end.is_over:
            break
        if frame is not None:
            end.send(frame)
        else:
            client.reset(client.get())
        if number % 1000 == 999:
            # Budgets are per second: on a slow machine a burst has to be large to be one.
            waypoint.turn(2)
    waypoint.run_until(lambda: end.is_over)
