"""The connections that a pod has when it joins the mesh: listed before anything is redirected, and told to conntrack afterwards.

Conntrack sees a pod's connections only from the first rule on. The next packet of an older one would look like a new connection's, be
redirected to a proxy that knows nothing of it, and be reset, however long after. With an entry of its own, untranslated and
established, the connection goes on as it was until it ends. If the entry is lost later the redirect takes over again: a reset, never
plaintext that should have been encrypted.
Works on the calling thread's namespace: use it through `netns.run_inside`.
Source: linux/inet_diag.h, linux/netfilter/nfnetlink_conntrack.h; conntrackd(8) makes its entries in the same way.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ztunnel.node.netlink import ACK, CREATE, DUMP, EXCL, NETLINK_NETFILTER, REQUEST, KernelRefused, Netlink, Request
from ztunnel.node.redirect import IPPROTO_TCP

MOST_CONNECTIONS = 1 << 16
"""Of one pod; further ones are left to the grace period."""
TIMEOUT_SECONDS = 432_000
"""As the kernel's own default for established connections (nf_conntrack_tcp_timeout_established): five days."""

_NETLINK_SOCK_DIAG = 4
_HEADER_BYTES = 16
_BY_FAMILY = 20
_STATES = sum(1 << state for state in (1, 4, 5, 8, 9, 11))  # established, and half-closed in every way
_REQUEST = struct.Struct("=IHHII BBBx I 48x")
_SOCKET = struct.Struct("=BBBB HH 16s16s")
_CT_NEW = 0x100
_HEADER = struct.Struct("=IHHII BBH")
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT = 1, 2, 3, 4, 7
_SEEN_REPLY, _ASSURED, _CONFIRMED = 0x2, 0x4, 0x8
_ESTABLISHED = 3
_BE_LIBERAL = 0x8  # the windows are not known: nothing is called invalid for lying outside of them
_MAPPED = b"\0" * 10 + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class Established:
    """One connection of the pod. Addresses are packed, 4 or 16 bytes; ports in network byte order's value."""

    local: tuple[bytes, int]
    remote: tuple[bytes, int]


def list_established() -> list[Established]:
    """Every TCP connection of the namespace but those within it.

    Raises: NetlinkError.
    """
    found: list[Established] = []
    with Netlink(_NETLINK_SOCK_DIAG) as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            data = _REQUEST.pack(_REQUEST.size, _BY_FAMILY, REQUEST | DUMP, 0, 0, family, IPPROTO_TCP, 0, _STATES)
            for answer in netlink.dump(Request(data, is_dump=True, what="list sockets"), MOST_CONNECTIONS):
                connection = _connection(answer[_HEADER_BYTES:])
                if connection is not None:
                    found.append(connection)
    return found


def keep(connections: Iterable[Established]) -> int:
    """Gives each connection an entry of its own; how many have one now that had none. Best effort: what is refused is left out.

    Raises: NetlinkError when the kernel cannot be asked at all.
    """
    made = 0
    with Netlink(NETLINK_NETFILTER) as netlink:
        for connection in connections:
            try:
                netlink.change([Request(_entry(connection), is_dump=False, what="keep a connection")])
                made += 1
            except KernelRefused as error:
                # EEXIST: it has sent something meanwhile. Others: conntrack's table is full, or the kernel cannot be told.
                if error.errno in (errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM):
                    return made
    return made


def _connection(answer: bytes) -> Established | None:
    if len(answer) < _SOCKET.size:
        return None
    family, _state, _timer, _retransmissions, source_port, destination_port, source, destination = _SOCKET.unpack_from(answer)
    local, remote = (_address(family, each) for each in (source, destination))
    if local == remote or _is_loopback(local) or _is_loopback(remote):
        return None
    return Established((local, socket.ntohs(source_port)), (remote, socket.ntohs(destination_port)))


def _address(family: int, field: bytes) -> bytes:
    if family == socket.AF_INET:
        return field[:4]
    return field[12:] if field.startswith(_MAPPED) else field


def _is_loopback(address: bytes) -> bool:
    return address[0] == 127 if len(address) == 4 else address == b"\0" * 15 + b"\1"


def _entry(connection: Established) -> bytes:
    """IPCTNL_MSG_CT_NEW for an established, untranslated connection."""
    flags = bytes((_BE_LIBERAL, _BE_LIBERAL))
    tcp = _attribute(1, bytes((_ESTABLISHED,))) + _attribute(4, flags) + _attribute(5, flags)
    attributes = (
        _nested(_TUPLE_ORIG, _tuple(connection.local, connection.remote))
        + _nested(_TUPLE_REPLY, _tuple(connection.remote, connection.local))
        + _attribute(_STATUS, struct.pack(">I", _SEEN_REPLY | _ASSURED | _CONFIRMED))
        + _nested(_PROTOINFO, _nested(1, tcp))
        + _attribute(_TIMEOUT, struct.pack(">I", TIMEOUT_SECONDS))
    )
    family = socket.AF_INET if len(connection.local[0]) == 4 else socket.AF_INET6
    return _HEADER.pack(_HEADER.size + len(attributes), _CT_NEW, REQUEST | CREATE | EXCL | ACK, 0, 0, family, 0, 0) + attributes


def _tuple(source: tuple[bytes, int], destination: tuple[bytes, int]) -> bytes:
    first = 1 if len(source[0]) == 4 else 3
    addresses = _attribute(first, source[0]) + _attribute(first + 1, destination[0])
    ports = _attribute(2, struct.pack(">H", source[1])) + _attribute(3, struct.pack(">H", destination[1]))
    return _nested(1, addresses) + _nested(2, _attribute(1, bytes((IPPROTO_TCP,))) + ports)


def _nested(kind: int, content: bytes) -> bytes:
    return _attribute(kind | _NESTED, content)


def _attribute(kind: int, content: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(content), kind) + content + b"\0" * (-len(content) % 4)
