"""One spelling for each address, and blocks."""

from __future__ import annotations

import pytest

from ztunnel.mesh.addresses import block_bounds, canonical, is_ipv6, is_loopback, number, parse_block
from ztunnel.mesh.rules import Cidr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("FD00:0:0::1", "fd00::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::1", "::1"),
        ("10.0.0.01", None),
        ("10.0.0.256", None),
        ("fe80::1%eth0", None),
        ("", None),
        ("web.default.svc.cluster.local", None),
        ("1" * 10_000, None),
    ],
)
def test_an_address_has_one_spelling(text: str, expected: str | None) -> None:
    assert canonical(text) == expected


def test_families_and_loopback() -> None:
    assert is_ipv6("::1")
    assert not is_ipv6("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("127.1.2.3")
    assert not is_loopback("128.0.0.1")


def test_numbers_tell_the_families_apart() -> None:
    assert number("0.0.0.1") == (32, 1)
    assert number("::1") == (128, 1)
    assert number("nonsense") == (0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10.1.2.3/8", Cidr(32, "10.0.0.0", 8)),
        ("10.1.2.3", Cidr(32, "10.1.2.3", 32)),
        ("fd00::1/64", Cidr(128, "fd00::", 64)),
        ("::ffff:10.0.0.0/104", Cidr(32, "10.0.0.0", 8)),
        ("::ffff:10.0.0.0/64", Cidr(128, "::", 64)),
        ("::/0", Cidr(128, "::", 0)),
        ("10.0.0.0/33", None),
        ("fe80::%1/64", None),
        ("10.0.0.0/" + "0" * 100, None),
        ("", None),
    ],
)
def test_a_block_is_canonical(text: str, expected: Cidr | None) -> None:
    assert parse_block(text) == expected


def test_bounds_of_a_block() -> None:
    assert block_bounds(Cidr(32, "10.0.0.0", 30)) == (32, 0x0A000000, 0x0A000003)
    assert block_bounds(Cidr(128, "::", 0)) == (128, 0, 2**128 - 1)
