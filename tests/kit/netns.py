"""Nodes and pods out of network namespaces, for tests of the node agent: file descriptors only, no names, nothing to clean up.

    with Topology() as net:
        client = net.node().pod("client")
        server = net.node().pod("server")
        with server.listener(8080) as listening, client.connect((server.v4, 8080)) as connection: ...

A node is a namespace on a bridge (itself a namespace), a pod a namespace routed through its node, as CNI plugins do it. The kernel
frees everything when the test process ends, however it ends. Needs the namespaces that tests/kit/isolation.py enters.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import ParamSpec, TypeVar

from pyroute2 import IPRoute

from ztunnel.node import netns

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_SECONDS = 20.0
IFA_F_NODAD = 0x02
GATEWAY4, GATEWAY6 = "169.254.1.1", "fe80::1"


@dataclass(slots=True, eq=False)
class Place:
    """A namespace: something that sockets and commands can be in."""

    name: str
    fd: int
    v4: str = ""
    v6: str = ""

    @property
    def addresses(self) -> tuple[str, ...]:
        """The addresses it has, IPv4 first."""
        return tuple(each for each in (self.v4, self.v6) if each)

    @property
    def path(self) -> str:
        """A path that leads to the namespace, as long as this process holds it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def address(self, family: int) -> str:
        """Its address of that family."""
        return self.v4 if family == socket.AF_INET else self.v6

    def run(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of `fn`, run inside."""
        return netns.run_inside(self.fd, fn, *args, **kwargs)

    def command(self, *argv: str, check: bool = True, stdin: str = "") -> str:
        """Standard output of a command that runs inside; its errors are in the exception."""
        done = subprocess.run(["nsenter", f"--net={self.path}", *argv], capture_output=True, text=True, check=False, input=stdin)
        if check and done.returncode != 0:
            raise AssertionError(f"{' '.join(argv)} in {self.name}: {done.stderr}")
        return done.stdout

    def tcp_socket(self, family: int, source: tuple[str, int] | None = None) -> socket.socket:
        """A TCP socket that belongs inside, bound to `source`, with a timeout."""
        with netns.inside(self.fd):
            made = socket.socket(family, socket.SOCK_STREAM)
        made.settimeout(TIMEOUT_SECONDS)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(source)
        return made

    @contextmanager
    def listener(self, port: int, address: str = "::") -> Iterator[socket.socket]:
        """A listening socket inside; dual-stack by default."""
        with self.tcp_socket(family_of(address)) as made:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind((address, port))
            made.listen()
            yield made

    @contextmanager
    def connect(self, to: tuple[str, int], source: tuple[str, int] | None = None) -> Iterator[socket.socket]:
        """A connection from inside. Raises OSError as connect(2) does."""
        with self.tcp_socket(family_of(to[0]), source) as made:
            made.connect(to)
            yield made


@dataclass(slots=True, eq=False)
class Pod(Place):
    """A pod: one interface, addresses of its own, everything else through its node."""

    uid: str = ""
    node: str = ""


@dataclass(slots=True, eq=False)
class Node(Place):
    """A node: forwards between its pods and the fabric."""

    number: int = 0
    topology: Topology | None = None
    pods: list[Pod] = field(default_factory=list)

    def pod(self, name: str, *, ipv6: bool = True) -> Pod:
        """A new pod on this node."""
        assert self.topology is not None
        return self.topology.add_pod(self, name, ipv6=ipv6)


class Topology:
    """Nodes on one bridge. A context manager: leaving it closes every namespace."""

    def __init__(self) -> None:
        self._fabric = _new()
        netns.run_inside(self._fabric, _make_bridge)
        self.nodes: list[Node] = []

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let every namespace go."""
        for place in [pod for node in self.nodes for pod in node.pods] + list(self.nodes):
            os.close(place.fd)
        os.close(self._fabric)
        self.nodes.clear()

    def node(self) -> Node:
        """A new node, reachable from and to all others."""
        number = len(self.nodes) + 1
        node = Node(f"node-{number}", _new(), f"10.99.0.{number}", f"fd99::{number}", number, self)
        netns.run_inside(self._fabric, _plug, f"n{number}", node.fd)
        node.run(_configure_node, node)
        for other in self.nodes:
            other.run(_route_to_node, node)
            node.run(_route_to_node, other)
        self.nodes.append(node)
        return node

    def add_pod(self, node: Node, name: str, *, ipv6: bool) -> Pod:
        """See `Node.pod`."""
        number = len(node.pods) + 1
        pod = Pod(name, _new(), f"10.{100 + node.number}.0.{number}", f"fd99:{node.number}::{number}" if ipv6 else "")
        pod.uid, pod.node = f"{name}-{node.number}-{number}", node.name
        if not ipv6:
            pod.run(_set, "ipv6/conf/all/disable_ipv6", "1")
        node.run(_plug_pod, f"p{number}", pod)
        pod.run(_configure_pod, pod)
        node.pods.append(pod)
        return pod

    def forget(self, node: Node, pod: Pod) -> None:
        """Delete the pod as a container runtime does: its namespace goes as soon as nobody else holds it."""
        node.pods.remove(pod)
        os.close(pod.fd)


def family_of(address: str) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if ip_address(address).version == 4 else socket.AF_INET6


def plain(address: str) -> str:
    """An address without the wrapping that dual-stack sockets give to IPv4."""
    return address.removeprefix("::ffff:")


def _new() -> int:
    fd = netns.new()
    netns.run_inside(fd, _prepare)
    return fd


def _prepare() -> None:
    # Before any link exists: with duplicate address detection the first IPv6 connection takes two seconds.
    for scope in ("all", "default"):
        _set(f"ipv6/conf/{scope}/accept_dad", "0")
    with IPRoute() as ipr:
        ipr.link("set", index=1, state="up")


def _set(key: str, value: str) -> None:
    with open(f"/proc/sys/net/{key}", "w") as file:
        file.write(value)


def _up(ipr: IPRoute, name: str) -> int:
    index = int(ipr.link_lookup(ifname=name)[0])
    ipr.link("set", index=index, state="up")
    return index


def _add_address(ipr: IPRoute, index: int, address: str, length4: int, length6: int) -> None:
    if ":" in address:
        ipr.addr("add", index=index, address=address, prefixlen=length6, flags=IFA_F_NODAD)
    else:
        ipr.addr("add", index=index, address=address, prefixlen=length4)


def _make_bridge() -> None:
    with IPRoute() as ipr:
        ipr.link("add", ifname="br0", kind="bridge", br_mcast_snooping=0)
        _up(ipr, "br0")


def _plug(name: str, node_fd: int) -> None:
    with IPRoute() as ipr:
        ipr.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": node_fd})
        ipr.link("set", index=_up(ipr, name), master=ipr.link_lookup(ifname="br0")[0])


def _configure_node(node: Node) -> None:
    _set("ipv4/ip_forward", "1")
    _set("ipv6/conf/all/forwarding", "1")
    with IPRoute() as ipr:
        index = _up(ipr, "eth0")
        _add_address(ipr, index, node.v4, 24, 64)
        _add_address(ipr, index, node.v6, 24, 64)


def _route_to_node(other: Node) -> None:
    with IPRoute() as ipr:
        ipr.route("add", dst=f"10.{100 + other.number}.0.0/24", gateway=other.v4)
        ipr.route("add", dst=f"fd99:{other.number}::/64", gateway=other.v6)


def _plug_pod(name: str, pod: Pod) -> None:
    with IPRoute() as ipr:
        ipr.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": pod.fd})
        index = _up(ipr, name)
        _add_address(ipr, index, GATEWAY4, 32, 64)
        _add_address(ipr, index, GATEWAY6, 32, 64)
        ipr.route("add", dst=f"{pod.v4}/32", oif=index, scope=253)
        if pod.v6:
            ipr.route("add", dst=f"{pod.v6}/128", oif=index)


def _configure_pod(pod: Pod) -> None:
    with IPRoute() as ipr:
        index = _up(ipr, "eth0")
        for address in pod.addresses:
            _add_address(ipr, index, address, 32, 128)
        ipr.route("add", dst=f"{GATEWAY4}/32", oif=index, scope=253)
        ipr.route("add", dst="0.0.0.0/0", gateway=GATEWAY4, oif=index)
        if pod.v6:
            ipr.route("add", dst="::/0", gateway=GATEWAY6, oif=index)
