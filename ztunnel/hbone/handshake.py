"""The mutual TLS 1.3 handshake of HBONE, without I/O: who the peer is, and the record layer for what follows.

OpenSSL does the handshake and the chain; this module decides whose certificate is good enough. The decision falls inside OpenSSL's
verification, before our side's last flight is made: a server that is not the expected one never sees our certificate, and a client
that is not of our trust domain never gets a byte from us. After the handshake OpenSSL is done with the connection (own records) or
stays as its record layer.

Bytes are given to OpenSSL no further than the end of a record, so that nothing that follows the handshake is swallowed by it.

Source: RFC 8446; Istio ztunnel `tls/workload.rs` (versions, suites, ALPN, which names must match).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from OpenSSL import SSL, crypto

from ztunnel.hbone.records import HEADER_SIZE, Alert, RecordError, Records
from ztunnel.hbone.records_openssl import OpensslRecords, read_bio, reason_of
from ztunnel.hbone.records_own import OwnRecords, fresh_state
from ztunnel.mesh.errors import Flag, LocalError, PeerError, UntrustedPeer
from ztunnel.mesh.identity import SpiffeId, parse_spiffe

MAX_HANDSHAKE_BYTES = 1 << 16
"""Bytes that a peer may send before its handshake is done. A chain of three certificates takes about 4 KiB."""
CIPHER_SUITES = b"TLS_AES_128_GCM_SHA256:TLS_AES_256_GCM_SHA384"
ALPN = b"h2"
MAX_CHAIN_DEPTH = 10
MAX_REMEMBERED_LEAVES = 1024

_NO_CERTIFICATE_COMPRESSION = (1 << 32) | (1 << 33)
"""SSL_OP_NO_TX_CERTIFICATE_COMPRESSION and SSL_OP_NO_RX_…, which pyOpenSSL does not name."""

_OPERATOR_TEXTS = {
    "peer did not return a certificate": "the peer sent no certificate",
    "unsupported protocol": "the peer does not speak TLS 1.3",
    "alert protocol version": "the peer refuses TLS 1.3 (alert protocol_version)",
    "no shared cipher": "no cipher suite in common with the peer",
    "no suitable key share": "no key exchange group in common with the peer",
    "wrong version number": "the peer does not speak TLS",
    "http request": "the peer speaks HTTP, not TLS",
    "https proxy request": "the peer speaks HTTP, not TLS",
    "alert unknown ca": "the peer does not trust our root (alert unknown_ca)",
    "alert certificate expired": "the peer says that our certificate has expired (alert certificate_expired)",
    "alert certificate unknown": "the peer does not accept our certificate (alert certificate_unknown)",
    "alert bad certificate": "the peer does not accept our certificate (alert bad_certificate)",
    "alert unsupported certificate": "our certificate is not for this purpose, says the peer (alert unsupported_certificate)",
    "alert certificate required": "the peer requires a certificate and got none (alert certificate_required)",
    "alert access denied": "the peer does not accept our identity (alert access_denied)",
    "alert no application protocol": "the peer does not accept ALPN h2 (alert no_application_protocol)",
}
"""OpenSSL's reasons (parts of them: the prefixes change with its version), in words for the person who has to mend it. Anything else is
passed on as OpenSSL says it."""


_CHAIN_TEXTS = {
    2: "its issuer is unknown",
    7: "a signature in its chain is wrong",
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its issuer is not among our roots",
    20: "its issuer is not among our roots",
    21: "its issuer is not among our roots",
    22: "its chain is too long",
    24: "an issuer in its chain is no CA",
    26: "it is not made for this side of TLS (extended key usage)",
    79: "an issuer in its chain is no CA",
}
"""X509_V_ERR numbers that operators meet."""
_NAMES_IN_TEXTS = 4

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

_CLIENT_SECRET = b"CLIENT_TRAFFIC_SECRET_0"
_SERVER_SECRET = b"SERVER_TRAFFIC_SECRET_0"
_SECRETS = frozenset({_CLIENT_SECRET, _SERVER_SECRET})
"""Labels of the NSS key log format."""


class HandshakeError(PeerError):
    """The handshake failed; `Handshake.outgoing` holds the alert for the peer, if there is one."""

    flag: ClassVar[Flag] = Flag.TLS_FAILURE


class BadCredentials(LocalError):
    """Our own key, certificate or roots cannot be used, or do not belong together."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What one identity proves itself with. `roots_pem` may hold several roots: all are trust anchors for peers."""

    identity: SpiffeId
    chain_pem: bytes
    key_pem: bytes
    roots_pem: bytes

    def __repr__(self) -> str:
        return f"Credentials({self.identity})"


