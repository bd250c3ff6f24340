"""The node's half of issuing: a fresh key, a request for it, and what comes back. Pure apart from randomness.

Any authority can stand behind this shape: the embedded one signs a request in a function call, a remote one over the network.
The key is made here and never leaves the process; only the request does.
"""

from __future__ import annotations

from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.identity import SpiffeId


class IssueError(LocalError):
    """The authority did not give the certificate that was asked for; the text says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """A certificate signing request and the private key that it proves possession of."""

    identity: SpiffeId
    csr_pem: bytes
    key_pem: bytes


@dataclass(frozen=True, slots=True)
class Signed:
    """An authority's answer: the leaf and its intermediates, and the roots that its peers are to be checked against."""

    chain_pem: bytes
    roots_pem: bytes


@dataclass(frozen=True, slots=True)
class Validity:
    """What one needs to know of a leaf to renew it and to show it. Times are seconds since the epoch."""

    not_before: float
    not_after: float
    serial: int


def new_request(identity: SpiffeId) -> Request:
    """A fresh P-256 key and a request for one identity: empty subject, the URI SAN critical.

    Source: Istio ztunnel `tls/csr.rs`; SPIFFE X509-SVID §4.1 (an empty subject makes the SAN critical, RFC 5280 §4.2.1.6).
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(name, critical=True).sign(key, SHA256())
    return Request(
        identity,
        csr.public_bytes(Encoding.PEM),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
    )


def accept(request: Request, signed: Signed) -> Credentials:
    """The credentials that an answer and our own key make.

    Raises:
        IssueError: the leaf cannot be read, is for another key or carries another identity than was asked for.
    """
    try:
        leaf = x509.load_pem_x509_certificate(signed.chain_pem)
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        ours = x509.load_pem_x509_csr(request.csr_pem).public_key()
        same_key = leaf.public_key() == ours
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IssueError(f"the authority's certificate for {request.identity} cannot be used: {error}") from error
    if uris != [request.identity.uri]:
        raise IssueError(f"the authority was asked for {request.identity} and gave {', '.join(uris)[:200] or 'no identity'}")
    if not same_key:
        raise IssueError(f"the authority's certificate for {request.identity} is for another key")
    return Credentials(request.identity, signed.chain_pem, request.key_pem, signed.roots_pem)


def check_chain(signed: Signed, now: float) -> None:
    """Whether the leaf of an answer leads to its roots at this time.

    Peers would find out at the handshake; here it keeps a certificate that nobody accepts from replacing one that works.

    Args:
        now: seconds since the epoch.
    Raises:
        IssueError: it does not, or something of it cannot be read.
    """
    try:
        chain = x509.load_pem_x509_certificates(signed.chain_pem)
        roots = x509.load_pem_x509_certificates(signed.roots_pem)
    except ValueError as error:
        raise IssueError(f"the authority's chain cannot be read: {error}") from error
    for certificate, issuer in zip(chain, [*chain[1:], None], strict=True):
        if not certificate.not_valid_before_utc.timestamp() <= now < certificate.not_valid_after_utc.timestamp():
            raise IssueError("a certificate of the authority's chain is not valid now; compare the clocks")
        if any(is_issued_by(certificate, root) for root in roots):
            return
        if issuer is None or not is_issued_by(certificate, issuer):
            break
    raise IssueError("the authority's certificate does not lead to any of the roots that came with it")


def validity(credentials: Credentials) -> Validity:
    """When the leaf of these credentials is valid.

    Raises:
        IssueError: its chain does not begin with a certificate.
    """
    try:
        leaf = x509.load_pem_x509_certificate(credentials.chain_pem)
    except ValueError as error:
        raise IssueError(f"the certificate of {credentials.identity} cannot be read: {error}") from error
    return Validity(leaf.not_valid_before_utc.timestamp(), leaf.not_valid_after_utc.timestamp(), leaf.serial_number)


def is_issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """Whether the issuer's name and key are those that the certificate is signed with."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True
