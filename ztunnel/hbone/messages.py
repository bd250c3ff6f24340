"""Which header lists are messages at all: the rules of HTTP/2 that hold for every request, response and trailer section.

What a CONNECT means is decided in `connect`; here a list is only well-formed or not, and a malformed one is a stream error.
Source: RFC 9113 §8.1 to §8.5; RFC 9110 §5.6.2 (token).
"""

from __future__ import annotations

import re
from typing import Final

from ztunnel.hbone.events import Headers
from ztunnel.hbone.headers import list_bytes

_TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+")
_USUAL: Final = frozenset({b"baggage", b"forwarded", b"traceparent"})
"""Names that need no looking at: every CONNECT has them."""
_LONGEST_ALIKE: Final = 4096
"""Bytes of a list that is kept for comparing, several times a CONNECT's: an idle tunnel must not keep 64 KiB of a hostile one."""
_STATUS: Final = re.compile(rb"[1-9][0-9][0-9]")
_OF_REQUESTS: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
_OF_EXTENDED: Final = _OF_REQUESTS | {b":protocol"}
_OF_RESPONSES: Final = frozenset({b":status"})
_OF_TRAILERS: frozenset[bytes] = frozenset()
_LF: Final = 0x0A
_CR: Final = 0x0D
_NUL: Final = 0
_SPACE: Final = 0x20
_TAB: Final = 0x09
_CONNECTION_SPECIFIC: Final = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"})


class MalformedError(ValueError):
    """The list breaks the rules; the text says which one."""


def check_request(headers: Headers, extended: bool = False) -> None:
    """Accepts a request's header list.

    A CONNECT without `:authority` passes: it gets a status, not a reset.

    Args:
        extended: a CONNECT may name a protocol, and has a scheme and a path then (RFC 8441 §4).
    Raises:
        MalformedError: see RFC 9113 §8.2, §8.3.1 and §8.5.
    """
    pseudo = _pseudo(headers, _OF_EXTENDED if extended else _OF_REQUESTS)
    method = pseudo.get(b":method")
    if not method:
        raise MalformedError("request without :method")
    if extended and b":protocol" in pseudo:
        if method != b"CONNECT" or not (pseudo.get(b":scheme") and pseudo.get(b":path") and pseudo.get(b":authority")):
            raise MalformedError(":protocol without CONNECT, :scheme, :path or :authority")
    elif method == b"CONNECT":
        if b":scheme" in pseudo or b":path" in pseudo:
            raise MalformedError("CONNECT with :scheme or :path")
    elif not pseudo.get(b":scheme") or not pseudo.get(b":path"):
        raise MalformedError("request without :scheme or :path")


def check_response(headers: Headers) -> int:
    """The status of a response's header list.

    Raises:
        MalformedError: no status of three digits, 101, or a field that RFC 9113 §8.2 forbids.
    """
    status = _pseudo(headers, _OF_RESPONSES).get(b":status", b"")
    if _STATUS.fullmatch(status) is None or status == b"101":
        raise MalformedError(f"response with status {status[:10]!r}")
    return int(status)


class MessageCheck:
    """`check_request` and `check_response` for one connection: what a message has in common with the last is not looked at again.

    Only for tunnels, whose peers say nearly the same in every request and the same in every answer. Other messages differ, and may be long.
    """

    __slots__ = ("_labels", "_last", "_messages", "_status")

    def __init__(self, messages: bool) -> None:
        """`messages`: of `MuxLimits`."""
        self._messages = messages
        self._last: Headers = ()
        self._status = 0
        """The last list that broke no rule, and its status; 0 for a request."""
        self._labels: tuple[bool, ...] = ()
        """Which of its fields may be different without breaking a rule, whatever sound value they have."""

    def request(self, headers: Headers) -> None:
        """As `check_request`, which see."""
        if not self._is_alike(headers):
            check_request(headers, self._messages)
            self._keep(headers, 0)

    def response(self, headers: Headers) -> int:
        """As `check_response`, which see."""
        if self._status and headers is self._last:
            return self._status
        status = check_response(headers)
        self._keep(headers, status)
        return status

    def _keep(self, headers: Headers, status: int) -> None:
        if not self._messages and list_bytes(headers) <= _LONGEST_ALIKE:
            self._last, self._status = headers, status
            self._labels = tuple([name in _USUAL for name, _ in headers])

    def _is_alike(self, headers: Headers) -> bool:
        """It has the names of the last list, and the very values but for fields of which only the values are judged, each for itself."""
        last = self._last
        count = len(last)
        if not count or len(headers) != count:
            return False
        for place in range(count):
            name, value = headers[place]
            known_name, known_value = last[place]
            if name != known_name or (value is not known_value and not (self._labels[place] and _is_sound(value))):
                return False
        return True


def check_trailers(headers: Headers) -> None:
    """Accepts a trailer section.

    Raises:
        MalformedError: a pseudo-header or a field that RFC 9113 §8.2 forbids.
    """
    _pseudo(headers, _OF_TRAILERS)


def _pseudo(headers: Headers, allowed: frozenset[bytes]) -> dict[bytes, bytes]:
    pseudo: dict[bytes, bytes] = {}
    regular = False
    for name, value in headers:
        if not _is_sound(value):
            raise MalformedError(f"value of {name[:40]!r}")
        if name in allowed:
            if regular or name in pseudo:
                raise MalformedError(f"{name.decode('ascii')} twice or after other fields")
            pseudo[name] = value
            continue
        regular = True
        if name in _USUAL:
            continue
        if _TOKEN.fullmatch(name) is None:
            raise MalformedError(f"name {name[:40]!r}")
        if name in _CONNECTION_SPECIFIC or (name == b"te" and value != b"trailers"):
            raise MalformedError(f"connection-specific field {name.decode('ascii')}")
    return pseudo


def _is_sound(value: bytes) -> bool:
    # As numbers: Python looks for a piece of bytes only after an exception that says that it is no number.
    if _LF in value or _CR in value or _NUL in value:
        return False
    return len(value) == 0 or not (value[0] == _SPACE or value[0] == _TAB or value[-1] == _SPACE or value[-1] == _TAB)
