"""The `websockets` library, client and server, with a waypoint's data path between them, by HTTP/1.1 and by HTTP/2's extended CONNECT."""

from __future__ import annotations

import http
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TypeVar

import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.sync.client import ClientConnection, connect
from websockets.sync.server import Server, ServerConnection, serve
from websockets.uri import parse_uri

from tests.kit.http2 import H2End
from tests.kit.polling import eventually
from tests.kit.waypoint import Bytes, LoopbackWaypoint
from waypoint.data.sockets import SocketStream
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.sockets import Acceptor
from ztunnel.mesh.errors import MeshError
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.routes import TextKind, TextMatch
from ztunnel.mesh.l7.security import L7Action, L7Policy, L7Rule, Operation

T = TypeVar("T")
SECONDS = 60.0
BIG = 1 << 20


class App:
    """What each path of the server does."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.closes: queue.Queue[tuple[int | None, str | None]] = queue.Queue()
        self.pongs: queue.Queue[bool] = queue.Queue()

    def refuse(self, connection: ServerConnection, request: Request) -> Response | None:
        self.asked.append(request.path)
        status = {"/forbidden": http.HTTPStatus.FORBIDDEN, "/nowhere": http.HTTPStatus.NOT_FOUND}.get(request.path)
        return None if status is None else connection.respond(status, f"the application says {int(status)}\n")

    def __call__(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        match connection.request.path:
            case "/fragments":
                connection.send(list(connection.recv_streaming()))
            case "/ping":
                self.pongs.put(connection.ping(b"are you there").wait(SECONDS))
            case "/closes":
                connection.close(4001, "the server has had enough")
            case _:
                with suppress(ConnectionClosed):
                    for message in connection:
                        connection.send(message)
                self.closes.put((connection.close_code, connection.close_reason))


class _Piped(Bytes):
    """Passes everything on to the other end."""

    def __init__(self) -> None:
        super().__init__()
        self.other: _Piped | None = None

    def received(self, data: memoryview) -> None:
        assert self.other is not None
        self.other.send(bytes(data))

    def peer_ended(self) -> None:
        assert self.other is not None
        self.other.end()

    def lost(self, error: MeshError) -> None:
        assert self.other is not None
        self.other.close()


class Between:
    """The waypoint's loop in a thread of its own. What connects to `door` is a mesh's client, in a stream of its tunnel."""

    def __init__(self, port: int) -> None:
        self.waypoint = LoopbackWaypoint()
        self.waypoint.cluster(Endpoint("127.0.0.1", port))
        self.waypoint.serve()
        listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.door: Address = listener.getsockname()
        self.waypoint._acceptors.append(Acceptor(self.waypoint.loop, listener, self._accept, lambda: None))
        self._stop = threading.Event()
        self._tasks: queue.Queue[Callable[[], object]] = queue.Queue()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def connect(self, path: str = "/echo", compression: str | None = "deflate") -> ClientConnection:
        """A client whose pings are the test's alone."""
        return connect(
            f"ws://app.default{path}",
            sock=socket.create_connection(self.door, timeout=SECONDS),
            compression=compression,
            legacy=True,
            open_timeout=SECONDS,
            close_timeout=SECONDS,
            ping_interval=None,
            max_size=2 * BIG,
        )

    def do(self, task: Callable[[], T]) -> T:
        """What the loop's thread answers."""
        answer: queue.Queue[T] = queue.Queue()
        self._tasks.put(lambda: answer.put(task()))
        return answer.get(timeout=SECONDS)

    def _accept(self, sock: socket.socket, _peer: Address) -> None:
        near, far = _Piped(), _Piped()
        near.other, far.other = far, near
        near.stream = SocketStream(self.waypoint.loop, self.waypoint.scratch, near)
        self.waypoint._sockets.append(near.stream)
        far.stream = self.waypoint.carry(far)
        near.stream.attach(sock)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.waypoint.loop.run_once(0.02)
            while not self._tasks.empty():
                self._tasks.get()()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.waypoint.close()


