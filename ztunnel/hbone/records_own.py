"""TLS 1.3 records by our own hands: AES-GCM straight between the caller's buffers, and a state that can move to another process.

Theory of operation. The two directions are independent: each has a traffic secret, the key and IV derived from it, and a sequence
number that starts at 0 with every secret. Sealing lends one byte after each fragment for the content type, so that neither plaintext
nor ciphertext is copied in Python. Opening decrypts each record to the end of what was opened before; whatever turns out not to be
application data goes to `posthandshake` and is overwritten by the next record. KeyUpdates of ours are made when something is about to
be sent and at no other time: a peer that asks for many before we speak gets one answer (RFC 8446 §4.6.3).

Invariants: a (key, sequence number) pair seals at most once, also over `export`; after any error nothing is sealed but the one alert.

Source: RFC 8446 §4.6, §5, §6, §7.1 to §7.3.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256, SHA384, HashAlgorithm
from cryptography.hazmat.primitives.hmac import HMAC

from ztunnel.hbone.posthandshake import IDLE_ALLOWANCE, KEY_UPDATE, PostHandshake
from ztunnel.hbone.records import (
    HEADER_SIZE,
    KEY_UPDATE_SIZE,
    MAX_FRAGMENT,
    TAG_SIZE,
    Alert,
    AlertReceived,
    RecordError,
    RecordsClosed,
    RecordState,
    sealed_size,
)

REKEY_RECORDS: Final = 1 << 24
"""Records under one key of ours. AES-GCM is safe for 2^24.5 (RFC 8446 §5.5); the rest is room for the call that crosses the limit."""

_CCS: Final = 20
_ALERT: Final = 21
_HANDSHAKE: Final = 22
_DATA: Final = 23
"""Plain numbers: an IntEnum's members are slower to compare, and these are compared for each record."""
_VERSION: Final = 0x0303
_OPAQUE: Final = b"\x17\x03\x03"
"""How every record begins: it says that it is data, of this version."""
_MAX_CIPHERTEXT: Final = MAX_FRAGMENT + 1 + TAG_SIZE
"""RFC 8446 §5.2 lets a record be 2^14 + 256 bytes, §5.4 the plaintext with type and padding 2^14 + 1: with a 16-byte tag the second is
the stricter, and nothing longer can be honest."""
_unpack: Final = Struct(">BHH").unpack_from
_MAX_SEQUENCE: Final = 1 << 62
_BYTES: Final = tuple(bytes((value,)) for value in range(256))

CIPHERS: Final = {"TLS_AES_128_GCM_SHA256": (SHA256(), 16, 32), "TLS_AES_256_GCM_SHA384": (SHA384(), 32, 48)}
"""Hash, key size and secret size in bytes."""


def expand_label(secret: bytes, label: bytes, length: int, algorithm: HashAlgorithm) -> bytes:
    """HKDF-Expand-Label with an empty context, for up to one hash length (all that records need). Source: RFC 8446 §7.1, RFC 5869 §2.3."""
    full = b"tls13 " + label
    code = HMAC(secret, algorithm)
    code.update(length.to_bytes(2, "big") + bytes([len(full)]) + full + b"\0\x01")
    return code.finalize()[:length]


def traffic_keys(cipher: str, secret: bytes) -> tuple[bytes, bytes]:
    """The key and the 12-byte IV of a traffic secret. Source: RFC 8446 §7.3."""
    algorithm, key_size, _ = CIPHERS[cipher]
    return expand_label(secret, b"key", key_size, algorithm), expand_label(secret, b"iv", 12, algorithm)


def next_secret(cipher: str, secret: bytes) -> bytes:
    """The traffic secret after a KeyUpdate. Source: RFC 8446 §7.2."""
    return expand_label(secret, b"traffic upd", len(secret), CIPHERS[cipher][0])


def check_state(state: RecordState) -> None:
    """Raises ValueError for a state that is none of ours: unknown cipher, wrong secret size, impossible sequence number."""
    if state.cipher not in CIPHERS:
        raise ValueError(f"unknown cipher suite {state.cipher[:50]!r}")
    secret_size = CIPHERS[state.cipher][2]
    for secret, sequence in ((state.tx_secret, state.tx_seq), (state.rx_secret, state.rx_seq)):
        if len(secret) != secret_size or not 0 <= sequence < _MAX_SEQUENCE:
            raise ValueError(f"not a state of {state.cipher}: a secret of {len(secret)} bytes, record {sequence}")


