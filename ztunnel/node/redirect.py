"""The in-pod rule set as data. PURE: which packets are redirected, tagged and left alone, in each stage of an enrolment.

`nft` turns this into netlink messages and reads the kernel's tables back into the same values, so that "is the kernel what
we want" is an equality. Base chains hold their rules directly; every rule counts.

Why each rule is there is said beside it. Two departures from Istio's rules, both for measured faults (decision 0004):
the stage GUARDED redirects only packets that open a connection, so that enrolling a pod does not reset what it already has;
and connections that the proxy opens get a conntrack zone of their own, so that a spoofed source port cannot evict a client's entry.
Source: Istio cni/pkg/nftables/nftables.go (rules, order, marks, probe addresses).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from ipaddress import ip_address
from typing import assert_never

from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND

PROXY_MARK = 0x539  # packets that the proxy sends
REPLY_MARK = 0x111  # conntrack mark of connections from the proxy to the application, and packet mark of the application's replies
MARK_MASK = 0xFFF
ROUTE_TABLE = 100
RULE_PRIORITY = 32764
PROXY_ZONE = 1
# The node rewrites the source of kubelet's probes to these, so that they reach the application without identity.
PROBE_ADDRESSES = ("169.254.7.127", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff")
LOOPBACKS = ("127.0.0.1", "::1")

NAT = "ztunnel-nat"
MANGLE = "ztunnel-mangle"
RAW = "ztunnel-raw"
TABLES = (NAT, MANGLE, RAW)


class Stage(Enum):
    """How much of a pod's traffic is redirected."""

    GUARDED = "guarded"  # new connections only: those alive at enrolment go on as they are. A leak if left on; a grace period only.
    FULL = "full"
    DRAIN = "drain"  # nothing new; connections redirected earlier keep their NAT mapping, marks and zone
    REMOVED = "removed"


class Hook(Enum):
    """Netfilter hooks by their kernel number."""

    PREROUTING = 0
    OUTPUT = 3


@dataclass(frozen=True, slots=True)
class Expr:
    """One nf_tables expression: its kernel name and its attributes in order.

    Attribute names are the kernel's without prefix, in lower case (`NFTA_CMP_SREG` is `sreg`). A verdict is the attribute
    `verdict` of an `immediate`.
    """

    name: str
    fields: tuple[tuple[str, int | bytes], ...] = ()


