"""Both ends of HBONE for end-to-end tests: real TLS and HTTP/2 over a blocking socket, and the freedom to do what no peer should.

Credentials come from the caller, so it can be a good peer, a foreign one or a hostile one.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Self

from tests.kit.tls import Wire
from ztunnel.hbone.events import DataReceived, Event, PeerGoingAway, RequestReceived, ResponseReceived
from ztunnel.hbone.handshake import Credentials, Handshake, TlsContexts
from ztunnel.hbone.limits import MuxLimits
from ztunnel.hbone.mux import Mux
from ztunnel.mesh.identity import SpiffeId

PATIENT = MuxLimits(settings=1 << 30, pings=1 << 30, resets=1 << 30, late_frames=1 << 30, window_updates=1 << 30)
"""Who floods gets floods back, and has to read them."""

Headers = tuple[tuple[bytes, bytes], ...]


def connect_headers(authority: str, method: bytes = b"CONNECT") -> Headers:
    """The headers of a request for `authority`; another method gets the pseudo-headers that HTTP/2 wants then."""
    if method != b"CONNECT":
        return ((b":method", method), (b":scheme", b"http"), (b":authority", authority.encode()), (b":path", b"/"))
    return ((b":method", method), (b":authority", authority.encode()), (b"forwarded", b'for="10.0.0.1:1"'))


class _End:
    """One end of a tunnel. A context manager that closes the socket."""

    def __init__(self, sock: socket.socket, handshake: Handshake, *, client: bool) -> None:
        """Does the handshake; raises what that raises."""
        self.sock = sock
        self.wire = Wire(sock, handshake)
        self.wire.greet()
        self.mux = Mux(client=client, limits=PATIENT)
        self.data: dict[int, bytearray] = {}
        self.events: list[Event] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def flush(self) -> None:
        """Sends what the machine has to say."""
        if out := bytes(self.mux.take()):
            self.wire.send(out)

    def send_raw(self, frames: bytes) -> None:
        """Sends bytes as they are, inside of TLS."""
        self.wire.send(frames)

    def send(self, stream: int, payload: bytes) -> None:
        """DATA of a stream; at most what the windows allow."""
        buffer = bytearray(9) + payload
        self.mux.data_header(buffer, 0, stream, len(payload))
        self.wire.send(bytes(self.mux.take()) + bytes(buffer))

    def receive(self, stream: int, size: int) -> bytes:
        """The next `size` bytes of a stream."""
        self._until(lambda: len(self.data[stream]) >= size)
        taken = bytes(self.data[stream][:size])
        del self.data[stream][:size]
        return taken

    def _until(self, condition: Callable[[], int]) -> int:
        while not (answer := condition()):
            self._take()
        return answer

    def _take(self) -> None:
        end = self.wire.end
        assert end is not None
        if not end.plain:
            data = self.sock.recv(1 << 16)
            if not data:
                raise EOFError("the peer hung up")
            end.receive(data)
        buffer = bytearray(end.plain)
        end.plain.clear()
        events = self.mux.receive(memoryview(buffer), 0, len(buffer), time.monotonic())
        end.plain[:0] = buffer[self.mux.taken :]
        for event in events:
            if isinstance(event, DataReceived):
                self.data.setdefault(event.stream, bytearray()).extend(event.data)
                self.mux.consumed(event.stream, len(event.data))
            else:
                self.events.append(event)
        self.flush()


class HbonePeer(_End):
    """A tunnel to somebody's 15008."""

    def __init__(self, sock: socket.socket, credentials: Credentials, expected: SpiffeId) -> None:
        """Does the handshake; raises what that raises."""
        handshake = Handshake(TlsContexts(credentials), server=False, expected=frozenset({expected}), own_records=True)
        super().__init__(sock, handshake, client=True)
        self.flush()

    def ask(self, authority: str, method: bytes = b"CONNECT") -> int:
        """A request; returns its stream."""
        stream = self.mux.open_stream(connect_headers(authority, method))
        self.data[stream] = bytearray()
        self.flush()
        return stream

    def status(self, stream: int) -> int:
        """The answer to a request."""
        return self._until(lambda: next((each.status for each in self._answers(stream)), 0))

    def request(self, authority: str, method: bytes = b"CONNECT") -> int:
        """`ask` and `status`."""
        return self.status(self.ask(authority, method))

    def gone(self) -> PeerGoingAway | None:
        """The peer's GOAWAY, None if it hangs up without one. Blocks until one or the other."""
        try:
            self._until(lambda: any(isinstance(each, PeerGoingAway) for each in self.events))
        except (EOFError, ConnectionResetError):
            pass
        return next((each for each in self.events if isinstance(each, PeerGoingAway)), None)

    def _answers(self, stream: int) -> list[ResponseReceived]:
        return [each for each in self.events if isinstance(each, ResponseReceived) and each.stream == stream]


class HboneServer(_End):
    """The far end of somebody's tunnel; does nothing by itself, not even send its SETTINGS."""

    def __init__(self, sock: socket.socket, credentials: Credentials) -> None:
        """Does the handshake; raises what that raises."""
        super().__init__(sock, Handshake(TlsContexts(credentials), server=True, expected=None, own_records=True), client=False)

    def requested(self) -> int:
        """The stream of the next request."""
        self._until(lambda: any(isinstance(each, RequestReceived) for each in self.events))
        request = next(each for each in self.events if isinstance(each, RequestReceived))
        self.events.remove(request)
        self.data.setdefault(request.stream, bytearray())
        return request.stream

    def respond(self, stream: int, status: int) -> None:
        """Answers a request."""
        self.mux.respond(stream, status, end=status != 200)
        self.flush()

    def reset(self, stream: int, code: int) -> None:
        """Ends a stream."""
        self.mux.reset(stream, code)
        self.flush()
