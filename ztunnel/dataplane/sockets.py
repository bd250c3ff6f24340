"""Sockets under the loop: accepting, dialling, and ending a TCP connection with the right last word (FIN or RST)."""

from __future__ import annotations

import _socket
import ctypes
import errno
import math
import os
import socket
import struct
from collections.abc import Callable
from typing import Final, cast

from ztunnel.dataplane.addresses import Address, canonical
from ztunnel.dataplane.kernel_tls import CONTROL_SPACE, REFUSALS
from ztunnel.dataplane.loop import HANGUP, READABLE, WRITABLE, Loop, Timer

ACCEPTS_PER_ROUND: Final = 64
"""A burst of new connections takes turns with the live ones."""
_BURST_SECONDS: Final = 0.0003
_PAUSE_SECONDS: Final = 0.1
"""How long accepting rests when descriptors or memory are short: the backlog holds, and nothing spins."""
_SHORTAGE: Final = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EINVAL}
"""EINVAL: somebody has shut the listener down, and it stays readable until the supervisor lets it listen again."""
_FAREWELL_SECONDS: Final = 2.0
_DISCARD: Final = 65536
_ENDINGS: Final = frozenset({errno.ECONNRESET, errno.EPIPE, errno.ETIMEDOUT, *REFUSALS})
"""How a read ends on a connection that is over."""
_LINGER_RESET: Final = struct.pack("ii", 1, 0)
_LINGER_OFF: Final = struct.pack("ii", 0, 0)
_NOBODY: Final = bytes(16)
"""A `sockaddr` of family AF_UNSPEC, which Python's own `connect` has no word for."""
_connect: Final = ctypes.PyDLL(None).connect
"""Keeps the interpreter's lock: with nobody it does not wait."""
_INET6: Final = int(socket.AF_INET6)
_SOCKET: Final = socket.SOL_SOCKET
_ERROR: Final = socket.SO_ERROR
_UNDER_WAY: Final = errno.EINPROGRESS
_TCP: Final = socket.IPPROTO_TCP
_QUICKACK: Final = socket.TCP_QUICKACK
_TCP_INFO: Final = socket.TCP_INFO
_TCP_CLOSE: Final = b"\x07"
"""The state of a connection of which both ends have everything (its first byte is all of TCP_INFO that is asked for)."""
_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


def adopt(family: int, descriptor: int) -> socket.socket:
    """A TCP socket that is there already, as an object that owns it.

    Of the C class: what `socket.socket` adds to it in Python (files, enumerations, counting who uses it) takes as long as the system
    calls to accept and to close, and no connection needs it.
    """
    return cast("socket.socket", _socket.socket(family, socket.SOCK_STREAM, 0, descriptor))


def reset(sock: socket.socket) -> None:
    """Closes with RST: the other side must not take a cut stream for a whole one."""
    reset_on_close(sock)
    sock.close()


def reset_on_close(sock: socket.socket) -> None:
    """Whoever closes it closes with RST, and the kernel keeps nothing of it."""
    _set_linger(sock, _LINGER_RESET)


def deliver_on_close(sock: socket.socket) -> None:
    """Whoever closes it closes with FIN, behind everything that was sent."""
    _set_linger(sock, _LINGER_OFF)


def acknowledge(sock: socket.socket) -> None:
    """Says the last word of the handshake of a socket that dialled, if no bytes have said it: the other side may be the first to speak.

    Otherwise the kernel does so after 40 to 200 ms, for sockets that were told to wait for bytes. On a connection that is over it does
    nothing; whoever reads hears of that.
    Source: tcp(7), TCP_DEFER_ACCEPT and TCP_QUICKACK; HAProxy's `tcp-smart-connect`.
    """
    sock.setsockopt(_TCP, _QUICKACK, 1)


def finish(sock: socket.socket) -> None:
    """Closes after both directions ended well.

    Sockets of applications have a zero linger time, so that a killed proxy resets rather than truncates: those that are accepted inherit
    it from their listeners, those that dial are made with it. It must go before a good end, or `close` would throw away what the kernel
    still has to deliver.
    """
    if not _is_delivered(sock):
        deliver_on_close(sock)
    sock.close()


