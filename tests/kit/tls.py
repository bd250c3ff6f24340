"""Two ends of a TLS connection joined in memory, and one end on a real socket: what handshake and record tests share."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from functools import cache

from tests.kit.pki import FakePki
from ztunnel.hbone.handshake import Credentials, Handshake, TlsContexts
from ztunnel.hbone.records import MAX_OPENED, MAX_RECORD, Records, sealed_size
from ztunnel.mesh.errors import PeerError

CIPHERS = ("TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384")
SOCKET_SECONDS = 10.0


def contexts(credentials: Credentials, cipher: str | None = None) -> TlsContexts:
    """Contexts of some credentials, with one cipher suite only if asked."""
    made = TlsContexts(credentials)
    if cipher is not None:
        made.client.set_tls13_ciphersuites(cipher.encode())
        made.server.set_tls13_ciphersuites(cipher.encode())
    return made


@cache
def peers(cipher: str) -> tuple[TlsContexts, TlsContexts]:
    """Contexts of two workloads of one mesh that accept each other; made once, they are only read."""
    pki = FakePki()
    return contexts(pki.credentials(pki.identity("client")), cipher), contexts(pki.credentials(pki.identity("server")), cipher)


def greet(client: Handshake, server: Handshake, *, chunk: int = 1 << 20) -> None:
    """Carry both sides' flights across until nobody has anything to send."""
    quiet = False
    while not quiet:
        quiet = True
        for sender, receiver in ((client, server), (server, client)):
            flight = sender.outgoing()
            for at in range(0, len(flight), chunk):
                quiet = False
                if receiver.done:
                    receiver._leftover += flight[at : at + chunk]
                else:
                    receiver.receive(flight[at : at + chunk])


def handshakes(own: tuple[bool, bool], cipher: str = CIPHERS[0]) -> tuple[Handshake, Handshake]:
    """A finished client and server handshake; `own` says for each whether its records will be ours."""
    client, server = peers(cipher)
    pair = (
        Handshake(client, server=False, expected=frozenset({server.identity}), own_records=own[0]),
        Handshake(server, server=True, expected=None, own_records=own[1]),
    )
    greet(*pair)
    return pair


class End:
    """A record layer with buffers: plain bytes in, plain bytes out."""

    def __init__(self, records: Records, leftover: bytes = b"", *, room: int = 2 * MAX_OPENED) -> None:
        self.records = records
        self.plain = bytearray()
        self._input = bytearray()
        self._room = bytearray(room)
        self.receive(leftover)

    def seal(self, plain: bytes) -> bytes:
        """What goes on the wire for `plain`; what was due before comes first."""
        out = bytearray(sealed_size(len(plain)))
        source = bytearray(plain) + b"\xaa"
        end = self.records.seal(source, 0, len(plain), memoryview(out), 0)
        assert source == plain + b"\xaa", "seal restores what it borrows"
        return bytes(out[:end])

    def receive(self, wire: bytes) -> None:
        """Open what came; the plaintext is appended to `plain`."""
        self._input = self._input + wire
        while True:
            consumed, end = self.records.open(memoryview(self._input), 0, len(self._input), memoryview(self._room), 0)
            self.plain += self._room[:end]
            self._input = self._input[consumed:]
            if not consumed:
                return

    def feed(self, wire: bytes, chunks: Iterable[int]) -> None:
        """Open the wire's bytes in pieces of the given sizes, and the rest at once."""
        at = 0
        for size in chunks:
            self.receive(wire[at : at + size])
            at += size
        self.receive(wire[at:])


def joined(own: tuple[bool, bool], cipher: str = CIPHERS[0]) -> tuple[End, End]:
    """A client's and a server's record layer after a real handshake."""
    client, server = handshakes(own, cipher)
    return End(*client.finish()), End(*server.finish())


class Wire:
    """Our end of a TLS connection on a blocking socket, for peers that are not ours."""

    def __init__(self, sock: socket.socket, handshake: Handshake) -> None:
        self.sock = sock
        self.handshake = handshake
        self.end: End | None = None
        sock.settimeout(SOCKET_SECONDS)

    def greet(self) -> End:
        """Do the handshake; on failure the alert is sent and the error raised."""
        try:
            while True:
                self.sock.sendall(self.handshake.outgoing())
                if self.handshake.done:
                    break
                data = self.sock.recv(MAX_RECORD)
                if not data:
                    raise EOFError("the peer hung up in the handshake")
                self.handshake.receive(data)
        except PeerError:
            if alert := self.handshake.outgoing():
                self.sock.sendall(alert)
            raise
        self.end = End(*self.handshake.finish())
        return self.end

    def send(self, plain: bytes) -> None:
        """Send what is due, then `plain`."""
        assert self.end is not None
        self.sock.sendall(self.end.records.pending() + self.end.seal(plain))

    def expect(self, size: int) -> bytes:
        """The next `size` bytes of plaintext; fewer if the peer closes before. What becomes due on the way is sent."""
        assert self.end is not None
        while len(self.end.plain) < size and not self.end.records.peer_closed:
            data = self.sock.recv(MAX_RECORD)
            if not data:
                raise EOFError("the peer hung up without close_notify")
            self.end.receive(data)
            self.sock.sendall(self.end.records.pending())
        plain = bytes(self.end.plain[:size])
        del self.end.plain[:size]
        return plain
