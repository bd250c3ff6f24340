"""The path of a request in the one form that is matched, judged and sent on, so that no spelling of a path gets around a rule.

BASE: escapes of unreserved characters are decoded once, `\\` is `/`, dot segments are resolved; `%2F` and `%5C` stay as they are.
MERGE_SLASHES: also `//` is `/`. DECODE_AND_MERGE_SLASHES: `%2F` and `%5C` are slashes as well. NONE: nothing is changed.
Everything but NONE refuses NUL, what is not printable ASCII, a fragment and what is not in origin form.
Source: Istio MeshConfig.pathNormalization; Envoy `normalize_path`, `merge_slashes`, `path_with_escaped_slashes_action`; RFC 3986 §6.2.2.
"""

from __future__ import annotations

import re
from typing import Final

from ztunnel.mesh.l7.config import PathNormalization

_UNRESERVED: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~"
_PLAIN: Final = _UNRESERVED + b"/!$&'()*+,;=:@[]"
"""Bytes that stand for themselves wherever they are. Other printable ones are escaped, others refused."""
_SEGMENT: Final = re.escape(_PLAIN.replace(b"/", b""))
_FIRST: Final = re.escape(_PLAIN.replace(b"/", b"").replace(b".", b""))
_USUAL: Final = re.compile(b"(?:/(?:[" + _FIRST + b"][" + _SEGMENT + b"]*)?)+(?:\\?[^#]*)?")
"""A path that BASE leaves as it is; nearly all are. Others are looked at byte by byte."""
_HEX: Final = b"0123456789ABCDEF"
_DIGITS: Final = {value: int(chr(value), 16) for value in b"0123456789abcdefABCDEF"}
_ESCAPED: Final = [bytes((0x25, _HEX[value >> 4], _HEX[value & 15])) for value in range(256)]
_SLASH: Final = 0x2F
_BACKSLASH: Final = 0x5C
_PERCENT: Final = 0x25


def normalize(path: bytes, how: PathNormalization) -> bytes | None:
    """A request's path with its query, normalised; the query is not touched. None: the request is to be refused (400).

    `*` (OPTIONS) stays as it is.
    """
    if how is PathNormalization.BASE and _USUAL.fullmatch(path) is not None:
        return path
    if how is PathNormalization.NONE:
        return path
    whole, mark, query = path.partition(b"?")
    if not whole.translate(None, _PLAIN) and b"/." not in whole and whole.startswith(b"/"):
        if b"//" not in whole or how is PathNormalization.BASE:
            return None if b"#" in query else path
        found = whole
    elif whole == b"*":
        return path
    elif b"#" in path or not whole.startswith((b"/", b"\\")):
        return None
    else:
        unescaped = _unescape(whole, slashes=how is PathNormalization.DECODE_AND_MERGE_SLASHES)
        if unescaped is None:
            return None
        found = _without_dots(unescaped)
    if how is not PathNormalization.BASE:
        found = _merged(found)
    return found + mark + query


def _unescape(path: bytes, *, slashes: bool) -> bytes | None:
    """Unreserved characters decoded, backslashes turned, what may not stand there escaped. None with what is not printable, or `%00`."""
    result = bytearray()
    at, end = 0, len(path)
    while at < end:
        byte = path[at]
        at += 1
        if byte == _PERCENT:
            value = _escape_at(path, at)
            if value < 0:
                result.append(byte)
                continue
            if value == 0:
                return None
            if value in _UNRESERVED:
                result.append(value)
            elif slashes and value in (_SLASH, _BACKSLASH):
                result.append(_SLASH)
            else:
                result += path[at - 1 : at + 2]
            at += 2
        elif byte == _BACKSLASH:
            result.append(_SLASH)
        elif byte < 0x20 or byte > 0x7E:
            return None
        elif byte in _PLAIN:
            result.append(byte)
        else:
            result += _ESCAPED[byte]
    return bytes(result)


def _escape_at(path: bytes, at: int) -> int:
    """The byte that two digits after a `%` stand for; negative when they are none."""
    if at + 2 > len(path):
        return -1
    high, low = _DIGITS.get(path[at], -1), _DIGITS.get(path[at + 1], -1)
    return -1 if high < 0 or low < 0 else high * 16 + low


def _without_dots(path: bytes) -> bytes:
    """RFC 3986 §5.2.4, for a path that starts with a slash. Empty segments count."""
    if b"/." not in path:
        return path
    kept: list[bytes] = []
    segments = path[1:].split(b"/")
    for segment in segments:
        if segment == b"..":
            if kept:
                kept.pop()
        elif segment != b".":
            kept.append(segment)
    if segments[-1] in (b".", b".."):
        kept.append(b"")
    return b"/" + b"/".join(kept)


def _merged(path: bytes) -> bytes:
    while b"//" in path:
        path = path.replace(b"//", b"/")
    return path


class Template:
    """A path template, compiled: `{*}` is one segment that is not empty, `{**}` whatever follows, also nothing."""

    __slots__ = ("_open", "_rest", "_segments")

    def __init__(self, text: str) -> None:
        before, self._open, after = text.encode().partition(b"{**}")
        self._segments = [None if segment == b"{*}" else segment for segment in before.split(b"/")]
        self._rest = after

    def matches(self, path: bytes) -> bool:
        """Whether a path without its query is of this form."""
        if not self._open:
            parts = path.split(b"/")
            return len(parts) == len(self._segments) and self._start(parts)
        # The last segment before `{**}` is what stands before it in its own segment: nothing.
        parts = path.split(b"/", len(self._segments) - 1)
        if len(parts) < len(self._segments):
            return False
        rest = parts.pop()
        return rest.endswith(self._rest) and self._start(parts)

    def _start(self, parts: list[bytes]) -> bool:
        for index, part in enumerate(parts):
            wanted = self._segments[index]
            if part != wanted and (wanted is not None or not part):
                return False
        return True
