"""The PROXY header, byte by byte."""

from __future__ import annotations

from ztunnel.hbone.proxy_protocol import SIGNATURE, header


def test_ipv4_with_the_peers_identity() -> None:
    made = header(("10.0.0.9", 40000), ("10.96.0.1", 80), "spiffe://td/ns/a/sa/b")
    tlv = b"\xd0\x00\x15spiffe://td/ns/a/sa/b"
    assert made == b"\r\n\r\n\0\r\nQUIT\n" + b"\x21\x11\x00\x24" + b"\x0a\0\0\x09\x0a\x60\0\x01\x9c\x40\0\x50" + tlv


def test_ipv6_without_identity() -> None:
    made = header(("fd00::9", 1), ("fd00::1", 2))
    assert made[:16] == SIGNATURE + b"\x21\x21\x00\x24"
    assert made[16:32] == bytes.fromhex("fd000000000000000000000000000009")
    assert made[48:] == b"\0\x01\0\x02"


def test_two_families_meet_in_ipv6() -> None:
    made = header(("10.0.0.9", 1), ("fd00::1", 2))
    assert made[13] == 0x21
    assert made[16:32] == bytes(10) + b"\xff\xff\x0a\0\0\x09"
