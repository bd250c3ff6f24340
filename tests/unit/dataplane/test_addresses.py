"""Addresses in canonical text, and the question where a redirected connection was going."""

from __future__ import annotations

import errno
import socket

import pytest

from ztunnel.dataplane import addresses
from ztunnel.dataplane.addresses import canonical, original_destination, text


@pytest.mark.parametrize(
    ("reported", "expected"),
    [
        (("10.0.0.1", 80), ("10.0.0.1", 80)),
        (("::ffff:10.0.0.1", 80, 0, 0), ("10.0.0.1", 80)),
        (("fe80::1%eth0", 80, 0, 3), ("fe80::1", 80)),
        (("fd00::1", 80, 0, 0), ("fd00::1", 80)),
        (("::ffff:1", 80, 0, 0), ("::ffff:1", 80)),
    ],
)
def test_canonical(reported: tuple[str, int] | tuple[str, int, int, int], expected: tuple[str, int]) -> None:
    assert canonical(reported) == expected


def test_text() -> None:
    assert text(("10.0.0.1", 80)) == "10.0.0.1:80"
    assert text(("fd00::1", 80)) == "[fd00::1]:80"


@pytest.mark.parametrize("peer", [("127.0.0.1", 1), ("::1", 1)])
def test_a_connection_that_nobody_redirected_has_no_original_destination(peer: tuple[str, int]) -> None:
    family = socket.AF_INET6 if ":" in peer[0] else socket.AF_INET
    with socket.socket(family) as sock, pytest.raises(OSError, match="Errno") as caught:
        original_destination(sock, peer)
    assert caught.value.errno in (errno.ENOENT, errno.ENOTCONN, errno.ENOPROTOOPT)


class Redirected:
    """A socket whose conntrack entry is known. The kernel's answers are as `tests/netns/test_redirection.py` meets them."""

    def __init__(self, entry: bytes) -> None:
        self.entry = entry

    def getsockopt(self, _level: int, _option: int, size: int) -> bytes:
        assert len(self.entry) == size
        return self.entry


@pytest.mark.parametrize(
    ("entry", "peer", "expected"),
    [
        (b"\x02\x00\x1f\x90" + bytes((10, 96, 0, 1)) + bytes(8), ("10.0.0.9", 4000), ("10.96.0.1", 8080)),
        (b"\x0a\x00\x1f\x90" + bytes(4) + socket.inet_pton(socket.AF_INET6, "fd96::1") + bytes(4), ("fd00::9", 4000), ("fd96::1", 8080)),
    ],
)
def test_the_original_destination_is_read_from_the_kernels_structures(
    entry: bytes, peer: tuple[str, int], expected: tuple[str, int]
) -> None:
    assert original_destination(Redirected(entry), peer) == expected  # type: ignore[arg-type]  # only getsockopt is asked for


def test_few_destinations_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_REMEMBERED", 3)
    for number in [*range(10), *range(10)]:
        entry = b"\x02\x00\x1f\x90" + bytes((10, 96, 7, number)) + bytes(8)
        known = original_destination(Redirected(entry), ("10.0.0.9", 4000))  # type: ignore[arg-type]  # only getsockopt is asked for
        assert known == (f"10.96.7.{number}", 8080)
    assert len(addresses._known) <= 3
