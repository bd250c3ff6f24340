"""One mutual handshake with ourselves, and a few bytes each way: whatever the libraries load when it is first needed is loaded after it.

A worker that has given up its privileges cannot open files any more, and OpenSSL, `cryptography` and Python's codecs all load parts
lazily. Running the real thing once is the only list of those parts that cannot become stale.
"""

from __future__ import annotations

from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ztunnel.hbone.handshake import Credentials, Handshake, HandshakeError, TlsContexts
from ztunnel.hbone.records import sealed_size
from ztunnel.mesh.errors import PeerError
from ztunnel.mesh.identity import SpiffeId

_WORD = b"rehearsal"
_BEGINNING, _END = datetime(2000, 1, 1, tzinfo=UTC), datetime(2100, 1, 1, tzinfo=UTC)


def rehearse(own_records: bool) -> None:
    """Takes about five milliseconds. The keys it makes are worth nothing and forgotten.

    Raises:
        PeerError: this installation cannot speak to itself, and so to nobody.
    """
    identity = SpiffeId("rehearsal.invalid", "none", "none")
    contexts = TlsContexts(_credentials(identity))
    # A refused handshake takes other ways through the libraries than one that succeeds.
    try:
        _join(contexts, frozenset({SpiffeId("rehearsal.invalid", "none", "another")}), own_records)
    except PeerError:
        pass
    client, server = _join(contexts, frozenset({identity}), own_records)
    near, far = client.finish()[0], server.finish()[0]
    source = bytearray(_WORD + b"\0")
    sealed = memoryview(bytearray(sealed_size(len(_WORD))))
    opened = memoryview(bytearray(1 << 15))
    end = near.seal(source, 0, len(_WORD), sealed, 0)
    _, length = far.open(sealed, 0, end, opened, 0)
    if opened[:length] != _WORD:
        raise HandshakeError("the record layer does not give back what it was given")


def _join(contexts: TlsContexts, expected: frozenset[SpiffeId], own_records: bool) -> tuple[Handshake, Handshake]:
    client = Handshake(contexts, server=False, expected=expected, own_records=own_records)
    server = Handshake(contexts, server=True, expected=None, own_records=own_records)
    while not (client.done and server.done):
        server.receive(client.outgoing())
        client.receive(server.outgoing())
    return client, server


def _credentials(identity: SpiffeId) -> Credentials:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rehearsal")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(_BEGINNING).not_valid_after(_END)
    certificate = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)]), critical=False).sign(
        key, SHA256()
    )
    pem = certificate.public_bytes(Encoding.PEM)
    return Credentials(identity, pem, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), pem)
