"""Envoy as the oracle of what an answer is: odd and broken ones of an application, and what the client is given of each."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import h11
import pytest

from tests.kit import envoy
from tests.kit.waypoint import LoopbackWaypoint
from ztunnel.mesh.l7.clusters import Endpoint

SECONDS = 10.0

Answer = tuple[int, list[tuple[bytes, bytes]], bytes, bool]
"""Status, the headers that the application set, body, and whether it is whole."""
OURS = {b"server", b"date", b"x-envoy-upstream-service-time", b"transfer-encoding", b"connection", b"content-length", b"content-type"}
"""Headers in which the two proxies may differ."""


@dataclass
class App:
    """Answers each request with `answer` and closes."""

    listener: socket.socket
    answer: bytes = b""

    def serve(self) -> None:
        """Until the listener is shut down."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True).start()

    def _answer(self, sock: socket.socket) -> None:
        with suppress(OSError), sock:  # who asked may not want all of it
            data = b""
            while b"\r\n\r\n" not in data:
                piece = sock.recv(65536)
                if not piece:
                    return
                data += piece
            sock.sendall(self.answer)
            sock.shutdown(socket.SHUT_WR)
            sock.settimeout(SECONDS)
            while sock.recv(65536):
                pass


@pytest.fixture(scope="module", name="app")
def fixture_app() -> Iterator[App]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listener:
        app = App(listener)
        thread = threading.Thread(target=app.serve, daemon=True)
        thread.start()
        yield app
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@pytest.fixture(scope="module", name="oracle")
def fixture_oracle(app: App) -> Iterator[tuple[str, int]]:
    """The address of an Envoy before the application."""
    with envoy.running(envoy.http_proxy(app.listener.getsockname())) as running:
        yield ("127.0.0.1", running.port("http"))


@pytest.fixture(scope="module", name="waypoint")
def fixture_waypoint(app: App) -> Iterator[LoopbackWaypoint]:
    waypoint = LoopbackWaypoint()
    host, port = app.listener.getsockname()
    waypoint.cluster(Endpoint(host, port, "app", waypoint.pki.identity("app"), hbone=False))
    waypoint.serve()
    yield waypoint
    waypoint.close()


def ask_envoy(address: tuple[str, int], wire: bytes) -> bytes:
    """All that it says until it closes."""
    said = b""
    with socket.create_connection(address, timeout=SECONDS) as sock:
        sock.sendall(wire)
        while data := sock.recv(65536):
            said += data
    return said