@dataclass(frozen=True, slots=True)
class Chain:
    """A base chain."""

    table: str
    name: str
    kind: str
    hook: Hook
    priority: int


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule; its place among the rules of the same chain is its place in `Ruleset.rules`."""

    table: str
    chain: str
    exprs: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Ruleset:
    """Everything that our tables hold; no table at all when `tables` is empty."""

    tables: tuple[str, ...] = ()
    chains: tuple[Chain, ...] = ()
    rules: tuple[Rule, ...] = ()


CHAINS = (
    Chain(NAT, "prerouting", "nat", Hook.PREROUTING, -100),
    Chain(NAT, "output", "nat", Hook.OUTPUT, -100),
    Chain(MANGLE, "prerouting", "filter", Hook.PREROUTING, -150),
    # `route`: changing the mark here must look the route up again.
    Chain(MANGLE, "output", "route", Hook.OUTPUT, -150),
    Chain(RAW, "output", "filter", Hook.OUTPUT, -300),
)


@cache
def ruleset(stage: Stage) -> Ruleset:
    """The rules of a stage, for IPv4 and IPv6 alike (IPv6 rules do no harm where IPv6 is off)."""
    match stage:
        case Stage.REMOVED:
            return Ruleset()
        case Stage.DRAIN:
            return Ruleset(TABLES, CHAINS, _marks() + _zone())
        case Stage.GUARDED:
            guard = _opens_connection()
        case Stage.FULL:
            guard = ()
        case _:
            assert_never(stage)
    return Ruleset(TABLES, CHAINS, _inbound(guard) + _outbound(guard) + _marks() + _zone())


def _inbound(guard: Sequence[Expr]) -> tuple[Rule, ...]:
    def rule(*exprs: Expr) -> Rule:
        return Rule(NAT, "prerouting", exprs)

    probes = [rule(*_tcp(), *_source(each), _counter(), _accept()) for each in PROBE_ADDRESSES]
    captured = [
        rule(*_destination_not(each), *_tcp(), *_port_not(INBOUND_HBONE), *_mark_not(PROXY_MARK), *guard, *_redirect(INBOUND_PLAINTEXT))
        for each in LOOPBACKS
    ]
    return (*probes, *captured)


def _outbound(guard: Sequence[Expr]) -> tuple[Rule, ...]:
    def rule(*exprs: Expr) -> Rule:
        return Rule(NAT, "output", exprs)

    probes = [rule(*_tcp(), *_destination(each), _counter(), _accept()) for each in PROBE_ADDRESSES]
    replies = [rule(*_tcp(), *_mark(REPLY_MARK), _counter(), _accept())]
    # A pod that calls its own address goes over lo, and is not the mesh's business.
    itself = [rule(*_leaves_by("lo"), *_destination_not(each), _counter(), _accept()) for each in LOOPBACKS]
    captured = [rule(*_destination_not(each), *_mark_not(PROXY_MARK), *_tcp(), *guard, *_redirect(OUTBOUND)) for each in LOOPBACKS]
    return (*probes, *replies, *itself, *captured)


def _marks() -> tuple[Rule, ...]:
    """The application answers a spoofed address; the mark brings the answer back to the proxy through table 100."""
    tag = (_load_ct_mark(), _bitwise(0xFFFFFFFF ^ MARK_MASK, REPLY_MARK), Expr("ct", (("key", CT_MARK), ("sreg", 1))))
    restore = (_load_ct_mark(), Expr("meta", (("key", META_MARK), ("sreg", 1))))
    return (
        Rule(MANGLE, "prerouting", (*_mark(PROXY_MARK), _counter(), *tag)),
        Rule(MANGLE, "output", (_load_ct_mark(), _bitwise(MARK_MASK, 0), _cmp(EQ, _host32(REPLY_MARK)), _counter(), *restore)),
    )


def _zone() -> tuple[Rule, ...]:
    """Connections that the proxy opens are kept apart in conntrack (original direction only: the answers carry no mark).

    Without it, a spoofed source port that equals a live client's port replaces that client's entry and resets its connection.
    """
    set_zone = Expr("ct", (("key", CT_ZONE), ("sreg", 1), ("direction", 0)))
    return (Rule(RAW, "output", (*_tcp(), *_mark(PROXY_MARK), _counter(), _immediate(struct.pack("=H", PROXY_ZONE)), set_zone)),)


# Numbers of linux/netfilter/nf_tables.h.
EQ, NE = 0, 1
META_MARK, META_OIFNAME, META_NFPROTO, META_L4PROTO = 3, 7, 15, 16
CT_MARK, CT_ZONE = 3, 17
NETWORK_HEADER, TRANSPORT_HEADER = 1, 2
NF_ACCEPT = 1
PROTO_SPECIFIED = 2  # linux/netfilter/nf_nat.h
IPPROTO_TCP = 6
SYN, ACK = 0x02, 0x10


def _meta(key: int) -> Expr:
    return Expr("meta", (("dreg", 1), ("key", key)))


def _load_ct_mark() -> Expr:
    return Expr("ct", (("dreg", 1), ("key", CT_MARK)))


def _cmp(operator: int, data: bytes) -> Expr:
    return Expr("cmp", (("sreg", 1), ("op", operator), ("data", data)))


def _payload(base: int, offset: int, length: int) -> Expr:
    return Expr("payload", (("dreg", 1), ("base", base), ("offset", offset), ("len", length)))


def _bitwise(mask: int, xor: int) -> Expr:
    return _bitwise_bytes(_host32(mask), _host32(xor))


def _bitwise_bytes(mask: bytes, xor: bytes) -> Expr:
    return Expr("bitwise", (("sreg", 1), ("dreg", 1), ("len", len(mask)), ("mask", mask), ("xor", xor)))


def _immediate(data: bytes) -> Expr:
    return Expr("immediate", (("dreg", 1), ("data", data)))


def _counter() -> Expr:
    return Expr("counter")


def _accept() -> Expr:
    return Expr("immediate", (("dreg", 0), ("verdict", NF_ACCEPT)))


def _redirect(port: int) -> tuple[Expr, ...]:
    return _counter(), _immediate(struct.pack(">H", port)), Expr("redir", (("reg_proto_min", 1), ("flags", PROTO_SPECIFIED)))


def _tcp() -> tuple[Expr, ...]:
    return _meta(META_L4PROTO), _cmp(EQ, bytes((IPPROTO_TCP,)))


def _mark(value: int) -> tuple[Expr, ...]:
    return _meta(META_MARK), _bitwise(MARK_MASK, 0), _cmp(EQ, _host32(value))


def _mark_not(value: int) -> tuple[Expr, ...]:
    return _meta(META_MARK), _bitwise(MARK_MASK, 0), _cmp(NE, _host32(value))


def _port_not(port: int) -> tuple[Expr, ...]:
    return _payload(TRANSPORT_HEADER, 2, 2), _cmp(NE, struct.pack(">H", port))


def _leaves_by(interface: str) -> tuple[Expr, ...]:
    return _meta(META_OIFNAME), _cmp(EQ, interface.encode().ljust(16, b"\0"))


def _source(address: str) -> tuple[Expr, ...]:
    return _address(address, 12, 8, EQ)


def _destination(address: str) -> tuple[Expr, ...]:
    return _address(address, 16, 24, EQ)


def _destination_not(address: str) -> tuple[Expr, ...]:
    return _address(address, 16, 24, NE)


def _address(address: str, offset4: int, offset6: int, operator: int) -> tuple[Expr, ...]:
    parsed = ip_address(address)
    family, offset = (2, offset4) if parsed.version == 4 else (10, offset6)
    return (
        _meta(META_NFPROTO),
        _cmp(EQ, bytes((family,))),
        _payload(NETWORK_HEADER, offset, len(parsed.packed)),
        _cmp(operator, parsed.packed),
    )


def _opens_connection() -> tuple[Expr, ...]:
    """tcp flags & (syn | ack) == syn"""
    return _payload(TRANSPORT_HEADER, 13, 1), _bitwise_bytes(bytes((SYN | ACK,)), b"\0"), _cmp(EQ, bytes((SYN,)))


def _host32(value: int) -> bytes:
    return struct.pack("=I", value)
