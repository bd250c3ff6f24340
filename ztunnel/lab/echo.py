"""The lab's echo server: `python -I -S echo.py --port 8080 --tcp-port 9000`, stand-alone, standard library only, one epoll loop.

A port speaks HTTP/1.1 or echoes bytes, as the first bytes of each connection say; `--tcp-port` never looks and always echoes.
HTTP: a JSON answer that tells who answered and what arrived; `?delay=SECONDS` answers later, `?bytes=N` with a body of N bytes,
`?status=N` with that status. TCP: every byte comes back, half-close included. Each connection's buffers are bounded: a peer that does
not read is no longer read from. Pod, namespace and node come from the environment (POD_NAME, POD_NAMESPACE, NODE_NAME).
"""

import argparse
import errno
import heapq
import json
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import parse_qs

MAX_HEAD = 64 * 1024
MAX_BACKLOG = 256 * 1024
MAX_CONNECTIONS = 20_000
MAX_BODY = 1 << 30
MAX_DELAY = 300.0
CHUNK = 64 * 1024
METHODS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"DELETE ", b"PATCH ", b"OPTIONS ", b"TRACE ")
FILLER = (b"0123456789abcdef" * (CHUNK // 16))[:CHUNK]

WHO = {
    "pod": os.environ.get("POD_NAME", socket.gethostname()),
    "namespace": os.environ.get("POD_NAMESPACE", ""),
    "node": os.environ.get("NODE_NAME", ""),
}


class Request(NamedTuple):
    """A request's head."""

    method: str
    target: str
    version: str
    headers: dict[str, str]
    length: int


class Connection:
    """One accepted connection: what arrived and is not used, what waits to be sent, and how it speaks."""

    __slots__ = (
        "body_left",
        "close_after",
        "filler",
        "inbox",
        "is_raw",
        "outbox",
        "peer",
        "read_ended",
        "request",
        "sock",
        "wake",
        "wanted",
    )

    def __init__(self, sock: socket.socket, peer: str, is_raw: bool | None) -> None:
        self.sock = sock
        self.peer = peer
        self.is_raw = is_raw  # None until the first bytes tell
        self.inbox = bytearray()
        self.outbox = bytearray()
        self.filler = 0  # bytes of body still to be made up
        self.body_left = 0  # bytes of the request's body still to be read
        self.request: Request | None = None  # waits for the end of its body
        self.read_ended = False
        self.close_after = False
        self.wake: float | None = None  # when a delayed answer is due
        self.wanted = 0


class Echo:
    """The loop."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.timers: list[tuple[float, int, Connection, Callable[[], None]]] = []
        self.serial = 0
        self.count = 0

    def listen(self, port: int, is_raw: bool) -> None:
        """Open a port for IPv6 and IPv4, or for the family that there is."""
        try:
            sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            host = "::"
        except OSError:
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            host = "0.0.0.0"  # noqa: S104 - a pod's server listens everywhere
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(4096)
        sock.setblocking(False)
        self.selector.register(sock, selectors.EVENT_READ, is_raw)

    def run(self) -> None:
        """Serve for ever."""
        while True:
            timeout = max(0.0, self.timers[0][0] - time.monotonic()) if self.timers else None
            for key, events in self.selector.select(timeout):
                if isinstance(key.data, Connection):
                    self.serve(key.data, events)
                else:
                    assert isinstance(key.fileobj, socket.socket)
                    self.accept(key.fileobj, key.data)
            self.fire()

    def accept(self, listener: socket.socket, is_raw: bool) -> None:
        """Take what is in the backlog, a bounded number per round."""
        for _ in range(64):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                    time.sleep(0.01)  # the backlog holds them until descriptors are free again
                return
            if self.count >= MAX_CONNECTIONS:
                sock.close()
                continue
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.count += 1
            connection = Connection(sock, address[0].removeprefix("::ffff:"), True if is_raw else None)
            connection.wanted = selectors.EVENT_READ
            self.selector.register(sock, selectors.EVENT_READ, connection)

    def fire(self) -> None:
        """Answer what was delayed until now."""
        now = time.monotonic()
        while self.timers and self.timers[0][0] <= now:
            _, _, connection, answer = heapq.heappop(self.timers)
            if connection.wake is not None and connection.sock.fileno() != -1:
                connection.wake = None
                answer()
                self.advance(connection)

    def serve(self, connection: Connection, events: int) -> None:
        """Read or write what is possible, then do what follows from it."""
        try:
            if events & selectors.EVENT_READ:
                data = connection.sock.recv(CHUNK)
                connection.inbox += data
                connection.read_ended = not data
        except BlockingIOError:
            pass
        except OSError:
            self.close(connection)
            return
        self.advance(connection)

    def advance(self, connection: Connection) -> None:
        """Use the inbox, send the outbox, and wait for what is needed next."""
        try:
            while self.use(connection) or self.send(connection):
                continue
        except OSError:
            self.close(connection)
            return
        if connection.close_after and not connection.outbox and not connection.filler:
            self.close(connection)
            return
        wanted = 0
        if not connection.read_ended and not connection.close_after and len(connection.outbox) + len(connection.inbox) < MAX_BACKLOG:
            wanted |= selectors.EVENT_READ
        if connection.outbox or connection.filler:
            wanted |= selectors.EVENT_WRITE
        self.want(connection, wanted)

    def want(self, connection: Connection, wanted: int) -> None:
        """Register for exactly these events."""
        if wanted == connection.wanted:
            return
        if not connection.wanted:
            self.selector.register(connection.sock, wanted, connection)
        elif not wanted:
            self.selector.unregister(connection.sock)
        else:
            self.selector.modify(connection.sock, wanted, connection)
        connection.wanted = wanted

    def send(self, connection: Connection) -> bool:
        """Send what the socket takes; whether anything went."""
        if not connection.outbox and connection.filler:
            take = min(connection.filler, CHUNK)
            connection.outbox += FILLER[:take]
            connection.filler -= take
        if not connection.outbox:
            return False
        try:
            sent = connection.sock.send(connection.outbox)
        except BlockingIOError:
            return False
        del connection.outbox[:sent]
        return sent > 0

    def use(self, connection: Connection) -> bool:
        """Take one step with what has arrived; whether there was one."""
        if connection.is_raw is None:
            decided = self.decide(connection)
            if decided is None:
                return False
            connection.is_raw = decided
        if connection.is_raw:
            return self.echo(connection)
        if connection.wake is not None or connection.outbox or connection.filler or connection.close_after:
            return False
        if connection.request is not None:
            return self.finish_body(connection, connection.request)
        return self.parse(connection)

    def decide(self, connection: Connection) -> bool | None:
        """Whether this is raw TCP; None while the bytes could still become a request."""
        start = bytes(connection.inbox[:8])
        if any(start.startswith(method) for method in METHODS):
            return False
        could_be = any(method.startswith(start) for method in METHODS)
        return None if could_be and not connection.read_ended else True

    def echo(self, connection: Connection) -> bool:
        """Move the inbox to the outbox; pass half-close on when all is sent."""
        if connection.inbox and len(connection.outbox) < MAX_BACKLOG:
            connection.outbox += connection.inbox
            connection.inbox.clear()
            return True
        if connection.read_ended and not connection.inbox:
            connection.close_after = True
        return False

    def parse(self, connection: Connection) -> bool:
        """Read a request's head."""
        end = connection.inbox.find(b"\r\n\r\n")
        if end < 0:
            if connection.read_ended:
                connection.close_after = True
            elif len(connection.inbox) > MAX_HEAD:
                self.answer(connection, 431, b"", True, False)
            return False
        head = bytes(connection.inbox[:end]).decode("latin-1").split("\r\n")
        del connection.inbox[: end + 4]
        parts = head[0].split(" ")
        headers = {}
        for line in head[1:]:
            name, _, value = line.partition(":")
            headers[name.strip().lower()] = value.strip()
        length = headers.get("content-length", "0")
        if (
            len(parts) != 3
            or not parts[2].startswith("HTTP/1.")
            or not length.isdecimal()
            or int(length) > MAX_BODY
            or "transfer-encoding" in headers
        ):
            self.answer(connection, 400, b'{"error": "bad request"}\n', True, False)
            return False
        if headers.get("expect", "").lower() == "100-continue":
            connection.outbox += b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.request = Request(parts[0], parts[1], parts[2], headers, int(length))
        connection.body_left = int(length)
        if connection.outbox:
            self.send(connection)
        return True

    def finish_body(self, connection: Connection, request: Request) -> bool:
        """Throw the request's body away, then answer."""
        take = min(connection.body_left, len(connection.inbox))
        del connection.inbox[:take]
        connection.body_left -= take
        if connection.body_left:
            connection.close_after = connection.read_ended
            return take > 0
        connection.request = None
        self.respond(connection, request)
        return True

    def respond(self, connection: Connection, request: Request) -> None:
        """Answer one request, now or after its delay."""
        headers = request.headers
        query = parse_qs(request.target.partition("?")[2])
        close = headers.get("connection", "").lower() == "close" or request.version == "HTTP/1.0"
        told = {"remote_address": connection.peer, "method": request.method, "path": request.target, "host": headers.get("host", "")}
        body = (json.dumps(WHO | told | {"headers": headers, "body_length": request.length}) + "\n").encode()
        head_only = request.method == "HEAD"
        status = int(number(query, "status", 200.0, 100.0, 599.0))
        delay = number(query, "delay", 0.0, 0.0, MAX_DELAY)
        made_up = int(number(query, "bytes", -1.0, -1.0, float(MAX_BODY)))

        def answer() -> None:
            if made_up >= 0:
                self.answer(connection, status, b"", close, head_only, made_up)
            else:
                self.answer(connection, status, body, close, head_only)

        if delay:
            connection.wake = time.monotonic() + delay
            self.serial += 1
            heapq.heappush(self.timers, (connection.wake, self.serial, connection, answer))
        else:
            answer()

    def answer(self, connection: Connection, status: int, body: bytes, close: bool, head_only: bool, made_up: int = 0) -> None:
        """Queue a response."""
        kind = "application/octet-stream" if made_up else "application/json"
        line = (
            f"HTTP/1.1 {status} {'OK' if status == 200 else 'Status'}\r\ncontent-type: {kind}\r\ncontent-length: {len(body) + made_up}\r\n"
        )
        connection.outbox += (line + ("connection: close\r\n" if close else "") + "\r\n").encode()
        if not head_only:
            connection.outbox += body
            connection.filler = made_up
        connection.close_after = close

    def close(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection.wanted:
            self.selector.unregister(connection.sock)
            connection.wanted = 0
        if connection.sock.fileno() != -1:
            connection.sock.close()
            self.count -= 1


def number(query: dict[str, list[str]], name: str, default: float, low: float, high: float) -> float:
    """A query parameter as a number within bounds; the default for nonsense."""
    try:
        return min(high, max(low, float(query[name][0])))
    except (KeyError, ValueError):
        return default


def main() -> None:
    """Listen and serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="HTTP and TCP echo server")
    parser.add_argument("--port", type=int, action="append", default=[], help="HTTP or, by its first bytes, TCP")
    parser.add_argument("--tcp-port", type=int, action="append", default=[], help="TCP only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    echo = Echo()
    for port in options.port:
        echo.listen(port, False)
    for port in options.tcp_port:
        echo.listen(port, True)
    echo.run()


if __name__ == "__main__":
    main()
