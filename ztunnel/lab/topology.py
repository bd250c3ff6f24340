"""The lab's network: a bridge in the controller's own namespace, nodes on it, pods behind their nodes with routed addresses.

    fabric (the controller's namespace)   br0 ── node-1, node-2, …
    node    eth0 10.99.0.<n>/24, routes to the other nodes' pods; a veth per pod, whose node end has 169.254.1.1 and fe80::1
    pod     eth0 10.244.<n>.<i>/32, default route through the veth

Namespaces are file descriptors and nothing else: the kernel frees them, and everything in them, when the controller dies.
Functions here are synchronous and enter namespaces through throw-away threads: call them with `trio.to_thread.run_sync`.
Not here: which addresses (addresses), what VIPs do (kubeproxy).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError as KernelError

from ztunnel.lab.addresses import SERVICE_NETWORKS, node_address, pod_network
from ztunnel.mesh.errors import NetlinkError
from ztunnel.node import netns

GATEWAYS = {4: ("169.254.1.1", 32), 6: ("fe80::1", 64)}
ALL = {4: "0.0.0.0/0", 6: "::/0"}
HOST_PREFIX = {4: 32, 6: 128}
FABRIC_PREFIX = {4: 24, 6: 64}
SCOPE_LINK = 253
IFA_F_NODAD = 0x02
BRIDGE = "br0"


@dataclass(frozen=True, slots=True)
class NodePlan:
    """One node; `number` (from 1) decides its addresses."""

    name: str
    number: int

    def address(self, version: int) -> str:
        """Its address on the fabric."""
        return node_address(self.number, version)


@dataclass(frozen=True, slots=True)
class PodPlan:
    """One pod's network: the interface's name on the node, and its addresses, primary first."""

    interface: str
    addresses: tuple[str, ...]


def version_of(address: str) -> int:
    """4 or 6."""
    return 6 if ":" in address else 4


def make_fabric() -> int:
    """A file descriptor of the calling process' namespace, which now has the bridge that nodes hang on.

    Raises: NetlinkError when the kernel refuses.
    """
    fabric = netns.open_current()
    netns.run_inside(fabric, _mapped, _fabric)
    return fabric


def make_node(fabric: int, node: NodePlan, nodes: Sequence[NodePlan], versions: Sequence[int]) -> int:
    """The namespace of a new node on the fabric, with routes to the pods of all `nodes`; the caller closes it.

    Raises: NetlinkError when the kernel refuses; nothing is left then.
    """
    fd = netns.new()
    try:
        netns.run_inside(fd, _mapped, _no_duplicate_detection)
        netns.run_inside(fabric, _mapped, lambda: _attach(node.name, fd))
        netns.run_inside(fd, _mapped, lambda: _configure_node(node, nodes, versions))
    except BaseException:
        os.close(fd)
        raise
    return fd


def make_pods(node_fd: int, node: NodePlan, pods: Sequence[PodPlan]) -> list[int]:
    """The namespaces of new pods, connected to their node; the caller closes them and calls `remove_pod`.

    Several at once, because most of the time goes into opening netlink sockets.

    Raises:
        NetlinkError: the kernel refuses one of them; nothing of any is left then.
    """
    fds: list[int] = []
    try:
        for _ in pods:
            fds.append(netns.new())
            netns.run_inside(fds[-1], _mapped, _no_duplicate_detection)
        netns.run_inside(node_fd, _mapped, lambda: _connect(node, pods, fds))
        for fd, pod in zip(fds, pods, strict=True):
            netns.run_inside(fd, _mapped, partial(_configure_pod, pod))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return fds


def remove_pod(node_fd: int, pod: PodPlan) -> None:
    """Cut a pod off: its veth pair and its routes are gone at once, whoever still holds the namespace."""
    netns.run_inside(node_fd, _mapped, lambda: _disconnect(pod))


def _mapped(work: Callable[[], None]) -> None:
    try:
        work()
    except KernelError as error:
        raise NetlinkError(f"the kernel refused the lab's network: {error}") from error
    except OSError as error:
        raise NetlinkError(f"the lab's network: {error.strerror} ({error.filename or 'netlink'})") from error


def _sysctl(name: str, value: int) -> None:
    """/proc/sys/net is that of the calling thread's namespace."""
    Path("/proc/sys/net", name).write_text(str(value))


