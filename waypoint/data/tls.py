"""TLS over any transport: to endpoints that want it (in a tunnel or outside the mesh), and of a gateway's clients.

OpenSSL through memory, as for the tunnels' handshakes. Certificates and keys come as PEM with the configuration: a worker opens no files.
A stream that ends without close_notify is cut, not ended (RFC 8446 §6.1).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from ipaddress import ip_address
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from ztunnel.dataplane.bytestream import Receiver, Transport
from ztunnel.dataplane.loop import READABLE, Loop, Timer
from ztunnel.hbone.records_openssl import read_bio, reason_of
from ztunnel.mesh.errors import LocalError, MeshError, PeerError, UpstreamTimeout
from ztunnel.mesh.l7.clusters import UpstreamTls
from ztunnel.mesh.l7.config import TlsServer

_READ: Final = 65536
_PIECE: Final = 16384
_MAX_EARLY: Final = 256 << 10
"""Bytes that wait for a handshake before whoever writes must."""
_PEM: Final = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----\n?", re.DOTALL)
_MOST_CERTIFICATES: Final = 1000

system_roots: list[x509.Certificate] = []
"""Filled before a worker is confined."""


class TlsRefused(PeerError):
    """The peer, or we, refuse the handshake."""


def load_system_roots(pem: bytes) -> None:
    """The authorities that this host trusts, for clusters that ask for them."""
    system_roots[:] = _certificates(pem)


def _certificates(pem: bytes) -> list[x509.Certificate]:
    """Every certificate of a bundle that can be read."""
    found = []
    for match in _PEM.finditer(pem):
        try:
            # Authorities that every host trusts have made certificates with odd serial numbers; that is not our news to tell.
            with warnings.catch_warnings(action="ignore"):
                found.append(x509.load_pem_x509_certificate(match.group()))
        except ValueError:
            continue
        if len(found) >= _MOST_CERTIFICATES:
            break
    return found


def _use(context: SSL.Context, certificate: bytes, key: bytes) -> None:
    chain = _certificates(certificate)
    if not chain:
        raise LocalError("the certificate cannot be read")
    try:
        context.use_certificate(chain[0])
        for issuer in chain[1:]:
            context.add_extra_chain_cert(issuer)
        context.use_privatekey(load_pem_private_key(key, None))  # type: ignore[arg-type]  # any kind that OpenSSL takes
        context.check_privatekey()
    except (ValueError, TypeError, SSL.Error, crypto.Error) as error:
        raise LocalError(f"the certificate and its key cannot be used: {error}") from error


def _trust(context: SSL.Context, roots: list[x509.Certificate]) -> None:
    store = context.get_cert_store()
    assert store is not None
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)


def _base(method: int, lowest: int) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(lowest)
    context.set_options(SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_NO_TICKET)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    return context


def client_context(tls: UpstreamTls) -> SSL.Context:
    """What we dial endpoints of a cluster with.

    Raises:
        LocalError: its certificate, key or roots cannot be used.
    """
    context = _base(SSL.TLS_CLIENT_METHOD, SSL.TLS1_2_VERSION)
    if tls.certificate:
        _use(context, tls.certificate, tls.key)
    if tls.verify:
        _trust(context, [*_certificates(tls.roots), *(system_roots if tls.system_roots else [])])
        context.set_verify(SSL.VERIFY_PEER, _chain_only)
    else:
        context.set_verify(SSL.VERIFY_NONE, _chain_only)
    return context


def server_context(tls: TlsServer, protocols: tuple[bytes, ...]) -> SSL.Context:
    """What a gateway's clients meet.

    Raises:
        LocalError: its certificate, key or roots cannot be used.
    """
    context = _base(SSL.TLS_SERVER_METHOD, SSL.TLS1_3_VERSION if tls.min_version == "TLSV1_3" else SSL.TLS1_2_VERSION)
    context.set_options(SSL.OP_CIPHER_SERVER_PREFERENCE)
    _use(context, tls.certificate, tls.key)
    if tls.client_roots:
        _trust(context, _certificates(tls.client_roots))
        context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _chain_only)

    def choose(_connection: SSL.Connection, offered: list[bytes]) -> bytes:
        for each in protocols:
            if each in offered:
                return each
        return SSL.NO_OVERLAPPING_PROTOCOLS  # type: ignore[return-value]  # pyOpenSSL's sentinel

    context.set_alpn_select_callback(choose)
    return context


def _chain_only(_tls: SSL.Connection, _certificate: crypto.X509, _error: int, _depth: int, chain_ok: int) -> bool:
    return bool(chain_ok)


def name_matches(certificate: x509.Certificate, wanted: tuple[str, ...]) -> bool:
    """Whether a certificate is for one of these names: DNS names (`*.` stands for one label), addresses, URIs."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        hosts = [each.lower() for each in names.get_values_for_type(x509.DNSName)]
        addresses = [str(each) for each in names.get_values_for_type(x509.IPAddress)]
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return False
    for name in wanted:
        lower = name.lower().rstrip(".")
        if name in uris or lower in hosts or lower in addresses:
            return True
        first, dot, rest = lower.partition(".")
        if dot and first and f"*.{rest}" in hosts:
            return True
        if lower.startswith("*.") and any(each.partition(".")[2] == lower[2:] for each in hosts):
            return True
    return False