class TlsContexts:
    """OpenSSL's client and server contexts of one identity: built once per certificate, shared by all of its handshakes."""

    __slots__ = ("client", "identity", "leaves", "not_after", "server")

    def __init__(self, credentials: Credentials) -> None:
        """Load and check the credentials.

        Raises:
            BadCredentials: PEM that does not parse, a key that is not the certificate's, or a certificate that does not carry the identity.
        """
        self.identity = credentials.identity
        self.leaves = _Leaves()
        try:
            chain = x509.load_pem_x509_certificates(credentials.chain_pem)
            roots = x509.load_pem_x509_certificates(credentials.roots_pem)
            key = load_pem_private_key(credentials.key_pem, None)
            if self.identity not in spiffe_ids(chain[0]):
                raise BadCredentials(f"the certificate does not carry {self.identity}")
            if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
                raise BadCredentials(f"a {type(key).__name__} is not an ECDSA or RSA key")
            self.not_after: datetime = chain[0].not_valid_after_utc
            self.client = _context(SSL.TLS_CLIENT_METHOD, chain, key, roots)
            self.server = _context(SSL.TLS_SERVER_METHOD, chain, key, roots)
        except (ValueError, TypeError, SSL.Error, crypto.Error) as error:
            raise BadCredentials(f"credentials of {self.identity}: {error}") from error
        self.client.set_alpn_protos([ALPN])
        self.server.set_alpn_select_callback(_select_alpn)


