"""An authority's two parts."""

from __future__ import annotations


def split_authority(authority: bytes) -> tuple[bytes, int]:
    """(host, port); 0 where it names none. The host of an IPv6 address keeps its brackets; what is no port stays part of the host."""
    host, colon, port = authority.rpartition(b":")
    if not colon or not port.isdigit() or len(port) > 5 or (b":" in host and not host.endswith(b"]")):
        return authority, 0
    return host, int(port)