def expecting(tls: UpstreamTls, sni: str) -> Callable[[SSL.Connection], str]:
    """What the endpoint must prove beyond its chain; gives the reason of a refusal."""
    wanted = tls.names or ((sni,) if sni else ())

    def check(connection: SSL.Connection) -> str:
        if not tls.verify or not wanted:
            return ""
        certificate = connection.get_peer_certificate()
        if certificate is None:
            return "the endpoint shows no certificate"
        if name_matches(certificate.to_cryptography(), wanted):
            return ""
        return f"the endpoint's certificate is not for {', '.join(wanted[:3])}"

    return check


class TlsStream:
    """One side of TLS over a transport. Implements `Transport` for its user and `Receiver` for what carries it."""

    __slots__ = (
        "_check", "_cut", "_done", "_early", "_early_bytes", "_ended", "_loop", "_lower", "_paused", "_receiver", "_server", "_shaken",
        "_timer", "_tls", "_told_end",
    )  # fmt: skip

    def __init__(
        self,
        loop: Loop,
        context: SSL.Context,
        receiver: Receiver,
        *,
        server: bool,
        seconds: float,
        check: Callable[[SSL.Connection], str] | None = None,
    ) -> None:
        """
        Args:
            seconds: for the handshake, and for a client for the connection under it.
            check: gives the reason why a finished handshake is refused all the same, or an empty text.
        """
        self._loop = loop
        self._server = server
        self._receiver = receiver
        self._check = check
        self._tls = SSL.Connection(context, None)
        self._lower: Transport | None = None
        self._shaken = False
        self._early: list[bytes] = []
        self._early_bytes = 0
        self._ended = False
        self._paused = False
        self._told_end = False
        self._cut = False
        """What carries it has ended."""
        self._done = False
        self._timer: Timer | None = loop.call_later(seconds, self._expired)
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()

    def offer(self, sni: str, protocols: list[bytes]) -> None:
        """A client: what is said in the first flight."""
        if sni and not _is_address(sni):
            self._tls.set_tlsext_host_name(sni.encode("idna") if not sni.isascii() else sni.encode())
        if protocols:
            self._tls.set_alpn_protos(protocols)

    def join(self, lower: Transport) -> None:
        """What carries it, though it may still be on its way: a client's first flight goes along."""
        self._lower = lower
        if not self._server:
            self._pump()

    def use(self, receiver: Receiver) -> None:
        """Another receiver takes over."""
        self._receiver = receiver

    @property
    def protocol(self) -> bytes:
        """What ALPN has chosen; empty for nothing."""
        return self._tls.get_alpn_proto_negotiated()

    @property
    def server_name(self) -> str:
        """What a client has asked for."""
        return (self._tls.get_servername() or b"").decode("ascii", "replace").lower()

    # For its user

    @property
    def is_full(self) -> bool:
        if not self._shaken:
            return self._early_bytes > _MAX_EARLY
        return self._lower is not None and self._lower.is_full

    def write(self, data: bytes) -> None:
        if self._done or self._ended or not data:
            return
        if not self._shaken:
            self._early.append(data)
            self._early_bytes += len(data)
            return
        for at in range(0, len(data), _PIECE):
            self._tls.send(data[at : at + _PIECE])
        self._flush()

    def end(self) -> None:
        if self._done or self._ended:
            return
        self._ended = True
        if self._shaken:
            self._say_goodbye()

    def _say_goodbye(self) -> None:
        try:
            self._tls.shutdown()
        except SSL.Error:
            pass
        self._flush()
        if self._lower is not None:
            self._lower.end()

    def pause(self) -> None:
        self._paused = True
        if self._lower is not None:
            self._lower.pause()

    def resume(self) -> None:
        if self._paused and not self._done:
            self._paused = False
            # What was read already comes first, in a turn of its own.
            self._loop.again(self, READABLE)

    def close(self) -> None:
        if not self._done:
            self._finish()
            if self._lower is not None:
                self._lower.close()

    # Under it

    def opened(self) -> None:
        """What carries it stands."""

    def received(self, data: memoryview) -> None:
        self._tls.bio_write(bytes(data))
        self._pump()

    def on_event(self, events: int) -> None:
        """Goes on behind a pause."""
        if self._done or self._paused:
            return
        self._pump()
        if self._paused or self._done or self._lower is None:
            return
        if self._cut:
            self.peer_ended()
        else:
            self._lower.resume()

    def on_bug(self) -> None:
        self._fail(LocalError("internal error"))

    def _pump(self) -> None:
        if self._done or (not self._shaken and not self._shake()):
            return
        while not self._paused and not self._done:
            try:
                data = self._tls.recv(_READ)
            except SSL.WantReadError:
                break
            except SSL.ZeroReturnError:
                self._tell_end()
                break
            except SSL.Error as error:
                self._flush()
                self._fail(TlsRefused(f"TLS: {reason_of(error)}"))
                return
            self._receiver.received(memoryview(data))
        if not self._done:
            self._flush()

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            self._flush()
            return False
        except SSL.Error as error:
            self._flush()
            self._fail(TlsRefused(f"TLS handshake: {reason_of(error)}"))
            return False
        refusal = self._check(self._tls) if self._check is not None else ""
        if refusal:
            self._fail(TlsRefused(f"TLS handshake: {refusal}"))
            return False
        self._shaken = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._flush()
        self._receiver.opened()
        early, self._early = self._early, []
        ended, self._ended = self._ended, False
        for data in early:
            self.write(data)
        if ended:
            self.end()
        return not self._done

    def _flush(self) -> None:
        if self._lower is None:
            return
        out = read_bio(self._tls)
        if out:
            self._lower.write(out)

    def _expired(self) -> None:
        self._timer = None
        self._fail(UpstreamTimeout("the TLS handshake did not come to an end in time"))

    def _tell_end(self) -> None:
        if not self._told_end:
            self._told_end = True
            self._receiver.peer_ended()

    def peer_ended(self) -> None:
        if self._done or self._told_end:
            return
        self._cut = True
        self._pump()
        if not self._done and not self._told_end and not self._paused:
            self._fail(TlsRefused("TLS: the connection was cut"))

    def writable(self) -> None:
        if self._shaken:
            self._receiver.writable()

    def lost(self, error: MeshError) -> None:
        self._fail(error)

    def closed(self) -> None:
        if not self._done:
            self._finish()
            self._receiver.closed()

    def _fail(self, error: MeshError) -> None:
        if self._done:
            return
        self._finish()
        if self._lower is not None:
            self._lower.close()
        self._receiver.lost(error)

    def _finish(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._early.clear()


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def host_of(authority: str) -> str:
    """An authority without its port and brackets."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0] if authority.count(":") == 1 else authority