def _no_duplicate_detection() -> None:
    """Before any link exists: duplicate address detection of the link-locals costs the first IPv6 connection two seconds."""
    if Path("/proc/sys/net/ipv6").exists():
        for scope in ("all", "default"):
            _sysctl(f"ipv6/conf/{scope}/accept_dad", 0)


def _up(route: IPRoute, name: str) -> int:
    index = int(route.link_lookup(ifname=name)[0])
    route.link("set", index=index, state="up")
    return index


def _address(route: IPRoute, index: int, address: str, prefix: int) -> None:
    if version_of(address) == 6:
        route.addr("add", index=index, address=address, prefixlen=prefix, flags=IFA_F_NODAD)
    else:
        route.addr("add", index=index, address=address, prefixlen=prefix)


def _fabric() -> None:
    _no_duplicate_detection()
    with IPRoute() as route:
        _up(route, "lo")
        # Multicast snooping without a querier swallows neighbour discovery for the first seconds.
        route.link("add", ifname=BRIDGE, kind="bridge", br_mcast_snooping=0)
        _up(route, BRIDGE)


def _attach(name: str, fd: int) -> None:
    with IPRoute() as route:
        route.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": fd})
        bridge = int(route.link_lookup(ifname=BRIDGE)[0])
        index = int(route.link_lookup(ifname=name)[0])
        route.link("set", index=index, master=bridge, state="up")


def _configure_node(node: NodePlan, nodes: Sequence[NodePlan], versions: Sequence[int]) -> None:
    if 4 in versions:
        _sysctl("ipv4/ip_forward", 1)
    if 6 in versions:
        _sysctl("ipv6/conf/all/forwarding", 1)
    with IPRoute() as route:
        _up(route, "lo")
        index = _up(route, "eth0")
        for version in versions:
            own = node.address(version)
            _address(route, index, own, FABRIC_PREFIX[version])
            for other in nodes:
                if other != node:
                    route.route("add", dst=pod_network(other.number, version), gateway=other.address(version), prefsrc=own)
            # The node's own connections to service addresses need a route before the address is rewritten.
            route.route("add", dst=str(SERVICE_NETWORKS[version]), oif=index, prefsrc=own)


def _connect(node: NodePlan, pods: Sequence[PodPlan], fds: Sequence[int]) -> None:
    with IPRoute() as route:
        for pod, fd in zip(pods, fds, strict=True):
            route.link("add", ifname=pod.interface, kind="veth", peer={"ifname": "eth0", "net_ns_fd": fd})
            index = _up(route, pod.interface)
            for address in pod.addresses:
                version = version_of(address)
                gateway, prefix = GATEWAYS[version]
                _address(route, index, gateway, prefix)
                # Without prefsrc the node would speak to its pods from the gateway's address; real nodes show their own.
                scope = {"scope": SCOPE_LINK} if version == 4 else {}
                route.route("add", dst=f"{address}/{HOST_PREFIX[version]}", oif=index, prefsrc=node.address(version), **scope)


def _configure_pod(pod: PodPlan) -> None:
    with IPRoute() as route:
        _up(route, "lo")
        index = _up(route, "eth0")
        for address in pod.addresses:
            version = version_of(address)
            gateway, _ = GATEWAYS[version]
            _address(route, index, address, HOST_PREFIX[version])
            if version == 4:
                route.route("add", dst=f"{gateway}/32", oif=index, scope=SCOPE_LINK)
            route.route("add", dst=ALL[version], gateway=gateway, oif=index)


def _disconnect(pod: PodPlan) -> None:
    with IPRoute() as route:
        for index in route.link_lookup(ifname=pod.interface):
            route.link("del", index=int(index))
