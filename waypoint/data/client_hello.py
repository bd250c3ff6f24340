"""The server name that a TLS client asks for, from its first bytes. Pure: nothing is decrypted and nothing is kept.

Source: RFC 8446 §4.1.2, §5.1; RFC 6066 §3.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

LONGEST: Final = 16384 + 5
"""A client whose first message is longer is not waited for."""
_RECORD: Final = 5
_HANDSHAKE: Final = 0x16
_CLIENT_HELLO: Final = 1
_SERVER_NAME: Final = 0


class Unread(Enum):
    """Why there is no name."""

    INCOMPLETE = "more bytes are needed"
    NO_TLS = "not a TLS client"


def server_name(data: bytes) -> str | Unread:
    """The name in lower case, empty if the client asks for none.

    A ClientHello may come in several records; all of it must be here.
    """
    message = bytearray()
    at = 0
    while True:
        header = data[at : at + _RECORD]
        if header and (header[0] != _HANDSHAKE or header[1:2] not in (b"", b"\x03")):
            return Unread.NO_TLS
        if len(header) < _RECORD:
            return Unread.INCOMPLETE
        length = int.from_bytes(header[3:5], "big")
        if not 0 < length <= LONGEST:
            return Unread.NO_TLS
        message += data[at + _RECORD : at + _RECORD + length]
        if len(message) >= 4:
            if message[0] != _CLIENT_HELLO:
                return Unread.NO_TLS
            wanted = 4 + int.from_bytes(message[1:4], "big")
            if wanted > LONGEST:
                return Unread.NO_TLS
            if len(message) >= wanted:
                try:
                    return _name(bytes(message[4:wanted]))
                except (IndexError, ValueError):
                    return Unread.NO_TLS
        at += _RECORD + length
        if at > len(data):
            return Unread.INCOMPLETE


def _name(hello: bytes) -> str:
    """Raises IndexError or ValueError for what is no ClientHello."""
    at = 2 + 32
    at += 1 + hello[at]
    at += 2 + int.from_bytes(_exactly(hello, at, 2), "big")
    at += 1 + hello[at]
    if at >= len(hello):
        return ""
    end = at + 2 + int.from_bytes(_exactly(hello, at, 2), "big")
    at += 2
    while at + 4 <= min(end, len(hello)):
        kind = int.from_bytes(hello[at : at + 2], "big")
        size = int.from_bytes(hello[at + 2 : at + 4], "big")
        body = _exactly(hello, at + 4, size)
        if kind == _SERVER_NAME:
            return _first_host(body)
        at += 4 + size
    return ""


def _first_host(body: bytes) -> str:
    at = 2
    while at + 3 <= len(body):
        size = int.from_bytes(body[at + 1 : at + 3], "big")
        if body[at] == 0:
            name = _exactly(body, at + 3, size).decode("ascii")
            if "\0" in name:
                raise ValueError("NUL in a name")
            return name.lower().rstrip(".")
        at += 3 + size
    return ""


def _exactly(data: bytes, at: int, size: int) -> bytes:
    found = data[at : at + size]
    if len(found) != size:
        raise IndexError("cut")
    return found
