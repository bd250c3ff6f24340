"""Two sockets joined: plain TCP through the node, where one side has no tunnel.

Half-closes pass through in each direction on their own, a reset of one side resets the other. Holds at most one scratch buffer of
bytes per direction; nothing is read that the other side has not taken.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from ztunnel.dataplane.buffers import SMALL, Scratch
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop
from ztunnel.dataplane.relay import AppReset, RelayOwner, TooMuchWaiting
from ztunnel.dataplane.sockets import Home, acknowledge, finish, reset
from ztunnel.mesh.errors import MeshError, UpstreamError

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


class _SpliceEnd:
    """One of the two sockets of a `Splice`."""

    __slots__ = ("hung", "pending", "read_ended", "sock", "splice", "write_shut")

    def __init__(self, splice: Splice, sock: socket.socket) -> None:
        self.splice: Splice | None = splice
        """None when it is over: the two know each other, and nobody but the garbage collector would ever free them."""
        self.sock = sock
        self.pending = b""
        self.hung = 0
        self.read_ended = False
        self.write_shut = False

    def on_event(self, events: int) -> None:
        if self.splice is not None:
            self.splice.on_end_event(self, events)

    def on_bug(self) -> None:
        if self.splice is not None:
            self.splice.abort(UpstreamError("internal error"))


class Splice:
    """Two sockets joined: plain TCP through the node. Holds at most one scratch buffer of bytes per direction.

    It ends at once, where a `StreamRelay` settles behind the round's output: what it moved is not collected, but has left.
    """

    __slots__ = ("_done", "_home", "_loop", "_owner", "_scratch", "_upper", "client", "down", "up")

    def __init__(self, loop: Loop, scratch: Scratch, client: socket.socket, owner: RelayOwner) -> None:
        self._loop = loop
        self._scratch = scratch
        self._owner = owner
        self.client = _SpliceEnd(self, client)
        self._upper: _SpliceEnd | None = None
        self._home: Home | None = None
        self._done = False
        self.up = 0
        self.down = 0

    @property
    def state(self) -> str:
        """For the listing: connecting, open or half-closed."""
        if self._upper is None:
            return "connecting"
        return "half-closed" if self.client.read_ended or self._upper.read_ended else "open"

    def attach(self, upper: socket.socket, home: Home | None = None) -> None:
        """The connected far side; bytes flow from now on. If it ends well, it goes to its `home` if it has one."""
        self._upper = _SpliceEnd(self, upper)
        self._home = home
        self._loop.take(upper.fileno(), self._upper)
        self._loop.take(self.client.sock.fileno(), self.client)

    def acknowledge(self) -> None:
        """The far side may be the first to speak: lets it, if the client has not spoken yet."""
        if self._upper is not None and not self._done and not self.up:
            acknowledge(self._upper.sock)

    def on_end_event(self, end: _SpliceEnd, events: int) -> None:
        if self._done or self._upper is None:
            return
        other = self._upper if end is self.client else self.client
        end.hung |= events & HANGUP
        if events & WRITABLE and end.pending and self._write(end):
            self._read(other, end)
        if not self._done and events & (READABLE | HANGUP):
            self._read(end, other)
        if not self._done and events & HANGUP and end.read_ended and end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._end(AppReset(f"{'client' if end is self.client else 'server'} side was reset"), graceful=False)

    def abort(self, error: MeshError) -> None:
        """Ends both sides with a reset."""
        self._end(error, graceful=False)

    def _read(self, source: _SpliceEnd, sink: _SpliceEnd) -> None:
        if source.read_ended or sink.pending or self._done:
            return
        scratch = self._scratch
        try:
            count = source.sock.recv_into(scratch.splice, 0, _FLAGS)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(AppReset(f"{'client' if source is self.client else 'server'} side: {error.strerror}"), graceful=False)
            return
        if not count:
            source.read_ended = True
            self._shut(sink)
            return
        if source is self.client:
            self.up += count
        else:
            self.down += count
        if count < SMALL:
            self._loop.small()
        self._send(sink, scratch.splice_view[:count])
        if not sink.pending and not self._done and (count == len(scratch.splice) or source.hung):
            self._loop.again(source, READABLE)

    def _send(self, sink: _SpliceEnd, data: memoryview) -> None:
        try:
            sent = sink.sock.send(data, _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._end(AppReset(f"{'client' if sink is self.client else 'server'} side: {error.strerror}"), graceful=False)
            return
        before, sink.pending = len(sink.pending), bytes(data[sent:])
        waits = len(sink.pending)
        if waits != before and not self._scratch.waiting.add(waits - before, waits):
            self._end(TooMuchWaiting(), graceful=False)

    def _write(self, sink: _SpliceEnd) -> bool:
        """Whether all that was pending has left."""
        self._send(sink, memoryview(sink.pending))
        if self._done or sink.pending:
            return False
        source = self._upper if sink is self.client else self.client
        if source is not None and source.read_ended:
            self._shut(sink)
        return not self._done

    def _shut(self, sink: _SpliceEnd) -> None:
        if sink.pending or sink.write_shut:
            return
        sink.write_shut = True
        try:
            sink.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            self._end(AppReset(f"reset while closing: {error.strerror}"), graceful=False)
            return
        assert self._upper is not None
        if self.client.write_shut and self._upper.write_shut:
            self._end(None, graceful=True)

    def _end(self, error: MeshError | None, *, graceful: bool) -> None:
        if self._done:
            return
        self._done = True
        for end in (self.client, self._upper):
            if end is not None:
                self._scratch.waiting.bytes -= len(end.pending)
                end.pending = b""
                end.splice = None
                self._loop.forget(end.sock.fileno())
                if not graceful:
                    reset(end.sock)
                elif end is self._upper and self._home is not None:
                    self._home.give_back(end.sock)
                else:
                    finish(end.sock)
        self._owner.relay_done(error)