class _Direction:
    """The keys of one direction and the number of its next record."""

    __slots__ = ("_beginning", "_cipher", "_iv", "_last", "_run", "aead", "secret", "sequence")

    def __init__(self, cipher: str, secret: bytes, sequence: int) -> None:
        self._cipher = cipher
        self._use(secret, sequence)

    def _use(self, secret: bytes, sequence: int) -> None:
        key, iv = traffic_keys(self._cipher, secret)
        self.secret = secret
        self.sequence = sequence
        self.aead = AESGCM(key)
        self._iv = int.from_bytes(iv, "big")
        self._last = iv[-1]
        self._begin()

    def update(self) -> None:
        self._use(next_secret(self._cipher, self.secret), 0)

    def _begin(self) -> None:
        self._run = self.sequence >> 8
        self._beginning = (self._iv ^ self.sequence).to_bytes(12, "big")[:-1]

    def nonce(self) -> bytes:
        """Of the next record: the IV and its number, by exclusive or (RFC 8446 §5.3). 256 in a row differ in their last byte only."""
        sequence = self.sequence
        if sequence >> 8 != self._run:
            self._begin()
        return self._beginning + _BYTES[self._last ^ (sequence & 0xFF)]


def _header(size: int) -> bytes:
    """The header of a record of so many bytes behind it, which is also what the seal covers besides the content."""
    return _OPAQUE + size.to_bytes(2, "big")


class OwnRecords:
    """The record layer that the data plane uses. See `Records` for the methods' promises."""

    __slots__ = ("_cipher", "_closed", "_failed", "_limit", "_messages", "_rx", "_server", "_tx", "peer_closed")

    def __init__(self, state: RecordState, *, rekey_records: int = REKEY_RECORDS) -> None:
        """Carry on from a state: a fresh one after the handshake, or one that `export` gave in another process.

        Args:
            rekey_records: records sealed under one key before a KeyUpdate; checked once in each `seal`.
        Raises:
            ValueError: the state is none of ours (`check_state`).
        """
        check_state(state)
        self._server = state.server
        self._cipher = state.cipher
        self._tx = _Direction(state.cipher, state.tx_secret, state.tx_seq)
        self._rx = _Direction(state.cipher, state.rx_secret, state.rx_seq)
        self._messages = messages_of(state)
        self._limit = rekey_records
        self._closed = state.closed
        self._failed = False
        self.peer_closed = state.peer_closed

    # Sealing

    def seal(self, source: bytearray, start: int, end: int, out: memoryview, at: int) -> int:
        if self._closed or self._failed:
            raise RecordsClosed("records: sealing after the end")
        if start >= end:
            return at
        if end >= len(source) or at + sealed_size(end - start) > len(out):
            raise ValueError("records: no spare byte after the plaintext, or too little room for the records")
        tx = self._tx
        if self._messages.answer_due or tx.sequence >= self._limit:
            out[at : at + KEY_UPDATE_SIZE] = self._key_update()
            at += KEY_UPDATE_SIZE
        encrypt_into = tx.aead.encrypt_into
        # Most records are a buffer of their own, and need no view of a part of it.
        view = None if start == 0 and end < MAX_FRAGMENT and end + 1 == len(source) else memoryview(source)
        while start < end:
            stop = min(start + MAX_FRAGMENT, end)
            size = stop - start + 1 + TAG_SIZE
            header = _header(size)
            body = at + HEADER_SIZE
            out[at:body] = header
            at = body + size
            lent = source[stop]
            source[stop] = _DATA
            encrypt_into(tx.nonce(), source if view is None else view[start : stop + 1], header, out[body:at])
            source[stop] = lent
            tx.sequence += 1
            start = stop
        return at

    def pending(self) -> bytes:
        return self._key_update() if self._messages.answer_due and not (self._closed or self._failed) else b""

    def close_notify(self) -> bytes:
        if self._closed or self._failed:
            return b""
        self._closed = True
        return self._control(_ALERT, bytes((1, Alert.CLOSE_NOTIFY)))

    def alert(self, error: RecordError) -> bytes:
        if self._closed or isinstance(error, AlertReceived):
            return b""
        self._closed = True
        return self._control(_ALERT, bytes((2, error.alert)))

    def _control(self, kind: int, content: bytes) -> bytes:
        header = _header(len(content) + 1 + TAG_SIZE)
        sealed = self._tx.aead.encrypt(self._tx.nonce(), content + bytes((kind,)), header)
        self._tx.sequence += 1
        return header + sealed

    def _key_update(self) -> bytes:
        record = self._control(_HANDSHAKE, KEY_UPDATE)
        self._tx.update()
        self._messages.answer_due = False
        return record

    # Opening

    def open(self, source: memoryview, start: int, end: int, out: memoryview, at: int) -> tuple[int, int]:
        if self._failed:
            raise RecordsClosed("records: opening after the end")
        if self.peer_closed:
            return end, at
        try:
            return self._open(source, start, end, out, at)
        except RecordError:
            self._failed = True
            self._messages.partial.clear()
            raise

    def _open(self, source: memoryview, start: int, end: int, out: memoryview, at: int) -> tuple[int, int]:
        rx, messages = self._rx, self._messages
        partial = messages.partial
        decrypt_into = rx.aead.decrypt_into
        capacity = len(out)
        credited = at
        while end - start >= HEADER_SIZE:
            head: tuple[int, int, int] = _unpack(source, start)
            kind, version, length = head
            if kind != _DATA or version != _VERSION or not TAG_SIZE <= length <= _MAX_CIPHERTEXT:
                raise _bad_header(kind, version, length)
            body = start + HEADER_SIZE
            after = body + length
            stop = at + length - TAG_SIZE
            if after > end or stop > capacity:
                break
            try:
                decrypt_into(rx.nonce(), source[body:after], _header(length), out[at:stop])
            except InvalidTag as error:
                raise RecordError("a record that the peer's key does not open", Alert.BAD_RECORD_MAC) from error
            rx.sequence += 1
            start = after
            last = stop - 1
            if last > at and not partial:
                inner: int = out[last]
                if inner == _DATA:
                    at = last
                    continue
            messages.credit(at - credited)
            size, kind = _unpad(out[at:stop].tobytes())
            if kind == _DATA and size and not partial:
                credited = at
                at += size
                continue
            if messages.take(kind, out[at : at + size].tobytes()):
                rx.update()
                decrypt_into = rx.aead.decrypt_into
            self.peer_closed = messages.peer_closed
            credited = at
            if self.peer_closed:
                start = end
        if messages.allowance < IDLE_ALLOWANCE:
            messages.credit(at - credited)
        return start, at

    # Moving

    def export(self) -> RecordState:
        if self._failed:
            raise RecordsClosed("records: exported after the end")
        state = RecordState(
            server=self._server,
            cipher=self._cipher,
            tx_secret=self._tx.secret,
            rx_secret=self._rx.secret,
            tx_seq=self._tx.sequence,
            rx_seq=self._rx.sequence,
            partial=bytes(self._messages.partial),
            answer_due=self._messages.answer_due,
            peer_closed=self.peer_closed,
            closed=self._closed,
            allowance=self._messages.allowance,
        )
        self._failed = self._closed = True
        return state


