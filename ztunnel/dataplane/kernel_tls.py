"""TLS records by the kernel (kTLS): a socket whose `send` takes plaintext and whose `recv` gives it.

Here are the system calls; what the records mean is decided in `hbone.records_kernel`. A connection comes here after its handshake, when
no record is half-way in either direction (`take_over`), and stays: the kernel gives nothing back.

Whether a kernel can do it is tried, not guessed from its version (`rehearse`): it has to seal and open what our own records open and
seal, with KeyUpdates in both directions, for which it takes Linux 6.14. A kernel without them would end each tunnel at the peer's first
KeyUpdate, which comes after 256 GiB at the latest.

Source: Linux `Documentation/networking/tls.rst`; `include/uapi/linux/tls.h` and `tcp.h` for the numbers.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import time

from ztunnel.hbone.posthandshake import KEY_UPDATE
from ztunnel.hbone.records import Alert, ContentType, RecordError, RecordState
from ztunnel.hbone.records_kernel import KernelRecords, first_keys
from ztunnel.hbone.records_own import CIPHERS, OwnRecords, fresh_state
from ztunnel.mesh.errors import LocalError, PeerError

log = logging.getLogger(__name__)

TCP_ULP = 31
SOL_TLS = 282
TLS_TX, TLS_RX = 1, 2
TLS_SET_RECORD_TYPE, TLS_GET_RECORD_TYPE = 1, 2

_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
CONTROL_SPACE = socket.CMSG_SPACE(1)
"""Room for the type of a record: without it the kernel gives nothing but data."""
REFUSALS = {
    errno.EBADMSG: ("a record that the peer's key does not open", Alert.BAD_RECORD_MAC),
    errno.EMSGSIZE: ("a record that is too long", Alert.RECORD_OVERFLOW),
    errno.EINVAL: ("a record of another version", Alert.DECODE_ERROR),
    # It stops reading at whatever looks like a KeyUpdate, until it gets a key.
    errno.EKEYEXPIRED: ("a KeyUpdate that is not whole", Alert.UNEXPECTED_MESSAGE),
}
"""What the kernel says of records that break the rules."""

_REHEARSAL_SECONDS = 1.0
_REHEARSED = (b"first", b"the second is sealed with the next key", bytes(20_000))


class KernelRefused(LocalError):
    """The kernel does not do TLS for us. Raised by `take_over` alone it means that nothing has changed."""


class KernelHalfway(LocalError):
    """The kernel has taken a part of a connection and refuses the rest: it cannot go on anywhere."""


class KernelSwitch:
    """Whether a worker's new tunnels are given to the kernel. Its first refusal turns that off for good, and is logged."""

    __slots__ = ("is_on",)

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on

    def turn_off(self, error: LocalError) -> None:
        """Tunnels that are in the kernel stay there."""
        if self.is_on:
            self.is_on = False
            log.warning("kernel TLS is not used any more: new tunnels have our own records", extra={"fields": {"error": error}})


ALWAYS_OFF = KernelSwitch(False)
"""For tunnels that are never given to the kernel; turning it off changes nothing."""


