"""The node's own rules for kubelet's probes, as messages to nf_tables. PURE.

A pod that takes no plaintext must take kubelet's probes. In the pod, what comes from `redirect.PROBE_ADDRESSES` reaches the application
as it is. On the node, connections that kubelet opens to captured pods get that source address, and nobody else's packets with it get
through:

    output       tcp, of kubelet's user and control group, to a captured pod  → connection marked
    postrouting  marked connections                                           → source becomes the probe address
    prerouting   that source from any interface                               → dropped: ours have it only behind this point
    forward      that destination                                             → dropped: answers have their real one by then

Encoded by hand, other than the pods' rules: sets and `socket cgroupv2` are not in pyroute2, and a hundred pods must not take it a second.
Source: linux/netfilter/nf_tables.h; Istio cni/pkg/nftables (addresses, uid of kubelet; it does not look at the control group).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from ipaddress import ip_address

from ztunnel.node.netlink import ACK, APPEND, CREATE, REQUEST, Request
from ztunnel.node.redirect import PROBE_ADDRESSES

TABLE = "ztunnel-probes"
MARK, MARK_MASK = 0x00539000, 0x00FFF000
"""Of the connection, in bits that neither kube-proxy nor the usual network plugins use there."""
OBJECTS = 6
"""What the kernel counts in the table: four chains, two sets."""
_INET = 1
_SUBSYSTEM = 10
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE, _NEWSET, _NEWSETELEM = 0, 2, 3, 6, 9, 12
_PREROUTING, _FORWARD, _OUTPUT, _POSTROUTING = 0, 2, 3, 4
_EQ, _NE = 0, 1
_META_IIFNAME, _META_SKUID, _META_NFPROTO, _META_L4PROTO = 6, 10, 15, 16
_CT_MARK = 3
_SOCKET_CGROUP = 3
_DROP, _ACCEPT = 0, 1
_TCP = 6
_ELEMENTS_IN_MESSAGE = 512
"""An attribute's length has sixteen bits."""


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between IPv4 and IPv6."""

    number: int
    version: int
    probe: str
    pods: str
    """The set of the pods' addresses."""
    key_type: int
    size: int
    source_at: int
    destination_at: int


