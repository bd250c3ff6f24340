"""The PROXY header, version 2: in front of a connection's bytes, who the client is and where it wanted to go. Sans-I/O, writing only.

Source: PROXY protocol specification (HAProxy), §2.2; Istio's TLV 0xD0 with the peer's identity.
"""

from __future__ import annotations

import struct
from ipaddress import ip_address
from typing import Final

SIGNATURE: Final = b"\r\n\r\n\0\r\nQUIT\n"
PEER_IDENTITY: Final = 0xD0
"""TLV: the peer's SPIFFE id as text."""
_PROXY: Final = 0x21  # version 2, command PROXY
_TCP4: Final = 0x11
_TCP6: Final = 0x21


def header(source: tuple[str, int], destination: tuple[str, int], identity: str = "") -> bytes:
    """The header of one connection.

    Args:
        source, destination: canonical addresses. Of two families, the IPv4 one is written as an IPv4-mapped IPv6 address.
        identity: a SPIFFE id, left out when empty; at most 2,048 bytes by its specification.
    """
    one, other = ip_address(source[0]), ip_address(destination[0])
    ports = struct.pack("!HH", source[1], destination[1])
    if one.version == other.version == 4:
        family, addresses = _TCP4, one.packed + other.packed
    else:
        family, addresses = _TCP6, _sixteen(one.packed) + _sixteen(other.packed)
    known = identity.encode()
    extra = struct.pack("!BH", PEER_IDENTITY, len(known)) + known if known else b""
    body = addresses + ports + extra
    return SIGNATURE + struct.pack("!BBH", _PROXY, family, len(body)) + body


def _sixteen(packed: bytes) -> bytes:
    return packed if len(packed) == 16 else b"\0" * 10 + b"\xff\xff" + packed
