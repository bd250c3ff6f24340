"""Peers that break the rules of HTTP to harm whoever else uses the waypoint: answers that smuggle, floods, silence."""

from __future__ import annotations

import pytest

from tests.kit.http2 import H2End
from tests.kit.waypoint import App, LoopbackWaypoint
from waypoint.data.connections import HEAD_SECONDS, IDLE_SECONDS, Opening
from waypoint.data.http2 import Http2Connection, Http2Stream, limits
from waypoint.data.served import PortAtWork
from waypoint.http.messages import Client
from ztunnel.dataplane.bytestream import Receiver
from ztunnel.dataplane.loop import Loop
from ztunnel.hbone.events import Event
from ztunnel.hbone.mux import Mux
from ztunnel.mesh.l7.clusters import UpstreamHttp
from ztunnel.mesh.l7.config import PortProtocol

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"


@pytest.mark.parametrize("commas", [b",", b" , ,"])
def test_a_connection_header_that_lists_nothing(waypoint: LoopbackWaypoint, app: App, commas: bytes) -> None:
    app.answers(OK.replace(b"\r\n\r\n", b"\r\nConnection: " + commas + b"\r\n\r\n"))
    client = waypoint.client()
    client.send(b"GET / HTTP/1.1\r\nHost: app\r\nConnection: " + commas + b"\r\n\r\n")
    waypoint.run_until(lambda: client.data.endswith(b"hello") or client.is_over)
    assert client.data.startswith(b"HTTP/1.1 200 OK\r\n")
    assert client.data.endswith(b"hello")


def test_a_flood_of_interim_answers_to_head_is_502(waypoint: LoopbackWaypoint, app: App) -> None:
    app.answers(b"HTTP/1.1 102 P\r\n\r\n" * 3000)
    client = waypoint.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: app\r\n\r\n")
    waypoint.run_until(lambda: b"HTTP/1.1 502" in client.data or client.is_over)
    assert b"HTTP/1.1 502" in client.data


def test_interim_answers_to_head_pass_in_pieces(waypoint: LoopbackWaypoint, app: App) -> None:
    client = waypoint.client()
    client.send(b"HEAD / HTTP/1.1\r\nHost: app\r\n\r\n")
    waypoint.run_until(lambda: app.connections and b"\r\n\r\n" in app.connections[0].data)
    app.connections[0].send(b"HTTP/1.1 103 E\r\nlink: a\r\n\r\nHTTP/1.1 103 E\r\nlink: b\r\n\r\nHTTP/1.1 2")
    waypoint.run_until(lambda: b"link: b" in client.data)
    app.connections[0].send(b"00 OK\r\nContent-Length: 7\r\n\r\n")
    waypoint.run_until(lambda: b"HTTP/1.1 200 OK" in client.data)
    assert client.data.count(b"HTTP/1.1 103") == 2


@pytest.mark.parametrize(("method", "status"), [(b"HEAD", b"200"), (b"GET", b"204"), (b"GET", b"304")])
def test_a_body_of_http2_where_there_is_none_smuggles_nothing(waypoint: LoopbackWaypoint, method: bytes, status: bytes) -> None:
    app = waypoint.app()
    waypoint.cluster(waypoint.endpoint(app), http=UpstreamHttp.HTTP2)
    waypoint.serve()
    servers: list[H2End] = []
    app.on_data = lambda end: servers.append(H2End(end, client=False))
    client = waypoint.client()
    client.send(method + b" / HTTP/1.1\r\nHost: app\r\n\r\n")
    waypoint.run_until(lambda: servers and servers[0].heads)
    (number,) = servers[0].heads
    servers[0].respond(number, status=status)
    servers[0].send(number, b"HTTP/1.1 200 smuggled\r\n\r\n", end=True)
    waypoint.run_until(lambda: client.is_over or b"smuggled" in client.data)
    assert b"smuggled" not in client.data


class Stuck:
    """A transport whose far side does not read. Implements `Transport`."""

    def __init__(self) -> None:
        self.is_full = True
        self.written = bytearray()
        self.is_closed = False

    def write(self, data: bytes) -> None:
        self.written += data

    def end(self) -> None:
        pass

    def close(self) -> None:
        self.is_closed = True

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass

    def use(self, receiver: Receiver) -> None:
        pass


class Server(Http2Connection):
    """One without requests."""

    def streams(self) -> list[Http2Stream]:
        return []

    def heard(self, event: Event) -> None:
        pass

    def died(self, why: str, broken: bool) -> None:
        raise AssertionError(why)


def test_control_frames_wait_for_a_peer_that_does_not_read() -> None:
    loop = Loop()
    transport = Stuck()
    connection = Server(loop, client=False, bounds=limits())
    connection.join(transport)
    peer = Mux(client=True, limits=limits())
    for number in range(10):
        peer.ping(b"%08d" % number)
    connection.received(memoryview(bytes(peer.take())))
    loop.run_once(0)
    assert not transport.written
    assert connection.mux.output_size > 10 * 17
    transport.is_full = False
    connection.writable()
    loop.run_once(0)
    assert b"00000009" in transport.written
    assert not connection.mux.has_output
    loop.close()


@pytest.mark.parametrize(("start", "seconds"), [(b"", IDLE_SECONDS), (b"PRI * HT", HEAD_SECONDS)])
def test_a_client_that_does_not_say_what_it_speaks_is_cut(waypoint: LoopbackWaypoint, start: bytes, seconds: float) -> None:
    port = PortAtWork(80, PortProtocol.HTTP)
    now = [0.0]
    loop, waypoint.engine.loop = waypoint.engine.loop, Loop(lambda: now[0])
    transport = Stuck()
    opening = Opening(waypoint.proxy.connections, transport, Client(None, "10.0.0.1"), port)
    if start:
        opening.received(memoryview(start))
    late, waypoint.engine.loop = waypoint.engine.loop, loop
    for now[0] in (seconds - 1.0, seconds + 1.0):
        assert not transport.is_closed
        late.run_once(0)
    assert transport.is_closed
    late.close()
