"""A stream of a tunnel as a stream of bytes for code that speaks a protocol over it, and the two roles of any such stream.

`Transport` is what carries bytes (this, a socket, TLS over either), `Receiver` who uses it. Back-pressure is part of both: a receiver
that cannot take more says `pause`, and the peer gets no more credit; a transport whose peer does not read says `is_full`, and whoever
writes lets its own source wait until `writable`.

Bounds: what was written and not sent waits here; whoever writes on although `is_full` must have a bound of its own. What arrives while
paused waits here too, at most one flow-control window, counted in the worker's `Waiting`.
"""

from __future__ import annotations

from typing import Final, Protocol

from ztunnel.dataplane.buffers import CHUNK_FRAMED, FRAME_HEADER, SMALLEST_MAX_FRAME
from ztunnel.dataplane.loop import READABLE
from ztunnel.dataplane.relay import TooMuchWaiting
from ztunnel.dataplane.streams import Carrier, StreamEnd
from ztunnel.mesh.errors import MeshError, UpstreamError, UpstreamRefused

FULL: Final = 128 << 10
"""Bytes that wait in a transport before it says that it is full."""
_RESUME: Final = FULL // 4
_CANCEL: Final = 0x8
_SMALLEST: Final = 256
"""A frame at the end of the buffer with less room than this is not begun."""


class Receiver(Protocol):
    """Who uses a transport. Nothing is called any more once it has closed or reset it."""

    def opened(self) -> None:
        """The far side is there: a dialled connection stands, a CONNECT was answered."""

    def received(self, data: memoryview) -> None:
        """Bytes came; the view is valid during this call only."""

    def peer_ended(self) -> None:
        """The far side sends no more."""

    def writable(self) -> None:
        """It had been full, and takes more now."""

    def lost(self, error: MeshError) -> None:
        """It is gone. Called once at most, and last."""

    def closed(self) -> None:
        """Both directions have ended well, and everything that was written is out. Called once at most, and last."""


class Transport(Protocol):
    """Carries bytes both ways."""

    @property
    def is_full(self) -> bool:
        """Whether enough waits to be sent."""

    def write(self, data: bytes) -> None:
        """Sends bytes, now or when the far side takes them."""

    def end(self) -> None:
        """Ends our direction, behind what was written."""

    def pause(self) -> None:
        """Takes nothing more from the far side until `resume`."""

    def resume(self) -> None:
        """Goes on; what waited may be delivered at once or later."""

    def close(self) -> None:
        """Ends both directions: well if everything was written and both have ended, with a reset otherwise."""


