"""IP addresses as canonical text, and address blocks.

Everything in the mesh compares addresses as text, so there is one spelling of each: what `inet_ntop` writes, without a zone,
and with an IPv4-mapped IPv6 address written as IPv4.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Final

from ztunnel.mesh.rules import Cidr

_LONGEST_TEXT: Final = 64  # "ffff:ffff:ffff:ffff:ffff:ffff:255.255.255.255/128" is 49; more is not worth parsing


def _mapped(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


@lru_cache(maxsize=4096)
def canonical(text: str) -> str | None:
    """The one spelling of an address, or None when the text is not an address."""
    if len(text) > _LONGEST_TEXT or "%" in text:
        return None
    try:
        return str(_mapped(ip_address(text)))
    except ValueError:
        return None


def is_ipv6(address: str) -> bool:
    """Whether a canonical address is IPv6."""
    return ":" in address


def is_loopback(address: str) -> bool:
    """Whether a canonical address is a loopback address."""
    return address == "::1" or address.startswith("127.")


def number(address: str) -> tuple[int, int]:
    """A canonical address as (32 or 128 bits, integer), the form that `contains` compares; (0, 0) for anything else."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return 0, 0
    return parsed.max_prefixlen, int(parsed)


def parse_block(text: str) -> Cidr | None:
    """The block that `10.0.0.0/8` or a single address names; None when it is neither.

    Host bits are cleared, as Istio does: `10.1.2.3/8` is `10.0.0.0/8`.
    """
    if len(text) > _LONGEST_TEXT or "%" in text:
        return None
    try:
        network = ip_network(text, strict=False)
    except ValueError:
        return None
    first = network.network_address
    if isinstance(first, IPv6Address) and first.ipv4_mapped is not None and network.prefixlen >= 96:
        return Cidr(32, str(first.ipv4_mapped), network.prefixlen - 96)
    return Cidr(first.max_prefixlen, str(first), network.prefixlen)


def block_bounds(block: Cidr) -> tuple[int, int, int]:
    """(bits, first, last) of a block, as integers, so that membership is two comparisons."""
    bits, first = number(block.network)
    return bits, first, first + (1 << (bits - block.prefix)) - 1
