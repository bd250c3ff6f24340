"""A throw-away certificate authority: credentials that work, and credentials that are wrong in exactly one way.

Everything is made in memory with P-256 keys. Nothing here is fit for a cluster; `ztunnel.ca` is.
"""

from __future__ import annotations

import datetime
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID

from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

DAY = datetime.timedelta(days=1)
BOTH_SIDES = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class FakePki:
    """One trust domain with one root. Two instances are foreign to each other, whatever their trust domains."""

    def __init__(self, trust_domain: str = "cluster.local") -> None:
        self.trust_domain = trust_domain
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"root of {trust_domain}")
        now = _now()
        builder = _builder(name, name, self._key.public_key(), now - DAY, now + 10 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        # Roots of one name are told apart by key identifiers, as those of real authorities are.
        self._root_id = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        builder = builder.add_extension(self._root_id, critical=False)
        self._root = builder.add_extension(_usage(signs=True), critical=True).sign(self._key, hashes.SHA256())

    @cached_property
    def root_pem(self) -> bytes:
        """The root certificate."""
        return self._root.public_bytes(Encoding.PEM)

    def identity(self, service_account: str = "default", namespace: str = "default") -> SpiffeId:
        """An identity of this trust domain."""
        return SpiffeId(self.trust_domain, namespace, service_account)

    def credentials(
        self,
        identity: SpiffeId | None = None,
        *,
        uris: tuple[str, ...] | None = None,
        usages: tuple[x509.ObjectIdentifier, ...] = BOTH_SIDES,
        valid: tuple[datetime.timedelta, datetime.timedelta] = (-DAY, DAY),
        authority: bool | None = False,
        san_der: bytes | None = None,
        roots_pem: bytes | None = None,
    ) -> Credentials:
        """Credentials signed by this root.

        Args:
            identity: the name that `Credentials` claims, in any trust domain; `identity()` if None.
            uris: the certificate's URI SANs if they are not just the identity's; empty for a certificate without SAN extension.
            usages: extended key usages; empty for a certificate without that extension.
            valid: notBefore and notAfter, relative to now.
            authority: make the leaf a CA certificate; None leaves out the basic constraints.
            san_der: the SAN extension's value as it is, valid or not, in place of `uris`.
            roots_pem: whom the holder trusts, if not this root.
        """
        identity = identity or self.identity()
        key = ec.generate_private_key(ec.SECP256R1())
        now = _now()
        builder = _builder(_name(""), self._root.subject, key.public_key(), now + valid[0], now + valid[1])
        if authority is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        builder = builder.add_extension(_usage(signs=bool(authority)), critical=True)
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(self._root_id)
        builder = builder.add_extension(issuer_id, critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        names = [x509.UniformResourceIdentifier(uri) for uri in ((identity.uri,) if uris is None else uris)]
        if san_der is not None:
            builder = builder.add_extension(x509.UnrecognizedExtension(ExtensionOID.SUBJECT_ALTERNATIVE_NAME, san_der), critical=False)
        elif names:
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
        leaf = builder.sign(self._key, hashes.SHA256())
        return Credentials(
            identity=identity,
            chain_pem=leaf.public_bytes(Encoding.PEM) + self.root_pem,
            key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
            roots_pem=self.root_pem if roots_pem is None else roots_pem,
        )

    def expired(self, identity: SpiffeId | None = None) -> Credentials:
        """A certificate that was valid until an hour ago."""
        return self.credentials(identity, valid=(-DAY, -DAY / 24))

    def without_san(self, identity: SpiffeId | None = None) -> Credentials:
        """A certificate without any name."""
        return self.credentials(identity, uris=())

    def wrong_usage(self, *, server: bool, identity: SpiffeId | None = None) -> Credentials:
        """A certificate that its holder, a server or a client, may not use: it is for the other side of TLS only."""
        return self.credentials(identity, usages=(ExtendedKeyUsageOID.CLIENT_AUTH if server else ExtendedKeyUsageOID.SERVER_AUTH,))

    def foreign_root(self, identity: SpiffeId | None = None) -> Credentials:
        """The right names, signed by a root of the same name that nobody here trusts; its holder trusts this root."""
        return FakePki(self.trust_domain).credentials(identity or self.identity(), roots_pem=self.root_pem)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)] if common else [])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, start: datetime.datetime, end: datetime.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(end)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