class Handshake:
    """One connection's handshake. Feed `receive`, send what `outgoing` gives, and `finish` when `done`."""

    __slots__ = (
        "_body_left", "_header", "_leftover", "_not_after", "_out", "_over", "_own", "_proof", "_received", "_sealed", "_server", "_tls",
        "done",
    )  # fmt: skip

    def __init__(self, contexts: TlsContexts, *, server: bool, expected: frozenset[SpiffeId] | None, own_records: bool) -> None:
        """Begin a handshake; a client has its first flight in `outgoing` at once.

        Args:
            expected: client: the identities of which the server must prove one; an empty set accepts nobody.
                Server: None; any identity of our own trust domain is accepted.
            own_records: which record layer `finish` gives.
        """
        if server is (expected is not None):
            raise ValueError("a client expects identities; a server expects its own trust domain")
        self._server = server
        self._own = own_records
        self._not_after = contexts.not_after
        self._proof = _Proof(contexts.identity.trust_domain, expected, contexts.leaves)
        self._tls = SSL.Connection(contexts.server if server else contexts.client)
        self._tls.set_app_data(self._proof)
        self._out = bytearray()
        self._received = 0
        self._header = bytearray()
        self._body_left = 0
        self._leftover = b""
        self._sealed = 0
        self._over = False
        self.done = False
        if server:
            self._tls.set_accept_state()
        else:
            self._tls.set_connect_state()
            self._step()
            self._out += read_bio(self._tls)

    @property
    def peer(self) -> SpiffeId:
        """Whom the peer proved to be: on a client the expected identity that matched, on a server its first SPIFFE name."""
        assert self._proof.peer is not None, "peer before done"
        return self._proof.peer

    @property
    def not_after(self) -> datetime:
        """When the first of the two certificates, ours and the peer's, expires (UTC)."""
        assert self._proof.not_after is not None, "not_after before done"
        return min(self._not_after, self._proof.not_after)

    def outgoing(self) -> bytes:
        """Bytes to send now; empties them. After an error they are the alert, and the last."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer. What comes after the handshake's end is kept for `finish`.

        Raises:
            HandshakeError: the peer or OpenSSL refuses. The connection is over.
            UntrustedPeer: the peer's chain is good, but not for an identity that we accept.
        """
        if self._over:
            raise HandshakeError("bytes after the end of the handshake")
        at = 0
        while at < len(data) and not self.done:
            if self._received >= MAX_HANDSHAKE_BYTES:
                self._over = True
                raise HandshakeError(f"more than {MAX_HANDSHAKE_BYTES} bytes before the end of the handshake")
            at += self._feed(data, at)
            self._step()
        if not self.done:
            self._out += read_bio(self._tls)
        self._leftover += data[at:]

    def finish(self) -> tuple[Records, bytes]:
        """The record layer, and the ciphertext that came with or after the peer's last flight. Once, when `done`.

        Let go of this object afterwards: it still holds OpenSSL's connection.
        """
        assert self.done and not self._over, "finish before done, or twice"
        self._over = True
        if not self._own:
            return OpensslRecords(self._tls), self._leftover
        cipher = self._tls.get_cipher_name()
        secrets = self._proof.secrets
        assert cipher is not None, "OpenSSL finished a handshake without a cipher"
        state = fresh_state(
            server=self._server,
            cipher=cipher,
            client_secret=secrets.pop(_CLIENT_SECRET),
            server_secret=secrets.pop(_SERVER_SECRET),
            tx_seq=self._sealed,
        )
        return OwnRecords(state), self._leftover

    def _feed(self, data: bytes, at: int) -> int:
        """Give OpenSSL bytes up to the end of a record, at most; how many those were."""
        allowed = min(len(data) - at, MAX_HANDSHAKE_BYTES - self._received)
        if self._body_left:
            size = min(self._body_left, allowed)
            self._body_left -= size
        else:
            size = min(HEADER_SIZE - len(self._header), allowed)
            self._header += data[at : at + size]
            if len(self._header) == HEADER_SIZE:
                length = int.from_bytes(self._header[3:], "big")
                body = min(length, allowed - size)
                self._header.clear()
                self._body_left = length - body
                size += body
        self._tls.bio_write(data[at : at + size])
        self._received += size
        return size

    def _step(self) -> None:
        try:
            self._tls.do_handshake()
        except SSL.WantReadError:
            return
        except HandshakeError:
            # From the ALPN callback, through pyOpenSSL.
            self._over = True
            self._out += read_bio(self._tls)
            raise
        except SSL.Error as error:
            self._over = True
            alert = read_bio(self._tls)
            failure = self._proof.explain(error)
            self._out += self._access_denied() if isinstance(failure, UntrustedPeer) else alert
            raise failure from error
        flight = read_bio(self._tls)
        self._out += flight
        self.done = True
        # A client's last flight is under its handshake key. Whatever a server sends after the client's Finished (session tickets, which
        # pyOpenSSL cannot turn off) is under its application key already, and our record layer has to go on counting there. Nothing
        # older is in `flight`: the client's Finished answers what the previous `receive` left in `outgoing`.
        self._sealed = _count_records(flight) if self._server else 0

    def _access_denied(self) -> bytes:
        """The alert for a good chain with the wrong name, in place of OpenSSL's.

        pyOpenSSL cannot say why a callback refuses, and OpenSSL then writes internal_error, which sends the peer's operator looking in
        the wrong place; rustls says access_denied here. A client of OpenSSL has no keys to write with yet, its alerts go in the clear.
        A server writes with its application key, and this is the first record under it that leaves.
        """
        if not self._server:
            return b"\x15\x03\x03\x00\x02\x02" + bytes((Alert.ACCESS_DENIED,))
        cipher = self._tls.get_cipher_name()
        secret = self._proof.secrets[_SERVER_SECRET]
        assert cipher is not None, "OpenSSL verified a certificate without a cipher"
        state = fresh_state(server=True, cipher=cipher, client_secret=secret, server_secret=secret, tx_seq=0)
        return OwnRecords(state).alert(RecordError("the peer's name is refused", Alert.ACCESS_DENIED))


