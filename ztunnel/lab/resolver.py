"""The lab's cluster DNS server: `python -m ztunnel.lab.resolver --manifests DIR`, an ordinary container of the pod `coredns`.

Answers from the objects that the controller keeps in the manifests directory; each query sees the directory as it is then. UDP and TCP
on port 53, IPv6 and IPv4, one loop, bounded connections. Names outside of the cluster are refused: a lab has no way out.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ztunnel.lab.zone import MAX_QUERY, Zone, answer, build
from ztunnel.mesh.manifests.tree import Tree

MAX_CONNECTIONS = 128
IDLE_SECONDS = 5.0
BATCH = 64
UNSETTLED_NANOSECONDS = 100_000_000
"""A directory that changed so recently may change again within the same tick of the file system's clock."""

Stamp = tuple[int, int, int]


@dataclass(slots=True)
class Directory:
    """The zone of a directory of objects, read again when the directory has changed."""

    path: Path
    _zone: Zone = field(default_factory=Zone)
    _bodies: dict[str, tuple[Stamp, Tree]] = field(default_factory=dict)
    _seen: int = -1

    def zone(self) -> Zone:
        """The zone as of now. Objects are renamed into place, so the directory's time tells of every change."""
        changed = self.path.stat().st_mtime_ns
        if changed != self._seen or time.time_ns() - changed < UNSETTLED_NANOSECONDS:
            if self._read():
                self._zone = build(body for _, body in self._bodies.values())
            self._seen = changed
        return self._zone

    def _read(self) -> bool:
        found: dict[str, tuple[Stamp, Tree]] = {}
        for entry in self.path.iterdir():
            try:
                status = entry.stat()
                stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
                known = self._bodies.get(entry.name)
                found[entry.name] = known if known is not None and known[0] == stamp else (stamp, json.loads(entry.read_bytes()))
            except FileNotFoundError:
                continue  # deleted since the listing
        has_changed = {name: stamp for name, (stamp, _) in found.items()} != {name: stamp for name, (stamp, _) in self._bodies.items()}
        self._bodies = found
        return has_changed


@dataclass(slots=True)
class Conversation:
    """One TCP client."""

    sock: socket.socket
    deadline: float
    inbox: bytearray = field(default_factory=bytearray)
    outbox: bytearray = field(default_factory=bytearray)


class Resolver:
    """The loop."""

    def __init__(self, directory: Directory, port: int) -> None:
        self._directory = directory
        self._selector = selectors.DefaultSelector()
        self._conversations: dict[int, Conversation] = {}
        datagrams, listener = _open(socket.SOCK_DGRAM, port), _open(socket.SOCK_STREAM, port)
        listener.listen(64)
        self._selector.register(datagrams, selectors.EVENT_READ, lambda _: self._datagrams(datagrams))
        self._selector.register(listener, selectors.EVENT_READ, lambda _: self._accept(listener))

    def run(self) -> None:
        """Serve for ever."""
        while True:
            for key, events in self._selector.select(1.0 if self._conversations else None):
                act: Callable[[int], None] = key.data
                act(events)
            now = time.monotonic()
            for conversation in [each for each in self._conversations.values() if each.deadline < now]:
                self._close(conversation)

    def _datagrams(self, sock: socket.socket) -> None:
        for _ in range(BATCH):
            try:
                packet, client = sock.recvfrom(MAX_QUERY + 1)
                reply = answer(self._directory.zone(), packet, is_udp=True)
                if reply is not None:
                    sock.sendto(reply, client)
            except BlockingIOError:
                return
            except OSError:
                continue  # one client that cannot be answered; the next may be waiting

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if len(self._conversations) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        conversation = Conversation(sock, time.monotonic() + IDLE_SECONDS)
        self._conversations[sock.fileno()] = conversation
        self._selector.register(sock, selectors.EVENT_READ, lambda events: self._converse(conversation, events))

    def _converse(self, conversation: Conversation, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = conversation.sock.recv(MAX_QUERY)
                if not data:
                    self._close(conversation)
                    return
                conversation.inbox += data
                if not self._take_queries(conversation):
                    self._close(conversation)
                    return
            if conversation.outbox:
                sent = conversation.sock.send(conversation.outbox)
                del conversation.outbox[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._close(conversation)
            return
        # A client that does not read its answers gets no further questions in.
        wanted = selectors.EVENT_WRITE if conversation.outbox else selectors.EVENT_READ
        self._selector.modify(conversation.sock, wanted, lambda events: self._converse(conversation, events))

    def _take_queries(self, conversation: Conversation) -> bool:
        """Answer the whole queries that arrived; whether the client may go on."""
        inbox = conversation.inbox
        while len(inbox) >= 2:
            (length,) = struct.unpack_from(">H", inbox)
            if length > MAX_QUERY:
                return False
            if len(inbox) < 2 + length:
                break
            reply = answer(self._directory.zone(), bytes(inbox[2 : 2 + length]), is_udp=False)
            del inbox[: 2 + length]
            if reply is None:
                return False
            conversation.outbox += struct.pack(">H", len(reply)) + reply
            conversation.deadline = time.monotonic() + IDLE_SECONDS
        return True

    def _close(self, conversation: Conversation) -> None:
        self._selector.unregister(conversation.sock)
        del self._conversations[conversation.sock.fileno()]
        conversation.sock.close()


def _open(kind: socket.SocketKind, port: int) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_INET6, kind)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        host = "::"
    except OSError:
        sock = socket.socket(socket.AF_INET, kind)
        host = "0.0.0.0"  # noqa: S104 - a pod's server listens everywhere
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    sock.setblocking(False)
    return sock


def main() -> None:
    """Serve a directory's names."""
    parser = argparse.ArgumentParser(description="The lab's cluster DNS server")
    parser.add_argument("--manifests", type=Path, required=True)
    parser.add_argument("--port", type=int, default=53)
    options = parser.parse_args()
    Resolver(Directory(options.manifests), options.port).run()


if __name__ == "__main__":
    main()
