"""What leaves on a tunnel's socket, in order: sealed frames, handshake flights and alerts, and the rest of them that the kernel did
not take yet.

Large frames are sealed where they lie in the worker's scratch buffer and sent at once. What the kernel does not take is copied to the
backlog; from then on `is_blocked`, and whoever could wait must: only what cannot be refused any more (control frames, bounded by the
mux) is still added. Where the kernel seals, the same frames go out as they are, and what waits is plaintext.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Final, Protocol

from ztunnel.dataplane.buffers import CHUNK_FRAMED, Scratch
from ztunnel.dataplane.kernel_tls import KernelTls
from ztunnel.hbone.records import RecordError, Records

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_VECTORS: Final = 64
_SPARE: Final = b"\0"
"""What sealing wants behind the plaintext."""


class Sender(Protocol):
    """What takes the bytes: a socket, or the kernel's TLS on one. Both raise OSError, BlockingIOError if there is no room."""

    def send(self, data: memoryview, flags: int, /) -> int:
        """How many bytes were taken."""

    def sendmsg(self, buffers: list[memoryview], ancillary: tuple[()], flags: int, /) -> int:
        """How many bytes were taken of all the buffers."""


class Outlet:
    """One socket's sending side. `on_lost` is called with the error that ended it; nothing is sent after that."""

    __slots__ = ("_backlog", "_kernel", "_on_lost", "_scratch", "_sock", "bytes_sent", "is_blocked", "records")

    def __init__(self, scratch: Scratch, on_lost: Callable[[OSError], None]) -> None:
        self._scratch = scratch
        self._on_lost = on_lost
        self._sock: Sender | None = None
        self._kernel: KernelTls | None = None
        self._backlog: list[memoryview] = []
        self.records: Records | None = None
        """Set once the handshake is done; frames can be sealed from then on. None again when the kernel seals them."""
        self.is_blocked = False
        self.bytes_sent = 0

    def open(self, sock: socket.socket) -> None:
        """The connected socket; it stays the caller's to close."""
        self._sock = sock

    def use_kernel(self, kernel: KernelTls) -> None:
        """The kernel seals what is sent from now on. Nothing waits: in the backlog it would be sealed twice."""
        assert not self._backlog, "ciphertext waits for a socket that takes plaintext"
        self._sock = self._kernel = kernel
        self.records = None

    def close(self) -> None:
        """Sends nothing more, and forgets what waits."""
        self._sock = None
        self._backlog.clear()

    @property
    def has_backlog(self) -> bool:
        """Whether something waits for the kernel."""
        return bool(self._backlog)

    @property
    def is_settled(self) -> bool:
        """Whether a FIN would follow everything that was sent. Costs a system call where the kernel seals."""
        return not self._backlog and (self._kernel is None or self._kernel.is_settled)

    def send_plain(self, plain: bytearray) -> None:
        """Seals and sends frames; takes the buffer over."""
        end = len(plain)
        plain += _SPARE
        if end <= CHUNK_FRAMED:
            self.seal(plain, 0, end)
            return
        for start in range(0, end, CHUNK_FRAMED):
            self.seal(plain, start, min(start + CHUNK_FRAMED, end))

    def seal(self, source: bytearray, start: int, end: int) -> None:
        """Seals source[start:end], at most CHUNK_FRAMED bytes with a spare one behind them, and sends the records."""
        records = self.records
        if records is None or self._sock is None:
            if self._kernel is not None:
                self._transmit(memoryview(source)[start:end])
            return
        # A KeyUpdate that is due is written in front of the data.
        sealed = self._scratch.sealed
        # Not in one expression: mypyc 2.4 calls twice what stands in the bound of a slice.
        size = records.seal(source, start, end, sealed, 0)
        self._transmit(sealed[:size])

    def send_raw(self, data: bytes) -> None:
        """Sends what is not to be sealed: handshake flights, and records that are complete."""
        if data:
            self._transmit(memoryview(data))

    def end(self, error: RecordError | None) -> None:
        """Says close_notify, or the alert of a fatal error: the last thing to send."""
        if self._kernel is not None:
            self._end_in_kernel(self._kernel, error)
        elif self.records is not None:
            self.send_raw(self.records.close_notify() if error is None else self.records.alert(error))

    def drain(self) -> None:
        """The kernel has room again."""
        backlog = self._backlog
        while backlog and self._sock is not None:
            try:
                sent = self._sock.sendmsg(backlog[:_VECTORS], (), _FLAGS)
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
                del backlog[0]
        self.is_blocked = False

    def _end_in_kernel(self, kernel: KernelTls, error: RecordError | None) -> None:
        if error is None and self._backlog:
            # It would overtake what waits, and the peer would take a cut stream for a whole one.
            return
        try:
            kernel.end(error)
        except OSError:
            # The peer does not hear it. The connection ends in any case, for a better reason than this.
            return

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