@dataclass(frozen=True, slots=True)
class _Leaf:
    names: tuple[SpiffeId, ...]
    not_after: datetime
    authority: bool


class _Leaves:
    """What the certificates of recent peers say, by SHA-256 of the certificate: parsing is a tenth of a handshake.

    Only the reading is remembered, never a verdict: each handshake verifies its chain and asks for its names anew.
    """

    __slots__ = ("_read",)

    def __init__(self) -> None:
        self._read: dict[bytes, _Leaf] = {}

    def read(self, certificate: crypto.X509) -> _Leaf:
        """Raises ValueError for a certificate that does not parse."""
        key = certificate.digest("sha256")
        leaf = self._read.get(key)
        if leaf is None:
            try:
                parsed = certificate.to_cryptography()
            except x509.InvalidVersion as error:
                raise ValueError(str(error)) from error
            leaf = _Leaf(spiffe_ids(parsed), parsed.not_valid_after_utc, is_authority(parsed))
            if len(self._read) >= MAX_REMEMBERED_LEAVES:
                del self._read[next(iter(self._read))]
            self._read[key] = leaf
        return leaf


class _Proof:
    """What the callbacks of one handshake find out: the peer's identity or why it was refused, and the traffic secrets by label."""

    __slots__ = ("_domain", "_expected", "_failure", "_leaves", "not_after", "peer", "secrets")

    def __init__(self, domain: str, expected: frozenset[SpiffeId] | None, leaves: _Leaves) -> None:
        self._leaves = leaves
        self._domain = domain
        self._expected = expected
        self._failure: PeerError | None = None
        self.peer: SpiffeId | None = None
        self.not_after: datetime | None = None
        self.secrets: dict[bytes, bytes] = {}

    def verify(self, certificate: crypto.X509, error: int, depth: int, chain_ok: bool) -> bool:
        """One step of OpenSSL's walk over the chain; the leaf (depth 0) comes last, and only then the names count."""
        if self._failure is None:
            if not chain_ok:
                text = _CHAIN_TEXTS.get(error, f"X.509 verification error {error}")
                self._failure = HandshakeError(f"the peer's certificate is refused: {text}" + (f" (at depth {depth})" if depth else ""))
            elif depth == 0:
                self._verify_leaf(certificate)
        return self._failure is None

    def _verify_leaf(self, certificate: crypto.X509) -> None:
        try:
            leaf = self._leaves.read(certificate)
        except ValueError as error:
            self._failure = UntrustedPeer(f"the peer's certificate does not parse: {error}")
            return
        names = leaf.names
        if leaf.authority:
            self._failure = UntrustedPeer("the peer's certificate is a CA's")
            return
        if self._expected is not None:
            self.peer = next((name for name in names if name in self._expected), None)
            if self.peer is None:
                wanted = _listed(sorted(self._expected, key=str)) if self._expected else "nobody"
                got = _listed(names)
                self._failure = UntrustedPeer(f"identity verification error: peer did not present the expected SAN ({wanted}), got {got}")
        elif not names or names[0].trust_domain != self._domain:
            self._failure = UntrustedPeer(f"identity verification error: expected trust domain {self._domain}, got {_listed(names)}")
        else:
            self.peer = names[0]
        self.not_after = leaf.not_after

    def explain(self, error: SSL.Error) -> PeerError:
        """The error to raise for a failed handshake: our own verdict if there was one, else OpenSSL's in an operator's words."""
        # Handed over, not kept: it will carry the traceback that holds us.
        failure, self._failure = self._failure, None
        if failure is not None:
            return failure
        reason = reason_of(error)
        return HandshakeError(next((text for key, text in _OPERATOR_TEXTS.items() if key in reason), reason))


