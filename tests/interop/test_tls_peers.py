"""Our handshake and records against TLS that is not ours: the interpreter's `ssl` module, the `openssl` program, and Envoy's BoringSSL."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path

import pytest

from tests.kit import envoy
from tests.kit.kernel_tls import KernelRules, KernelSocket
from tests.kit.pki import FakePki
from tests.kit.polling import eventually
from tests.kit.tls import CIPHERS, SOCKET_SECONDS, Wire
from ztunnel.dataplane.kernel_tls import take_over
from ztunnel.hbone.handshake import Credentials, Handshake, HandshakeError, TlsContexts
from ztunnel.hbone.records import AlertReceived
from ztunnel.hbone.records_own import OwnRecords
from ztunnel.mesh.errors import PeerError, UntrustedPeer

PKI = FakePki()
OTHER = FakePki("other.example")
OURS, THEIRS = PKI.identity("ours"), PKI.identity("theirs")
MINE = TlsContexts(PKI.credentials(OURS))
GOOD = PKI.credentials(THEIRS)
BOTH = pytest.mark.parametrize("own", [True, False], ids=["own", "openssl"])


def ours(*, server: bool, own: bool = True) -> Handshake:
    return Handshake(MINE, server=server, expected=None if server else frozenset({THEIRS}), own_records=own)


def files(credentials: Credentials, where: Path) -> tuple[str, str, str]:
    """Chain, key and roots of some credentials as files, which is all that other implementations take."""
    paths = tuple(str(where / name) for name in ("chain.pem", "key.pem", "roots.pem"))
    for path, pem in zip(paths, (credentials.chain_pem, credentials.key_pem, credentials.roots_pem), strict=True):
        Path(path).write_bytes(pem)
    return paths[0], paths[1], paths[2]


# The interpreter's ssl


def stdlib(credentials: Credentials | None, where: Path, *, server: bool) -> ssl.SSLContext:
    """A context that trusts our root and checks no names; no credentials means that it presents none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.set_alpn_protocols(["h2"])
    chain, key, roots = files(credentials or GOOD, where)
    context.load_verify_locations(roots)
    if credentials is not None:
        context.load_cert_chain(chain, key)
    return context


Conversation = Callable[[ssl.SSLSocket], None]
Connection = Callable[..., AbstractContextManager[tuple[Wire, "Openssl"]]]


@contextmanager
def stdlib_peer(context: ssl.SSLContext, *, server: bool, talk: Conversation) -> Iterator[tuple[socket.socket, list[BaseException]]]:
    """A thread that holds the other end of a socket pair; what it raised is in the list once the context is left."""
    here, there = socket.socketpair()
    there.settimeout(SOCKET_SECONDS)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            with closing(context.wrap_socket(there, server_side=server)) as peer:
                talk(peer)
        except OSError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield here, raised
    finally:
        thread.join(SOCKET_SECONDS)
        here.close()
        there.close()
        assert not thread.is_alive()


def echo(peer: ssl.SSLSocket) -> None:
    """Send back what comes until close_notify."""
    while data := peer.recv(1 << 17):
        peer.sendall(data)


@BOTH
@pytest.mark.parametrize("server", [False, True], ids=["client", "server"])
def test_the_interpreters_ssl_talks_with_us(server: bool, own: bool, tmp_path: Path) -> None:
    payload = bytes(range(256)) * 300
    seen: list[object] = []

    def talk(peer: ssl.SSLSocket) -> None:
        seen.extend((peer.version(), peer.selected_alpn_protocol()))
        echo(peer)

    with stdlib_peer(stdlib(GOOD, tmp_path, server=not server), server=not server, talk=talk) as (sock, raised):
        wire = Wire(sock, ours(server=server, own=own))
        end = wire.greet()
        for size in (1, 16383, 16384, 16385, len(payload)):
            wire.send(payload[:size])
            assert wire.expect(size) == payload[:size]
        sock.sendall(end.records.close_notify())
    assert (wire.handshake.peer, seen, raised) == (THEIRS, ["TLSv1.3", "h2"], [])


@BOTH
def test_close_notify_of_the_interpreters_ssl(own: bool, tmp_path: Path) -> None:
    def talk(peer: ssl.SSLSocket) -> None:
        peer.sendall(b"last words")
        peer.unwrap()

    with stdlib_peer(stdlib(GOOD, tmp_path, server=False), server=False, talk=talk) as (sock, raised):
        wire = Wire(sock, ours(server=True, own=own))
        end = wire.greet()
        assert wire.expect(11) == b"last words"
        assert end.records.peer_closed
        sock.sendall(end.records.close_notify())
    assert raised == []


