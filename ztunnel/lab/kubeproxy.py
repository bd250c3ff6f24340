"""kube-proxy's part on each node: packets to a service address go to a random ready endpoint, or are refused.

One table in the node's namespace, replaced whole in one transaction whenever endpoints change; connections that exist keep their
mapping, which lives in conntrack. For TCP and UDP, for pods (prerouting) and the node itself (output). A pod that is sent back to
itself is masqueraded (hairpin), or it would answer itself directly. What is left over for a service address is rejected, so that a
service without endpoints refuses at once. Meshed pods' TCP never comes here: it was captured in the pod.
Source: Kubernetes kube-proxy (nftables mode); linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from ipaddress import ip_address, ip_network
from typing import Any

from pyroute2.netlink.nfnetlink import nfgen_msg
from pyroute2.netlink.nfnetlink.nftsocket import nft_chain_msg, nft_rule_msg, nft_table_msg
from pyroute2.nftables.expressions import genex

from ztunnel.lab.addresses import SERVICE_NETWORKS
from ztunnel.lab.placement import Forward
from ztunnel.node import netns
from ztunnel.node.netlink import ACK, APPEND, CREATE, NETLINK_NETFILTER, Netlink, Request, request

TABLE = "lab-services"
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEWTABLE, _DELTABLE, _NEWCHAIN, _NEWRULE = 0, 2, 3, 6
_INET = 1
_CHAINS = (  # name, type, hook, priority: NAT before the filter that rejects what NAT left alone
    ("prerouting", "nat", 0, -100),
    ("output", "nat", 3, -100),
    ("postrouting", "nat", 4, 100),
    ("refuse-forwarded", "filter", 0, 0),
    ("refuse-own", "filter", 3, 0),
)
_SERVICES = "services"
_EQ = 0
_JUMP = -3
_META_NFPROTO, _META_L4PROTO = 15, 16
_NETWORK, _TRANSPORT = 1, 2
_NFPROTO = {4: 2, 6: 10}
_L4 = {"TCP": 6, "UDP": 17}
_SOURCE_AT = {4: (12, 4), 6: (8, 16)}
_DESTINATION_AT = {4: (16, 4), 6: (24, 16)}
_REJECT_ICMPX, _REJECT_TCP_RST = 2, 1
_PORT_UNREACHABLE = 1  # NFT_REJECT_ICMPX_PORT_UNREACH

Expression = Any  # pyroute2 publishes no types
"""One nf_tables expression as pyroute2 wants it."""


def program(node_fd: int, requests: list[Request]) -> None:
    """Put a `transaction` into force on a node. Blocking; the socket lives in a throw-away thread inside the namespace.

    Raises:
        NetlinkError: the kernel refuses; the earlier rules stay in force.
    """
    netns.run_inside(node_fd, _send, requests)


def _send(requests: list[Request]) -> None:
    with Netlink(NETLINK_NETFILTER) as link:
        link.change(requests)


def transaction(forwards: Sequence[Forward]) -> list[Request]:
    """The whole replacement as one batch: begin, remove, add, commit. The same for every node, and re-usable."""
    return list(_transaction(forwards))


def _transaction(forwards: Sequence[Forward]) -> Iterator[Request]:
    yield _batch(_BATCH_BEGIN, 0)
    yield _table(_NEWTABLE, CREATE)  # so that there is one to delete
    yield _table(_DELTABLE, 0)
    yield _table(_NEWTABLE, CREATE)
    yield _regular_chain(_SERVICES)
    for name, kind, hook, priority in _CHAINS:
        yield _chain(name, kind, hook, priority)
    yield _rule("prerouting", [_jump(_SERVICES)])
    yield _rule("output", [_jump(_SERVICES)])
    for forward in forwards:
        for expressions in _spread(forward):
            yield _rule(_SERVICES, expressions)
    for address in sorted({address for forward in forwards for address, _ in forward.backends}):
        yield _rule("postrouting", _hairpin(address))
    for chain in ("refuse-forwarded", "refuse-own"):
        for expressions in _refusals():
            # Only these are acknowledged: an answer for each rule of a large lab would overflow the socket's buffer.
            yield _rule(chain, expressions, ACK)
    yield _batch(_BATCH_END, ACK)


def _spread(forward: Forward) -> Iterator[list[Expression]]:
    """One rule per endpoint: the first takes 1 in n, the next 1 in n-1 of what is left, the last all."""
    version, protocol = ip_address(forward.address).version, _L4[forward.protocol]
    chosen = [
        *_address(_DESTINATION_AT[version], version, forward.address),
        *_protocol(protocol),
        genex("payload", {"dreg": 1, "base": _TRANSPORT, "offset": 2, "len": 2}),
        _equals(struct.pack(">H", forward.port)),
    ]
    for position, (address, port) in enumerate(forward.backends):
        left = len(forward.backends) - position
        chance = [_random(left), _equals(struct.pack("=I", 0))] if left > 1 else []
        target = [
            genex("immediate", {"dreg": 1, "data": _value(ip_address(address).packed)}),
            genex("immediate", {"dreg": 2, "data": _value(struct.pack(">H", port))}),
            genex("nat", {"type": 1, "family": _NFPROTO[version], "reg_addr_min": 1, "reg_proto_min": 2}),
        ]
        yield [*chosen, *chance, *target]


def _random(modulus: int) -> Expression:
    # Not by `genex`: the kernel names this expression's attributes NG, not NUMGEN.
    attributes = [("NFTA_NG_DREG", 1), ("NFTA_NG_MODULUS", modulus), ("NFTA_NG_TYPE", 1)]
    return {"attrs": [("NFTA_EXPR_NAME", "numgen"), ("NFTA_EXPR_DATA", {"attrs": attributes})]}


def _hairpin(address: str) -> list[Expression]:
    version = ip_address(address).version
    return [*_address(_SOURCE_AT[version], version, address), *_address(_DESTINATION_AT[version], version, address), genex("masq", {})]


def _refusals() -> Iterator[list[Expression]]:
    for version, network in SERVICE_NETWORKS.items():
        whole = [*_family(version), genex("payload", _field(_DESTINATION_AT[version])), *_within(str(network))]
        yield [*whole, *_protocol(_L4["TCP"]), genex("reject", {"type": _REJECT_TCP_RST, "icmp_code": 0})]
        yield [*whole, genex("reject", {"type": _REJECT_ICMPX, "icmp_code": _PORT_UNREACHABLE})]


def _within(network: str) -> list[Expression]:
    parsed = ip_network(network)
    mask, zero = parsed.netmask.packed, bytes(len(parsed.netmask.packed))
    masked = genex("bitwise", {"sreg": 1, "dreg": 1, "len": len(mask), "mask": _value(mask), "xor": _value(zero)})
    return [masked, _equals(parsed.network_address.packed)]


def _address(place: tuple[int, int], version: int, address: str) -> list[Expression]:
    return [*_family(version), genex("payload", _field(place)), _equals(ip_address(address).packed)]


def _field(place: tuple[int, int]) -> dict[str, int]:
    return {"dreg": 1, "base": _NETWORK, "offset": place[0], "len": place[1]}


def _family(version: int) -> list[Expression]:
    return [genex("meta", {"dreg": 1, "key": _META_NFPROTO}), _equals(bytes([_NFPROTO[version]]))]


def _protocol(number: int) -> list[Expression]:
    return [genex("meta", {"dreg": 1, "key": _META_L4PROTO}), _equals(bytes([number]))]


def _equals(data: bytes) -> Expression:
    return genex("cmp", {"sreg": 1, "op": _EQ, "data": _value(data)})


def _value(data: bytes) -> Expression:
    return {"attrs": [("NFTA_DATA_VALUE", data)]}


def _batch(kind: int, flags: int) -> Request:
    message = nfgen_msg()
    message["res_id"] = _SUBSYSTEM
    return request(message, kind, flags, "service rules")


def _request(message: Expression, kind: int, flags: int, attributes: list[tuple[str, object]], what: str) -> Request:
    message["attrs"] = attributes
    message["nfgen_family"] = _INET
    return request(message, _SUBSYSTEM << 8 | kind, flags, what)


def _table(kind: int, flags: int) -> Request:
    return _request(nft_table_msg(), kind, flags, [("NFTA_TABLE_NAME", TABLE)], f"table {TABLE}")


def _chain(name: str, kind: str, hook: int, priority: int) -> Request:
    place = {"attrs": [("NFTA_HOOK_HOOKNUM", hook), ("NFTA_HOOK_PRIORITY", priority)]}
    attributes: list[tuple[str, object]] = [("NFTA_CHAIN_TABLE", TABLE), ("NFTA_CHAIN_NAME", name), ("NFTA_CHAIN_HOOK", place)]
    attributes += [("NFTA_CHAIN_TYPE", kind), ("NFTA_CHAIN_POLICY", 1)]
    return _request(nft_chain_msg(), _NEWCHAIN, CREATE, attributes, f"chain {name}")


def _regular_chain(name: str) -> Request:
    attributes: list[tuple[str, object]] = [("NFTA_CHAIN_TABLE", TABLE), ("NFTA_CHAIN_NAME", name)]
    return _request(nft_chain_msg(), _NEWCHAIN, CREATE, attributes, f"chain {name}")


def _jump(chain: str) -> Expression:
    verdict = {"attrs": [("NFTA_VERDICT_CODE", _JUMP), ("NFTA_VERDICT_CHAIN", chain)]}
    return genex("immediate", {"dreg": 0, "data": {"attrs": [("NFTA_DATA_VERDICT", verdict)]}})


def _rule(chain: str, expressions: list[Expression], flags: int = 0) -> Request:
    attributes: list[tuple[str, object]] = [("NFTA_RULE_TABLE", TABLE), ("NFTA_RULE_CHAIN", chain), ("NFTA_RULE_EXPRESSIONS", expressions)]
    return _request(nft_rule_msg(), _NEWRULE, CREATE | APPEND | flags, attributes, f"rule in {chain}")