class KernelTls:
    """One connection. `send` and `sendmsg` are those of a socket, as far as an outlet needs them; the socket stays the caller's."""

    __slots__ = ("_records", "_sock", "ended")

    def __init__(self, sock: socket.socket, records: KernelRecords) -> None:
        """The kernel has the keys already: by `take_over`, or in the process that had this socket before."""
        self._sock = sock
        self._records = records
        self.ended = records.peer_closed
        """The peer sends nothing more: close_notify or FIN."""

    def send(self, data: memoryview, flags: int, /) -> int:
        """Seals and sends; how many bytes the kernel took. A KeyUpdate that is due goes in front. Raises OSError."""
        if self._records.update_due:
            self._update()
        count = self._sock.send(data, flags)
        self._records.sealed(count)
        return count

    def sendmsg(self, buffers: list[memoryview], ancillary: tuple[()], flags: int, /) -> int:
        """`send` for several buffers."""
        if self._records.update_due:
            self._update()
        count = self._sock.sendmsg(buffers, ancillary, flags)
        self._records.sealed(count)
        return count

    @property
    def is_settled(self) -> bool:
        """Whether all that was sent is in TCP's hands.

        The kernel takes a record whole, and when TCP has no room for it, keeps it: it would be lost behind a FIN. When there is room
        again, the next record pushes what was kept out before itself. If there is none, the loop hears of it (WRITABLE) when there is.
        """
        poll = select.poll()
        poll.register(self._sock, select.POLLOUT)
        return any(events & select.POLLOUT for _, events in poll.poll(0))

    def end(self, error: RecordError | None) -> None:
        """Says close_notify, or the alert of a fatal error. Raises OSError if the kernel does not take it."""
        content = self._records.close_notify() if error is None else self._records.alert(error)
        if content:
            # A record that it could not open stays on the socket as its error until somebody asks, and would refuse the alert.
            self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._send_control(ContentType.ALERT, content)

    def receive(self, into: memoryview) -> int:
        """Reads once; how many bytes of plaintext came. 0: a record without data was dealt with, or the peer has `ended`.

        Raises:
            OSError: from the socket, BlockingIOError included.
            RecordError: the peer's records break the rules, or it sent a fatal alert.
            KernelHalfway: the kernel does not take the peer's next key.
        """
        try:
            count = self._sock.recv_into(into, len(into), _FLAGS)
        except OSError as error:
            if error.errno != errno.EIO:
                raise self._explained(error) from error
            # Not data: the record waits for somebody who asks for its type.
            self._receive_control(into)
            return 0
        if count:
            self._records.opened(count)
        else:
            self.ended = True
        return count

    def export(self) -> RecordState:
        """What another process needs beside the socket, for `KernelTls(sock, KernelRecords(state))`. This object is spent.

        Raises:
            RecordsClosed: after an error, or exported before.
            OSError: from the socket.
        """
        size = self._records.info_size
        return self._records.export(self._sock.getsockopt(SOL_TLS, TLS_TX, size), self._sock.getsockopt(SOL_TLS, TLS_RX, size))

    def _receive_control(self, into: memoryview) -> None:
        try:
            count, ancillary, _, _ = self._sock.recvmsg_into((into,), CONTROL_SPACE, _FLAGS)
        except OSError as error:
            raise self._explained(error) from error
        kinds = [raw[0] for level, what, raw in ancillary if (level, what) == (SOL_TLS, TLS_GET_RECORD_TYPE)]
        if not kinds:
            raise OSError(errno.EIO, "the kernel does not say what kind of record it read")
        keys = self._records.control(kinds[0], bytes(into[:count]))
        self.ended = self._records.peer_closed
        if keys:
            try:
                self._sock.setsockopt(SOL_TLS, TLS_RX, keys)
            except OSError as error:
                self._records.fail()
                raise KernelHalfway(f"the kernel does not take the peer's next TLS key: {error.strerror}") from error

    def _explained(self, error: OSError) -> OSError | RecordError:
        refusal = REFUSALS.get(error.errno or 0)
        if refusal is None:
            return error
        self._records.fail()
        return RecordError(*refusal)

    def _update(self) -> None:
        # Nothing is lost if the socket is full: the update stays due, and the data waits with it.
        self._send_control(ContentType.HANDSHAKE, KEY_UPDATE)
        try:
            self._sock.setsockopt(SOL_TLS, TLS_TX, self._records.next_key())
        except OSError as error:
            self._records.fail()
            raise OSError(error.errno, f"the kernel does not take our next TLS key: {error.strerror}") from error

    def _send_control(self, kind: ContentType, content: bytes) -> None:
        # The kernel takes a record that is no data whole or not at all.
        self._sock.sendmsg((content,), [(SOL_TLS, TLS_SET_RECORD_TYPE, bytes((kind,)))], _FLAGS)


