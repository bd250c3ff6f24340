"""The root on disk: made once, refused when unsafe."""

from __future__ import annotations

import fcntl
import os
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from ztunnel.ca import root as module
from ztunnel.ca.files import MAX_FILE_BYTES, RootError
from ztunnel.ca.root import new_root, open_root

NOW = 1_800_000_000.0


def test_made_once_with_a_private_key_file(tmp_path: Path) -> None:
    directory = tmp_path / "a" / "ca"
    first = open_root(directory, "cluster.local", NOW)
    again = open_root(directory, "cluster.local", NOW + 60)
    assert first.pem == again.pem
    assert (directory / "root-key.pem").stat().st_mode & 0o777 == 0o600
    assert (directory / "root-cert.pem").stat().st_mode & 0o777 == 0o644
    assert directory.stat().st_mode & 0o777 == 0o700
    basic = first.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert basic.value.ca
    names = first.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://cluster.local"]
    life = first.certificate.not_valid_after_utc - first.certificate.not_valid_before_utc
    assert life.days == 3650


def test_agents_that_start_together_share_one_root(tmp_path: Path) -> None:
    roots: list[bytes] = []
    barrier = threading.Barrier(8)

    def start() -> None:
        barrier.wait(10)
        roots.append(open_root(tmp_path / "ca", "cluster.local", NOW).pem)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(roots) == 8
    assert len(set(roots)) == 1


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-key.pem").chmod(mode)
    with pytest.raises(RootError, match="others may have read this key"):
        open_root(tmp_path, "cluster.local", NOW)


def test_a_pair_that_does_not_match_is_refused(tmp_path: Path) -> None:
    open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-cert.pem").write_bytes(new_root("cluster.local", NOW).pem)
    with pytest.raises(RootError, match="does not match"):
        open_root(tmp_path, "cluster.local", NOW)


def test_a_certificate_without_its_key_is_refused(tmp_path: Path) -> None:
    open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-key.pem").unlink()
    with pytest.raises(RootError, match="is missing"):
        open_root(tmp_path, "cluster.local", NOW)


def test_a_key_without_certificate_is_a_start_that_was_interrupted(tmp_path: Path) -> None:
    first = open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-cert.pem").unlink()
    second = open_root(tmp_path, "cluster.local", NOW)
    assert first.certificate.public_key() == second.certificate.public_key()


def test_another_trust_domain_and_another_time_are_refused(tmp_path: Path) -> None:
    open_root(tmp_path, "cluster.local", NOW)
    with pytest.raises(RootError, match=r"made for spiffe://cluster\.local, but trust_domain is other\.example"):
        open_root(tmp_path, "other.example", NOW)
    for moment in (NOW - 86400, NOW + 11 * 365 * 86400):
        with pytest.raises(RootError, match="which is not now"):
            open_root(tmp_path, "cluster.local", moment)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"])
def test_files_that_are_not_ours_are_refused(tmp_path: Path, content: bytes) -> None:
    open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-cert.pem").write_bytes(content)
    with pytest.raises(RootError, match=r"root-cert\.pem"):
        open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-key.pem").write_bytes(content)
    with pytest.raises(RootError, match=r"root-key\.pem"):
        open_root(tmp_path, "cluster.local", NOW)


@pytest.mark.parametrize("key", [ed25519.Ed25519PrivateKey.generate(), ec.generate_private_key(ec.SECP384R1())])
def test_a_key_of_another_kind_is_refused(tmp_path: Path, key: ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> None:
    file = tmp_path / "root-key.pem"
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    file.chmod(0o600)
    with pytest.raises(RootError, match="P-256"):
        open_root(tmp_path, "cluster.local", NOW)


def test_links_directories_and_huge_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch(0o600)
    (tmp_path / "root-key.pem").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RootError):
        open_root(tmp_path, "cluster.local", NOW)
    (tmp_path / "root-key.pem").unlink()
    (tmp_path / "root-key.pem").write_bytes(b"x" * (MAX_FILE_BYTES + 1))
    with pytest.raises(RootError, match="not a file of ours"):
        open_root(tmp_path, "cluster.local", NOW)


def test_a_directory_that_cannot_be_made_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RootError, match="file"):
        open_root(tmp_path / "file" / "ca", "cluster.local", NOW)


def test_a_lock_that_is_not_given_back_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.0)
    holder = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RootError, match="held by another process"):
            open_root(tmp_path, "cluster.local", NOW)
    finally:
        os.close(holder)
