"""Envoy as the oracle of what a request is: odd, broken and smuggling ones, and what the application behind is given of each."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import h11
import pytest

from tests.kit import envoy
from tests.kit.waypoint import LoopbackWaypoint
from ztunnel.mesh.l7.clusters import Endpoint

NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
SECONDS = 10.0

Seen = tuple[bytes, bytes, bytes, bytes]
"""Method, target, host and body of a request as an application reads them."""


@dataclass
class App:
    """An HTTP/1.1 server that notes what it is asked."""

    listener: socket.socket
    seen: list[Seen] = field(default_factory=list)

    def serve(self) -> None:
        """Until the listener is shut down."""
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._talk, args=(sock,), daemon=True).start()

    def _talk(self, sock: socket.socket) -> None:
        with suppress(h11.RemoteProtocolError), sock:  # a request that was cut
            self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        connection = h11.Connection(h11.SERVER)
        request: h11.Request | None = None
        body = b""
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(_receive(sock))
            elif isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += bytes(event.data)
            elif isinstance(event, h11.EndOfMessage) and request is not None:
                host = next((value for name, value in request.headers if name == b"host"), b"")
                self.seen.append((request.method, request.target, host, body))
                sock.sendall(connection.send(h11.Response(status_code=200, headers=[("content-length", "0")])) or b"")
                connection.send(h11.EndOfMessage())
                if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                    return
                connection.start_next_cycle()
            else:
                return


def _receive(sock: socket.socket) -> bytes:
    try:
        return sock.recv(65536)
    except ConnectionError:
        return b""


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
    """The address of an Envoy before the application, its options those of Istio's waypoints."""
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


def statuses(data: bytes) -> list[int]:
    """Of every answer that there is in it."""
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3})", data)]


def ask_envoy(address: tuple[str, int], wire: bytes) -> bytes:
    """All that it says until it closes."""
    said = b""
    with socket.create_connection(address, timeout=SECONDS) as sock:
        try:
            sock.sendall(wire)
            while data := sock.recv(65536):
                said += data
        except ConnectionResetError:
            pass
    return said


def get(*lines: bytes, target: bytes = b"/x", method: bytes = b"GET", version: bytes = b"HTTP/1.1", host: bytes = b"Host: a") -> bytes:
    return b"\r\n".join([method + b" " + target + b" " + version, *([host] if host else []), *lines, b"", b""])


def chunked(body: bytes, *lines: bytes) -> bytes:
    return get(b"Transfer-Encoding: chunked", *lines, method=b"POST") + body