def _is_delivered(sock: socket.socket) -> bool:
    """Whether the kernel has nothing left to deliver: an application of this node has mostly acknowledged the end when we have sent it.

    To ask takes two thirds of the time of setting an option from bytes, which Python tries as two other kinds first.
    """
    try:
        return sock.getsockopt(_TCP, _TCP_INFO, 1) == _TCP_CLOSE
    except OSError:
        return False


class Home:
    """Where a socket goes that has ended well and may have another life."""

    __slots__ = ()

    def give_back(self, sock: socket.socket) -> None:
        """Takes it over: both directions have ended, and the loop has forgotten it."""
        raise NotImplementedError


def renew(sock: socket.socket) -> bool:
    """Makes a socket whose connection has ended well one that can dial, with the options that it was made with. False: it cannot be.

    That spares its namespace a socket, which costs our supervisor ten times as much. Only one that the kernel is done with qualifies,
    everything acknowledged in both directions: any other would be reset, and what is on its way lost. Its TIME_WAIT, if it has one, is the
    kernel's own and stays.
    It is still bound to its former address; if it was ever bound, also to one that the kernel chose. It has IP_BIND_ADDRESS_NO_PORT, or it
    could not be bound to another.
    Source: connect(2), AF_UNSPEC; Linux `tcp_disconnect`, which keeps the address that a socket was bound to.
    """
    if not _is_delivered(sock):
        return False
    try:
        return not sock.getsockopt(_SOCKET, _ERROR) and not _connect(sock.fileno(), _NOBODY, len(_NOBODY))
    except OSError:
        return False


def unbind(sock: socket.socket) -> None:
    """Takes from a socket that is not connected the address that it was bound to, if any: it comes from where the kernel says."""
    sock.bind(("::" if sock.family == _INET6 else "0.0.0.0", 0))  # noqa: S104 - to no address: it is going to dial


def _set_linger(sock: socket.socket, value: bytes) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, value)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL):
            raise


