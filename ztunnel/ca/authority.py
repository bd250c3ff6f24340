"""The embedded authority: signs a workload certificate for any identity of its own trust domain. No clock, no disk.

It trusts its caller: the agent that holds the root decides which identities its node needs. What it refuses is what no caller may
ask for: another trust domain, a weak key, a request whose proof of possession fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztunnel.ca.request import IssueError, Signed, accept, new_request
from ztunnel.ca.root import Root, key_usage
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

_PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

CLOCK_SKEW_SECONDS = 120.0
"""A leaf is valid from this long before it was issued, so that a peer whose clock is behind accepts it. Source: Istio's CA."""


class Authority:
    """Issues from one root."""

    def __init__(self, root: Root, leaf_hours: float = 24.0) -> None:
        self._root = root
        self._leaf_seconds = leaf_hours * 3600
        self._root_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(root.key.public_key())

    def issue(self, identity: SpiffeId, now: float) -> Credentials:
        """A fresh key and a certificate for it, about a millisecond's work.

        Args:
            now: seconds since the epoch.
        Raises:
            IssueError: see `sign`.
        """
        request = new_request(identity)
        return accept(request, self.sign(request.csr_pem, identity, now))

    async def obtain(self, identity: SpiffeId, now: float) -> Credentials:
        """`issue`, in the shape that a remote authority has."""
        return self.issue(identity, now)

    def sign(self, csr_pem: bytes, identity: SpiffeId, now: float, seconds: float | None = None) -> Signed:
        """A certificate for the request's key.

        Only the key is taken from the request: names and usages are ours to say.

        Args:
            identity: what the caller has established that the requester may have.
            now: seconds since the epoch.
            seconds: the life that the requester wishes for; more than ours is not given.
        Raises:
            IssueError: a request that is malformed, badly signed, for a weak or unusual key or for another identity; an identity of
                another trust domain; a root that has expired.
        """
        if identity.trust_domain != self._root.trust_domain:
            raise IssueError(f"{identity} is not of this authority's trust domain {self._root.trust_domain}")
        key = _requested_key(csr_pem, identity)
        life = self._leaf_seconds if seconds is None else min(seconds, self._leaf_seconds)
        # A leaf of seconds, as tests want it, is not to be past its half-life at birth.
        skew = min(CLOCK_SKEW_SECONDS, life / 10)
        issued = datetime.fromtimestamp(int(now), UTC)
        end = min(issued + timedelta(seconds=life), self._root.certificate.not_valid_after_utc)
        if end <= issued:
            raise IssueError(f"the root certificate expired at {end.isoformat()}")
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(identity.uri)])
        leaf = self._builder(key, san, issued - timedelta(seconds=skew), end)
        pem = leaf.sign(self._root.key, SHA256()).public_bytes(Encoding.PEM)
        return Signed(pem + self._root.intermediates_pem, self._root.roots_pem)

    def server(self, names: Sequence[str], now: float) -> tuple[bytes, bytes]:
        """Chain and key in PEM of a certificate for a TLS server of these DNS names, for the authority's own use."""
        key = ec.generate_private_key(ec.SECP256R1())
        issued = datetime.fromtimestamp(int(now), UTC)
        end = min(issued + timedelta(seconds=self._leaf_seconds), self._root.certificate.not_valid_after_utc)
        san = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = self._builder(key.public_key(), san, issued - timedelta(seconds=min(CLOCK_SKEW_SECONDS, self._leaf_seconds / 10)), end)
        chain = builder.sign(self._root.key, SHA256()).public_bytes(Encoding.PEM) + self._root.intermediates_pem
        return chain, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def _builder(self, key: _PublicKey, names: x509.SubjectAlternativeName, start: datetime, end: datetime) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self._root.certificate.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(end)
            .add_extension(names, critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
            .add_extension(self._root_id, critical=False)
        )


def _requested_key(csr_pem: bytes, identity: SpiffeId) -> _PublicKey:
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        signed_by_its_key = csr.is_signature_valid
        names = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        key = csr.public_key()
    except (ValueError, x509.ExtensionNotFound) as error:
        raise IssueError(f"the request for {identity} cannot be read: {error}") from error
    if not signed_by_its_key:
        raise IssueError(f"the request for {identity} is not signed by its own key")
    if not _is_strong(key):
        raise IssueError(f"the request for {identity} has a key that is not P-256, P-384 or RSA of 2048 to 4096 bits")
    if names.get_values_for_type(x509.UniformResourceIdentifier) != [identity.uri]:
        raise IssueError(f"the request says another identity than {identity}")
    assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
    return key


def _is_strong(key: object) -> bool:
    """Ours are P-256; Istio's proxies ask with RSA 2048 unless told otherwise."""
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1)
    return isinstance(key, rsa.RSAPublicKey) and 2048 <= key.key_size <= 4096