def take_over(sock: socket.socket, state: RecordState) -> KernelTls:
    """Gives a connection's records to the kernel. No ciphertext may wait in user space, in either direction.

    Raises:
        KernelRefused: nothing has happened, `state` is still good.
        KernelHalfway: the kernel seals from now on, but does not open: the connection is over.
    """
    tx, rx = first_keys(state)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, TCP_ULP, b"tls")
        sock.setsockopt(SOL_TLS, TLS_TX, tx)
    except FileNotFoundError as error:
        raise KernelRefused("this kernel has no TLS ULP (CONFIG_TLS, module tls)") from error
    except OSError as error:
        raise KernelRefused(f"the kernel does not take a connection's TLS: {error.strerror}") from error
    try:
        sock.setsockopt(SOL_TLS, TLS_RX, rx)
    except OSError as error:
        raise KernelHalfway(f"the kernel seals TLS records but does not open them: {error.strerror}") from error
    return KernelTls(sock, KernelRecords(state))


def rehearse() -> None:
    """Tries the kernel's TLS over the loopback with every cipher that we use. Blocks for some milliseconds; opens sockets.

    Raises:
        KernelRefused: it should not be used, and why.
    """
    for cipher in CIPHERS:
        try:
            near, far = _loopback_pair()
            with near, far:
                rehearse_on(near, far, cipher)
        except OSError as error:
            raise KernelRefused(f"the kernel's TLS was tried: {error.strerror or error}") from error


def rehearse_on(near: socket.socket, far: socket.socket, cipher: str) -> None:
    """Has the kernel speak on `near` with our own records on `far`, the other end of its connection, through three keys each.

    Raises:
        KernelRefused: it does not take the connection, or what it sends or reads is wrong.
        OSError: from the sockets.
    """
    size = CIPHERS[cipher][2]
    client, server = os.urandom(size), os.urandom(size)
    ours = OwnRecords(fresh_state(server=True, cipher=cipher, client_secret=client, server_secret=server, tx_seq=0), rekey_records=1)
    state = fresh_state(server=False, cipher=cipher, client_secret=client, server_secret=server, tx_seq=0)
    try:
        take_over(near, state)
        kernel = KernelTls(near, KernelRecords(state, rekey_records=1))
        for plain in _REHEARSED:
            kernel.send(memoryview(plain), _FLAGS)
            if _read_own(far, ours, len(plain)) != plain:
                raise KernelRefused("the kernel's TLS was tried: what it sealed opens to something else")
            _send_own(far, ours, plain)
            if _read_kernel(near, kernel, len(plain)) != plain:
                raise KernelRefused("the kernel's TLS was tried: what it opened is something else")
    except (KernelHalfway, PeerError) as error:
        raise KernelRefused(f"the kernel's TLS was tried: {error}") from error


def _loopback_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return near, far


def _await(sock: socket.socket, deadline: float) -> None:
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    if time.monotonic() > deadline or not poll.poll(_REHEARSAL_SECONDS * 1000):
        raise TimeoutError(errno.ETIMEDOUT, "nothing came")


def _read_own(sock: socket.socket, records: OwnRecords, size: int) -> bytes:
    sealed, plain, room = b"", bytearray(), memoryview(bytearray(1 << 16))
    deadline = time.monotonic() + _REHEARSAL_SECONDS
    while len(plain) < size:
        _await(sock, deadline)
        data = sock.recv(len(room), _FLAGS)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended")
        sealed += data
        consumed, end = records.open(memoryview(sealed), 0, len(sealed), room, 0)
        sealed = sealed[consumed:]
        plain += room[:end]
    return bytes(plain)


def _send_own(sock: socket.socket, records: OwnRecords, plain: bytes) -> None:
    out = memoryview(bytearray(1 << 16))
    end = records.seal(bytearray(plain) + b"\0", 0, len(plain), out, 0)
    sock.sendall(out[:end], socket.MSG_NOSIGNAL)


def _read_kernel(sock: socket.socket, kernel: KernelTls, size: int) -> bytes:
    plain, room = bytearray(), memoryview(bytearray(1 << 16))
    deadline = time.monotonic() + _REHEARSAL_SECONDS
    while len(plain) < size:
        _await(sock, deadline)
        try:
            plain += room[: kernel.receive(room)]
        except BlockingIOError:
            continue
        if kernel.ended:
            raise ConnectionResetError(errno.ECONNRESET, "the connection ended")
    return bytes(plain)
