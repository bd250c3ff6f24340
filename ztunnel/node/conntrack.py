"""The connections that bypass the proxy because they are older than the capture, cut: for pods that take no plaintext.

A connection whose conntrack entry was made while nothing was redirected keeps it, and with it its way past the proxy, for as long as
it lives. Without the entry its next packet is taken for a new connection's, is redirected, and answered with a reset.
Works on the calling thread's namespace: use it through `netns.run_inside`.
Source: linux/netfilter/nfnetlink_conntrack.h, nf_conntrack_common.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Collection, Iterator
from ipaddress import ip_address

from ztunnel.mesh.ports import INBOUND_HBONE
from ztunnel.node import routes
from ztunnel.node.netlink import ACK, DUMP, NETLINK_NETFILTER, REQUEST, KernelRefused, Netlink, Request
from ztunnel.node.redirect import IPPROTO_TCP, LOOPBACKS, MARK_MASK, PROBE_ADDRESSES, REPLY_MARK

MOST_ENTRIES = 1 << 20
_GET, _DELETE = 0x101, 0x102
_TUPLE_ORIG, _STATUS, _MARK, _ZONE = 1, 3, 8, 18
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
_PROTO_NUMBER, _PROTO_TO = 1, 3
_IS_TRANSLATED = 0x30  # IPS_SRC_NAT | IPS_DST_NAT
_MESSAGE = struct.Struct("=IHHIIBBH")
_ATTRIBUTE = struct.Struct("=HH")
_TYPE_MASK = 0x3FFF
_LEFT_ALONE = frozenset(ip_address(each).packed for each in (*PROBE_ADDRESSES, *LOOPBACKS))


def cut_uncaptured() -> int:
    """Forgets the TCP connections that neither are redirected nor are the proxy's own; how many. 0 where the kernel cannot list them.

    Raises: NetlinkError.
    """
    cut = 0
    here = frozenset(ip_address(each).packed for each in routes.addresses())
    with Netlink(NETLINK_NETFILTER) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            dump = Request(_message(_GET, DUMP | REQUEST, family), is_dump=True, what="list connections")
            try:
                found = netlink.dump(dump, MOST_ENTRIES)
            except KernelRefused as error:
                if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    return cut
                raise
            for message in found:
                if entry := _uncaptured(message, here):
                    cut += _forget(netlink, family, entry)
    return cut


def _forget(netlink: Netlink, family: int, entry: bytes) -> bool:
    try:
        netlink.change([Request(_message(_DELETE, REQUEST | ACK, family, entry), is_dump=False, what="forget a connection")])
    except KernelRefused as error:
        if error.errno != errno.ENOENT:
            raise
        return False  # it has ended meanwhile
    return True


def _uncaptured(message: bytes, here: Collection[bytes]) -> bytes | None:
    """The attribute that names a connection, if it is one to be cut. `here`: the pod's addresses."""
    attributes = dict(_attributes(message[_MESSAGE.size :]))
    status, mark = (int.from_bytes(attributes.get(each, b"")[4:], "big") for each in (_STATUS, _MARK))
    original = attributes.get(_TUPLE_ORIG, b"")
    if not original or status & _IS_TRANSLATED or mark & MARK_MASK == REPLY_MARK or _ZONE in attributes:
        return None
    parts = dict(_attributes(original[4:]))
    if _TUPLE_ZONE in parts or _TUPLE_IP not in parts or _TUPLE_PROTO not in parts:
        return None
    ends = [each[4:] for _, each in sorted(_attributes(parts[_TUPLE_IP][4:]))]
    protocol = {kind: int.from_bytes(each[4:], "big") for kind, each in _attributes(parts[_TUPLE_PROTO][4:])}
    # An entry may begin at either end, and a client may call its own port 15008.
    is_tunnel = protocol.get(_PROTO_TO) == INBOUND_HBONE and ends[-1] in here
    if protocol.get(_PROTO_NUMBER) != IPPROTO_TCP or is_tunnel:
        return None
    if len(set(ends)) != 2 or not _LEFT_ALONE.isdisjoint(ends):
        return None
    return original


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, whole attribute without its padding) of each."""
    at = 0
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[at : at + length]
        at += (length + 3) & ~3


def _message(kind: int, flags: int, family: int, attribute: bytes = b"") -> bytes:
    padded = attribute.ljust((len(attribute) + 3) & ~3, b"\0")
    return _MESSAGE.pack(_MESSAGE.size + len(padded), kind, flags, 0, 0, family, 0, 0) + padded
