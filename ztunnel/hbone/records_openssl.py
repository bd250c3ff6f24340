"""TLS 1.3 records by OpenSSL through memory BIOs: slower, not exportable, and the oracle that `records_own` is tested against.

Records are handed to OpenSSL one at a time, because only so the room in the caller's buffer bounds what comes back. What breaks the
rules is OpenSSL's decision; the alert that it wrote is kept for `alert`.
"""

from __future__ import annotations

from OpenSSL import SSL

from ztunnel.hbone.records import (
    HEADER_SIZE,
    MAX_FRAGMENT,
    MAX_RECORD,
    TAG_SIZE,
    Alert,
    AlertReceived,
    NotExportable,
    RecordError,
    RecordsClosed,
    RecordState,
    sealed_size,
)

_BIO_READ = 1 << 18


class _Alerts:
    """The last alert of each direction, as OpenSSL's info callback tells it. Apart from the records, so that no cycle keeps both alive."""

    __slots__ = ("read", "written")

    def __init__(self) -> None:
        self.read: int | None = None
        self.written: int | None = None

    def note(self, _tls: SSL.Connection, where: int, value: int) -> None:
        if where & SSL.SSL_CB_READ_ALERT == SSL.SSL_CB_READ_ALERT:
            self.read = value & 0xFF
        elif where & SSL.SSL_CB_WRITE_ALERT == SSL.SSL_CB_WRITE_ALERT:
            self.written = value & 0xFF


class OpensslRecords:
    """A finished handshake's pyOpenSSL connection behind the interface `Records`, whose methods' promises hold here too."""

    __slots__ = ("_alerts", "_closed", "_failed", "_tls", "peer_closed")

    def __init__(self, tls: SSL.Connection) -> None:
        self._tls = tls
        self._alerts = _Alerts()
        self._closed = False
        self._failed = False
        self.peer_closed = False
        tls.set_info_callback(self._alerts.note)

    def seal(self, source: bytearray, start: int, end: int, out: memoryview, at: int) -> int:
        if self._closed or self._failed:
            raise RecordsClosed("records: sealing after the end")
        if start >= end:
            return at
        if end >= len(source) or at + sealed_size(end - start) > len(out):
            raise ValueError("records: no spare byte after the plaintext, or too little room for the records")
        with memoryview(source) as plain, plain[start:end] as fragment:
            # A memory BIO takes everything: OpenSSL returns only when all of it is sealed.
            self._tls.sendall(fragment)
        records = read_bio(self._tls)
        out[at : at + len(records)] = records
        return at + len(records)

    def open(self, source: memoryview, start: int, end: int, out: memoryview, at: int) -> tuple[int, int]:
        if self._failed:
            raise RecordsClosed("records: opening after the end")
        while not self.peer_closed and end - start >= HEADER_SIZE:
            length = int.from_bytes(source[start + 3 : start + HEADER_SIZE], "big")
            after = start + HEADER_SIZE + length
            if HEADER_SIZE + length > MAX_RECORD:
                after = start + HEADER_SIZE  # for OpenSSL to refuse now, rather than to wait for a body that may never come
            elif after > end or at + min(length - TAG_SIZE, MAX_FRAGMENT) > len(out):
                break
            self._tls.bio_write(bytes(source[start:after]))
            plain = self._read()
            out[at : at + len(plain)] = plain
            at += len(plain)
            start = after
        return (end if self.peer_closed else start), at

    def _read(self) -> bytes:
        """The plaintext of the record that was just written to the BIO; empty for one that brings none."""
        self._alerts.read = None
        try:
            return self._tls.recv(MAX_FRAGMENT)
        except SSL.WantReadError:
            return b""
        except SSL.ZeroReturnError:
            self.peer_closed = True
            return b""
        except SSL.Error as error:
            self._failed = True
            if self._alerts.read is not None:
                raise AlertReceived(self._alerts.read) from error
            alert = Alert.INTERNAL_ERROR if self._alerts.written is None else self._alerts.written
            raise RecordError(f"OpenSSL refuses a record: {reason_of(error)}", alert) from error

    def pending(self) -> bytes:
        return b"" if self._closed or self._failed else read_bio(self._tls)

    def close_notify(self) -> bytes:
        if self._closed or self._failed:
            return b""
        self._closed = True
        self._tls.shutdown()
        return read_bio(self._tls)

    def alert(self, error: RecordError) -> bytes:
        if self._closed or isinstance(error, AlertReceived):
            return b""
        self._closed = True
        return read_bio(self._tls)

    def export(self) -> RecordState:
        raise NotExportable("records: OpenSSL keeps this connection's keys to itself")


def read_bio(tls: SSL.Connection) -> bytes:
    """Everything that OpenSSL wants to send."""
    parts = []
    try:
        while True:
            parts.append(tls.bio_read(_BIO_READ))
    except SSL.WantReadError:
        return b"".join(parts)


def reason_of(error: SSL.Error) -> str:
    """OpenSSL's words for what went wrong: the reasons of its error queue, without the libraries and functions."""
    queue = error.args[0] if error.args else ()
    if isinstance(queue, list | tuple):
        reasons = [str(entry[-1]) for entry in queue if isinstance(entry, tuple) and entry]
        if reasons:
            return "; ".join(reasons)
    return str(error) or type(error).__name__