def read(wire: bytes, method: str) -> Answer | None:
    """As a client reads it."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method=method, target="/", headers=[("host", "a"), ("connection", "close")]))
    connection.send(h11.EndOfMessage())
    connection.receive_data(wire)
    connection.receive_data(b"")
    head: h11.Response | None = None
    body = b""
    try:
        while True:
            event = connection.next_event()
            if isinstance(event, h11.Response):
                head = event
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, (h11.EndOfMessage, h11.ConnectionClosed)):
                break
    except h11.RemoteProtocolError:
        event = None
    if head is None:
        return None
    headers = sorted((name, value) for name, value in head.headers if name not in OURS)
    if head.status_code in (502, 503):
        headers, body = [], b""
    return head.status_code, headers, body, event is not None


def ok(*lines: bytes, status: bytes = b"HTTP/1.1 200 OK") -> bytes:
    return b"\r\n".join([status, *lines, b"", b""])


CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: 3"
ANSWERS: dict[str, bytes] = {
    "plain": ok(LENGTH) + b"abc",
    "headers": ok(LENGTH, b"X: 1", b"Set-Cookie: a=b", b"Set-Cookie: c=d", b"x:2") + b"abc",
    "no body": ok(b"Content-Length: 0"),
    "to the end": ok() + b"abc",
    "to the end empty": ok(),
    "http10": ok(LENGTH, status=b"HTTP/1.0 200 OK") + b"abc",
    "http10 to the end": ok(status=b"HTTP/1.0 200 OK") + b"abc",
    "http10 chunked": ok(CHUNKED, status=b"HTTP/1.0 200 OK") + b"3\r\nabc\r\n0\r\n\r\n",
    "http12": ok(LENGTH, status=b"HTTP/1.2 200 OK") + b"abc",
    "http2": ok(LENGTH, status=b"HTTP/2 200 OK") + b"abc",
    "http lower": ok(LENGTH, status=b"http/1.1 200 OK") + b"abc",
    "no reason": ok(LENGTH, status=b"HTTP/1.1 200 ") + b"abc",
    "no reason or space": ok(LENGTH, status=b"HTTP/1.1 200") + b"abc",
    "reason high": ok(LENGTH, status=b"HTTP/1.1 200 \xc3\xa9") + b"abc",
    "reason control": ok(LENGTH, status=b"HTTP/1.1 200 a\x01") + b"abc",
    "status 99": ok(LENGTH, status=b"HTTP/1.1 99 x") + b"abc",
    "status 600": ok(LENGTH, status=b"HTTP/1.1 600 x") + b"abc",
    "status 999": ok(LENGTH, status=b"HTTP/1.1 999 x") + b"abc",
    "status 1000": ok(LENGTH, status=b"HTTP/1.1 1000 x") + b"abc",
    "status 000": ok(LENGTH, status=b"HTTP/1.1 000 x") + b"abc",
    "status text": ok(LENGTH, status=b"HTTP/1.1 abc x") + b"abc",
    "204": ok(status=b"HTTP/1.1 204 No Content"),
    "204 length": ok(LENGTH, status=b"HTTP/1.1 204 No Content") + b"abc",
    "204 length zero": ok(b"Content-Length: 0", status=b"HTTP/1.1 204 No Content"),
    "204 chunked": ok(CHUNKED, status=b"HTTP/1.1 204 No Content") + b"0\r\n\r\n",
    "205": ok(b"Content-Length: 0", status=b"HTTP/1.1 205 Reset Content"),
    "304": ok(b"ETag: x", status=b"HTTP/1.1 304 Not Modified"),
    "304 length": ok(LENGTH, status=b"HTTP/1.1 304 Not Modified"),
    "100": ok(status=b"HTTP/1.1 100 Continue") + ok(LENGTH) + b"abc",
    "103": ok(b"Link: x", status=b"HTTP/1.1 103 Early Hints") + ok(LENGTH) + b"abc",
    "many interim": ok(status=b"HTTP/1.1 102 Processing") * 5 + ok(LENGTH) + b"abc",
    "101": ok(b"Connection: upgrade", b"Upgrade: websocket", status=b"HTTP/1.1 101 Switching Protocols"),
    "chunked": ok(CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n",
    "chunk extension": ok(CHUNKED) + b"3;a=b\r\nabc\r\n0\r\n\r\n",
    "chunk space": ok(CHUNKED) + b"3 \r\nabc\r\n0\r\n\r\n",
    "chunk lf": ok(CHUNKED) + b"3\nabc\n0\n\n",
    "chunk bad": ok(CHUNKED) + b"x\r\nabc\r\n0\r\n\r\n",
    "chunk cut": ok(CHUNKED) + b"5\r\nabc",
    "trailers": ok(CHUNKED) + b"3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n",
    "length cut": ok(b"Content-Length: 5") + b"abc",
    "length too short": ok(b"Content-Length: 2") + b"abc",
    "length and chunked": ok(LENGTH, CHUNKED) + b"3\r\nabc\r\n0\r\n\r\n",
    "two lengths": ok(LENGTH, LENGTH) + b"abc",
    "unlike lengths": ok(LENGTH, b"Content-Length: 4") + b"abc",
    "length list": ok(b"Content-Length: 3, 3") + b"abc",
    "length plus": ok(b"Content-Length: +3") + b"abc",
    "length empty": ok(b"Content-Length:") + b"abc",
    "chunked twice": ok(CHUNKED, CHUNKED) + b"0\r\n\r\n",
    "gzip chunked": ok(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "identity": ok(b"Transfer-Encoding: identity") + b"abc",
    "identity length": ok(b"Transfer-Encoding: identity", LENGTH) + b"abc",
    "fold": ok(b"X: a\r\n b", LENGTH) + b"abc",
    "lf": ok(LENGTH).replace(b"\r\n", b"\n") + b"abc",
    "lf one": ok(b"X: a\nY: b", LENGTH) + b"abc",
    "cr inside": ok(b"X: a\rb", LENGTH) + b"abc",
    "nul": ok(b"X: a\x00b", LENGTH) + b"abc",
    "control": ok(b"X: a\x01b", LENGTH) + b"abc",
    "high": ok(b"X: \xc3\xa9", LENGTH) + b"abc",
    "name space": ok(b"X y: a", LENGTH) + b"abc",
    "name spaced": ok(b"X : a", LENGTH) + b"abc",
    "name empty": ok(b": a", LENGTH) + b"abc",
    "name only": ok(b"X", LENGTH) + b"abc",
    "empty value": ok(b"X:", LENGTH) + b"abc",
    "blank value": ok(b"X:   ", LENGTH) + b"abc",
    "empty lines first": b"\r\n\r\n" + ok(LENGTH) + b"abc",
    "nothing": b"",
    "head cut": b"HTTP/1.1 200 OK\r\nContent-Le",
    "noise": b"SSH-2.0-x\r\n\r\n",
    "big header": ok(b"X: " + b"x" * (50 << 10), LENGTH) + b"abc",
    "bigger header": ok(b"X: " + b"x" * (70 << 10), LENGTH) + b"abc",
    "100 headers": ok(*(b"X%d: y" % number for number in range(90)), LENGTH) + b"abc",
    "101 headers": ok(*(b"X%d: y" % number for number in range(110)), LENGTH) + b"abc",
}

STRICTER = {"http12", "fold", "lf", "lf one", "cr inside", "bigger header"}
"""We refuse what Envoy makes something of."""
OTHERWISE = {
    "101": 502,
    "status 1000": 502,
    "204 length": 204,
    "204 chunked": 204,
    "empty lines first": 200,
    "reason control": 200,
    "head cut": 503,
}
"""Our status where Envoy sends on what no client understands, or says 502."""
ALIKE = [name for name in ANSWERS if name not in STRICTER | OTHERWISE.keys() | {"chunk space"}]


def request(method: str) -> bytes:
    return method.encode() + b" / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def ask_us(waypoint: LoopbackWaypoint, wire: bytes) -> bytes:
    """All that our waypoint says until it closes."""
    client = waypoint.client()
    client.send(wire)
    waypoint.run_until(lambda: client.is_over, SECONDS)
    client.close()
    return bytes(client.data)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ALIKE)
def test_an_answer_is_what_envoy_takes_it_for(
    name: str, method: str, app: App, oracle: tuple[str, int], waypoint: LoopbackWaypoint
) -> None:
    app.answer = ANSWERS[name]
    wire = request(method)
    assert read(ask_us(waypoint, wire), method) == read(ask_envoy(oracle, wire), method)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", sorted(STRICTER))
def test_what_we_refuse_alone(name: str, method: str, app: App, oracle: tuple[str, int], waypoint: LoopbackWaypoint) -> None:
    app.answer = ANSWERS[name]
    wire = request(method)
    theirs, ours = read(ask_envoy(oracle, wire), method), read(ask_us(waypoint, wire), method)
    assert theirs is not None
    assert ours is not None
    assert theirs[0] == 200
    assert ours[0] in (502, 503)


@pytest.mark.parametrize("name", OTHERWISE)
def test_where_we_differ(name: str, app: App, oracle: tuple[str, int], waypoint: LoopbackWaypoint) -> None:
    app.answer = ANSWERS[name]
    wire = request("GET")
    theirs, ours = read(ask_envoy(oracle, wire), "GET"), read(ask_us(waypoint, wire), "GET")
    assert theirs is None or theirs[0] == 502
    assert ours is not None
    assert ours[0] == OTHERWISE[name]


def test_a_space_behind_a_chunks_size_cuts_the_answer(app: App, oracle: tuple[str, int], waypoint: LoopbackWaypoint) -> None:
    app.answer = ANSWERS["chunk space"]
    wire = request("GET")
    assert read(ask_envoy(oracle, wire), "GET") == (200, [], b"abc", True)
    assert read(ask_us(waypoint, wire), "GET") == (200, [], b"", False)
