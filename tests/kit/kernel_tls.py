"""A socket with kernel TLS, for kernels that have none: does in its methods what Linux documents for such a socket's system calls.

It knows nothing of our record layers: it gets keys by `setsockopt`, as the kernel does, and seals and opens with them on a real TCP
socket. What it imitates, each with its place in Linux: net/tls/tls_main.c (the socket options), tls_sw.c (sendmsg, recvmsg), tls_strp.c
(which records are read), Documentation/networking/tls.rst. Two things it does not: epoll tells of records that have come in part, and
does not tell again of one that hides behind data which was read.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

_TCP_ULP, _SOL_TLS, _TLS_TX, _TLS_RX = 31, 282, 1, 2
_SET_RECORD_TYPE, _GET_RECORD_TYPE = 1, 2
_ALERTS, _HANDSHAKE, _DATA = 21, 22, 23
_KEY_UPDATE = 24
_KEYS = {51: 16, 52: 32}
_HEADER, _TAG, _FRAGMENT = 5, 16, 16384
_NOW = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

Ancillary = list[tuple[int, int, bytes]]


@dataclass
class KernelRules:
    """What this kernel can do. The numbers are those of the error that it refuses with, 0 if it does not refuse."""

    ulp: int = 0
    tx: int = 0
    rx: int = 0
    rekey_tx: int = 0
    rekey_rx: int = 0
    flaw: int = 0
    """Added to each sequence number: a kernel that seals and opens what nobody else does."""


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


class _Half:
    """One direction: what a crypto_info says."""

    def __init__(self, info: bytes, flaw: int) -> None:
        version, self.cipher = struct.unpack_from("=HH", info)
        size = _KEYS.get(self.cipher, 0)
        if version != 0x0304 or not size or len(info) != 4 + 8 + size + 4 + 8:
            raise _error(errno.EINVAL)
        iv, key, salt, sequence = info[4:12], info[12 : 12 + size], info[12 + size : 16 + size], info[16 + size :]
        self.info = info
        self.aead = AESGCM(key)
        self.iv = int.from_bytes(salt + iv, "big")
        self.sequence = int.from_bytes(sequence, "big") + flaw

    def nonce(self) -> bytes:
        nonce = (self.iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return nonce


class KernelSocket(socket.socket):
    """Takes over a connected socket's descriptor. `tick` is what the kernel does by itself when TCP has room again."""

    def __init__(self, sock: socket.socket, rules: KernelRules) -> None:
        super().__init__(fileno=sock.detach())
        self.rules = rules
        self.waiting = bytearray()
        """Records that were taken and for which TCP had no room."""
        self.is_full = False
        """TCP takes nothing, whatever the real socket would take."""
        self._ulp = False
        self._tx: _Half | None = None
        self._rx: _Half | None = None
        self._rekey_due = False
        self._part = bytearray()
        self._opened: list[tuple[int, bytes]] = []
        """Records that were opened and not given out yet."""
        self._error = 0
        self.rekeys = 0

    # Options

    def setsockopt(self, level: int, option: int, value: int | bytes, *more: int) -> None:  # type: ignore[override]  # overloads in one
        if (level, option) == (socket.IPPROTO_TCP, _TCP_ULP):
            self._use_ulp(value)
        elif level == _SOL_TLS and isinstance(value, bytes):
            self._use_keys(option, value)
        else:
            super().setsockopt(level, option, value)

    def _use_ulp(self, name: int | bytes) -> None:
        if name != b"tls" or self.rules.ulp:
            raise _error(self.rules.ulp or errno.ENOENT)
        if self._ulp:
            raise _error(errno.EEXIST)
        self._ulp = True

    def _use_keys(self, option: int, info: bytes) -> None:
        if not self._ulp:
            raise _error(errno.ENOPROTOOPT)
        rules, sending = self.rules, option == _TLS_TX
        half = self._tx if sending else self._rx
        refusal = (rules.tx if sending else rules.rx) if half is None else (rules.rekey_tx if sending else rules.rekey_rx)
        if refusal:
            raise _error(refusal)
        made = _Half(info, rules.flaw)
        if half is not None:
            if made.cipher != half.cipher:
                raise _error(errno.EINVAL)
            self.rekeys += 1
        if sending:
            self._tx = made
        else:
            self._rx = made
            self._rekey_due = False

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:  # type: ignore[override]  # three overloads in one
        if level == _SOL_TLS:
            half = self._tx if option == _TLS_TX else self._rx
            if half is None or size != len(half.info):
                raise _error(errno.EBUSY if half is None else errno.EINVAL)
            return half.info[:-8] + half.sequence.to_bytes(8, "big")
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR) and self._error:
            number, self._error = self._error, 0
            return number
        return super().getsockopt(level, option, size) if size else super().getsockopt(level, option)

    # Sending

    def tick(self) -> None:
        """Pushes what TCP has not taken."""
        while self.waiting and not self.is_full:
            try:
                del self.waiting[: super().send(self.waiting, _NOW)]
            except OSError:
                return

    def send(self, data: object, flags: int = 0, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        if self._tx is None:
            return super().send(view, flags)
        taken = 0
        while taken < len(view):
            self._make_room(taken)
            if self.waiting:
                return taken
            fragment = bytes(view[taken : taken + _FRAGMENT])
            self._seal(_DATA, fragment)
            taken += len(fragment)
        return taken

    def sendmsg(self, buffers: Iterable[object], ancillary: object = (), flags: int = 0, address: object = None, /) -> int:
        views = [memoryview(each) for each in buffers]  # type: ignore[arg-type]
        if self._tx is None:
            assert not ancillary
            return super().sendmsg(views, (), flags)
        data = b"".join(views)
        if not ancillary:
            return self.send(data, flags)
        assert isinstance(ancillary, list)
        assert flags & socket.MSG_DONTWAIT
        ((level, what, raw),) = ancillary
        assert (level, what) == (_SOL_TLS, _SET_RECORD_TYPE)
        assert len(raw) == 1
        assert len(data) <= _FRAGMENT
        self._make_room(0)
        self._seal(raw[0], data)
        return len(data)

    def _make_room(self, taken: int) -> None:
        if self._error:
            raise _error(self._error)
        self.tick()
        if self.waiting and not taken:
            raise _error(errno.EAGAIN)

    def _seal(self, kind: int, content: bytes) -> None:
        assert self._tx is not None
        header = struct.pack(">BHH", _DATA, 0x0303, len(content) + 1 + _TAG)
        self.waiting += header + self._tx.aead.encrypt(self._tx.nonce(), content + bytes((kind,)), header)
        self.tick()

    # Receiving

    def recv_into(self, buffer: object, size: int = 0, flags: int = 0, /) -> int:
        view = memoryview(buffer)[: size or None]  # type: ignore[arg-type]
        if self._rx is None:
            return super().recv_into(view, size, flags)
        data, _ = self._read(len(view), typed=False)
        view[: len(data)] = data
        return len(data)

    def recvmsg_into(self, buffers: Iterable[object], room: int = 0, flags: int = 0, /) -> tuple[int, Ancillary, int, None]:
        assert self._rx is not None
        assert room, "a caller without room asks for data only"
        (buffer,) = buffers
        view = memoryview(buffer)  # type: ignore[arg-type]
        data, kind = self._read(len(view), typed=True)
        view[: len(data)] = data
        return len(data), _told(kind), socket.MSG_EOR, None

    def recvmsg(self, size: int, room: int = 0, flags: int = 0, /) -> tuple[bytes, Ancillary, int, object]:
        if self._rx is None:
            return super().recvmsg(size, room, flags)
        data, kind = self._read(size, typed=bool(room))
        return data, _told(kind), socket.MSG_EOR, None

    def _read(self, size: int, *, typed: bool) -> tuple[bytes, int]:
        """The data of records up to `size` bytes or the first other record; or one of those, if its type can be told. Empty: FIN."""
        out = bytearray()
        while len(out) < size:
            try:
                record = self._next_record()
            except OSError:
                if out:
                    break
                raise
            if record is None:
                break
            kind, content = record
            if kind != _DATA and (out or not typed):
                self._opened.insert(0, record)
                if out:
                    break
                raise _error(errno.EIO)
            if kind != _DATA:
                return content[:size], kind
            if rest := content[size - len(out) :]:
                self._opened.insert(0, (_DATA, rest))
            out += content[: size - len(out)]
        return bytes(out), _DATA if out else 0

    def _next_record(self) -> tuple[int, bytes] | None:
        if self._opened:
            return self._opened.pop(0)
        if self._rekey_due:
            raise _error(errno.EKEYEXPIRED)
        if not self._fill(_HEADER):
            return None
        _, version, length = struct.unpack_from(">BHH", self._part)
        if version != 0x0303:
            raise self._spoilt(errno.EINVAL)
        if length > _FRAGMENT + 1 + _TAG:
            raise self._spoilt(errno.EMSGSIZE)
        if not self._fill(_HEADER + length):
            return None
        sealed = bytes(self._part)
        self._part.clear()
        return self._open(sealed)

    def _fill(self, size: int) -> bool:
        """Takes bytes of one record from TCP: its window must not close over a record that has come in part. False: FIN."""
        while len(self._part) < size:
            data = super().recv(size - len(self._part), socket.MSG_DONTWAIT)
            if not data:
                return False
            self._part += data
        return True

    def _open(self, sealed: bytes) -> tuple[int, bytes]:
        assert self._rx is not None
        try:
            inner = self._rx.aead.decrypt(self._rx.nonce(), sealed[_HEADER:], sealed[:_HEADER]).rstrip(b"\0")
        except InvalidTag:
            raise self._spoilt(errno.EBADMSG) from None
        if not inner:
            raise self._spoilt(errno.EBADMSG)
        kind, content = inner[-1], inner[:-1]
        if kind == _HANDSHAKE and content[:1] == bytes((_KEY_UPDATE,)):
            self._rekey_due = True
        return kind, content

    def _spoilt(self, number: int) -> OSError:
        self._error = errno.EBADMSG
        return _error(number)


def _told(kind: int) -> Ancillary:
    return [(_SOL_TLS, _GET_RECORD_TYPE, bytes((kind,)))] if kind else []
