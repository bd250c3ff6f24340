"""The policy route that brings an application's answers back to the proxy, and the addresses that a namespace holds.

`ip rule add fwmark 0x111/0xfff priority 32764 lookup 100` and `ip route add local default dev lo table 100`, for both families.
Without them every proxied inbound connection hangs, so their effect is part of the drift check.
Every function works on the calling thread's namespace: use it through `netns.run_inside`.
Source: Istio cni/pkg/iptables/iptables_linux.go.
"""

from __future__ import annotations

import errno
import socket
from enum import IntEnum
from functools import cache
from ipaddress import ip_address

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from ztunnel.node.netlink import (
    ACK,
    CREATE,
    DUMP,
    EXCL,
    NETLINK_ROUTE,
    REPLACE,
    KernelRefused,
    Netlink,
    Request,
    attribute,
    request,
)
from ztunnel.node.redirect import MARK_MASK, REPLY_MARK, ROUTE_TABLE, RULE_PRIORITY

_TO_TABLE = 1
_LOCAL = 2
_PROTO_STATIC = 4
_SCOPE_HOST = 254
_IFF_UP = 1
# Addresses that no pod has: the look-up must reach the rule.
_ANYWHERE = {socket.AF_INET: "198.51.100.1", socket.AF_INET6: "2001:db8::1"}
_NAMES = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_ABSENT = (errno.ENOENT, errno.ESRCH, errno.ENODEV, errno.EAFNOSUPPORT)


class _Kind(IntEnum):
    NEWLINK = 16
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    GETADDR = 22
    NEWRULE = 32
    DELRULE = 33


def ensure() -> None:
    """Rule and route are there for each family that the namespace speaks. Idempotent.

    Sets `lo` up if it is down: some container runtimes do that beside the CNI chain in which a new pod waits for us.

    Raises: KernelRefused naming the operation. IPv6 is passed over only where it is switched off.
    """
    with Netlink(NETLINK_ROUTE) as netlink:
        for family in _families():
            try:
                netlink.change([_rule(family, _Kind.NEWRULE, CREATE | EXCL)])
            except KernelRefused as error:
                if error.errno != errno.EEXIST:
                    raise
            try:
                netlink.change([_route(family, _Kind.NEWROUTE, CREATE | REPLACE)])
            except KernelRefused as error:
                if error.errno != errno.ENETDOWN:
                    raise
                netlink.change([_loopback_up(), _route(family, _Kind.NEWROUTE, CREATE | REPLACE)])


def remove() -> None:
    """Rule and route are gone for both families. Idempotent.

    Raises: KernelRefused when something that exists cannot be removed.
    """
    with Netlink(NETLINK_ROUTE) as netlink:
        for family in _FAMILIES:
            for removal in (_rule(family, _Kind.DELRULE, 0), _route(family, _Kind.DELROUTE, 0)):
                try:
                    netlink.change([removal])
                except KernelRefused as error:
                    if error.errno not in _ABSENT:
                        raise


def difference() -> str | None:
    """What is wrong with the policy route, in words; None when a packet with the reply mark is delivered locally.

    It asks the kernel where such a packet would go: that covers rule, route and anything put before them, in one question.
    """
    with Netlink(NETLINK_ROUTE) as netlink:
        for family in _families():
            try:
                found = netlink.query(_lookup(family), rtmsg)[0]
            except KernelRefused:
                return f"{_NAMES[family]} rule or route of table {ROUTE_TABLE} is missing"
            if found["type"] != _LOCAL:
                return f"{_NAMES[family]} rule or route of table {ROUTE_TABLE} is missing"
    return None


def addresses() -> frozenset[str]:
    """Every address of the namespace, in canonical text."""
    with Netlink(NETLINK_ROUTE) as netlink:
        found = netlink.query(request(ifaddrmsg(), _Kind.GETADDR, DUMP, "list addresses"), ifaddrmsg)
    # On point-to-point links IFA_ADDRESS is the other side's.
    held = (attribute(each, "IFA_LOCAL") or attribute(each, "IFA_ADDRESS") for each in found)
    return frozenset(str(ip_address(each)) for each in held if each)


def has_ipv6() -> bool:
    """Whether IPv6 is compiled in and switched on for `lo`, over which the reply route goes."""
    try:
        with open("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "rb") as file:
            return file.read().strip() == b"0"
    except FileNotFoundError:
        return False


def _families() -> tuple[socket.AddressFamily, ...]:
    return _FAMILIES if has_ipv6() else _FAMILIES[:1]


def _rule(family: socket.AddressFamily, kind: _Kind, flags: int) -> Request:
    message = fibmsg()
    message["family"] = family
    message["table"] = ROUTE_TABLE
    message["action"] = _TO_TABLE
    message["attrs"] = [
        ("FRA_PRIORITY", RULE_PRIORITY),
        ("FRA_FWMARK", REPLY_MARK),
        ("FRA_FWMASK", MARK_MASK),
        ("FRA_TABLE", ROUTE_TABLE),
    ]
    return request(message, kind, flags | ACK, f"{_verb(kind)} {_NAMES[family]} rule {RULE_PRIORITY}")


def _route(family: socket.AddressFamily, kind: _Kind, flags: int) -> Request:
    message = rtmsg()
    message["family"] = family
    message["table"] = ROUTE_TABLE
    message["type"] = _LOCAL
    message["proto"] = _PROTO_STATIC
    message["scope"] = _SCOPE_HOST if family == socket.AF_INET else 0
    message["attrs"] = [("RTA_TABLE", ROUTE_TABLE), ("RTA_OIF", socket.if_nametoindex("lo"))]
    return request(message, kind, flags | ACK, f"{_verb(kind)} {_NAMES[family]} route of table {ROUTE_TABLE}")


def _loopback_up() -> Request:
    message = ifinfmsg()
    message["index"] = socket.if_nametoindex("lo")
    message["flags"] = message["change"] = _IFF_UP
    return request(message, _Kind.NEWLINK, ACK, "set lo up")


@cache
def _lookup(family: socket.AddressFamily) -> Request:
    message = rtmsg()
    message["family"] = family
    message["dst_len"] = 32 if family == socket.AF_INET else 128
    message["attrs"] = [("RTA_DST", _ANYWHERE[family]), ("RTA_MARK", REPLY_MARK)]
    return request(message, _Kind.GETROUTE, 0, f"look up the {_NAMES[family]} reply route")


def _verb(kind: _Kind) -> str:
    return "remove" if kind in (_Kind.DELRULE, _Kind.DELROUTE) else "add"