class TunnelStream(StreamEnd):
    """A stream of a tunnel. Implements `Transport`."""

    __slots__ = (
        "_answered", "_done", "_ended", "_early", "_full", "_loop", "_out", "_out_bytes", "_out_ended", "_owed", "_paused", "_receiver",
        "_remote_ended", "_stream", "_told_end", "_tunnel", "_waiting", "_waiting_bytes", "to_stream",
    )  # fmt: skip

    def __init__(self, tunnel: Carrier, stream: int, receiver: Receiver, *, answered: bool, early: bool = False) -> None:
        """`answered`: server side. `early`: client side: write before the answer where the peer takes that."""
        super().__init__()
        self._tunnel = tunnel
        self._loop = tunnel.loop
        self._stream = stream
        self._receiver = receiver
        self._answered = answered
        self._early = early
        self._out: list[memoryview] = []
        self._out_bytes = 0
        self._out_ended = False
        self._ended = False
        """Our direction has ended on the wire."""
        self._full = False
        self._paused = False
        self._owed = 0
        """Bytes that the receiver has and for which the peer gets no credit yet, because it paused."""
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._remote_ended = False
        self._told_end = False
        self._done = False
        self.to_stream = 0

    def use(self, receiver: Receiver) -> None:
        """Another receiver takes over."""
        self._receiver = receiver

    # Writing

    @property
    def is_full(self) -> bool:
        return self._full

    def write(self, data: bytes) -> None:
        if self._done or self._out_ended or not data:
            return
        size = len(data)
        if not self._out and size <= SMALLEST_MAX_FRAME and self._answered:
            # Most messages are one frame that leaves at once.
            tunnel = self._tunnel
            mux = tunnel.mux
            if tunnel.is_ready and not tunnel.blocked and mux.sendable(self._stream) >= size:
                scratch = tunnel.scratch
                scratch.frame_view[FRAME_HEADER : FRAME_HEADER + size] = data
                mux.data_header(scratch.frame, 0, self._stream, size)
                self.to_stream += size
                tunnel.send_frames(FRAME_HEADER + size)
                return
        self._out.append(memoryview(data))
        self._out_bytes += size
        if len(self._out) == 1:
            self._push()
        if self._out_bytes > FULL:
            self._full = True

    def end(self) -> None:
        if self._done or self._out_ended:
            return
        self._out_ended = True
        self._push()

    def _push(self) -> None:
        tunnel = self._tunnel
        mux = tunnel.mux
        while self._out:
            room = 0
            if tunnel.is_ready and not tunnel.blocked and (self._answered or (self._early and mux.peer_takes_early_data)):
                room = mux.sendable(self._stream)
            if room <= 0:
                tunnel.park(self)
                return
            self._send(room)
            if self._done:
                return
        if self._out_ended and not self._ended:
            self._ended = True
            mux.end_stream(self._stream)
            tunnel.mark_dirty()
            self._finish_if_over()

    def _send(self, room: int) -> None:
        """Fills the worker's frame buffer with DATA frames of what waits, and sends it."""
        tunnel, out, stream = self._tunnel, self._out, self._stream
        frame, view, mux = tunnel.scratch.frame, tunnel.scratch.frame_view, tunnel.mux
        largest = mux.peer_max_frame
        at = 0
        while out and room > 0:
            size = CHUNK_FRAMED - at - FRAME_HEADER
            if size < _SMALLEST:
                break
            if size > room:
                size = room
            if size > largest:
                size = largest
            start = at + FRAME_HEADER
            filled = 0
            # What was written in several pieces leaves in one frame.
            while out and filled < size:
                piece = out[0]
                length = len(piece)
                if filled + length > size:
                    length = size - filled
                    out[0] = piece[length:]
                    piece = piece[:length]
                else:
                    del out[0]
                view[start + filled : start + filled + length] = piece
                filled += length
            mux.data_header(frame, at, stream, filled)
            at = start + filled
            room -= filled
            self._out_bytes -= filled
            self.to_stream += filled
        tunnel.send_frames(at)

    def on_event(self, events: int) -> None:
        if self._done:
            return
        if self._waiting and not self._paused:
            self._redeliver()
        if self._done:
            return
        self._push()
        if self._full and self._out_bytes <= _RESUME and not self._done:
            self._full = False
            self._receiver.writable()

    # Reading

    def deliver(self, view: memoryview) -> None:
        size = len(view)
        self.from_stream += size
        if self._done:
            self._tunnel.mux.consumed(self._stream, size)
        elif self._paused or self._waiting:
            self._waiting.append(bytes(view))
            self._waiting_bytes += size
            if not self._tunnel.scratch.waiting.add(size, self._waiting_bytes):
                self._fail(TooMuchWaiting())
        else:
            self._receiver.received(view)
            if self._paused and not self._done:
                self._owed += size
            else:
                self._tunnel.mux.consumed(self._stream, size)

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        if not self._paused or self._done:
            return
        self._paused = False
        if self._owed:
            owed, self._owed = self._owed, 0
            self._tunnel.mux.consumed(self._stream, owed)
            self._tunnel.mark_dirty()
        if self._waiting:
            # In a turn of its own: the receiver is often in the middle of something when it resumes.
            self._loop.again(self, READABLE)
        elif self._remote_ended and not self._told_end:
            self._loop.again(self, READABLE)

    def _redeliver(self) -> None:
        while self._waiting and not self._paused and not self._done:
            data = self._waiting.pop(0)
            size = len(data)
            self._waiting_bytes -= size
            self._tunnel.scratch.waiting.bytes -= size
            self._receiver.received(memoryview(data))
            if self._done or not self._paused:
                self._tunnel.mux.consumed(self._stream, size)
            else:
                self._owed += size
        if not self._done:
            self._tunnel.mark_dirty()
            self._tell_end()

    def _tell_end(self) -> None:
        if self._remote_ended and not self._told_end and not self._waiting and not self._done:
            self._told_end = True
            self._receiver.peer_ended()
            self._finish_if_over()

    def answered(self, status: int, ended: bool) -> None:
        if self._answered or self._done:
            return
        if status != 200:
            self._reset(_CANCEL)
            self._fail(UpstreamRefused(f"peer answered CONNECT with http status {status}", status))
            return
        self._answered = True
        self._receiver.opened()
        if ended:
            self.remote_ended()
        if not self._done:
            self._push()

    def remote_ended(self) -> None:
        self._remote_ended = True
        self._tell_end()

    def remote_reset(self, code: int) -> None:
        self._fail(UpstreamError(f"peer reset the stream with error {code:#x}"))

    def tunnel_lost(self, error: MeshError) -> None:
        self._fail(error)

    # Ending

    def close(self) -> None:
        if self._done:
            return
        if not (self._ended and self._remote_ended):
            self._reset(_CANCEL)
        self._finish()

    def abort(self, error: MeshError) -> None:
        if not self._done:
            self._reset(_CANCEL)
            self._fail(error)

    def on_bug(self) -> None:
        self.abort(UpstreamError("internal error"))

    def _reset(self, code: int) -> None:
        if not self._tunnel.is_dead:
            self._tunnel.mux.reset(self._stream, code)
            self._tunnel.mark_dirty()

    def _fail(self, error: MeshError) -> None:
        if self._done:
            return
        self._finish()
        self._receiver.lost(error)

    def _finish_if_over(self) -> None:
        if self._ended and self._told_end and not self._done:
            self._finish()
            self._receiver.closed()

    def _finish(self) -> None:
        self._done = True
        self._tunnel.scratch.waiting.bytes -= self._waiting_bytes
        left = self._waiting_bytes + self._owed
        self._waiting_bytes = self._owed = 0
        self._waiting.clear()
        self._out.clear()
        if left and not self._tunnel.is_dead:
            self._tunnel.mux.consumed(self._stream, left)
        self._tunnel.release(self._stream)
