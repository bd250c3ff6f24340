"""A TCP connection as a `Transport`: to an endpoint without HBONE, or from a client of a gateway."""

from __future__ import annotations

import errno
import socket
from typing import Final

from waypoint.data.tunnels import new_socket
from ztunnel.dataplane.addresses import Address
from ztunnel.dataplane.buffers import Scratch
from ztunnel.dataplane.bytestream import FULL, Receiver
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop
from ztunnel.dataplane.sockets import Dial, finish, reset
from ztunnel.mesh.errors import MeshError, UpstreamError, UpstreamRefused, UpstreamTimeout

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_READ: Final = 128 << 10
_VECTORS: Final = 64
_RESUME: Final = FULL // 4


class SocketStream:
    """Implements `Transport`. Dial with `connect`, or give it a connected socket with `attach`."""

    __slots__ = (
        "_dial", "_done", "_full", "_loop", "_out", "_out_bytes", "_out_ended", "_paused", "_receiver", "_remote_ended", "_scratch",
        "_shut", "_sock",
    )  # fmt: skip

    def __init__(self, loop: Loop, scratch: Scratch, receiver: Receiver) -> None:
        self._loop = loop
        self._scratch = scratch
        self._receiver = receiver
        self._sock: socket.socket | None = None
        self._dial: Dial | None = None
        self._out: list[memoryview] = []
        self._out_bytes = 0
        self._out_ended = False
        self._shut = False
        self._full = False
        self._paused = False
        self._remote_ended = False
        self._done = False

    def use(self, receiver: Receiver) -> None:
        """Another receiver takes over."""
        self._receiver = receiver

    def connect(self, address: Address, seconds: float, keepalive: tuple[float, float, int] | None = None) -> None:
        """Dials. The receiver hears `opened` or `lost`, at once or later.

        Raises:
            LocalError: no descriptor.
        """
        sock = new_socket(address[0])
        if keepalive is not None:
            idle, interval, probes = keepalive
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(idle)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(interval)))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, max(1, probes))

        def done(sock: socket.socket, error: OSError | None) -> None:
            self._dial = None
            if self._done:
                sock.close()
            elif error is None:
                self.attach(sock)
                self._receiver.opened()
            elif isinstance(error, TimeoutError):
                self._fail(UpstreamTimeout(f"connect to {address[0]}:{address[1]} timed out"))
            else:
                self._fail(UpstreamRefused(f"connect to {address[0]}:{address[1]}: {error.strerror}"))

        self._dial = Dial(self._loop, sock, seconds, done)
        self._dial.start(address, None)

    def attach(self, sock: socket.socket) -> None:
        """Takes over a connected socket."""
        self._sock = sock
        self._loop.take(sock.fileno(), self)
        self._push()

    @property
    def is_full(self) -> bool:
        return self._full

    def write(self, data: bytes) -> None:
        if self._done or self._out_ended or not data:
            return
        self._out.append(memoryview(data))
        self._out_bytes += len(data)
        if len(self._out) == 1:
            self._push()
        if self._out_bytes > FULL:
            self._full = True

    def end(self) -> None:
        if not self._done and not self._out_ended:
            self._out_ended = True
            self._push()

    def _push(self) -> None:
        sock, out = self._sock, self._out
        if sock is None:
            return
        while out:
            try:
                sent = sock.send(out[0], _FLAGS) if len(out) == 1 else sock.sendmsg(out[:_VECTORS], (), _FLAGS)
            except BlockingIOError:
                return
            except OSError as error:
                self._broken(error)
                return
            self._out_bytes -= sent
            while sent:
                first = out[0]
                if sent < len(first):
                    out[0] = first[sent:]
                    break
                sent -= len(first)
                del out[0]
        if self._out_ended and not self._shut:
            self._shut = True
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
            self._finish_if_over()

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if self._paused and not self._done:
            self._paused = False
            # An edge that came meanwhile is not told again.
            self._loop.again(self, READABLE)

    def on_event(self, events: int) -> None:
        if self._done:
            return
        if events & WRITABLE and (self._out or self._out_ended):
            self._push()
            if self._full and self._out_bytes <= _RESUME and not self._done:
                self._full = False
                self._receiver.writable()
        if events & (READABLE | HANGUP) and not self._done and not self._paused and not self._remote_ended:
            self._read(events)

    def _read(self, events: int) -> None:
        assert self._sock is not None
        view = self._scratch.splice_view[:_READ]
        try:
            count = self._sock.recv_into(view, _READ, _FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._broken(error)
            return
        if not count:
            self._remote_ended = True
            self._receiver.peer_ended()
            self._finish_if_over()
            return
        self._receiver.received(view[:count])
        if not self._done and not self._paused and (count == _READ or events & HANGUP):
            self._loop.again(self, READABLE | (events & HANGUP))

    def on_bug(self) -> None:
        self._fail(UpstreamError("internal error"))

    def _broken(self, error: OSError) -> None:
        self._fail(UpstreamError(f"connection: {error.strerror}"))

    def close(self) -> None:
        self._end(graceful=self._shut and self._remote_ended)

    def _fail(self, error: MeshError) -> None:
        if not self._done:
            self._end(graceful=False)
            self._receiver.lost(error)

    def _finish_if_over(self) -> None:
        if self._shut and self._remote_ended and not self._done:
            self._end(graceful=True)
            self._receiver.closed()

    def _end(self, *, graceful: bool) -> None:
        if self._done:
            return
        self._done = True
        self._out.clear()
        if self._dial is not None:
            self._dial.cancel()
        if self._sock is not None:
            self._loop.forget(self._sock.fileno())
            if graceful:
                finish(self._sock)
            else:
                reset(self._sock)