class Farewell:
    """Ends a connection whose last bytes are still on their way: FIN now, close when the peer has closed too or after a while.

    Closing at once with unread input would make the kernel send RST and throw away what it has not delivered yet (RFC 1122 §4.2.2.13).
    """

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._closed = False
        self._timer = loop.call_later(_FAREWELL_SECONDS, self._close)
        deliver_on_close(sock)
        try:
            sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:
                raise
            self._close()
            return
        loop.take(sock.fileno(), self)

    def on_event(self, events: int) -> None:
        if self._closed:
            return
        try:
            # With room for ancillary data, because a socket whose TLS the kernel does refuses to pass on the peer's close_notify without.
            data, ancillary, _, _ = self._sock.recvmsg(_DISCARD, CONTROL_SPACE, socket.MSG_DONTWAIT)
            if data or ancillary:
                # In turns with the others: a peer that sends as fast as we read must not keep the loop to itself.
                self._loop.again(self, READABLE)
                return
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno not in _ENDINGS:
                raise
        self._close()

    def on_bug(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._loop.forget(self._sock.fileno())
            self._sock.close()


class Acceptor:
    """Accepts on one listener and hands every connection over with its canonical peer address.

    Accepted sockets are left blocking, which spares a system call: every call on them says MSG_DONTWAIT.
    """

    def __init__(
        self,
        loop: Loop,
        listener: socket.socket,
        on_accept: Callable[[socket.socket, Address], None],
        on_shortage: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._family = listener.family
        self._on_accept = on_accept
        self._on_shortage = on_shortage
        self._pause: Timer | None = None
        self._accepted_at = -math.inf
        self._closed = False
        listener.setblocking(False)
        loop.watch_listener(listener.fileno(), self)

    def on_event(self, events: int) -> None:
        if self._closed or self._pause is not None:
            return
        # A connection alone costs one accept. One that follows at once is a burst, which is taken in one go. So is one that follows in the
        # next round, however long rounds are: beside bulk transfers one in each would be few.
        loop, last = self._loop, self._accepted_at
        for _ in range(ACCEPTS_PER_ROUND if last == loop.before or loop.now - last < _BURST_SECONDS else 1):
            try:
                # What `accept` adds in Python (asking each time for the family, the type and the timeout) costs as much as the call.
                descriptor, peer = self._listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - typeshed leaves it out
            except BlockingIOError:
                return
            except OSError as error:
                self._shortage(error)
                return
            self._on_accept(adopt(self._family, descriptor), canonical(peer))
            if self._closed:
                return
            loop.flush_if_late()
        self._accepted_at = self._loop.now

    def _shortage(self, error: OSError) -> None:
        # ECONNABORTED and network errors belong to the connection that died in the queue: the loop comes back for the next one.
        if error.errno not in _SHORTAGE:
            return
        self._on_shortage()
        # Not watched meanwhile: the listener stays readable, and the loop would come back at once.
        self._loop.forget(self._listener.fileno())
        self._pause = self._loop.call_later(_PAUSE_SECONDS, self._resume)

    def _resume(self) -> None:
        self._pause = None
        self._loop.watch_listener(self._listener.fileno(), self)

    def on_bug(self) -> None:
        """A connection that could not even be set up is lost; the listener goes on."""

    def close(self) -> None:
        """Stops accepting; connections in the backlog are reset by the kernel once nobody else holds the listener."""
        if self._closed:
            return
        self._closed = True
        if self._pause is not None:
            self._pause.cancel()
        self._loop.forget(self._listener.fileno())
        self._listener.close()


class Dialling:
    """One TCP connect with a deadline. A subclass says in `dialled`, which is called exactly once unless it is cancelled, what follows."""

    def __init__(self, loop: Loop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._sock: socket.socket | None = None
        self._done = False
        self._timer: Timer | None = None

    def dialled(self, sock: socket.socket, error: OSError | None) -> None:
        """It is connected, or it is closed and this is why."""
        raise NotImplementedError

    def connect(self, sock: socket.socket, destination: Address, source_ip: str | None) -> None:
        """Connects; with `source_ip` from that address (the socket is transparent, the kernel chooses the port), else as it is bound."""
        self._sock = sock
        try:
            if source_ip is not None:
                sock.bind((source_ip, 0))
            code = sock.connect_ex(destination)
            if code == _UNDER_WAY and _is_connected(sock):
                code = 0
        except OSError as error:
            self._finish(sock, error)
            return
        if code == _UNDER_WAY:
            self._timer = self._loop.call_later(self._seconds, self._expire)
            self._loop.watch(sock.fileno(), self)
        else:
            self._finish(sock, OSError(code, os.strerror(code)) if code else None)

    def on_event(self, events: int) -> None:
        sock = self._sock
        if sock is None or self._done or not events & (WRITABLE | HANGUP):
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._finish(sock, OSError(code, os.strerror(code)) if code else None)

    def on_bug(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Gives up; `dialled` is not called any more and the socket is closed."""
        if not self._done:
            self._conclude()
            if self._sock is not None:
                self._loop.forget(self._sock.fileno())
                self._sock.close()

    def _expire(self) -> None:
        if self._sock is not None:
            self._finish(self._sock, TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _conclude(self) -> None:
        self._done = True
        if self._timer is not None:
            self._timer.cancel()

    def _finish(self, sock: socket.socket, error: OSError | None) -> None:
        if self._done:
            return
        self._conclude()
        if error is not None:
            self._loop.forget(sock.fileno())
            sock.close()
        self.dialled(sock, error)


def _is_connected(sock: socket.socket) -> bool:
    """A connect within one namespace is over before the call returns, but says "in progress" all the same: spares a round.

    Raises:
        OSError: it has failed, and nothing but this error will say so.
    """
    try:
        sock.send(b"", _FLAGS)
    except BlockingIOError:
        return False
    return True


class Dial(Dialling):
    """One TCP connect with a deadline. Calls `on_done(sock, error)` exactly once, unless it is cancelled."""

    def __init__(self, loop: Loop, sock: socket.socket, seconds: float, on_done: Callable[[socket.socket, OSError | None], None]) -> None:
        super().__init__(loop, seconds)
        self._sock = sock
        self._on_done = on_done

    def start(self, destination: Address, source_ip: str | None) -> None:
        """As `connect`."""
        assert self._sock is not None
        self.connect(self._sock, destination, source_ip)

    def dialled(self, sock: socket.socket, error: OSError | None) -> None:
        self._on_done(sock, error)