def test_no_session_is_resumed(tmp_path: Path) -> None:
    context = stdlib(GOOD, tmp_path, server=False)
    sessions: list[ssl.SSLSession | None] = []
    for _ in range(2):
        here, there = socket.socketpair()
        there.settimeout(SOCKET_SECONDS)
        wire = Wire(here, ours(server=True))
        greeting = threading.Thread(target=wire.greet)
        greeting.start()
        with context.wrap_socket(there, session=sessions[-1] if sessions else None) as peer:
            greeting.join(SOCKET_SECONDS)
            wire.send(b"x")
            assert peer.recv(1) == b"x"
            assert not peer.session_reused
            sessions.append(peer.session)
        here.close()


REFUSED_BY_CLIENT = {
    "expired": (PKI.expired(THEIRS), HandshakeError, "expired", "CERTIFICATE_EXPIRED"),
    "usage": (PKI.wrong_usage(server=True, identity=THEIRS), HandshakeError, "extended key usage", "UNSUPPORTED_CERTIFICATE"),
    "foreign": (PKI.foreign_root(THEIRS), HandshakeError, "our roots", "UNKNOWN_CA"),
    "wrong-name": (PKI.credentials(PKI.identity("another")), UntrustedPeer, "expected SAN", "ACCESS_DENIED"),
    "trust-domain": (PKI.credentials(OTHER.identity("theirs")), UntrustedPeer, "expected SAN", "ACCESS_DENIED"),
    "no-san": (PKI.without_san(THEIRS), UntrustedPeer, "no SPIFFE name", "ACCESS_DENIED"),
}
REFUSED_BY_SERVER = {
    "expired": (PKI.expired(THEIRS), HandshakeError, "expired", "CERTIFICATE_EXPIRED"),
    "usage": (PKI.wrong_usage(server=False, identity=THEIRS), HandshakeError, "extended key usage", "UNSUPPORTED_CERTIFICATE"),
    "foreign": (PKI.foreign_root(THEIRS), HandshakeError, "our roots", "UNKNOWN_CA"),
    "trust-domain": (PKI.credentials(OTHER.identity("theirs")), UntrustedPeer, "expected trust domain", "ACCESS_DENIED"),
    "no-san": (PKI.without_san(THEIRS), UntrustedPeer, "no SPIFFE name", "ACCESS_DENIED"),
    "no-certificate": (None, HandshakeError, "no certificate", "CERTIFICATE_REQUIRED"),
}


@pytest.mark.parametrize(
    ("server", "credentials", "error", "text", "alert"),
    [pytest.param(False, *case, id=f"client-{name}") for name, case in REFUSED_BY_CLIENT.items()]
    + [pytest.param(True, *case, id=f"server-{name}") for name, case in REFUSED_BY_SERVER.items()],
)
def test_we_refuse_and_the_interpreters_ssl_hears_why(
    server: bool, credentials: Credentials | None, error: type[PeerError], text: str, alert: str, tmp_path: Path
) -> None:
    # A peer's echo reads first: the alert for a client comes after its handshake, with the first read.
    with stdlib_peer(stdlib(credentials, tmp_path, server=not server), server=not server, talk=echo) as (sock, raised):
        with pytest.raises(error, match=text):
            Wire(sock, ours(server=server)).greet()
        sock.shutdown(socket.SHUT_WR)
    assert alert in str(raised[0])


@pytest.mark.parametrize("server", [False, True], ids=["client", "server"])
def test_tls_1_2_is_refused(server: bool, tmp_path: Path) -> None:
    context = stdlib(GOOD, tmp_path, server=not server)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    with stdlib_peer(context, server=not server, talk=echo) as (sock, raised):
        with pytest.raises(HandshakeError, match=r"TLS 1\.3"):
            Wire(sock, ours(server=server)).greet()
        sock.shutdown(socket.SHUT_WR)
    assert len(raised) == 1


def test_other_application_protocols_are_refused(tmp_path: Path) -> None:
    context = stdlib(GOOD, tmp_path, server=False)
    context.set_alpn_protocols(["http/1.1"])
    with stdlib_peer(context, server=False, talk=echo) as (sock, raised), pytest.raises(HandshakeError, match="ALPN h2"):
        Wire(sock, ours(server=True)).greet()
    assert "no application protocol" in str(raised[0])