@pytest.fixture(name="app")
def fixture_app() -> App:
    return App()


@pytest.fixture(name="server")
def fixture_server(app: App) -> Iterator[Server]:
    server = serve(
        app,
        "127.0.0.1",
        0,
        process_request=app.refuse,
        open_timeout=SECONDS,
        close_timeout=SECONDS,
        ping_interval=None,
        max_size=2 * BIG,
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture(name="between")
def fixture_between(server: Server) -> Iterator[Between]:
    between = Between(server.socket.getsockname()[1])
    yield between
    between.close()


@pytest.mark.parametrize("compression", ["deflate", None])
def test_messages_of_every_kind_and_size_come_back(between: Between, compression: str | None) -> None:
    with between.connect(compression=compression) as client:
        names = [each.name for each in client.protocol.extensions]
        assert names == (["permessage-deflate"] if compression else [])
        for message in ("text ✓", b"binary \x00\xff", "", b"", "x" * BIG, os.urandom(BIG), "last"):
            client.send(message)
            assert client.recv(SECONDS) == message


def test_fragments_stay_fragments(between: Between) -> None:
    with between.connect("/fragments", compression=None) as client:
        client.send(["one", "two", "three"])
        assert [part for part in client.recv_streaming() if part] == ["one", "two", "three"]


def test_pings_of_both_sides_are_answered(between: Between, app: App) -> None:
    with between.connect() as client:
        assert client.ping(b"and you").wait(SECONDS)
    with between.connect("/ping"):
        assert app.pongs.get(timeout=SECONDS)


def test_close_codes_of_both_sides_arrive(between: Between, app: App) -> None:
    with between.connect() as client:
        client.close(4002, "the client has had enough")
    assert app.closes.get(timeout=SECONDS) == (4002, "the client has had enough")
    with between.connect("/closes") as client, pytest.raises(ConnectionClosed):
        client.recv(SECONDS)
    assert (client.close_code, client.close_reason) == (4001, "the server has had enough")


def test_fifty_at_once_keep_apart(between: Between) -> None:
    with ExitStack() as stack:
        clients = [stack.enter_context(between.connect()) for _ in range(50)]
        for number, client in enumerate(clients):
            client.send(f"from {number}")
        for number, client in enumerate(clients):
            assert client.recv(SECONDS) == f"from {number}"


@pytest.mark.parametrize(("path", "status"), [("/forbidden", 403), ("/nowhere", 404)])
def test_a_refusal_of_the_application_is_passed_on(between: Between, path: str, status: int) -> None:
    with pytest.raises(InvalidStatus) as caught:
        between.connect(path)
    assert caught.value.response.status_code == status
    assert caught.value.response.body == f"the application says {status}\n".encode()


def test_a_policy_refuses_the_upgrade(between: Between, app: App) -> None:
    rules = (L7Rule(operations=(Operation(paths=(TextMatch(TextKind.EXACT, "/secret"),)),)),)
    policy = L7Policy("secret", "default", L7Action.DENY, rules, ())
    waypoint = between.waypoint

    def deny() -> None:
        services = tuple(replace(each, policies=(policy.key,)) for each in waypoint.config.services)
        waypoint.update(services=services, policies={policy.key: policy})

    between.do(deny)
    with pytest.raises(InvalidStatus) as caught:
        between.connect("/secret")
    assert caught.value.response.status_code == 403
    assert caught.value.response.body == b"RBAC: access denied"
    with between.connect("/echo") as client:
        client.send("allowed")
        assert client.recv(SECONDS) == "allowed"
    assert app.asked == ["/echo"]


def test_another_protocol_is_not_upgraded_to(between: Between, app: App) -> None:
    with socket.create_connection(between.door, timeout=SECONDS) as sock:
        sock.sendall(b"GET /echo HTTP/1.1\r\nHost: app\r\nConnection: upgrade\r\nUpgrade: mqtt\r\n\r\n")
        with sock.makefile("rb") as answer:
            assert answer.readline().startswith(b"HTTP/1.1 403 ")
    assert app.asked == []


def test_an_idle_one_is_no_idle_connection(between: Between) -> None:
    connections = between.waypoint.proxy.connections

    def a_year_passes() -> int:
        for connection in connections.http:
            connection.busy_since -= 365 * 86400.0
        connections.sweep()
        return len(connections.http)

    with between.connect() as client:
        assert between.do(a_year_passes) == 1
        client.send("still here")
        assert client.recv(SECONDS) == "still here"


def test_it_outlives_the_begin_of_a_drain_and_not_its_end(between: Between, app: App) -> None:
    proxy = between.waypoint.proxy
    with between.connect() as client:
        between.do(proxy.drain)
        client.send("still here")
        assert client.recv(SECONDS) == "still here"
        assert between.do(proxy.live) > 0
        between.do(proxy.close)
        with pytest.raises(ConnectionClosed):
            client.recv(SECONDS)
    eventually(lambda: between.do(proxy.live) == 0, within=SECONDS, saying="nothing is left of it")
    code, _ = app.closes.get(timeout=SECONDS)
    assert code in (1001, 1005, 1006)


class Http2Socket:
    """The library's own framing on a stream that an extended CONNECT opened (RFC 8441)."""

    def __init__(self, between: Between, path: bytes) -> None:
        self.between = between
        self.protocol = ClientProtocol(parse_uri("ws://app.default/"), state=State.OPEN, max_size=2 * BIG)
        self.frames: list[Frame] = []
        self._read = 0
        self.client = between.do(lambda: H2End(between.waypoint.client(), client=True))
        pseudo = [(b":method", b"CONNECT"), (b":protocol", b"websocket"), (b":scheme", b"http"), (b":authority", b"app"), (b":path", path)]
        self.stream = between.do(lambda: self.client.request([*pseudo, (b"sec-websocket-version", b"13")]))
        self.until(lambda: self.client.status(self.stream) is not None, "the waypoint answers")

    @property
    def status(self) -> bytes | None:
        return self.between.do(lambda: self.client.status(self.stream))

    def until(self, condition: Callable[[], object], saying: str) -> None:
        eventually(lambda: self.between.do(condition), within=SECONDS, saying=saying)

    def flush(self) -> None:
        data = b"".join(self.protocol.data_to_send())
        self.between.do(lambda: self.client.send(self.stream, data))

    def take(self, count: int) -> list[Frame]:
        """The next frames."""

        def came() -> bool:
            data = bytes(self.between.do(lambda: self.client.data[self.stream][self._read :]))
            self._read += len(data)
            if data:
                self.protocol.receive_data(data)
                self.frames += [event for event in self.protocol.events_received() if isinstance(event, Frame)]
            return len(self.frames) >= count

        eventually(came, within=SECONDS, saying=f"{count} frames come")
        taken, self.frames = self.frames[:count], self.frames[count:]
        return taken


def test_by_extended_connect_of_http2(between: Between, app: App) -> None:
    client = Http2Socket(between, b"/echo")
    assert client.status == b"200"
    body = os.urandom(BIG // 32)
    client.protocol.send_text("text ✓".encode())
    client.protocol.send_binary(body)
    client.protocol.send_ping(b"ping")
    client.flush()
    frames = {frame.opcode: bytes(frame.data) for frame in client.take(3)}
    assert frames == {Opcode.TEXT: "text ✓".encode(), Opcode.BINARY: body, Opcode.PONG: b"ping"}
    client.protocol.send_close(4003, "enough")
    client.flush()
    (farewell,) = client.take(1)
    assert (farewell.opcode, Close.parse(farewell.data)) == (Opcode.CLOSE, Close(4003, "enough"))
    assert app.closes.get(timeout=SECONDS) == (4003, "enough")


@pytest.mark.parametrize(("path", "status"), [(b"/forbidden", b"403"), (b"/nowhere", b"404")])
def test_a_refusal_reaches_a_client_of_http2(between: Between, path: bytes, status: bytes) -> None:
    assert Http2Socket(between, path).status == status
