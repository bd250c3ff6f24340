"""Addresses as the kernel reports them, in the mesh's canonical text: IPv4-mapped addresses become IPv4, scopes are dropped."""

from __future__ import annotations

import socket
import struct
from typing import Final

Address = tuple[str, int]

SO_ORIGINAL_DST: Final = 80
"""The same number for IPv4 (SOL_IP) and IPv6 (IPPROTO_IPV6); the socket module has no name for it."""

_IPV4_ENTRY: Final = struct.Struct("!HH4s8x")
_IPV6_PORT: Final = struct.Struct("!H")
_MAPPED: Final = "::ffff:"
_REMEMBERED: Final = 4096
_SOL_IP: Final = socket.SOL_IP
_SOL_IPV6: Final = socket.IPPROTO_IPV6
_known: Final[dict[bytes, Address]] = {}
"""Destinations as conntrack writes them: a pod dials few, thousands of times."""


def canonical(address: tuple[str, int] | tuple[str, int, int, int]) -> Address:
    """`(ip, port)` of what `getpeername`, `getsockname` or `accept` returned."""
    ip = address[0]
    if ip.startswith(_MAPPED) and "." in ip:
        ip = ip[len(_MAPPED) :]
    elif "%" in ip:
        ip = ip.partition("%")[0]
    return ip, address[1]


def original_destination(sock: socket.socket, peer: Address) -> Address:
    """Where the connection was going before nftables redirected it to us.

    Args:
        sock: an accepted socket. peer: its canonical peer, which tells the family.
    Raises:
        OSError: conntrack has no entry (ENOENT): the connection was not redirected, or the rules were flushed meanwhile.
    Source: netfilter's `nf_getorigdst`; IPv4 entries are asked on AF_INET6 sockets at the SOL_IP level too.
    """
    ipv4 = ":" not in peer[0]
    entry = sock.getsockopt(_SOL_IP, SO_ORIGINAL_DST, 16) if ipv4 else sock.getsockopt(_SOL_IPV6, SO_ORIGINAL_DST, 28)
    known = _known.get(entry)
    if known is None:
        if len(_known) >= _REMEMBERED:
            _known.clear()
        known = _known[entry] = _ipv4(entry) if ipv4 else _ipv6(entry)
    return known


def _ipv4(entry: bytes) -> Address:
    _, port, raw = _IPV4_ENTRY.unpack(entry)
    return socket.inet_ntop(socket.AF_INET, raw), port


def _ipv6(entry: bytes) -> Address:
    return canonical((socket.inet_ntop(socket.AF_INET6, entry[8:24]), _IPV6_PORT.unpack_from(entry, 2)[0]))


def text(address: Address) -> str:
    """`ip:port`, with brackets around IPv6."""
    ip, port = address
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"