@BOTH
def test_a_server_that_refuses_us_is_heard_at_the_first_read(own: bool, tmp_path: Path) -> None:
    """In TLS 1.3 the client is done before the server has judged it: the verdict comes as a record."""
    context = stdlib(OTHER.credentials(THEIRS, roots_pem=OTHER.root_pem), tmp_path, server=True)
    mine = TlsContexts(PKI.credentials(OURS, roots_pem=OTHER.root_pem))
    with stdlib_peer(context, server=True, talk=echo) as (sock, _raised):
        wire = Wire(sock, Handshake(mine, server=False, expected=frozenset({THEIRS}), own_records=own))
        wire.greet()
        with pytest.raises(AlertReceived, match="unknown_ca"):
            wire.expect(1)


# The openssl program


class Openssl:
    """`openssl s_client` or `s_server` on the loopback, driven by its standard input."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._stdin = process.stdin
        self._stdout = process.stdout
        self._seen = bytearray()
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while data := os.read(self._stdout.fileno(), 1 << 16):
            with self._changed:
                self._seen += data
                self._changed.notify_all()

    def type(self, line: bytes) -> None:
        self._stdin.write(line + b"\n")
        self._stdin.flush()

    def expect(self, text: bytes) -> None:
        """Wait until the program prints a text; what it printed up to there is done with."""
        with self._changed:
            assert self._changed.wait_for(lambda: text in self._seen, SOCKET_SECONDS), bytes(self._seen)
            del self._seen[: self._seen.index(text) + len(text)]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._stdin.close()
        self._stdout.close()


@contextmanager
def openssl(*arguments: str) -> Iterator[Openssl]:
    # Half of what s_server prints goes through stdio's buffer, which a pipe would fill for ever.
    command = ["stdbuf", "-oL", "openssl", *arguments]
    program = Openssl(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    try:
        yield program
    finally:
        program.stop()


@contextmanager
def s_client(where: Path, *more: str, own: bool) -> Iterator[tuple[Wire, Openssl]]:
    """A handshake between `openssl s_client` and our server."""
    chain, key, roots = files(GOOD, where)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        trust = ("-cert", chain, "-key", key, "-CAfile", roots, "-verify_return_error", "-alpn", "h2", "-tls1_3", "-noservername")
        with openssl("s_client", "-connect", address, *trust, *more) as program:
            listener.settimeout(SOCKET_SECONDS)
            with closing(listener.accept()[0]) as sock:
                wire = Wire(sock, ours(server=True, own=own))
                wire.greet()
                yield wire, program


@contextmanager
def s_server(where: Path, *more: str, own: bool) -> Iterator[tuple[Wire, Openssl]]:
    """A handshake between our client and `openssl s_server`."""
    chain, key, roots = files(GOOD, where)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
    trust = ("-cert", chain, "-key", key, "-CAfile", roots, "-Verify", "3", "-verify_return_error", "-alpn", "h2", "-tls1_3")
    with openssl("s_server", "-accept", f"127.0.0.1:{port}", "-naccept", "1", *trust, *more) as program:
        program.expect(b"ACCEPT")
        with socket.create_connection(("127.0.0.1", int(port))) as sock:
            wire = Wire(sock, ours(server=False, own=own))
            wire.greet()
            yield wire, program


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize(
    ("peer", "confirmation"), [(s_client, b"KEYUPDATE"), (s_server, b"SSL_do_handshake -> 1")], ids=["s_client", "s_server"]
)
@BOTH
def test_the_openssl_program_updates_keys_with_us(own: bool, peer: Connection, confirmation: bytes, cipher: str, tmp_path: Path) -> None:
    """`k` sends a KeyUpdate, `K` one that wants an answer. The program throws away what it reads together with a command."""
    with peer(tmp_path, "-ciphersuites", cipher, own=own) as (wire, program):
        assert wire.end is not None
        for command in (b"k", b"K", b"K", b"k"):
            program.type(command)
            program.expect(confirmation)
            program.type(b"after " + command)
            assert wire.expect(8) == b"after " + command + b"\n"
            wire.send(b"answer to " + command + b"\n")
            program.expect(b"answer to " + command + b"\n")
        if own:
            layer = wire.end.records
            assert isinstance(layer, OwnRecords)
            moved = layer.export()
            # Four updates of theirs, one record since; two answers of ours, two records since the last.
            assert (moved.rx_seq, moved.tx_seq) == (1, 2)
            wire.end.records = OwnRecords(moved, rekey_records=2)
            for number in range(5):
                wire.send(b"from another process %d\n" % number)
                program.expect(b"from another process %d\n" % number)
            program.type(b"good")
            assert wire.expect(5) == b"good\n"
        wire.sock.sendall(wire.end.records.close_notify())


class InKernel:
    """Our end of a connection, given to the kit's kernel after the handshake."""

    def __init__(self, wire: Wire) -> None:
        assert wire.end is not None
        assert isinstance(wire.end.records, OwnRecords)
        self.sock = KernelSocket(wire.sock, KernelRules())
        self.kernel = take_over(self.sock, wire.end.records.export())

    def expect(self, size: int) -> bytes:
        plain, room = bytearray(), memoryview(bytearray(1 << 16))

        def came() -> bool:
            try:
                plain.extend(room[: self.kernel.receive(room)])
            except BlockingIOError:
                return False
            return len(plain) >= size

        eventually(came)
        return bytes(plain)

    def send(self, plain: bytes) -> None:
        assert self.kernel.send(memoryview(plain), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(plain)


@pytest.mark.parametrize("cipher", CIPHERS)
@pytest.mark.parametrize(
    ("peer", "confirmation"), [(s_client, b"KEYUPDATE"), (s_server, b"SSL_do_handshake -> 1")], ids=["s_client", "s_server"]
)
def test_kernel_tls_updates_keys_with_the_openssl_program(peer: Connection, confirmation: bytes, cipher: str, tmp_path: Path) -> None:
    """The server's session tickets come on the way too. The kernel is the kit's: its keys are what is tested, and what becomes of them."""
    with peer(tmp_path, "-ciphersuites", cipher, own=True) as (wire, program):
        end = InKernel(wire)
        with end.sock:
            for command in (b"k", b"K", b"K", b"k"):
                program.type(command)
                program.expect(confirmation)
                program.type(b"after " + command)
                assert end.expect(8) == b"after " + command + b"\n"
                end.send(b"answer to " + command + b"\n")
                program.expect(b"answer to " + command + b"\n")
            # Four updates of theirs, two answers of ours.
            assert end.sock.rekeys == 6
            end.kernel.end(None)


def test_no_server_name_and_only_our_suites_are_offered(tmp_path: Path) -> None:
    with s_server(tmp_path, "-trace", own=True) as (wire, program):
        wire.send(b"done\n")
        program.expect(b"ClientHello")
        with program._changed:
            assert program._changed.wait_for(lambda: b"done\n" in program._seen, SOCKET_SECONDS)
            hello = bytes(program._seen[: program._seen.index(b"ServerHello")])
    assert b"server_name" not in hello
    assert b"compress_certificate" not in hello
    assert b"TLS_AES_128_GCM_SHA256" in hello
    assert b"TLS_AES_256_GCM_SHA384" in hello
    assert b"CHACHA20" not in hello


# Envoy, whose TLS is BoringSSL


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
NO_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


@BOTH
def test_envoys_server_talks_with_us(own: bool) -> None:
    with envoy.running(envoy.hbone_server(GOOD, app=("127.0.0.1", 1), client=OURS)) as there:
        with socket.create_connection(("127.0.0.1", there.port("hbone"))) as sock:
            wire = Wire(sock, ours(server=False, own=own))
            end = wire.greet()
            wire.send(PREFACE + NO_SETTINGS)
            assert wire.expect(5)[3:] == b"\x04\x00", "its SETTINGS"
            sock.sendall(end.records.close_notify())
        with socket.create_connection(("127.0.0.1", there.port("hbone"))) as sock:
            stranger = Handshake(MINE, server=False, expected=frozenset({OURS}), own_records=own)
            with pytest.raises(UntrustedPeer):
                Wire(sock, stranger).greet()
            eventually(lambda: there.counter("listener.hbone.ssl.connection_error") == 1)


def test_envoys_client_talks_with_us_twice() -> None:
    """Envoy keeps session tickets and offers them the next time; we accept none and verify anew."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(SOCKET_SECONDS)
        config = envoy.hbone_client(GOOD, peer=("127.0.0.1", listener.getsockname()[1]), authority="10.0.0.1:80", server=OURS)
        with envoy.running(config) as here:
            for _ in range(2):
                with socket.create_connection(("127.0.0.1", here.port("tcp"))), listener.accept()[0] as sock:
                    wire = Wire(sock, ours(server=True))
                    end = wire.greet()
                    assert wire.handshake.peer == THEIRS
                    assert wire.expect(len(PREFACE)) == PREFACE
                    wire.send(NO_SETTINGS)
                    sock.sendall(end.records.close_notify())
            assert here.counter("cluster.tunnel.ssl.handshake") == 2
            assert here.counter("cluster.tunnel.ssl.session_reused") == 0
