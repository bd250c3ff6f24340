"""A signing certificate that an operator gives, as files in a directory (a mounted Secret): cert-manager's names, or Istio's `cacerts`.

They are read again whenever they change. To replace a root without an outage its operator adds the new one to the bundle first (`ca.crt`),
and lets it sign (`tls.crt`, `tls.key`) once every certificate has been renewed, and takes the
former one out as much later.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key

from ztunnel.ca.files import MAX_FILE_BYTES, RootError
from ztunnel.ca.request import is_issued_by
from ztunnel.ca.root import Root


@dataclass(frozen=True, slots=True)
class _Names:
    certificate: str
    key: str
    roots: str
    chain: str = ""


_LAYOUTS = (_Names("tls.crt", "tls.key", "ca.crt"), _Names("ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"))


def read_given(directory: Path, trust_domain: str, now: float) -> Root:
    """What signs, with its intermediates and roots.

    Args:
        now: seconds since the epoch.
    Raises:
        RootError: files are missing, do not belong together, are no authority or not valid now.
    """
    names = next((each for each in _LAYOUTS if (directory / each.certificate).exists()), None)
    if names is None:
        expected = " or ".join(f"{each.certificate}, {each.key} and {each.roots}" for each in _LAYOUTS)
        raise RootError(f"{directory}: {expected} are expected")
    place = directory / names.certificate
    try:
        chain = x509.load_pem_x509_certificates(_read(place))
        roots = x509.load_pem_x509_certificates(_read(directory / names.roots))
        if names.chain and (directory / names.chain).exists():
            chain += [each for each in x509.load_pem_x509_certificates(_read(directory / names.chain)) if each not in chain]
        key = load_pem_private_key(_read(directory / names.key), None)
    except (ValueError, TypeError) as error:
        raise RootError(f"{directory}: cannot be read: {error}") from error
    certificate = chain[0]
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise RootError(f"{directory / names.key}: an ECDSA or RSA key is expected")
    if key.public_key() != certificate.public_key():
        raise RootError(f"{place}: does not belong to {names.key}")
    _check_authority(place, certificate, now)
    path = _path(chain, roots)
    if path is None:
        raise RootError(f"{place}: does not lead to any root of {names.roots}")
    intermediates = b"".join(each.public_bytes(Encoding.PEM) for each in path)
    anchors = b"".join(each.public_bytes(Encoding.PEM) for each in roots)
    return Root(certificate, key, trust_domain, intermediates, anchors)


def _check_authority(place: Path, certificate: x509.Certificate, now: float) -> None:
    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        may_sign = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except (ValueError, x509.ExtensionNotFound):
        is_authority, may_sign = False, False
    if not is_authority or not may_sign:
        raise RootError(f"{place}: not a certificate authority (basicConstraints CA:TRUE and keyUsage keyCertSign)")
    if not certificate.not_valid_before_utc.timestamp() <= now < certificate.not_valid_after_utc.timestamp():
        raise RootError(f"{place}: not valid now, but from {certificate.not_valid_before_utc} to {certificate.not_valid_after_utc}")


def _path(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> list[x509.Certificate] | None:
    """What stands between leaves and roots: the certificates before the first that is a root or signed by one; None if none is."""
    path: list[x509.Certificate] = []
    for index, certificate in enumerate(chain):
        if certificate in roots:
            return path
        path.append(certificate)
        if any(is_issued_by(certificate, root) for root in roots):
            return path
        if index + 1 == len(chain) or not is_issued_by(certificate, chain[index + 1]):
            return None
    return None


def _read(file: Path) -> bytes:
    try:
        with file.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise RootError(f"{file}: {error.strerror}") from error
    if len(content) > MAX_FILE_BYTES:
        raise RootError(f"{file}: larger than {MAX_FILE_BYTES} bytes")
    return content