REQUESTS: dict[str, bytes] = {
    "plain": get(),
    "body": get(b"Content-Length: 3", method=b"POST") + b"abc",
    "get body": get(b"Content-Length: 3") + b"abc",
    "empty lines before": b"\r\n\r\n" + get(),
    "bare lf before": b"\n" + get(),
    "chunked": chunked(b"3\r\nabc\r\n0\r\n\r\n"),
    "chunk upper": chunked(b"A\r\n0123456789\r\n0\r\n\r\n"),
    "chunk zeros": chunked(b"0003\r\nabc\r\n000\r\n\r\n"),
    "chunk extension": chunked(b"3;a=b\r\nabc\r\n0;c\r\n\r\n"),
    "chunk extension quoted": chunked(b'3;a="b;c"\r\nabc\r\n0\r\n\r\n'),
    "chunk extension lf": chunked(b"3;a\nb\r\nabc\r\n0\r\n\r\n"),
    "chunk extension cr": chunked(b"3;a\rb\r\nabc\r\n0\r\n\r\n"),
    "chunk space": chunked(b"3 \r\nabc\r\n0\r\n\r\n"),
    "chunk space first": chunked(b" 3\r\nabc\r\n0\r\n\r\n"),
    "chunk lf": chunked(b"3\nabc\n0\n\n"),
    "chunk size lf": chunked(b"3\nabc\r\n0\r\n\r\n"),
    "chunk data lf": chunked(b"3\r\nabc\n0\r\n\r\n"),
    "chunk long": chunked(b"3\r\nabcd\r\n0\r\n\r\n"),
    "chunk short": chunked(b"3\r\nab\r\n0\r\n\r\n"),
    "chunk hex prefix": chunked(b"0x3\r\nabc\r\n0\r\n\r\n"),
    "chunk plus": chunked(b"+3\r\nabc\r\n0\r\n\r\n"),
    "chunk minus": chunked(b"-3\r\nabc\r\n0\r\n\r\n"),
    "chunk no size": chunked(b"\r\nabc\r\n0\r\n\r\n"),
    "chunk overflow": chunked(b"10000000000000003\r\nabc\r\n0\r\n\r\n"),
    "trailers": chunked(b"3\r\nabc\r\n0\r\nX-T: 1\r\n\r\n"),
    "trailer length": chunked(b"3\r\nabc\r\n0\r\nContent-Length: 1\r\n\r\n"),
    "trailer lf": chunked(b"3\r\nabc\r\n0\r\nX-T: 1\n\r\n"),
    "trailer bad": chunked(b"3\r\nabc\r\n0\r\nX T: 1\r\n\r\n"),
    "length and chunked": chunked(b"0\r\n\r\n", b"Content-Length: 5"),
    "chunked and length": get(b"Content-Length: 5", b"Transfer-Encoding: chunked", method=b"POST") + b"0\r\n\r\n",
    "two lengths": get(b"Content-Length: 3", b"Content-Length: 3", method=b"POST") + b"abc",
    "unlike lengths": get(b"Content-Length: 3", b"Content-Length: 0", method=b"POST") + b"abc",
    "length list": get(b"Content-Length: 3, 3", method=b"POST") + b"abc",
    "length plus": get(b"Content-Length: +3", method=b"POST") + b"abc",
    "length minus": get(b"Content-Length: -3", method=b"POST") + b"abc",
    "length hex": get(b"Content-Length: 0x3", method=b"POST") + b"abc",
    "length empty": get(b"Content-Length:", method=b"POST"),
    "length zeros": get(b"Content-Length: 003", method=b"POST") + b"abc",
    "length overflow": get(b"Content-Length: 18446744073709551619", method=b"POST") + b"abc",
    "length spaced": get(b"Content-Length : 3", method=b"POST") + b"abc",
    "length space inside": get(b"Content-Length: 3 0", method=b"POST") + b"abc",
    "length underscore": get(b"Content_Length: 3", method=b"POST"),
    "chunked twice": chunked(b"0\r\n\r\n", b"Transfer-Encoding: chunked"),
    "chunked list twice": get(b"Transfer-Encoding: chunked, chunked", method=b"POST") + b"0\r\n\r\n",
    "chunked upper": get(b"Transfer-Encoding: CHUNKED", method=b"POST") + b"0\r\n\r\n",
    "chunked tab": get(b"Transfer-Encoding:\tchunked", method=b"POST") + b"0\r\n\r\n",
    "chunked vtab": get(b"Transfer-Encoding: \x0bchunked", method=b"POST") + b"0\r\n\r\n",
    "chunked spaced": get(b"Transfer-Encoding : chunked", method=b"POST") + b"0\r\n\r\n",
    "chunked quoted": get(b'Transfer-Encoding: "chunked"', method=b"POST") + b"0\r\n\r\n",
    "chunked x": get(b"Transfer-Encoding: xchunked", method=b"POST") + b"0\r\n\r\n",
    "chunked comma": get(b"Transfer-Encoding: ,chunked", method=b"POST") + b"0\r\n\r\n",
    "gzip chunked": get(b"Transfer-Encoding: gzip, chunked", method=b"POST") + b"0\r\n\r\n",
    "chunked identity": get(b"Transfer-Encoding: chunked, identity", method=b"POST") + b"0\r\n\r\n",
    "identity": get(b"Transfer-Encoding: identity", method=b"POST"),
    "encoding empty": get(b"Transfer-Encoding:", method=b"POST"),
    "encoding folded": get(b"Transfer-Encoding:\r\n chunked", method=b"POST") + b"0\r\n\r\n",
    "fold": get(b"X: a\r\n b"),
    "fold first": b"GET /x HTTP/1.1\r\n X: a\r\nHost: a\r\n\r\n",
    "lf everywhere": get().replace(b"\r\n", b"\n"),
    "lf one": get(b"X: a\nY: b"),
    "lf last": b"GET /x HTTP/1.1\r\nHost: a\r\n\n",
    "lf first line": b"GET /x HTTP/1.1\nHost: a\r\n\r\n",
    "cr inside": get(b"X: a\rb"),
    "cr cr lf": get(b"X: a\r\r\nY: b"),
    "nul value": get(b"X: a\x00b"),
    "nul name": get(b"X\x00: a"),
    "control": get(b"X: a\x01b"),
    "del": get(b"X: a\x7fb"),
    "high": get(b"X: \xc3\xa9"),
    "high name": get(b"X\xc3: a"),
    "name space": get(b"X y: a"),
    "name space first": get(b"X: a", b"Y : b"),
    "name empty": get(b": a"),
    "name only": get(b"X"),
    "name brackets": get(b"X[]: a"),
    "name tokens": get(b"X!#$%&'*+-.^_`|~9: a"),
    "no host": get(host=b""),
    "host empty": get(host=b"Host:"),
    "two hosts": get(b"Host: b"),
    "same hosts": get(b"Host: a"),
    "host list": get(host=b"Host: a, b"),
    "host space": get(host=b"Host: a b"),
    "host slash": get(host=b"Host: a/b"),
    "host user": get(host=b"Host: u@a"),
    "host port": get(host=b"Host: a:80"),
    "host port bad": get(host=b"Host: a:x"),
    "host v6": get(host=b"Host: [::1]:80"),
    "host query": get(host=b"Host: a?b"),
    "absolute": get(target=b"http://b/y?z"),
    "absolute bare": get(target=b"http://b"),
    "absolute user": get(target=b"http://u@b/"),
    "absolute https": get(target=b"https://b/"),
    "absolute other": get(target=b"ftp://b/"),
    "double slash": get(target=b"//b/x"),
    "query": get(target=b"/x?a=b&c"),
    "query only": get(target=b"?a"),
    "fragment": get(target=b"/x#y"),
    "relative": get(target=b"x"),
    "star": get(target=b"*", method=b"OPTIONS"),
    "star get": get(target=b"*"),
    "high target": get(target=b"/\xc3\xa9"),
    "control target": get(target=b"/a\x01"),
    "nul target": get(target=b"/a\x00"),
    "tab target": get(target=b"/a\tb"),
    "space target": get(target=b"/a b"),
    "quote target": get(target=b'/a"<>\\^`{|}'),
    "dots": get(target=b"/a/../b/./c"),
    "dots encoded": get(target=b"/a/%2e%2e/b"),
    "nul encoded": get(target=b"/a%00"),
    "spaces before version": get(target=b"/x "),
    "tab before version": b"GET /x\tHTTP/1.1\r\nHost: a\r\n\r\n",
    "space after version": get(version=b"HTTP/1.1 "),
    "space first": b" " + get(),
    "http10": get(version=b"HTTP/1.0"),
    "http12": get(version=b"HTTP/1.2"),
    "http20": get(version=b"HTTP/2.0"),
    "http09": b"GET /x\r\n\r\n",
    "http lower": get(version=b"http/1.1"),
    "http long": get(version=b"HTTP/1.10"),
    "method lower": get(method=b"get"),
    "method custom": get(method=b"PURGE"),
    "method unknown": get(method=b"FROB"),
    "method bad": get(method=b"G@T"),
    "method trace": get(method=b"TRACE"),
    "connect": get(target=b"a:80", method=b"CONNECT"),
    "upgrade unknown": get(b"Connection: upgrade", b"Upgrade: foo"),
    "upgrade h2c": get(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABk"),
    "expect unknown": get(b"Expect: x", b"Content-Length: 3", method=b"POST") + b"abc",
    "connection host": get(b"Connection: host"),
    "connection length": get(b"Connection: content-length", b"Content-Length: 3", method=b"POST") + b"abc",
    "te": get(b"TE: trailers", b"Connection: TE"),
    "big header": get(b"X: " + b"x" * (59 << 10)),
    "bigger header": get(b"X: " + b"x" * (61 << 10)),
    "100 headers": get(*(b"X%d: y" % number for number in range(99))),
    "101 headers": get(*(b"X%d: y" % number for number in range(100))),
    "tls": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
}

STRICTER = {
    "chunk space",
    "chunk data lf",
    "chunk long",
    "chunk short",
    "trailer length",
    "trailer lf",
    "encoding folded",
    "fold",
    "lf everywhere",
    "lf one",
    "lf last",
    "lf first line",
    "cr inside",
    "cr cr lf",
    "host empty",
    "two hosts",
    "same hosts",
    "host user",
    "absolute user",
    "tab before version",
    "space after version",
}
"""We answer 400 where Envoy makes something of it."""
OTHER_WORDS = {
    "chunked twice": (501, 400),
    "chunked list twice": (501, 400),
    "chunked identity": (501, 400),
    "encoding empty": (501, 400),
    "http12": (426, 400),
    "http20": (426, 400),
    "connect": (404, 403),
}
"""Refused by both: Envoy's status and ours."""
LAXER = {
    "star",  # for it no route with the prefix "/" matches, while ours is without conditions
    "connection host",  # we let such a nomination have no effect
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_is_what_envoy_takes_it_for(name: str, app: App, oracle: tuple[str, int], waypoint: LoopbackWaypoint) -> None:
    wire = REQUESTS[name] + NEXT
    app.seen.clear()
    theirs = statuses(ask_envoy(oracle, wire))
    they_saw = list(app.seen)
    app.seen.clear()
    client = waypoint.client()
    client.send(wire)
    waypoint.run_until(lambda: client.is_over, SECONDS)
    client.close()
    ours = statuses(bytes(client.data))
    if name in STRICTER:
        assert theirs[0] == 200
        assert (ours, app.seen) == ([400], [])
    elif name in OTHER_WORDS:
        assert (theirs, ours) == tuple([status] for status in OTHER_WORDS[name])
        assert they_saw == app.seen == []
    elif name in LAXER:
        assert ours == [200, 200]
    elif name == "nul encoded":
        assert (theirs, ours) == ([400], [400, 200]), "we keep the connection, for the request has an end that is beyond doubt"
    else:
        assert (ours, app.seen) == (theirs, they_saw)
