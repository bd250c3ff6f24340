"""Moves bytes between an application's socket and a stream of a tunnel.

Half-closes pass through in each direction on their own; an error on one side is an error on the other (RST for a TCP side,
RST_STREAM for a stream), so that a cut transfer is never taken for a whole one (RFC 9113 §8.5).
Bounds: bytes that the application does not take wait in the relay, at most one flow-control window of them, because credit is
given only for what the kernel accepted; the other way nothing is read that cannot be sent.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Final, Protocol

from ztunnel.dataplane.buffers import SMALL
from ztunnel.dataplane.loop import HANGUP, READABLE, READS, WRITABLE
from ztunnel.dataplane.sockets import Farewell, Home, acknowledge, finish, reset
from ztunnel.dataplane.streams import Carrier, StreamEnd
from ztunnel.mesh.errors import LocalError, MeshError, UpstreamError, UpstreamRefused

_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_SHUT_WR: Final = socket.SHUT_WR
_VECTORS: Final = 64
_BLOCK: Final = 65536
"""Bytes that wait are collected in blocks of this size: kept as they came, a peer's one-byte frames would cost hundreds each."""
CONNECT_ERROR: Final = 0xA
"""HTTP/2 error code for a TCP connection that failed (RFC 9113 §8.5)."""
_CANCEL: Final = 0x8


class TooMuchWaiting(LocalError):
    """The application does not take its bytes, and too many wait in the worker."""

    def __init__(self) -> None:
        super().__init__("limit reached: waiting_bytes")


class AppReset(UpstreamError):
    """The application's side of the connection was reset."""


class RelayOwner(Protocol):
    """Who accounts for a relay."""

    def relay_answered(self) -> None:
        """The far side accepted the CONNECT (client side only)."""

    def relay_done(self, error: MeshError | None) -> None:
        """The relay is over and has closed its sockets. Called exactly once."""