def _listed(names: Sequence[SpiffeId]) -> str:
    return ", ".join(name.uri for name in names[:_NAMES_IN_TEXTS]) or "no SPIFFE name"


def spiffe_ids(certificate: x509.Certificate) -> tuple[SpiffeId, ...]:
    """The URI SANs that are SPIFFE identities of Istio's form, in the certificate's order; other names are skipped.

    Raises:
        ValueError: the certificate's extensions do not parse.
    """
    names = _extension(certificate, x509.SubjectAlternativeName)
    if names is None:
        return ()
    found = []
    for uri in names.get_values_for_type(x509.UniformResourceIdentifier):
        try:
            found.append(parse_spiffe(uri))
        except ValueError:
            continue
    return tuple(found)


def is_authority(certificate: x509.Certificate) -> bool:
    """Whether a certificate may sign others: such a one is nobody's identity (X.509-SVID §4.1, as webpki does)."""
    constraints = _extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
    except (x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise ValueError(str(error)) from error


def _context(
    method: int, chain: list[x509.Certificate], key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey, roots: list[x509.Certificate]
) -> SSL.Context:
    context = SSL.Context(method)
    context.set_min_proto_version(SSL.TLS1_3_VERSION)
    context.set_max_proto_version(SSL.TLS1_3_VERSION)
    context.set_tls13_ciphersuites(CIPHER_SUITES)
    context.set_options(SSL.OP_NO_TICKET | SSL.OP_NO_COMPRESSION | SSL.OP_NO_RENEGOTIATION | SSL.OP_CIPHER_SERVER_PREFERENCE)
    context.set_options(_NO_CERTIFICATE_COMPRESSION)
    context.set_session_cache_mode(SSL.SESS_CACHE_OFF)
    context.set_mode(SSL.MODE_RELEASE_BUFFERS)
    context.use_certificate(chain[0])
    for issuer in chain[1:]:
        context.add_extra_chain_cert(issuer)
    context.use_privatekey(key)
    context.check_privatekey()
    store = context.get_cert_store()
    assert store is not None
    for root in roots:
        store.add_cert(crypto.X509.from_cryptography(root))
    # Every certificate of the root set is an anchor, self-signed or not, as in rustls.
    store.set_flags(crypto.X509StoreFlags.PARTIAL_CHAIN)
    context.set_verify(SSL.VERIFY_PEER | SSL.VERIFY_FAIL_IF_NO_PEER_CERT, _verify)
    context.set_verify_depth(MAX_CHAIN_DEPTH)
    context.set_keylog_callback(_keep_secret)
    return context


def _verify(tls: SSL.Connection, certificate: crypto.X509, error: int, depth: int, chain_ok: int) -> bool:
    proof = tls.get_app_data()
    return isinstance(proof, _Proof) and proof.verify(certificate, error, depth, bool(chain_ok))


def _keep_secret(tls: SSL.Connection, line: bytes) -> None:
    """Key-log callback: the only way by which OpenSSL tells its traffic secrets. They go to the handshake's own memory, nowhere else."""
    proof = tls.get_app_data()
    label, _random, secret = line.split()
    if isinstance(proof, _Proof) and label in _SECRETS:
        proof.secrets[label] = bytes.fromhex(secret.decode())


def _select_alpn(_tls: SSL.Connection, offered: list[bytes]) -> bytes:
    """Called only if the client offers anything; one that offers nothing is taken to mean HTTP/2, as rustls does.

    Raising is how pyOpenSSL lets a callback refuse: its NO_OVERLAPPING_PROTOCOLS would go on without ALPN.
    """
    if ALPN not in offered:
        raise HandshakeError("the peer does not offer ALPN h2")
    return ALPN


def _count_records(flight: bytes) -> int:
    count = at = 0
    while at < len(flight):
        at += HEADER_SIZE + int.from_bytes(flight[at + 3 : at + HEADER_SIZE], "big")
        count += 1
    return count
