"""The embedded authority's root on disk: made once, however many agents start together, and refused when it is not safe.

Two files: `root-key.pem` (mode 0600, ours) and `root-cert.pem`. Invariant: a key that somebody else could have read is never
used, and a pair that does not match is never mended by guessing; a person decides. Only a missing certificate beside a good key
is made anew, because that is what a crash between the two writes leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from ztunnel.ca.files import RootError, locked, read_file, write_file

ROOT_YEARS = 10
"""Life of the root; as Istio's self-signed root. Its replacement is a new directory."""
LOCK_SECONDS = 10.0
"""How long a start waits for another agent that is making the root (it takes milliseconds)."""

_KEY = "root-key.pem"
_CERTIFICATE = "root-cert.pem"


@dataclass(frozen=True, slots=True)
class Root:
    """A certificate that signs, with its key: a self-signed P-256 root of ours, or what an operator gives."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    trust_domain: str
    intermediates_pem: bytes = b""
    """What peers need between a leaf and their roots: this certificate and those above it; empty if this is a root."""
    anchors_pem: bytes = b""
    """The roots that peers are to trust; empty: this certificate."""

    @property
    def pem(self) -> bytes:
        """The certificate."""
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def roots_pem(self) -> bytes:
        """What peers are to trust."""
        return self.anchors_pem or self.pem


def open_root(directory: Path, trust_domain: str, now: float) -> Root:
    """The root in a directory, made there if there is none.

    Waits up to LOCK_SECONDS for another process that is doing the same; blocks, so it belongs into a daemon's start.

    Args:
        now: seconds since the epoch.
    Raises:
        RootError: files that others may read, that do not belong together, that are expired or of another trust domain; a
            directory that cannot be written; a lock that is not given back.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(directory / ".lock", LOCK_SECONDS):
            return _open_locked(directory, trust_domain, now)
    except OSError as error:
        raise RootError(f"{error.filename or directory}: {error.strerror}") from error


def new_root(trust_domain: str, now: float, key: ec.EllipticCurvePrivateKey | None = None) -> Root:
    """A root in memory, valid from an hour ago for ROOT_YEARS.

    Its URI SAN is the trust domain's own SPIFFE id (SPIFFE X509-SVID §2: a signing certificate's id has no path).
    """
    key = key or ec.generate_private_key(ec.SECP256R1())
    start = datetime.fromtimestamp(int(now), UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"ztunnel root {trust_domain}"[:64])])
    own_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start - timedelta(hours=1))
        .not_valid_after(start + timedelta(days=365 * ROOT_YEARS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .add_extension(own_id, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{trust_domain}")]), critical=False)
        .sign(key, SHA256())
    )
    return Root(certificate, key, trust_domain)


def key_pem_of(root: Root) -> bytes:
    """The key, unencrypted."""
    return root.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """A root signs certificates and revocation lists, a leaf signs handshakes; neither does anything else."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _open_locked(directory: Path, trust_domain: str, now: float) -> Root:
    key_file, certificate_file = directory / _KEY, directory / _CERTIFICATE
    key_pem, certificate_pem = read_file(key_file, secret=True), read_file(certificate_file, secret=False)
    if key_pem is None and certificate_pem is not None:
        raise RootError(f"{certificate_file}: its key {key_file} is missing; bring it back, or remove the certificate to make a new root")
    key = None if key_pem is None else _parse_key(key_file, key_pem)
    if certificate_pem is None:
        root = new_root(trust_domain, now, key)
        if key is None:
            write_file(key_file, key_pem_of(root), 0o600)
        write_file(certificate_file, root.pem, 0o644)
        return root
    assert key is not None
    return _checked(certificate_file, certificate_pem, key, trust_domain, now)


def _checked(file: Path, pem: bytes, key: ec.EllipticCurvePrivateKey, trust_domain: str, now: float) -> Root:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        certificate.verify_directly_issued_by(certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound) as error:
        raise RootError(f"{file}: not a root certificate of ours: {type(error).__name__} {error}") from error
    if certificate.public_key() != key.public_key():
        raise RootError(f"{file}: does not match {file.parent / _KEY}; restore the pair, or remove both to make a new root")
    if not is_authority:
        raise RootError(f"{file}: not a certificate authority")
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if uris != [f"spiffe://{trust_domain}"]:
        raise RootError(f"{file}: made for {', '.join(uris)[:200]}, but trust_domain is {trust_domain}; use another ca.directory")
    if not certificate.not_valid_before_utc.timestamp() <= now < certificate.not_valid_after_utc.timestamp():
        raise RootError(
            f"{file}: valid from {certificate.not_valid_before_utc.isoformat()} to {certificate.not_valid_after_utc.isoformat()}, "
            "which is not now; check the clock, or remove both files to make a new root"
        )
    return Root(certificate, key, trust_domain)


def _parse_key(file: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, None)
    except (ValueError, TypeError) as error:
        raise RootError(f"{file}: not a private key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise RootError(f"{file}: a P-256 key is expected")
    return key
