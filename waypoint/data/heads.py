"""HTTP/1.1 heads: what of their lines is about the connection and what about the message, and how they are written.

Names are known in the spelling that peers use, so that most lines cost one look-up. llhttp has refused what is no header line already
(folded lines, bare CR or LF, NUL, spaces in names, a second or malformed Content-Length, Content-Length beside Transfer-Encoding).
"""

from __future__ import annotations

import base64
import hashlib
from typing import Final

import httptools

from waypoint.http.arrival import FORGED
from waypoint.http.messages import Headers, Request, Response
from ztunnel.dataplane.bytestream import Transport

LARGE: Final = 16384
"""Pieces of a body from here on are not copied once more."""
MAX_NAMES: Final = 1024
"""Spellings that are remembered."""

PLAIN: Final = 0
HOST: Final = 1
CONNECTION: Final = 2
UPGRADE: Final = 3
TRANSFER_ENCODING: Final = 4
CONTENT_LENGTH: Final = 5
TE: Final = 6
DROPPED: Final = 7
EXPECT: Final = 8

_KINDS: Final[dict[bytes, int]] = {
    b"host": HOST,
    b"connection": CONNECTION,
    b"upgrade": UPGRADE,
    b"transfer-encoding": TRANSFER_ENCODING,
    b"content-length": CONTENT_LENGTH,
    b"te": TE,
    b"keep-alive": DROPPED,
    b"proxy-connection": DROPPED,
    b"http2-settings": DROPPED,
    b"expect": EXPECT,
}
FRAMING: Final = frozenset(_KINDS) | {b"trailer"}
"""Names that a trailer must not have."""
_NOT_IN_TRAILERS: Final = FRAMING | FORGED | {b"authorization", b"proxy-authorization", b"cookie", b"set-cookie", b"x-forwarded-for"}
"""Nor these: whoever merges trailers into headers would believe what nobody has judged (RFC 9110 §6.5.1)."""
_NEVER_NOMINATED: Final = frozenset((b"host", b"content-length", b"transfer-encoding", b"authorization", b"cookie", b"content-type"))
"""A `Connection` header that names one of these is an attack on whoever stands behind us, and is not followed."""

_names: dict[bytes, tuple[bytes, int]] = {}


def known(name: bytes) -> tuple[bytes, int]:
    """A header's name in lower case, and what kind of header it is."""
    found = _names.get(name)
    if found is None:
        lower = name.lower()
        found = (lower, _KINDS.get(lower, PLAIN))
        if len(_names) < MAX_NAMES:
            _names[name] = found
    return found


class BadMessage(Exception):
    """A peer's message that is refused: `status` for a request."""

    def __init__(self, status: int, details: str) -> None:
        super().__init__(details)
        self.status = status
        self.details = details


class Stop:
    """Why a function that llhttp calls has stopped it: llhttp's own error says only that one did, and its context may be that of another
    connection's error, in whose handler the message is read."""

    __slots__ = ("_reason",)

    def __init__(self) -> None:
        self._reason: Exception | None = None

    def by(self, reason: Exception) -> Exception:
        """The reason, to be raised by such a function."""
        self._reason = reason
        return reason

    def bad(self, status: int, details: str) -> Exception:
        """The same for a message that is refused."""
        return self.by(BadMessage(status, details))

    def take(self, error: Exception) -> Exception | None:
        """The reason behind llhttp's error. None: llhttp itself has found the message bad.

        Raises:
            httptools.HttpParserCallbackError: `error`, if what a function raised was meant for nobody: a bug.
        """
        reason, self._reason = self._reason, None
        if reason is None and isinstance(error, httptools.HttpParserCallbackError):
            raise error
        return reason


def tokens(value: bytes) -> list[bytes]:
    """The elements of a comma-separated list, in lower case."""
    return [token.strip().lower() for token in value.split(b",") if token.strip()]


def without_nominated(headers: Headers, nominated: list[bytes]) -> Headers:
    """The headers that `Connection` does not name as this hop's own."""
    names = {name for name in nominated if name not in _NEVER_NOMINATED}
    return [line for line in headers if line[0] not in names]


def trailer_lines(trailers: Headers) -> Headers:
    """Those that a trailer may hold (RFC 9110 §6.5.1)."""
    return [line for line in trailers if line[0] not in _NOT_IN_TRAILERS]


# ------------------------------------------------------------------------------------------------------------- writing

