"""The TLS 1.3 record layer after the handshake: what every implementation of it promises, and the values that they share.

There are two implementations. `records_own` seals and opens between the caller's buffers without a copy and can be moved to another
process; `records_openssl` lets OpenSSL do it and is the oracle that the first is tested against. Where the kernel seals and opens,
nothing is left to do between buffers: `records_kernel` shares the state and the rules, not the interface. This module knows none of
them, no sockets and no buffers' owners.

Source: RFC 8446 §4.6 (post-handshake messages), §5 (record protocol), §6 (alerts).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import ClassVar, Final, Protocol

from ztunnel.mesh.errors import Flag, LocalError, PeerError

MAX_FRAGMENT: Final = 16384
"""Bytes of plaintext in one record (2^14)."""
HEADER_SIZE: Final = 5
TAG_SIZE: Final = 16
OVERHEAD: Final = HEADER_SIZE + 1 + TAG_SIZE
"""What one record of ours adds to its plaintext: header, content type, tag. We do not pad."""
KEY_UPDATE_SIZE: Final = OVERHEAD + 5
MAX_RECORD: Final = MAX_FRAGMENT + 256 + HEADER_SIZE
"""The longest record that a peer may send, header included; a receive buffer holds at least this."""
MAX_OPENED: Final = MAX_FRAGMENT + 1
"""Room in `out` with which `Records.open` always gets on by at least one record."""


class ContentType(IntEnum):
    """What a record holds. Source: RFC 8446 §5.1."""

    CHANGE_CIPHER_SPEC = 20
    ALERT = 21
    HANDSHAKE = 22
    DATA = 23


class Alert(IntEnum):
    """TLS alert descriptions that we send or treat specially. Source: RFC 8446 §6."""

    CLOSE_NOTIFY = 0
    UNEXPECTED_MESSAGE = 10
    BAD_RECORD_MAC = 20
    RECORD_OVERFLOW = 22
    HANDSHAKE_FAILURE = 40
    BAD_CERTIFICATE = 42
    UNSUPPORTED_CERTIFICATE = 43
    CERTIFICATE_REVOKED = 44
    CERTIFICATE_EXPIRED = 45
    CERTIFICATE_UNKNOWN = 46
    ILLEGAL_PARAMETER = 47
    UNKNOWN_CA = 48
    ACCESS_DENIED = 49
    DECODE_ERROR = 50
    DECRYPT_ERROR = 51
    PROTOCOL_VERSION = 70
    INSUFFICIENT_SECURITY = 71
    INTERNAL_ERROR = 80
    USER_CANCELED = 90
    MISSING_EXTENSION = 109
    UNSUPPORTED_EXTENSION = 110
    UNRECOGNIZED_NAME = 112
    CERTIFICATE_REQUIRED = 116
    NO_APPLICATION_PROTOCOL = 120


def alert_name(number: int) -> str:
    """The RFC's name of an alert for an operator, or its number if the RFC has none that we know."""
    try:
        return Alert(number).name.lower()
    except ValueError:
        return f"alert {number}"


class RecordError(PeerError):
    """The peer's records break the rules: the connection is over.

    `alert` is the alert description that says so; `Records.alert` makes the record to send.
    """

    flag: ClassVar[Flag] = Flag.TLS_FAILURE

    def __init__(self, text: str, alert: int) -> None:
        super().__init__(text)
        self.alert = alert


class AlertReceived(RecordError):
    """The peer ended the connection with a fatal alert, whose number is `alert`. Nothing is sent back (RFC 8446 §6.2)."""

    def __init__(self, alert: int) -> None:
        super().__init__(f"the peer sent the TLS alert {alert_name(alert)}", alert)


class RecordsClosed(LocalError):
    """Somebody uses a record layer that has failed, was closed or was exported. Sealing more would repeat a nonce or lie to the peer."""


class NotExportable(LocalError):
    """This record layer's keys live inside OpenSSL: the connection cannot move to another process."""


@dataclass(frozen=True, slots=True)
class RecordState:
    """Everything that another process needs to carry on with a connection's records. It holds keys: never log it.

    `partial` is the beginning of a post-handshake message whose rest has not arrived. `answer_due`: the peer asked for a KeyUpdate that
    has not been sent. `allowance` is what is left of the budget for records that carry no data, in bytes.
    """

    server: bool
    cipher: str
    tx_secret: bytes = field(repr=False)
    rx_secret: bytes = field(repr=False)
    tx_seq: int
    rx_seq: int
    partial: bytes = field(default=b"", repr=False)
    answer_due: bool = False
    peer_closed: bool = False
    closed: bool = False
    allowance: int = 0


class Records(Protocol):
    """One connection's record layer. Whoever holds it owns both directions; nothing here blocks or does I/O.

    Buffers come as views where only parts of them are used: their owner makes the views once, not each call.
    """

    peer_closed: bool
    """close_notify was received: the peer sends nothing more. Records that follow it are dropped."""

    def seal(self, source: bytearray, start: int, end: int, out: memoryview, at: int) -> int:
        """Seal source[start:end] into as many records as needed, written to `out` from `at`.

        Args:
            source: has a spare byte after `end` (len(source) > end); bytes in and after the range may be overwritten during the call
                and are restored before it returns.
            out: has room for `sealed_size(end - start)` bytes from `at`. A KeyUpdate that is due is written before the data.
        Returns: the end of what was written to `out`; `at` if there was nothing to seal.
        Raises:
            RecordsClosed: after an error, after `close_notify` and after `export`.
            ValueError: a buffer is too small. Nothing was sealed.
        """

    def open(self, source: memoryview, start: int, end: int, out: memoryview, at: int) -> tuple[int, int]:
        """Open every whole record in source[start:end]; the plaintext of all of them is written contiguously to `out` from `at`.

        Post-handshake messages and alerts are dealt with inside. Stops early when `out` might not hold the next record: then drain it
        and call again; with MAX_OPENED bytes of room there is always progress. Bytes of `out` beyond the returned end may have changed.

        Returns: the offset in `source` of the first byte not consumed, and the end of the plaintext in `out`.
        Raises:
            RecordError: the records break the rules, or the peer sent a fatal alert. Plaintext of this call is lost.
            RecordsClosed: after an error and after `export`.
        """

    def pending(self) -> bytes:
        """Control records that are due (the answer to a KeyUpdate). They go out after everything sealed before, and before the rest."""

    def close_notify(self) -> bytes:
        """The record to send before FIN; nothing can be sealed afterwards. Empty if the layer was closed or has failed."""

    def alert(self, error: RecordError) -> bytes:
        """The record that tells the peer of a fatal error; empty if the error was the peer's own alert or we closed already."""

    def export(self) -> RecordState:
        """Everything that another process needs to carry on. This object is spent: two users of one key would repeat nonces.

        Raises:
            NotExportable: this implementation cannot.
            RecordsClosed: after an error, or exported before.
        """


def missing(partial: bytes) -> int:
    """How many bytes the record still lacks of which this is the beginning; as long as its header is not whole, what that lacks."""
    if len(partial) < HEADER_SIZE:
        return HEADER_SIZE - len(partial)
    return HEADER_SIZE + int.from_bytes(partial[3:HEADER_SIZE], "big") - len(partial)


def sealed_size(n: int) -> int:
    """Upper bound of the bytes that `Records.seal` writes for `n` bytes of plaintext."""
    return n + OVERHEAD * -(-n // MAX_FRAGMENT) + KEY_UPDATE_SIZE
