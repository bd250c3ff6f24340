"""What a connection's first bytes say of its protocol. Pure.

HTTP/2 begins with its preface; HTTP/1 with a method, a target and a version on one line. Source: Envoy's `http_inspector`.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LONGEST_LINE: Final = 8192
"""A first line that is longer is no request's."""
_METHOD: Final = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ-")
_LONGEST_METHOD: Final = 20


class Seen(Enum):
    """What it is."""

    HTTP1 = "http1"
    HTTP2 = "http2"
    OTHER = "other"
    UNKNOWN = "unknown"
    """More bytes are needed."""


def http_version(start: bytes) -> Seen:
    """Which HTTP it is, where it is known to be HTTP."""
    if PREFACE.startswith(start[: len(PREFACE)]):
        return Seen.HTTP2 if len(start) >= len(PREFACE) else Seen.UNKNOWN
    return Seen.HTTP1


def protocol(start: bytes) -> Seen:
    """Whether it is HTTP at all."""
    if PREFACE.startswith(start[: len(PREFACE)]):
        return Seen.HTTP2 if len(start) >= len(PREFACE) else Seen.UNKNOWN
    line, end, _ = start.partition(b"\n")
    method, space, rest = line.partition(b" ")
    if not method or len(method) > _LONGEST_METHOD or not _METHOD.issuperset(method):
        return Seen.OTHER
    if not end:
        return Seen.UNKNOWN if len(start) <= LONGEST_LINE else Seen.OTHER
    _, found, version = rest.rstrip(b"\r").rpartition(b" ")
    return Seen.HTTP1 if space and found and version.startswith(b"HTTP/1.") else Seen.OTHER
