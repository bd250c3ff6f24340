"""A pod as a worker serves it: its listeners, its identity's TLS contexts, its sockets. And what the worker shares among all pods."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from ztunnel.dataplane.addresses import Address, original_destination
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.channel import Configure
from ztunnel.dataplane.endings import TunnelTimes
from ztunnel.dataplane.kernel_tls import KernelSwitch
from ztunnel.dataplane.loop import Loop
from ztunnel.dataplane.sockets import Acceptor, Dialling, reset
from ztunnel.dataplane.tunnel import Tunnel
from ztunnel.hbone.handshake import TlsContexts
from ztunnel.mesh.errors import Flag, LocalError, UpstreamRefused, UpstreamTimeout
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.index import Index
from ztunnel.proxy.connections import Connection, ConnectionTable
from ztunnel.proxy.stock import SocketStock


class LimitReached(LocalError):
    """One of our bounds was hit; `limit` names it for the metric."""

    def __init__(self, limit: str) -> None:
        super().__init__(f"limit reached: {limit}")
        self.limit = limit


class NoIdentity(LocalError):
    """There is no certificate for the pod's identity: nothing is carried (fail closed)."""

    flag: ClassVar[Flag] = Flag.IDENTITY_ERROR


@dataclass(slots=True)
class Pod:
    """One enrolled pod."""

    uid: str
    identity: SpiffeId
    ipv4: SocketStock
    ipv6: SocketStock
    acceptors: list[Acceptor] = field(default_factory=list)
    inbound: set[Tunnel] = field(default_factory=set)
    handshaking: int = 0
    """Inbound tunnels whose handshake is under way."""
    is_gone: bool = False

    def stock(self, ip: str) -> SocketStock:
        """The sockets that can dial this address."""
        return self.ipv6 if ":" in ip else self.ipv4


@dataclass(slots=True)
class Node:
    """What all pods of a worker share. Built by the composition root only."""

    loop: Loop
    scratch: Scratch
    index: Index
    settings: Configure
    connections: ConnectionTable
    random: Callable[[int], int]
    """A uniform integer below its argument."""
    pods: dict[str, Pod] = field(default_factory=dict)
    """The pods that are served, by UID."""
    contexts: dict[SpiffeId, TlsContexts] = field(default_factory=dict)
    limits: Counter[str] = field(default_factory=Counter)
    """Limits hit since the supervisor was last told."""
    kernel: KernelSwitch = field(init=False)
    """Whether new tunnels are given to kernel TLS."""

    def __post_init__(self) -> None:
        self.kernel = KernelSwitch(self.settings.kernel_records)

    @property
    def times(self) -> TunnelTimes:
        settings = self.settings
        return TunnelTimes(settings.handshake_seconds, settings.ping_seconds, settings.ping_timeout_seconds)

    def tls(self, pod: Pod) -> TlsContexts:
        """Raises NoIdentity when no certificate has come yet, or it has expired and none has followed."""
        contexts = self.contexts.get(pod.identity)
        if contexts is None:
            raise NoIdentity(f"no valid certificate for {pod.identity}")
        return contexts

    def hit(self, limit: str) -> LimitReached:
        """Counts a limit that was reached."""
        self.limits[limit] += 1
        return LimitReached(limit)


def redirected(node: Node, pod: Pod, sock: socket.socket, peer: Address) -> Address | None:
    """Where a connection was going that nftables brought to us. None: there is no room for it, or nobody knows; it has been reset."""
    if node.connections.is_full_for(pod.uid):
        node.hit("connections")
    else:
        try:
            return original_destination(sock, peer)
        except OSError:
            # Nobody redirected it here, or the rules were flushed under it.
            node.hit("original_destination_unknown")
    reset(sock)
    return None


class PodDial(Dialling):
    """Connects from a pod's namespace for a connection, which ends if that fails. Its relay gets the socket."""

    def __init__(self, node: Node, connection: Connection, destination: Address, source_ip: str | None) -> None:
        """`source_ip`: the address to come from, None for the pod's own."""
        super().__init__(node.loop, node.settings.connect_seconds)
        self._node = node
        self._connection = connection
        self._destination = destination
        self._source_ip = source_ip
        self._stock: SocketStock | None = None

    def start(self, pod: Pod) -> None:
        """Begins with the pod's next socket, or waits for it within the same time."""
        stock = self._stock = pod.stock(self._destination[0])
        self._connection.dial = self
        sock, is_bound = stock.take_now(self._source_ip or "")
        if sock is not None:
            self.connect(sock, self._destination, None if is_bound else self._source_ip)
            return
        self._timer = self._loop.call_later(self._seconds, self._waited)
        if not stock.take(self._taken):
            self._connection.abort(self._node.hit("sockets_waiting"))

    def connected(self, sock: socket.socket) -> None:
        """What follows."""
        relay = self._connection.relay
        assert relay is not None
        relay.attach(sock, self._stock.home(self._source_ip or "") if self._stock is not None else None)
        self._loop.settle_later(self)

    def settle(self) -> None:
        """What came with a tunnel's request has been passed on: an application that still has nothing may have to speak first.

        A `Splice` has not heard its client by then, and always gives the word.
        """
        relay = self._connection.relay
        if relay is not None:
            relay.acknowledge()

    def on_bug(self) -> None:
        self._connection.abort(LocalError("internal error"))

    def dialled(self, sock: socket.socket, error: OSError | None) -> None:
        connection = self._connection
        connection.dial = None
        if error is None:
            self.connected(sock)
            return
        where = f"connect to {self._destination[0]}:{self._destination[1]}"
        if isinstance(error, TimeoutError):
            connection.abort(UpstreamTimeout(f"{where} timed out"))
        else:
            connection.abort(UpstreamRefused(f"{where}: {error.strerror}"))

    def _waited(self) -> None:
        self._connection.abort(UpstreamTimeout("no socket came in time"))

    def _taken(self, sock: socket.socket | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if sock is None:
            self._connection.abort(LocalError("no socket to be had in the pod's namespace"))
        elif self._done:
            # It is over: nobody waits for it any more.
            sock.close()
        else:
            self.connect(sock, self._destination, self._source_ip)
