"""Requests out of the bytes of an HTTP/1.1 connection. Sans-I/O.

llhttp reads, and what it tells is noted as events, which are acted upon behind the reading: nothing is called back into a parser.
Refused: what llhttp refuses, heads over the limits, a transfer coding other than chunked, more than one Host or none, HTTP/1.0 where it is
off, an upgrade to anything but websocket. Behind a refusal nothing more is read. Source: RFC 9112; Envoy's HTTP/1 codec.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Final

import httptools

from waypoint.data.heads import (
    CONNECTION,
    CONTENT_LENGTH,
    DROPPED,
    EXPECT,
    HOST,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
    BadMessage,
    Stop,
    known,
    tokens,
    trailer_lines,
    without_nominated,
)
from waypoint.http.messages import Headers, Request

_MAX_HOSTS: Final = 1024
_HOST_BYTES: Final = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~%:[]!$&'()*+,;=")
_BRACKETED: Final = re.compile(rb"\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[0-9A-Za-z._~%-]+)?\](?::[0-9]*)?")

_hosts: set[bytes] = set()
"""Authorities that were found well-formed."""


def is_authority(host: bytes) -> bool:
    """Whether it may stand in a Host header."""
    if host in _hosts:
        return True
    if not _HOST_BYTES.issuperset(host):
        return False
    if (b"[" in host or b"]" in host) and _BRACKETED.fullmatch(host) is None:
        # a name in brackets would be routed as the name, and judged as another one
        return False
    if len(_hosts) < _MAX_HOSTS:
        _hosts.add(host)
    return True


class HttpLimits:
    """What a client may ask for."""

    __slots__ = ("allow_http10", "header_bytes", "headers")

    def __init__(self, header_bytes: int = 60 << 10, headers: int = 100, allow_http10: bool = False) -> None:
        self.header_bytes = header_bytes
        self.headers = headers
        self.allow_http10 = allow_http10


class End:
    """The end of a message's body."""

    __slots__ = ("trailers",)

    def __init__(self, trailers: Headers) -> None:
        self.trailers = trailers


NO_TRAILERS: Final = End([])


class Unread:
    """Bytes that are to be read once the requests in front of them are answered."""

    __slots__ = ("data",)

    def __init__(self, data: bytes) -> None:
        self.data = data


