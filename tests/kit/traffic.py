"""What a test does with connections through a redirection: accept, talk, ask where from and where to."""

from __future__ import annotations

import socket
import struct

from tests.kit.netns import TIMEOUT_SECONDS, plain

SO_ORIGINAL_DST = 80


def accept(listener: socket.socket) -> socket.socket:
    """The next connection, with a timeout on everything."""
    listener.settimeout(TIMEOUT_SECONDS)
    connection, _ = listener.accept()
    connection.settimeout(TIMEOUT_SECONDS)
    return connection


def nobody_waits(listener: socket.socket) -> bool:
    """Whether no connection is in the backlog (one that is gets closed)."""
    listener.setblocking(False)
    try:
        listener.accept()[0].close()
    except BlockingIOError:
        return True
    return False


def original_destination(connection: socket.socket) -> tuple[str, int]:
    """Where a redirected connection was going."""
    if connection.getpeername()[0].startswith("::ffff:"):
        _, port, packed = struct.unpack("!HH4s8x", connection.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16))
        return socket.inet_ntop(socket.AF_INET, packed), port
    raw = connection.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, 28)
    return socket.inet_ntop(socket.AF_INET6, raw[8:24]), struct.unpack("!H", raw[2:4])[0]


def source_of(connection: socket.socket) -> str:
    """The address that a connection comes from."""
    return plain(connection.getpeername()[0])


def talk(one: socket.socket, other: socket.socket) -> None:
    """Both directions work."""
    for sender, receiver in ((one, other), (other, one)):
        sender.sendall(b"hello")
        assert receiver.recv(16) == b"hello"
