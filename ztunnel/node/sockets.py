"""Sockets that live in a pod's namespace: the three listeners, and the marked transparent sockets that the proxy dials with.

They are made by the privileged agent and handed to data-plane workers, which hold no capability. The hop into the namespace
covers socket(2) only; every option is set afterwards, because a socket remembers its namespace.
Source: Istio ztunnel socket.rs and inpod/config.rs (marks, keepalive times); tcp(7), ip(7), ipv6(7).
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from dataclasses import dataclass

from ztunnel.dataplane.sockets import reset_on_close
from ztunnel.mesh.errors import LocalError
from ztunnel.mesh.ports import INBOUND_HBONE, INBOUND_PLAINTEXT, OUTBOUND
from ztunnel.node import netns
from ztunnel.node.redirect import PROXY_MARK

BACKLOG = 1024
# Enough for a batch, and a bound on what one request may cost in file descriptors.
MAX_BATCH = 256
KEEPALIVE_SECONDS = 180
KEEPALIVE_PROBES = 9

IP_TRANSPARENT = 19
IP_BIND_ADDRESS_NO_PORT = 24
IPV6_TRANSPARENT = 75

_KEEP_ALIVE = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_SECONDS),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES),
)
_ALL_DIALLING = (
    (socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK),
    # The port is chosen at connect, when the destination is known: bind alone would use up the 28k ports of one client address.
    (socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1),
    # The first bytes mostly follow the handshake at once and say its last word too; else `dataplane.sockets.acknowledge` does.
    (socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1),
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    *_KEEP_ALIVE,
)
_DIALLING: dict[int, tuple[tuple[int, int, int], ...]] = {
    socket.AF_INET: ((socket.IPPROTO_IP, IP_TRANSPARENT, 1), *_ALL_DIALLING),
    socket.AF_INET6: ((socket.IPPROTO_IPV6, IPV6_TRANSPARENT, 1), *_ALL_DIALLING),
}
"""A socket's options by its family, which it takes longer to ask a socket for than to set one."""


class PortTaken(LocalError):
    """Something in the pod already listens on a port that the mesh needs there."""

    def __init__(self, pod: str, port: int) -> None:
        super().__init__(
            f"pod {pod}: port {port} is in use by the application; the mesh needs {OUTBOUND}, {INBOUND_PLAINTEXT} and {INBOUND_HBONE}"
        )
        self.pod = pod
        self.port = port


@dataclass(frozen=True, slots=True)
class Listeners:
    """The listening sockets of one pod, non-blocking. Whoever made them closes them; a worker gets duplicates."""

    outbound: socket.socket
    plaintext: socket.socket
    hbone: socket.socket

    def __iter__(self) -> Iterator[socket.socket]:
        return iter((self.outbound, self.plaintext, self.hbone))

    @property
    def listening(self) -> bool:
        """Whether all of them still listen. Whoever has a duplicate, a worker that was taken over for one, can shut them down for all."""
        return all(each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for each in self)

    def listen(self) -> None:
        """All of them listen, again if need be; each has kept its port.

        Raises: LocalError when the kernel refuses.
        """
        try:
            for each in self:
                each.listen(BACKLOG)
        except OSError as error:
            raise LocalError(f"cannot listen again: {error.strerror}") from error

    def close(self) -> None:
        for each in self:
            each.close()


def make_listeners(netns_fd: int, pod: str) -> Listeners:
    """The three listeners of a pod, dual-stack, or IPv4 only where the kernel has no IPv6.

    Args:
        netns_fd: the pod's namespace; stays the caller's.
        pod: `namespace/name`, for error texts.
    Raises: PortTaken when the application holds one of the ports; LocalError for any other refusal. Nothing stays open then.
    """
    made: list[socket.socket] = []
    try:
        # extend() keeps what was made before an error.
        made.extend(_listener(netns_fd, pod, port) for port in (OUTBOUND, INBOUND_PLAINTEXT, INBOUND_HBONE))
    except BaseException:
        _close_all(made)
        raise
    return Listeners(*made)


def make_sockets(netns_fd: int, family: int, count: int) -> list[socket.socket]:
    """A batch of unconnected TCP sockets in the pod's namespace, marked as the proxy's and able to take a client's address.

    Args:
        netns_fd: the pod's namespace; stays the caller's.
        family: AF_INET or AF_INET6.
        count: 1 to MAX_BATCH.
    Returns: non-blocking sockets, the caller's to close.
    Raises: LocalError when the kernel refuses (no such family, file descriptors used up, no CAP_NET_RAW). Nothing stays open then.
    """
    if not 1 <= count <= MAX_BATCH:
        raise ValueError(f"count must be 1 to {MAX_BATCH}, not {count}")
    made: list[socket.socket] = []
    try:
        with netns.inside(netns_fd):
            made.extend(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(count))
        options = _DIALLING[family]
        for each in made:
            for option in options:
                each.setsockopt(*option)
            # As for those that are accepted: an application must not take half of an upload for all because the proxy was killed.
            reset_on_close(each)
    except OSError as error:
        _close_all(made)
        raise LocalError(f"cannot make a proxy socket: {error.strerror}") from error
    except BaseException:
        _close_all(made)
        raise
    return made


def _listener(netns_fd: int, pod: str, port: int) -> socket.socket:
    listener, address = _listening_socket(netns_fd)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if listener.family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        _set_inherited(listener, port)
        listener.bind((address, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortTaken(pod, port) from error
        raise LocalError(f"pod {pod}: cannot listen on port {port}: {error.strerror}") from error
    return listener


def _listening_socket(netns_fd: int) -> tuple[socket.socket, str]:
    kind = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
    try:
        with netns.inside(netns_fd):
            try:
                return socket.socket(socket.AF_INET6, kind), "::"
            except OSError as error:
                if error.errno != errno.EAFNOSUPPORT:
                    raise
                return socket.socket(socket.AF_INET, kind), "0.0.0.0"  # noqa: S104 - traffic comes to whatever addresses the pod has
    except OSError as error:
        raise LocalError(f"cannot make a listening socket: {error.strerror}") from error


def _set_inherited(listener: socket.socket, port: int) -> None:
    """Options that accepted sockets take over from their listener."""
    # A small answer behind another that is not yet acknowledged would wait for the peer's delayed acknowledgement: 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if port == INBOUND_HBONE:
        # Without it, a tunnel whose conntrack entry is lost and in which this side speaks first would look like a connection
        # that the application opens: it would be redirected to ourselves, and hang.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, PROXY_MARK)
    else:
        # A proxy that is killed then resets its plaintext connections. A FIN would make the application take a truncated
        # stream for a complete one. The proxy clears it before it closes gracefully.
        reset_on_close(listener)
        # A client that vanished would hold its connection for ever: the application's own probes end at the proxy, which answers them.
        # Tunnels are asked by PING.
        _keep_alive(listener)


def _keep_alive(each: socket.socket) -> None:
    for option in _KEEP_ALIVE:
        each.setsockopt(*option)


def _close_all(sockets: list[socket.socket]) -> None:
    for each in sockets:
        each.close()
