"""What leaves on a tunnel's socket, in order: sealed frames, handshake flights and alerts, and the rest of them that the kernel did
not take yet.

Large frames are sealed where they lie in the worker's scratch buffer and sent at once. What the kernel does not take is copied to the
backlog; from then on `is_blocked`, and whoever could wait must: only what cannot be refused any more (control frames, bounded by the
mux) is still added.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from itertools import islice

from ztunnel.dataplane.buffers import CHUNK_FRAMED, Scratch
from ztunnel.hbone.records import Records

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_VECTORS = 64


class Outlet:
    """One socket's sending side. `on_lost` is called with the error that ended it; nothing is sent after that."""

    __slots__ = ("_backlog", "_on_lost", "_scratch", "_sock", "bytes_sent", "is_blocked", "records")

    def __init__(self, scratch: Scratch, on_lost: Callable[[OSError], None]) -> None:
        self._scratch = scratch
        self._on_lost = on_lost
        self._sock: socket.socket | None = None
        self._backlog: deque[memoryview] = deque()
        self.records: Records | None = None
        """Set once the handshake is done; frames can be sealed from then on."""
        self.is_blocked = False
        self.bytes_sent = 0

    def open(self, sock: socket.socket) -> None:
        """The connected socket; it stays the caller's to close."""
        self._sock = sock

    def close(self) -> None:
        """Sends nothing more, and forgets what waits."""
        self._sock = None
        self._backlog.clear()

    @property
    def has_backlog(self) -> bool:
        """Whether something waits for the kernel."""
        return bool(self._backlog)

    def send_plain(self, plain: bytearray) -> None:
        """Seals and sends frames; takes the buffer over."""
        end = len(plain)
        plain.append(0)
        if end <= CHUNK_FRAMED:
            self.seal(plain, 0, end)
            return
        for start in range(0, end, CHUNK_FRAMED):
            self.seal(plain, start, min(start + CHUNK_FRAMED, end))

    def seal(self, source: bytearray, start: int, end: int) -> None:
        """Seals source[start:end], at most CHUNK_FRAMED bytes with a spare one behind them, and sends the records."""
        records = self.records
        if records is None or self._sock is None:
            return
        # A KeyUpdate that is due is written in front of the data.
        size = records.seal(source, start, end, self._scratch.sealed, 0)
        self._transmit(self._scratch.sealed_view[:size])

    def send_raw(self, data: bytes) -> None:
        """Sends what is not to be sealed: handshake flights, and records that are complete."""
        if data:
            self._transmit(memoryview(data))

    def drain(self) -> None:
        """The kernel has room again."""
        backlog = self._backlog
        while backlog and self._sock is not None:
            try:
                sent = self._sock.sendmsg(list(islice(backlog, _VECTORS)), (), _FLAGS)
            except BlockingIOError:
                return
            except OSError as error:
                self._on_lost(error)
                return
            self.bytes_sent += sent
            while sent:
                first = backlog[0]
                if sent < len(first):
                    backlog[0] = first[sent:]
                    break
                sent -= len(first)
                backlog.popleft()
        self.is_blocked = False

    def _transmit(self, data: memoryview) -> None:
        sock = self._sock
        if sock is None:
            return
        if self._backlog:
            self._backlog.append(memoryview(bytes(data)))
            return
        try:
            sent = sock.send(data, _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._on_lost(error)
            return
        self.bytes_sent += sent
        if sent < len(data):
            self._backlog.append(memoryview(bytes(data[sent:])))
            self.is_blocked = True