class RequestReader:
    """One connection's requests. `events` is filled by `read` and emptied by whoever acts: a `Request`, pieces of its body, an `End`."""

    __slots__ = (
        "_bytes", "_connection", "_expects", "_fields", "_head", "_headers", "_host", "_limits", "_parser", "_silent", "_stop", "_te",
        "_upgrade", "_url", "events", "expects", "is_raw", "last",
    )  # fmt: skip

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._parser: httptools.HttpRequestParser | None = httptools.HttpRequestParser(self)
        self.events: deque[Request | bytes | End | Unread | BadMessage] = deque()
        self._stop = Stop()
        self._url = b""
        self._headers: Headers = []
        self._host: bytes | None = None
        self._connection = b""
        self._upgrade = b""
        self._te = False
        self._expects = False
        self._bytes = 0
        self._fields = 0
        self._silent = 0
        """Bytes since something was last told of them."""
        self._head = True
        """A head is being read, not a body."""
        self.expects: Request | None = None
        """The latest request whose client waits for a 100 before it sends the body."""
        self.last: Request | None = None
        """The request that the client wants to be the last on this connection."""
        self.is_raw = False
        """What comes is another protocol's."""

    @property
    def is_halfway(self) -> bool:
        """Whether a head has come in part."""
        return bool(self._url) or self._fields > 0

    def close(self) -> None:
        """Reads nothing more."""
        self._parser = None
        self.events.clear()

    def read(self, data: memoryview) -> None:
        """Takes bytes; what they say is in `events`."""
        if self.is_raw:
            self.events.append(bytes(data))
            return
        parser = self._parser
        if parser is None:
            return
        before = len(self.events)
        try:
            parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            rest = data[upgrade.args[0] :]
            if len(rest):
                self.read(rest)
        except httptools.HttpParserError as error:
            self._refuse(error)
        else:
            if len(self.events) > before:
                self._silent = 0
                return
            # A head in pieces, or a chunk's extension or a trailer that never ends.
            self._silent += len(data)
            if self._silent > 2 * self._limits.header_bytes:
                self._parser = None
                self.events.append(BadMessage(431, "http1.headers_too_large"))

    def _refuse(self, error: Exception) -> None:
        reason = self._stop.take(error)
        self._parser = None
        if reason is None and str(error) == "Data after `Connection: close`":
            return
        self.events.append(reason if isinstance(reason, BadMessage) else BadMessage(400, "http1.codec_error"))

    # What llhttp tells

    def on_url(self, url: bytes) -> None:
        self._url = self._url + url if self._url else url
        if len(self._url) > self._limits.header_bytes:
            raise self._stop.bad(431, "http1.headers_too_large")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._fields += 1
        self._bytes += len(name) + len(value)
        if self._fields > self._limits.headers or self._bytes > self._limits.header_bytes:
            raise self._stop.bad(431, "http1.headers_too_large" if self._fields <= self._limits.headers else "http1.too_many_headers")
        if value and value[-1] in b" \t":
            value = value.rstrip(b" \t")
        lower, kind = known(name)
        if not kind:
            self._headers.append((lower, value))
        elif self._head:
            self._special(kind, lower, value)

    def _special(self, kind: int, name: bytes, value: bytes) -> None:
        if kind == HOST:
            if self._host is not None:
                raise self._stop.bad(400, "http1.multiple_hosts")
            self._host = value
        elif kind == CONTENT_LENGTH:
            if not value.isdigit():
                raise self._stop.bad(400, "http1.content_length")
            self._headers.append((name, value))
        elif kind == CONNECTION:
            self._connection = self._connection + b"," + value if self._connection else value
        elif kind == TRANSFER_ENCODING:
            if value.lower() != b"chunked":
                raise self._stop.bad(501, "http1.invalid_transfer_encoding")
        elif kind == UPGRADE:
            self._upgrade = value
        elif kind == TE:
            self._te = self._te or b"trailers" in tokens(value)
        elif kind == EXPECT:
            if value.lower() == b"100-continue":
                self._expects = True
            self._headers.append((name, value))
        else:
            assert kind == DROPPED

    def on_headers_complete(self) -> None:
        parser = self._parser
        assert parser is not None
        self._head = False
        version = 11
        keeps = parser.should_keep_alive()
        if not keeps or self._connection:
            version = self._version(parser.get_http_version())
        method: bytes = parser.get_method()
        path, authority = self._target(method)
        upgrade = b""
        headers = self._headers
        if self._connection:
            nominated = tokens(self._connection)
            if b"upgrade" in nominated and self._upgrade:
                upgrade = self._asked_upgrade()
            if len(nominated) > 1 or nominated[:1] not in ([], [b"keep-alive"], [b"close"], [b"upgrade"]):
                headers = without_nominated(headers, nominated)
        if self._te:
            headers.append((b"te", b"trailers"))
        request = Request(method, path, authority, headers, version=version, upgrade=upgrade)
        if not keeps or version < 11:
            self.last = request
        if self._expects:
            self.expects = request
        self.events.append(request)
        self._headers = []

    def _version(self, said: str) -> int:
        if said == "1.1":
            return 11
        if said == "1.0" and self._limits.allow_http10:
            return 10
        if said in ("1.0", "0.9"):
            raise self._stop.bad(426, "low_version")
        raise self._stop.bad(400, "http1.codec_error")

    def _asked_upgrade(self) -> bytes:
        wanted = self._upgrade.lower()
        if wanted == b"websocket":
            return wanted
        if wanted == b"h2c" and not any(name == b"content-length" for name, _ in self._headers):
            return b""
        raise self._stop.bad(403, "upgrade_failed")

    def _target(self, method: bytes) -> tuple[bytes, bytes]:
        """(path, authority) of the request that was just read. Source: RFC 9112 §3.2."""
        url, host = self._url, self._host
        path = url
        if url[:1] != b"/":
            scheme, found, rest = url.partition(b"://")
            if method == b"CONNECT":
                raise self._stop.bad(403, "upgrade_failed")
            if found and scheme.lower() in (b"http", b"https"):
                # The absolute form's authority counts, whatever Host says.
                end = len(rest)
                for mark in (b"/", b"?", b"#"):
                    at = rest.find(mark)
                    if 0 <= at < end:
                        end = at
                host, path = rest[:end], rest[end:]
                if path[:1] != b"/":
                    path = b"/" + path
            elif not (url == b"*" and method == b"OPTIONS"):
                raise self._stop.bad(400, "http1.codec_error")
        at = path.find(b"#")
        if at >= 0:
            raise self._stop.bad(400, "http1.codec_error")
        if not host:
            if self._limits.allow_http10 and host is None:
                return path, b""
            raise self._stop.bad(400, "missing_host_header")
        if not is_authority(host):
            raise self._stop.bad(400, "http1.codec_error")
        return path, host

    def on_body(self, body: bytes) -> None:
        self.events.append(body)
        self._bytes = self._fields = 0

    def on_message_complete(self) -> None:
        if self._upgrade and self.events:
            last = self.events[-1]
            if type(last) is Request and last.upgrade:
                self.is_raw = True
                return
        self.events.append(End(trailer_lines(self._headers)) if self._headers else NO_TRAILERS)
        self._headers = []
        self._url = b""
        self._host = None
        self._connection = self._upgrade = b""
        self._te = self._expects = False
        self._bytes = self._fields = 0
        self._head = True
