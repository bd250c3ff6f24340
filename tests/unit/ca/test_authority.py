"""What a workload certificate says, and what the authority refuses to say."""

from __future__ import annotations

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from ztunnel.ca.authority import Authority
from ztunnel.ca.request import IssueError, Request, Signed, accept, new_request, validity
from ztunnel.ca.root import new_root
from ztunnel.hbone.handshake import Credentials
from ztunnel.mesh.identity import SpiffeId

NOW = 1_800_000_000.0
ROOT = new_root("cluster.local", NOW)
ALICE = SpiffeId("cluster.local", "shop", "alice")
BOB = SpiffeId("cluster.local", "shop", "bob")


def csr(key: ec.EllipticCurvePrivateKey, uri: str | None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if uri is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
    return builder.sign(key, SHA256()).public_bytes(Encoding.PEM)


def test_a_leaf_is_what_istio_peers_expect() -> None:
    credentials = Authority(ROOT).issue(ALICE, NOW)
    leaf = x509.load_pem_x509_certificate(credentials.chain_pem)
    leaf.verify_directly_issued_by(ROOT.certificate)
    assert credentials.identity == ALICE
    assert credentials.roots_pem == ROOT.pem
    assert leaf.subject == x509.Name([])
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.critical
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cluster.local/ns/shop/sa/alice"]
    usage = set(leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)
    assert usage == {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH}
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    key = leaf.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert isinstance(key.curve, ec.SECP256R1)
    known = validity(credentials)
    assert (known.not_before, known.not_after) == (NOW - 120, NOW + 86400)
    assert known.serial == leaf.serial_number


def test_every_certificate_has_a_key_of_its_own() -> None:
    authority = Authority(ROOT)
    assert authority.issue(ALICE, NOW).key_pem != authority.issue(ALICE, NOW).key_pem


def test_a_short_leaf_is_not_half_spent_at_birth() -> None:
    known = validity(Authority(ROOT, leaf_hours=10 / 3600).issue(ALICE, NOW))
    assert (known.not_before, known.not_after) == (NOW - 1, NOW + 10)


def test_a_leaf_does_not_outlive_its_root() -> None:
    end = ROOT.certificate.not_valid_after_utc.timestamp()
    authority = Authority(ROOT)
    assert validity(authority.issue(ALICE, end - 60)).not_after == end
    with pytest.raises(IssueError, match="root certificate expired"):
        authority.issue(ALICE, end)


def test_another_trust_domain_is_refused() -> None:
    with pytest.raises(IssueError, match="trust domain"):
        Authority(ROOT).issue(SpiffeId("evil.example", "shop", "alice"), NOW)


def test_requests_that_are_not_what_they_claim_are_refused() -> None:
    authority = Authority(ROOT)
    good = ec.generate_private_key(ec.SECP256R1())
    tampered = x509.load_pem_x509_csr(csr(good, ALICE.uri)).public_bytes(Encoding.DER)
    tampered = tampered[:-4] + bytes([tampered[-4] ^ 1]) + tampered[-3:]
    cases = {
        "cannot be read": b"nonsense",
        "is not signed by its own key": x509.load_der_x509_csr(tampered).public_bytes(Encoding.PEM),
        "not P-256, P-384 or RSA": csr(ec.generate_private_key(ec.SECP521R1()), ALICE.uri),
        "another identity": csr(good, BOB.uri),
    }
    for expected, request in cases.items():
        with pytest.raises(IssueError, match=expected):
            authority.sign(request, ALICE, NOW)
    with pytest.raises(IssueError, match="cannot be read"):
        authority.sign(csr(good, None), ALICE, NOW)


def test_an_answer_is_checked_before_it_is_used() -> None:
    authority = Authority(ROOT)
    mine, other = new_request(ALICE), new_request(ALICE)
    with pytest.raises(IssueError, match="for another key"):
        accept(mine, authority.sign(other.csr_pem, ALICE, NOW))
    theirs = new_request(BOB)
    with pytest.raises(IssueError, match=r"was asked for .*alice and gave .*bob"):
        accept(Request(ALICE, theirs.csr_pem, theirs.key_pem), authority.sign(theirs.csr_pem, BOB, NOW))
    with pytest.raises(IssueError, match="cannot be used"):
        accept(mine, Signed(b"", ROOT.pem))
    with pytest.raises(IssueError, match="cannot be read"):
        validity(Credentials(ALICE, b"nonsense", b"", b""))