_REASONS: Final = {
    100: b"Continue", 101: b"Switching Protocols", 102: b"Processing", 103: b"Early Hints",
    200: b"OK", 201: b"Created", 202: b"Accepted", 203: b"Non-Authoritative Information", 204: b"No Content", 205: b"Reset Content",
    206: b"Partial Content", 300: b"Multiple Choices", 301: b"Moved Permanently", 302: b"Found", 303: b"See Other", 304: b"Not Modified",
    307: b"Temporary Redirect", 308: b"Permanent Redirect", 400: b"Bad Request", 401: b"Unauthorized", 403: b"Forbidden",
    404: b"Not Found", 405: b"Method Not Allowed", 406: b"Not Acceptable", 408: b"Request Timeout", 409: b"Conflict", 410: b"Gone",
    411: b"Length Required", 412: b"Precondition Failed", 413: b"Payload Too Large", 414: b"URI Too Long",
    415: b"Unsupported Media Type", 417: b"Expectation Failed", 418: b"I'm a teapot", 422: b"Unprocessable Entity",
    425: b"Too Early", 426: b"Upgrade Required", 429: b"Too Many Requests", 431: b"Request Header Fields Too Large",
    500: b"Internal Server Error", 501: b"Not Implemented", 502: b"Bad Gateway", 503: b"Service Unavailable", 504: b"Gateway Timeout",
    505: b"HTTP Version Not Supported",
}  # fmt: skip
_STATUS_LINES: Final = {status: b"HTTP/1.1 %d %s\r\n" % (status, reason) for status, reason in _REASONS.items()}


def has_no_body(status: int) -> bool:
    """Whether a response of this status never has one, whatever its headers say (RFC 9112 §6.3)."""
    return status < 200 or status in (204, 304)


def request_head(request: Request, ended: bool) -> tuple[bytes, bool]:
    """A request's head, and whether its body is to be chunked."""
    length = False
    lines = [request.method, b" ", request.path, b" HTTP/1.1\r\nhost: ", request.authority, b"\r\n"]
    for name, value in request.headers:
        if name == b"content-length":
            length = True
        lines.append(name + b": " + value + b"\r\n")
    chunked = False
    if request.upgrade:
        lines.append(b"connection: upgrade\r\nupgrade: " + request.upgrade + b"\r\n")
    elif not length and not ended:
        chunked = True
        lines.append(b"transfer-encoding: chunked\r\n")
    elif not length and request.method in (b"POST", b"PUT", b"PATCH"):
        lines.append(b"content-length: 0\r\n")
    lines.append(b"\r\n")
    return b"".join(lines), chunked


def response_head(response: Response, *, bodiless: bool, ended: bool, chunks: bool, close: bool) -> tuple[bytes, bool]:
    """A response's head, and whether its body is to be chunked.

    Args:
        bodiless: it has no body by its status or by the request's method, whatever its headers say.
        ended: it has none in fact.
        chunks: the client takes chunks; if not, the body's end is that of the connection.
    """
    status = response.status
    length = False
    lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    for name, value in response.headers:
        if name == b"content-length":
            length = True
        lines.append(name + b": " + value + b"\r\n")
    chunked = False
    if not length and not bodiless:
        if ended:
            lines.append(b"content-length: 0\r\n")
        elif chunks:
            chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
    lines.append(b"connection: close\r\n\r\n" if close else b"\r\n")
    return b"".join(lines), chunked


def websocket_accept(key: bytes) -> bytes:
    """The proof that a server has read a websocket's handshake (RFC 6455 §4.2.2)."""
    return base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11", usedforsecurity=False).digest())


def chunk(data: bytes) -> bytes:
    """A piece of a body in chunked coding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def write_pieces(transport: Transport, pieces: list[bytes]) -> None:
    """Writes what was collected: small pieces in one, large ones as they are, since copying them costs more than another write."""
    if len(pieces) == 1:
        transport.write(pieces[0])
        return
    small: list[bytes] = []
    for piece in pieces:
        if len(piece) < LARGE:
            small.append(piece)
            continue
        if small:
            transport.write(b"".join(small))
            small = []
        transport.write(piece)
    if small:
        transport.write(b"".join(small))


def last_chunk(trailers: Headers) -> bytes:
    """The end of a body in chunked coding."""
    if not trailers:
        return b"0\r\n\r\n"
    return b"0\r\n" + b"".join([name + b": " + value + b"\r\n" for name, value in trailer_lines(trailers)]) + b"\r\n"