class StreamRelay(StreamEnd):
    """One application socket and one stream.

    On the client side the socket is there from the start and the answer is awaited; on the server side the stream is there
    first and `attach` brings the socket once it is connected.
    """

    __slots__ = (
        "_answered",
        "_app_ended",
        "_app_shut",
        "_backlog",
        "_done",
        "_home",
        "_hung",
        "_is_settling",
        "_loop",
        "_optimistic",
        "_owner",
        "_remote_ended",
        "_sock",
        "_stream",
        "_tunnel",
        "_unread",
        "_waiting",
        "_watches_room",
        "on_refused",
        "to_stream",
    )

    def __init__(self, tunnel: Carrier, stream: int, owner: RelayOwner, *, answered: bool, optimistic: bool) -> None:
        super().__init__()
        self._tunnel = tunnel
        self._loop = tunnel.loop
        self._stream = stream
        self._owner = owner
        self._sock: socket.socket | None = None
        self._home: Home | None = None
        self._answered = answered
        self._optimistic = optimistic
        self._backlog: list[bytearray] = []
        self._waiting = 0
        """Bytes in it."""
        self._app_ended = False
        self._app_shut = False
        self._remote_ended = False
        self._done = False
        self._is_settling = False
        self._unread = False
        """The application may still be sending, to nobody."""
        self._watches_room = False
        """The loop says when the socket takes more. Most never have to wait for that."""
        self._hung = 0
        self.to_stream = 0
        self.on_refused: Callable[[MeshError], None] | None = None
        """Server side: answers the request when its application could not be reached; without it the stream is reset."""

    @property
    def state(self) -> str:
        """For the listing: connecting, open or half-closed."""
        if self._sock is None or not self._answered:
            return "connecting"
        return "half-closed" if self._app_ended or self._remote_ended else "open"

    def attach(self, sock: socket.socket, home: Home | None = None) -> None:
        """Takes over the application's socket, watched by the loop from now on. If it ends well, it goes to its `home` if it has one."""
        self._sock = sock
        self._home = home
        if self._backlog:
            self._watch_room(sock)
        else:
            self._loop.take(sock.fileno(), self, READS)
        if self._remote_ended and not self._backlog:
            # The end came while the application was still being dialled: nothing else will come that could pass it on.
            self._pass_end()

    def acknowledge(self) -> None:
        """The application may be the first to speak: lets it, if nothing has come for it yet."""
        if self._sock is not None and not self._done and not self.from_stream:
            acknowledge(self._sock)

    def _watch_room(self, sock: socket.socket) -> None:
        self._watches_room = True
        self._loop.take(sock.fileno(), self)

    # The application's side

    def look(self) -> bool:
        """Reads what the application has sent already, before the loop says so. Whether there was anything, or an end."""
        if self._done or self._app_ended:
            return True
        before = self.to_stream
        self._read()
        return self.to_stream > before or self._app_ended or self._done

    def on_event(self, events: int) -> None:
        if self._done or self._sock is None:
            return
        # A hang-up is told once: whoever is parked meanwhile must still find the end of file.
        self._hung |= events & HANGUP
        if events & WRITABLE and self._backlog:
            self._write_backlog()
        if events & (READABLE | HANGUP) and not self._done and not self._app_ended:
            self._read()
        elif events & HANGUP and not self._done:
            self._check_error()

    def on_bug(self) -> None:
        self.abort(UpstreamError("internal error"))

    def _read(self) -> None:
        tunnel = self._tunnel
        if not self._answered and not (self._optimistic and tunnel.mux.peer_takes_early_data):
            # Its SETTINGS may still say that it takes early data: parked relays are asked again then.
            tunnel.park(self)
            if self._hung:
                self._check_error()
            return
        room = 0 if tunnel.blocked or not tunnel.is_ready else tunnel.mux.sendable(self._stream)
        if room <= 0:
            tunnel.park(self)
            if self._hung:
                self._check_error()
            return
        assert self._sock is not None
        try:
            count, asked = tunnel.read_from(self._sock, self._stream, room)
        except BlockingIOError:
            return
        except OSError as error:
            self._app_failed(error)
            return
        if self._done:
            return
        if count == 0:
            self._app_ended = True
            tunnel.mux.end_stream(self._stream)
            tunnel.mark_dirty()
            self._finish_if_over()
            return
        self.to_stream += count
        if count < SMALL:
            self._loop.small()
        if count == asked or self._hung:
            # More may wait, or the end of it: with an edge-triggered loop nobody would say so again.
            self._loop.again(self, READABLE)

    def _check_error(self) -> None:
        """A reset while nothing is read: with HANGUP the kernel keeps the error for whoever asks."""
        assert self._sock is not None
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._app_failed(OSError(code, errno.errorcode.get(code, str(code))))

    def _app_failed(self, error: OSError) -> None:
        self._reset_stream(CONNECT_ERROR)
        self._end(AppReset(f"application side: {error.strerror}"))

    # The stream's side

    def deliver(self, view: memoryview) -> None:
        sock = self._sock
        if sock is None or self._backlog or self._done:
            self.deliver_run([view])
            return
        size = len(view)
        self.from_stream += size
        try:
            sent: int = sock.send(view, _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._tunnel.mux.consumed(self._stream, size)
            self._app_failed(error)
            return
        if sent:
            self._tunnel.mux.consumed(self._stream, sent)
        if sent < size:
            self._keep([view], sent)
        elif size < SMALL:
            self._loop.small()

    def deliver_run(self, views: list[memoryview]) -> None:
        total = sum(map(len, views))
        self.from_stream += total
        if self._done:
            self._tunnel.mux.consumed(self._stream, total)
            return
        if self._sock is None or self._backlog:
            self._keep(views, 0)
            return
        try:
            sent = self._sock.sendmsg(views[:_VECTORS], (), _FLAGS)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._tunnel.mux.consumed(self._stream, total)
            self._app_failed(error)
            return
        if sent:
            self._tunnel.mux.consumed(self._stream, sent)
        if sent == total:
            if total < SMALL:
                self._loop.small()
            return
        self._keep(views, sent)
        if len(views) > _VECTORS and not self._done:
            # The kernel may still have room, and then no edge would come.
            self._loop.again(self, WRITABLE)

    def _keep(self, views: list[memoryview], sent: int) -> None:
        """Copies what is behind the first `sent` bytes, until the application takes it."""
        backlog = self._backlog
        kept = sum(map(len, views)) - sent
        for view in views:
            size = len(view)
            if sent >= size:
                sent -= size
                continue
            if backlog and len(backlog[-1]) + size <= _BLOCK:
                backlog[-1] += view[sent:]
            else:
                backlog.append(bytearray(view[sent:]))
            sent = 0
        self._waiting += kept
        if not self._tunnel.scratch.waiting.add(kept, self._waiting):
            self.abort(TooMuchWaiting())
        elif self._sock is not None and not self._watches_room:
            self._watch_room(self._sock)

    def answered(self, status: int, ended: bool) -> None:
        """The response to our CONNECT: 200 opens the relay, anything else ends it."""
        if self._answered or self._done:
            return
        if status != 200:
            # Also behind an END_STREAM: our own direction is open, and not every server resets it (RFC 9113 §8.1 only allows it to).
            self._reset_stream(_CANCEL)
            self._end(UpstreamRefused(f"peer answered CONNECT with http status {status}", status))
            return
        self._answered = True
        self._owner.relay_answered()
        if ended:
            self.remote_ended()
        if not self._done and not (self._optimistic and self._tunnel.mux.peer_takes_early_data):
            self._loop.again(self, READABLE)

    def remote_ended(self) -> None:
        """END_STREAM: the far side has no more to send."""
        self._remote_ended = True
        if not self._backlog and self._sock is not None:
            self._pass_end()

    def remote_reset(self, code: int) -> None:
        """RST_STREAM. Behind END_STREAM it ends the stream well, whatever its code: what came before is whole, and only our own direction
        is cut. (Envoy resets a stream with CONNECT_ERROR when the server behind it half-closes first.)

        Before END_STREAM it is a cut, whatever its code. Istio's ztunnel takes NO_ERROR and CANCEL there for an end of file too, and
        sends CANCEL when it drops a connection in the middle: its applications take the half of an answer for the whole.
        """
        if self._done:
            return
        if not self._answered or self._sock is None or not self._remote_ended:
            self._end(UpstreamError(f"peer reset the stream with error {code:#x}"))
            return
        self._unread = not self._app_ended
        self._app_ended = True
        self._finish_if_over()

    def tunnel_lost(self, error: MeshError) -> None:
        """The tunnel died; what had arrived before is not worth a clean end that would look whole."""
        self._end(error)

    def abort(self, error: MeshError) -> None:
        """Ends both sides with a reset, or with a refusal if the application's side never came to be. What has ended well stays so."""
        if self._done:
            self.settle()
            return
        if self._sock is None and self.on_refused is not None and not self._tunnel.is_dead:
            self.on_refused(error)
        else:
            self._reset_stream(CONNECT_ERROR if self._answered else _CANCEL)
        self._end(error)

    # Writing and ending

    def _write_backlog(self) -> None:
        assert self._sock is not None
        backlog = self._backlog
        while backlog:
            try:
                sent = self._sock.sendmsg(backlog[:_VECTORS], (), _FLAGS)
            except BlockingIOError:
                return
            except OSError as error:
                self._app_failed(error)
                return
            self._tunnel.mux.consumed(self._stream, sent)
            self._waiting -= sent
            self._tunnel.scratch.waiting.bytes -= sent
            while sent:
                first = backlog[0]
                if sent < len(first):
                    del first[:sent]
                    break
                sent -= len(first)
                del backlog[0]
        self._tunnel.mark_dirty()
        if self._remote_ended:
            self._pass_end()

    def _pass_end(self) -> None:
        """The far side has ended, and everything of it was passed on."""
        if self._app_ended:
            self._finish_if_over()
        elif not self._app_shut and not self._done:
            self._shut_app()

    def _shut_app(self) -> None:
        self._app_shut = True
        assert self._sock is not None
        try:
            self._sock.shutdown(_SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            if not self._app_ended:
                self._app_failed(error)

    def _finish_if_over(self) -> None:
        if self._app_ended and self._remote_ended and not self._backlog and not self._done:
            # It ended well, and nothing waits. Whoever has bytes for others is before what is left to do.
            # The stream is over at once: a tunnel that ends behind it has lost nothing.
            self._done = self._is_settling = True
            self._loop.settle_later(self)
            self._tunnel.release(self._stream)

    def _reset_stream(self, code: int) -> None:
        if not self._tunnel.is_dead:
            self._tunnel.mux.reset(self._stream, code)
            self._tunnel.mark_dirty()

    def _end(self, error: MeshError) -> None:
        """Not well: with a reset, at once."""
        if self._done:
            return
        self._done = True
        waiting, self._waiting = self._waiting, 0
        self._tunnel.scratch.waiting.bytes -= waiting
        self._backlog.clear()
        if not self._tunnel.is_dead and waiting:
            self._tunnel.mux.consumed(self._stream, waiting)
        if self._sock is not None:
            self._loop.forget(self._sock.fileno())
            reset(self._sock)
        self._tunnel.release(self._stream)
        self._owner.relay_done(error)

    def settle(self) -> None:
        """What is left of a good end: the application's socket is closed or goes home, and the owner counts. Once, whoever asks first."""
        if not self._is_settling:
            return
        self._is_settling = False
        assert self._sock is not None
        try:
            self._let_go(self._sock)
        finally:
            self._owner.relay_done(None)

    def _let_go(self, sock: socket.socket) -> None:
        if self._unread:
            Farewell(self._loop, sock)
            return
        if not self._app_shut:
            # Also right before it is closed: an end that the application has acknowledged by then needs no care (`sockets.finish`).
            self._shut_app()
        if self._home is not None:
            self._loop.forget(sock.fileno())
            self._home.give_back(sock)
        else:
            self._loop.drop(sock.fileno())
            finish(sock)
