"""Applications for end-to-end tests: an echo server in a pod, clients that say what became of them, and a tap on a wire.

An `Echo` says its name to whoever connects, then echoes until the client ends its direction, then ends its own. All of it is plain
sockets in the test process; one thread serves one server, however many connections it has.
"""

from __future__ import annotations

import select
import selectors
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Self

from scripts.wiretap import ETH_P_ALL, FRAME_BYTES, Segment, segment_of
from tests.kit.netns import TIMEOUT_SECONDS, Place, family_of, plain
from ztunnel.node import netns

SO_RCVBUFFORCE = 33
SOL_PACKET = 263
PACKET_STATISTICS = 6
TAP_BYTES = 64 << 20
_CHUNK = 1 << 18


@dataclass
class _Session:
    sock: socket.socket
    pending: bytearray = field(default_factory=bytearray)
    ended: bool = False


class Echo:
    """An echo server in a place. A context manager."""

    def __init__(self, place: Place, port: int, *, address: str = "::", name: str = "", backlog: int = 512) -> None:
        """`name`: said first on each connection, with a line feed."""
        self.peers: list[str] = []
        """Addresses of the clients, in the order in which they came."""
        self._greeting = f"{name}\n".encode() if name else b""
        self._listener = place.tcp_socket(family_of(address))
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind((address, port))
        self._listener.listen(backlog)
        self._listener.setblocking(False)
        self._wake, self._stop = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stop, selectors.EVENT_READ)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._wake.send(b"x")
        self._thread.join(5)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
        self._selector.close()
        self._wake.close()

    def _serve(self) -> None:
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._stop:
                    return
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._move(key.data)

    def _accept(self) -> None:
        try:
            sock, peer = self._listener.accept()
        except OSError:
            return
        self.peers.append(plain(peer[0]))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        session = _Session(sock, bytearray(self._greeting))
        self._selector.register(sock, selectors.EVENT_READ, session)
        self._move(session)

    def _move(self, session: _Session) -> None:
        try:
            self._transfer(session)
        except OSError:
            self._close(session)

    def _transfer(self, session: _Session) -> None:
        if not session.pending and not session.ended:
            try:
                data = session.sock.recv(_CHUNK)
            except BlockingIOError:
                return
            session.ended = not data
            session.pending += data
        if session.pending:
            try:
                del session.pending[: session.sock.send(session.pending)]
            except BlockingIOError:
                pass
        if session.pending:
            self._selector.modify(session.sock, selectors.EVENT_WRITE, session)
        elif session.ended:
            self._close(session)
        else:
            self._selector.modify(session.sock, selectors.EVENT_READ, session)

    def _close(self, session: _Session) -> None:
        self._selector.unregister(session.sock)
        session.sock.close()


def call(place: Place, to: tuple[str, int], message: bytes = b"hello", source: tuple[str, int] | None = None) -> bytes:
    """What an echo server answers to one message, its name included, up to the end of the stream. Raises OSError as sockets do."""
    with place.connect(to, source) as connection:
        connection.sendall(message)
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)


@contextmanager
def connected(place: Place, to: tuple[str, int]) -> Iterator[socket.socket]:
    """A connection that may have been reset already, which `connect` would say by an exception."""
    with place.tcp_socket(family_of(to[0])) as sock:
        sock.setblocking(False)
        sock.connect_ex(to)
        select.select([], [sock], [], TIMEOUT_SECONDS)
        sock.settimeout(TIMEOUT_SECONDS)
        yield sock


def outcome(place: Place, to: tuple[str, int], message: bytes = b"hello", source: tuple[str, int] | None = None) -> str:
    """`echoed`, `cut` (a clean end without all of the answer), `reset`, `refused`, `timeout` or the error's text."""
    try:
        answer = call(place, to, message, source)
    except ConnectionRefusedError:
        return "refused"
    except (ConnectionResetError, BrokenPipeError):
        return "reset"
    except TimeoutError:
        return "timeout"
    except OSError as error:
        return str(error)
    return "echoed" if answer.endswith(message) else "cut"


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    return b"".join(iter(lambda: sock.recv(_CHUNK), b""))


def read_exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes; fewer at the end of the stream."""
    data = bytearray()
    while len(data) < size and (part := sock.recv(min(_CHUNK, size - len(data)))):
        data += part
    return bytes(data)


def ping(connection: socket.socket, message: bytes = b"ping") -> bool:
    """Whether an open connection to an echo server without a name still carries bytes both ways."""
    try:
        connection.sendall(message)
        return read_exactly(connection, len(message)) == message
    except OSError:
        return False


def ending(connection: socket.socket) -> str:
    """How an idle connection ends: `end` (FIN), `reset`, `data` or `timeout`."""
    try:
        return "data" if connection.recv(1) else "end"
    except ConnectionResetError:
        return "reset"
    except TimeoutError:
        return "timeout"


class Tap:
    """Every TCP segment with payload that passed an interface since the tap was opened."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.segments: list[Segment] = []

    def look(self) -> list[Segment]:
        """All segments so far, those included that came since the last look. A tap that has missed some proves nothing, and says so."""
        while True:
            try:
                frame = self._sock.recv(FRAME_BYTES)
            except BlockingIOError:
                _, missed = struct.unpack("II", self._sock.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
                assert missed == 0, f"the tap's buffer was too small for {missed} frames"
                return self.segments
            segment = segment_of(frame)
            if segment is not None:
                self.segments.append(segment)

    @property
    def ports(self) -> set[int]:
        """Server ports: of each segment the smaller one of its two."""
        return {min(segment.source_port, segment.destination_port) for segment in self.look()}

    def saw(self, marker: bytes) -> bool:
        """Whether these bytes were in any segment."""
        return any(marker in segment.payload for segment in self.look())


@contextmanager
def tapped(place: Place, interface: str = "eth0") -> Iterator[Tap]:
    """Listens on an interface of a place."""
    with netns.inside(place.fd):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind((interface, ETH_P_ALL))
    with sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, TAP_BYTES)
        except PermissionError:  # root of a user namespace may not pass the machine's limit
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TAP_BYTES)
        sock.setblocking(False)
        yield Tap(sock)
