"""The embedded authority's root on disk: made once, however many agents start together, and refused when it is not safe.

Two files: `root-key.pem` (mode 0600, ours) and `root-cert.pem`. Invariant: a key that somebody else could have read is never
used, and a pair that does not match is never mended by guessing; a person decides. Only a missing certificate beside a good key
is made anew, because that is what a crash between the two writes leaves.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import NameOID

from ztunnel.mesh.errors import LocalError

ROOT_YEARS = 10
"""Life of the root; as Istio's self-signed root. Its replacement is a new directory."""
LOCK_SECONDS = 10.0
"""How long a start waits for another agent that is making the root (it takes milliseconds)."""
MAX_FILE_BYTES = 64 << 10

_KEY = "root-key.pem"
_CERTIFICATE = "root-cert.pem"


class RootError(LocalError):
    """The root on disk cannot be used; the text names the file, the reason and the way out."""


@dataclass(frozen=True, slots=True)
class Root:
    """A self-signed P-256 root and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    trust_domain: str

    @property
    def pem(self) -> bytes:
        """The certificate, as peers need it."""
        return self.certificate.public_bytes(Encoding.PEM)


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
        with _locked(directory / ".lock"):
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
    key_pem, certificate_pem = _read(key_file, secret=True), _read(certificate_file, secret=False)
    if key_pem is None and certificate_pem is not None:
        raise RootError(f"{certificate_file}: its key {key_file} is missing; bring it back, or remove the certificate to make a new root")
    key = None if key_pem is None else _parse_key(key_file, key_pem)
    if certificate_pem is None:
        root = new_root(trust_domain, now, key)
        if key is None:
            secret = root.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            _write(key_file, secret, 0o600)
        _write(certificate_file, root.pem, 0o644)
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


def _read(file: Path, *, secret: bool) -> bytes | None:
    """The file's content, None if there is none. A secret must be ours and nobody else's to read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with os.fdopen(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_FILE_BYTES:
            raise RootError(f"{file}: not a file of ours")
        if secret and (status.st_mode & 0o077 or status.st_uid != os.geteuid()):
            mode = stat.S_IMODE(status.st_mode)
            raise RootError(
                f"{file}: mode {mode:04o}, owner {status.st_uid}: others may have read this key; make a new root (remove both files), "
                f"or if you are sure that nobody did: chmod 600 {file}"
            )
        return opened.read()


def _write(file: Path, content: bytes, mode: int) -> None:
    """The file appears whole or not at all, also after a power cut."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(descriptor, "wb") as opened:
        # The process's umask may have taken bits away from the certificate, which is meant to be readable.
        os.fchmod(descriptor, mode)
        opened.write(content)
        opened.flush()
        os.fsync(descriptor)
    temporary.rename(file)
    folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise RootError(f"{file}: held by another process for over {LOCK_SECONDS:g} s; see `fuser {file}`") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)
