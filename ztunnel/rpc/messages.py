"""gRPC over HTTP/2 without I/O: message frames, statuses and the headers that carry them.

Source: gRPC's PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import IntEnum
from urllib.parse import quote, unquote_to_bytes

from ztunnel.mesh.errors import MeshError

Headers = Iterable[tuple[bytes, bytes]]

CONTENT_TYPE = b"application/grpc"
PREFIX_BYTES = 5
LONGEST_STATUS_TEXT = 1024
"""Characters of a status message that are kept or sent; more is nobody's sentence."""

_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
_UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


class Status(IntEnum):
    """How a call ended."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


_OF_HTTP = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}
"""What an answer means that no gRPC server gave. Source: gRPC's http-grpc-status-mapping.md."""


class RpcError(MeshError):
    """A call that did not end with OK: what a server's method raises, and what a client's call does."""

    def __init__(self, status: Status, text: str) -> None:
        super().__init__(f"{status.name}: {text}" if text else status.name)
        self.status = status
        self.text = text


class Messages:
    """Takes a stream's bytes and gives its messages.

    Args:
        limit: bytes of one message.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that these bytes complete.

        Raises:
            RpcError: a message that is too large, or compressed although nobody offered to take that.
        """
        self._buffer += data
        found = []
        while len(self._buffer) >= PREFIX_BYTES:
            size = int.from_bytes(self._buffer[1:PREFIX_BYTES], "big")
            if self._buffer[0]:
                raise RpcError(Status.UNIMPLEMENTED, "compressed messages are not taken")
            if size > self._limit:
                raise RpcError(Status.RESOURCE_EXHAUSTED, f"a message of {size} bytes; {self._limit} are taken")
            if len(self._buffer) < PREFIX_BYTES + size:
                break
            found.append(bytes(self._buffer[PREFIX_BYTES : PREFIX_BYTES + size]))
            del self._buffer[: PREFIX_BYTES + size]
        return found

    @property
    def is_empty(self) -> bool:
        """Whether the stream may end here."""
        return not self._buffer


def framed(message: bytes) -> bytes:
    """A message as its stream carries it, uncompressed."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def request_headers(authority: str, path: str, timeout_seconds: float, metadata: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """What opens a call."""
    milliseconds = min(max(1, int(timeout_seconds * 1000)), 99_999_999)
    return [
        (b":method", b"POST"),
        (b":scheme", b"https"),
        (b":authority", authority.encode()),
        (b":path", path.encode()),
        (b"te", b"trailers"),
        (b"content-type", CONTENT_TYPE),
        (b"grpc-timeout", b"%dm" % milliseconds),
        *((name.encode(), value.encode()) for name, value in metadata.items()),
    ]


def status_headers(status: Status, text: str) -> list[tuple[bytes, bytes]]:
    """The trailers of an answer."""
    headers = [(b"grpc-status", b"%d" % status)]
    if text:
        headers.append((b"grpc-message", quote(text[:LONGEST_STATUS_TEXT], safe=" !#$&'()*+,/:;=?@[]\"<>\\^`{|}~").encode()))
    return headers


def check_answer(headers: Headers) -> None:
    """Whether the first headers of an answer are a gRPC server's.

    Raises:
        RpcError: an HTTP status other than 200 or another content type: a proxy or another server answered.
    """
    found = dict(headers)
    status = found.get(b":status", b"")
    if status != b"200":
        number = int(status) if status.isdigit() else 0
        raise RpcError(_OF_HTTP.get(number, Status.UNKNOWN), f"HTTP status {status.decode('latin-1') or 'missing'}")
    kind = found.get(b"content-type", b"")
    if not kind.startswith(CONTENT_TYPE):
        raise RpcError(Status.UNKNOWN, f"content type {kind[:100].decode('latin-1') or 'missing'}: not a gRPC server")


def check_status(headers: Headers) -> None:
    """Whether an answer's trailers say OK.

    Raises:
        RpcError: they say something else, or nothing.
    """
    found = dict(headers)
    raw = found.get(b"grpc-status")
    if raw is None:
        raise RpcError(Status.UNKNOWN, "the answer has no status")
    try:
        status = Status(int(raw)) if raw.isdigit() else Status.UNKNOWN
    except ValueError:
        status = Status.UNKNOWN
    if status is not Status.OK:
        text = unquote_to_bytes(found.get(b"grpc-message", b"")[: 3 * LONGEST_STATUS_TEXT]).decode("utf-8", "replace")
        raise RpcError(status, text[:LONGEST_STATUS_TEXT])


def timeout_of(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds that the caller waits, None if it does not say.

    Raises:
        RpcError: it says something unreadable.
    """
    raw = headers.get(b"grpc-timeout")
    if raw is None:
        return None
    match = _TIMEOUT.fullmatch(raw)
    if match is None:
        raise RpcError(Status.INVALID_ARGUMENT, "grpc-timeout cannot be read")
    return int(match[1]) * _UNITS[match[2]]