def messages_of(state: RecordState) -> PostHandshake:
    """What the two sides were saying besides data."""
    return PostHandshake(
        server=state.server,
        partial=state.partial,
        answer_due=state.answer_due,
        peer_closed=state.peer_closed,
        allowance=state.allowance,
    )


def fresh_state(*, server: bool, cipher: str, client_secret: bytes, server_secret: bytes, tx_seq: int) -> RecordState:
    """The state right after a handshake.

    Args:
        client_secret, server_secret: the application traffic secrets 0 of the two sides.
        tx_seq: records that our side has already sent under its application key (a server's session tickets).
    """
    tx, rx = (server_secret, client_secret) if server else (client_secret, server_secret)
    return RecordState(server, cipher, tx, rx, tx_seq, 0, allowance=IDLE_ALLOWANCE)


def _unpad(inner: bytes) -> tuple[int, int]:
    """Size of the content and its type, from a TLSInnerPlaintext: content, type, zeros. Source: RFC 8446 §5.4."""
    plain = inner.rstrip(b"\0")
    if not plain:
        raise RecordError("a record without a content type", Alert.UNEXPECTED_MESSAGE)
    return len(plain) - 1, plain[-1]


def _bad_header(kind: int, version: int, length: int) -> RecordError:
    if kind != _DATA:
        what = {_CCS: "a ChangeCipherSpec", _ALERT: "an unprotected alert", _HANDSHAKE: "an unprotected handshake message"}.get(kind)
        return RecordError(f"{what or f'a record of type {kind}'} after the handshake", Alert.UNEXPECTED_MESSAGE)
    if version != _VERSION:
        return RecordError(f"a record of version {version:#06x}", Alert.DECODE_ERROR)
    if length > _MAX_CIPHERTEXT:
        return RecordError(f"a record of {length} bytes", Alert.RECORD_OVERFLOW)
    return RecordError(f"a record of {length} bytes is too short for its tag", Alert.BAD_RECORD_MAC)