FAMILIES = (
    Family(2, 4, PROBE_ADDRESSES[0], "pods4", 7, 4, 12, 16),
    Family(10, 6, PROBE_ADDRESSES[1], "pods6", 8, 16, 8, 24),
)


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose connections are probes.

    `cgroup` is the number of its control group, or None where there are none of version 2: then the user alone must do.
    """

    uid: int
    cgroup: int | None
    level: int = 0
    """How deep the group lies, as the kernel counts: 1 is a child of the root."""


def replacement(owner: Owner, pods: Collection[str]) -> tuple[Request, ...]:
    """The batch that makes the table be for these pods, whatever it was."""
    changes = [_table(_NEWTABLE), _table(_DELTABLE), _table(_NEWTABLE)]
    changes += [_set(family) for family in FAMILIES]
    changes += [
        _chain("prerouting", b"filter", _PREROUTING, -300),
        _chain("forward", b"filter", _FORWARD, 0),
        _chain("output", b"filter", _OUTPUT, -150),
        _chain("postrouting", b"nat", _POSTROUTING, 99),
    ]
    for family in FAMILIES:
        probe = ip_address(family.probe).packed
        marked = _load_mark(), _bitwise(MARK_MASK, 0), _cmp(_EQ, struct.pack("=I", MARK))
        changes += [
            _rule(
                "prerouting",
                *_not_from_lo(),
                *_proto(family),
                *_address(family, family.source_at),
                _cmp(_EQ, probe),
                _counter(),
                _verdict(),
            ),
            _rule("forward", *_proto(family), *_address(family, family.destination_at), _cmp(_EQ, probe), _counter(), _verdict()),
            _rule("output", *_tcp(), *_of(owner), *_proto(family), *_in_set(family), _counter(), *_mark()),
            _rule("postrouting", *_tcp(), *_proto(family), *marked, *_in_set(family), _counter(), *_source_becomes(family, probe)),
        ]
        changes += _elements(family, pods)
    return (_batch(0x10, 0), *changes, _batch(0x11, ACK))


def removal() -> tuple[Request, ...]:
    """The batch that takes the table away, whether it is there or not."""
    return (_batch(0x10, 0), _table(_NEWTABLE), _table(_DELTABLE), _batch(0x11, ACK))


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + b"\0" * (-len(value) % 4)


def _nest(kind: int, *parts: bytes) -> bytes:
    return _attribute(kind | 0x8000, b"".join(parts))


def _number(kind: int, value: int) -> bytes:
    return _attribute(kind, struct.pack(">I", value & 0xFFFFFFFF))


def _name(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _data(kind: int, value: bytes) -> bytes:
    return _nest(kind, _attribute(1, value))


def _message(kind: int, flags: int, what: str, *attributes: bytes) -> Request:
    body = struct.pack(">BBH", _INET, 0, 0) + b"".join(attributes)
    header = struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM << 8 | kind, flags | REQUEST | ACK, 0, 0)
    return Request(header + body, False, what)


def _batch(kind: int, flags: int) -> Request:
    return Request(
        struct.pack("=IHHII", 20, kind, flags | REQUEST, 0, 0) + struct.pack(">BBH", 0, 0, _SUBSYSTEM), False, f"rules of {TABLE}"
    )


def _table(kind: int) -> Request:
    return _message(kind, CREATE if kind == _NEWTABLE else 0, f"{'add' if kind == _NEWTABLE else 'remove'} table {TABLE}", _name(1, TABLE))


def _set(family: Family) -> Request:
    parts = _name(1, TABLE), _name(2, family.pods), _number(3, 0), _number(4, family.key_type), _number(5, family.size), _number(10, 1)
    return _message(_NEWSET, CREATE, f"add set {family.pods}", *parts)


def _elements(family: Family, pods: Collection[str]) -> Sequence[Request]:
    keys = sorted(address.packed for address in map(ip_address, pods) if address.version == family.version)
    messages = []
    for start in range(0, len(keys), _ELEMENTS_IN_MESSAGE):
        elements = [_nest(1, _data(1, key)) for key in keys[start : start + _ELEMENTS_IN_MESSAGE]]
        messages.append(
            _message(_NEWSETELEM, CREATE, f"fill set {family.pods}", _name(1, TABLE), _name(2, family.pods), _nest(3, *elements))
        )
    return messages


def _chain(name: str, kind: bytes, hook: int, priority: int) -> Request:
    parts = _name(1, TABLE), _name(3, name), _nest(4, _number(1, hook), _number(2, priority)), _number(5, _ACCEPT), _name(7, kind.decode())
    return _message(_NEWCHAIN, CREATE, f"add chain {name}", *parts)


def _rule(chain: str, *expressions: bytes) -> Request:
    return _message(_NEWRULE, CREATE | APPEND, f"add rule to {chain}", _name(1, TABLE), _name(2, chain), _nest(4, *expressions))


def _expression(name: str, *attributes: bytes) -> bytes:
    return _nest(1, _name(1, name), _nest(2, *attributes))


def _meta(key: int) -> bytes:
    return _expression("meta", _number(1, 1), _number(2, key))


def _cmp(operator: int, value: bytes) -> bytes:
    return _expression("cmp", _number(1, 1), _number(2, operator), _data(3, value))


def _tcp() -> tuple[bytes, ...]:
    return _meta(_META_L4PROTO), _cmp(_EQ, bytes((_TCP,)))


def _proto(family: Family) -> tuple[bytes, ...]:
    return _meta(_META_NFPROTO), _cmp(_EQ, bytes((family.number,)))


def _not_from_lo() -> tuple[bytes, ...]:
    return _meta(_META_IIFNAME), _cmp(_NE, b"lo".ljust(16, b"\0"))


def _address(family: Family, offset: int) -> tuple[bytes, ...]:
    return (_expression("payload", _number(1, 1), _number(2, 1), _number(3, offset), _number(4, family.size)),)


def _in_set(family: Family) -> tuple[bytes, ...]:
    return *_address(family, family.destination_at), _expression("lookup", _name(1, family.pods), _number(2, 1))


def _of(owner: Owner) -> tuple[bytes, ...]:
    user = _meta(_META_SKUID), _cmp(_EQ, struct.pack("=I", owner.uid))
    if owner.cgroup is None:
        return user
    group = _expression("socket", _number(1, _SOCKET_CGROUP), _number(2, 1), _number(3, owner.level))
    return *user, group, _cmp(_EQ, struct.pack("=Q", owner.cgroup))


def _bitwise(mask: int, xor: int) -> bytes:
    mask_bytes, xor_bytes = struct.pack("=I", mask), struct.pack("=I", xor)
    return _expression("bitwise", _number(1, 1), _number(2, 1), _number(3, 4), _data(4, mask_bytes), _data(5, xor_bytes))


def _load_mark() -> bytes:
    return _expression("ct", _number(1, 1), _number(2, _CT_MARK))


def _mark() -> tuple[bytes, ...]:
    return _load_mark(), _bitwise(0xFFFFFFFF ^ MARK_MASK, MARK), _expression("ct", _number(2, _CT_MARK), _number(4, 1))


def _source_becomes(family: Family, address: bytes) -> tuple[bytes, ...]:
    load = _expression("immediate", _number(1, 1), _data(2, address))
    return load, _expression("nat", _number(1, 0), _number(2, family.number), _number(3, 1))


def _counter() -> bytes:
    return _expression("counter", _attribute(1, bytes(8)), _attribute(2, bytes(8)))


def _verdict() -> bytes:
    return _expression("immediate", _number(1, 0), _nest(2, _nest(2, _number(1, _DROP))))
