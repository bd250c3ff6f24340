"""Signing certificates that operators give, in cert-manager's and in Istio's form."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from ztunnel.ca.authority import Authority
from ztunnel.ca.files import RootError
from ztunnel.ca.given import read_given
from ztunnel.ca.request import check_chain, new_request
from ztunnel.ca.root import key_usage
from ztunnel.mesh.identity import SpiffeId

NOW = 1_800_000_000.0
ALICE = SpiffeId("cluster.local", "shop", "alice")
Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


def certificate(name: str, key: Key, issuer: str, signing: Key, *, authority: bool = True, years: float = 1) -> bytes:
    start = datetime.datetime.fromtimestamp(NOW - 60, datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=365 * years))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=authority), critical=True)
        .sign(signing, SHA256())
    )
    return made.public_bytes(Encoding.PEM)


def pem(key: Key) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


ROOT, MIDDLE, LOWER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(3))
RSA_ROOT = rsa.generate_private_key(65537, 2048)
ROOT_PEM = certificate("root", ROOT, "root", ROOT)
MIDDLE_PEM = certificate("middle", MIDDLE, "root", ROOT)
LOWER_PEM = certificate("lower", LOWER, "middle", MIDDLE)
OTHER_PEM = certificate("other", RSA_ROOT, "other", RSA_ROOT)


def write(directory: Path, **files: bytes) -> Path:
    for name, content in files.items():
        (directory / name.replace("__", "-").replace("_", ".")).write_bytes(content)
    return directory


def signs(directory: Path, intermediates: int) -> None:
    root = read_given(directory, "cluster.local", NOW)
    signed = Authority(root).sign(new_request(ALICE).csr_pem, ALICE, NOW)
    check_chain(signed, NOW)
    assert signed.chain_pem.count(b"BEGIN") == 1 + intermediates


def test_a_root_that_signs_itself(tmp_path: Path) -> None:
    signs(write(tmp_path, tls_crt=ROOT_PEM, tls_key=pem(ROOT), ca_crt=ROOT_PEM), 0)


def test_an_rsa_root(tmp_path: Path) -> None:
    signs(write(tmp_path, tls_crt=OTHER_PEM, tls_key=pem(RSA_ROOT), ca_crt=OTHER_PEM), 0)


def test_intermediates_as_cert_manager_gives_them(tmp_path: Path) -> None:
    signs(write(tmp_path, tls_crt=LOWER_PEM + MIDDLE_PEM, tls_key=pem(LOWER), ca_crt=ROOT_PEM), 2)


def test_intermediates_as_istio_has_them(tmp_path: Path) -> None:
    files = {"ca__cert_pem": LOWER_PEM, "ca__key_pem": pem(LOWER), "cert__chain_pem": LOWER_PEM + MIDDLE_PEM, "root__cert_pem": ROOT_PEM}
    signs(write(tmp_path, **files), 2)


def test_a_bundle_of_old_and_new(tmp_path: Path) -> None:
    directory = write(tmp_path, tls_crt=ROOT_PEM, tls_key=pem(ROOT), ca_crt=OTHER_PEM + ROOT_PEM)
    signs(directory, 0)
    assert read_given(directory, "cluster.local", NOW).roots_pem == OTHER_PEM + ROOT_PEM


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "tls.crt, tls.key and ca.crt or ca-cert.pem"),
        ({"tls_crt": ROOT_PEM, "tls_key": pem(ROOT)}, "ca.crt: No such file"),
        ({"tls_crt": ROOT_PEM, "tls_key": pem(MIDDLE), "ca_crt": ROOT_PEM}, "does not belong to tls.key"),
        ({"tls_crt": LOWER_PEM, "tls_key": pem(LOWER), "ca_crt": ROOT_PEM}, "does not lead to any root"),
        ({"tls_crt": MIDDLE_PEM, "tls_key": pem(MIDDLE), "ca_crt": OTHER_PEM}, "does not lead to any root"),
        ({"tls_crt": b"x", "tls_key": pem(MIDDLE), "ca_crt": OTHER_PEM}, "cannot be read"),
        ({"tls_crt": ROOT_PEM, "tls_key": b"x" * (1 << 20), "ca_crt": OTHER_PEM}, "larger than"),
        (
            {"tls_crt": certificate("leaf", LOWER, "root", ROOT, authority=False), "tls_key": pem(LOWER), "ca_crt": ROOT_PEM},
            "not a certificate authority",
        ),
        ({"tls_crt": certificate("root", ROOT, "root", ROOT, years=1e-6), "tls_key": pem(ROOT), "ca_crt": ROOT_PEM}, "not valid now"),
    ],
)
def test_what_cannot_sign_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(RootError, match=reason):
        read_given(write(tmp_path, **files), "cluster.local", NOW)
