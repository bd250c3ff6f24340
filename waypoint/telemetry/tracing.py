"""Traces: which one a request belongs to, whether it is sampled, and what the next hop is told. Pure but for its dice.

A decision that comes with a request is kept. A new trace is sampled by its request id, so that all proxies that see the same id decide
alike, or by dice. W3C's headers and B3's (one or several) are read; the next hop gets W3C's, and B3's where B3 came or Zipkin collects.
Source: W3C Trace Context §3; openzipkin b3-propagation; Envoy `UuidRequestIdExtension` (the nibble of a request id).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from waypoint.http.messages import Request
from ztunnel.mesh.l7.telemetry import Collector, Tracing

_PARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_B3 = re.compile(rb"([0-9a-f]{16}|[0-9a-f]{32})-([0-9a-f]{16})(?:-([01d])(?:-[0-9a-f]{16})?)?")
_TRACE_ID = re.compile(rb"[0-9a-f]{16}|[0-9a-f]{32}")
_SPAN_ID = re.compile(rb"[0-9a-f]{16}")
_UUID = re.compile(rb"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_NIBBLE: Final = 14
"""Where a UUID says its version; Envoy writes its decision there: 4 not sampled, 9 sampled, a and b forced."""
_B3_HEADERS: Final = frozenset({b"x-b3-traceid", b"x-b3-spanid", b"x-b3-parentspanid", b"x-b3-sampled", b"x-b3-flags"})
_CONTEXT: Final = frozenset({b"traceparent", b"b3", *_B3_HEADERS})
_LONGEST_STATE: Final = 512


class Span:
    """What a proxy does of one trace."""

    __slots__ = ("parent_id", "sampled", "span_id", "trace_id", "trace_state", "tracing")

    def __init__(self, tracing: Tracing, trace_id: str, span_id: str, parent_id: str, sampled: bool, trace_state: str = "") -> None:
        """Ids are lower-case hexadecimal: 32 characters of a trace's, 16 of a span's."""
        self.tracing = tracing
        self.trace_id = trace_id
        self.span_id = span_id
        self.parent_id = parent_id
        self.sampled = sampled
        self.trace_state = trace_state

    @property
    def is_reported(self) -> bool:
        """Whether a collector hears of it."""
        return self.sampled and self.tracing.report and bool(self.tracing.cluster)


class _Context:
    """What came with a request. `sampled` None: nobody has decided yet."""

    __slots__ = ("sampled", "span_id", "trace_id")

    def __init__(self, trace_id: bytes, span_id: bytes, sampled: bool | None) -> None:
        self.trace_id = trace_id.decode().rjust(32, "0")
        self.span_id = span_id.decode()
        self.sampled = sampled


def begin(tracing: Tracing, request: Request, randrange: Callable[[int, int], int]) -> Span | None:
    """The span of a request that has just come; its headers tell the next hop. None where there is no tracing.

    Args:
        randrange: as `random.randrange`.
    """
    if tracing.collector is Collector.NONE:
        return None
    zipkin = tracing.collector is Collector.ZIPKIN
    found = _b3(request) or _w3c(request) if zipkin else _w3c(request) or _b3(request)
    sampled = None if found is None else found.sampled
    if sampled is None:
        sampled = _sample(tracing, request, randrange)
    span_id = f"{randrange(1, 1 << 64):016x}"
    if found is None:
        span = Span(tracing, f"{randrange(1, 1 << 128):032x}", span_id, "", sampled)
    else:
        state = request.get(b"tracestate") or b""
        text = state.decode("ascii", "replace") if len(state) <= _LONGEST_STATE else ""
        span = Span(tracing, found.trace_id, span_id, found.span_id, sampled, text)
    if tracing.propagate:
        _inject(span, request, zipkin)
    return span


def unsampled(request: Request) -> Request:
    """The request as a copy is sent: part of no trace that anybody is told of (mirrored requests are not sampled)."""
    if not any(name in _CONTEXT for name, _ in request.headers):
        return request
    headers = [line for line in request.headers if line[0] not in _CONTEXT]
    headers.append((b"x-b3-sampled", b"0"))
    scheme, version, upgrade = request.scheme, request.version, request.upgrade
    return Request(request.method, request.path, request.authority, headers, scheme=scheme, version=version, upgrade=upgrade)


def _w3c(request: Request) -> _Context | None:
    value = request.get(b"traceparent")
    match = None if value is None else _PARENT.fullmatch(value.strip())
    if match is None:
        return None
    version, trace_id, span_id, flags, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return _Context(trace_id, span_id, bool(int(flags, 16) & 1))


def _b3(request: Request) -> _Context | None:
    single = request.get(b"b3")
    if single is not None:
        match = _B3.fullmatch(single.strip().lower())
        if match is not None and int(match[1], 16) and int(match[2], 16):
            return _Context(match[1], match[2], None if match[3] is None else match[3] != b"0")
        return None
    trace_id, span_id = (request.get(b"x-b3-traceid") or b"").lower(), (request.get(b"x-b3-spanid") or b"").lower()
    if not _TRACE_ID.fullmatch(trace_id) or not _SPAN_ID.fullmatch(span_id) or not int(trace_id, 16) or not int(span_id, 16):
        return None
    if request.get(b"x-b3-flags") == b"1":
        return _Context(trace_id, span_id, True)
    said = request.get(b"x-b3-sampled")
    return _Context(trace_id, span_id, {b"1": True, b"true": True, b"0": False, b"false": False}.get(said or b""))


def _sample(tracing: Tracing, request: Request, randrange: Callable[[int, int], int]) -> bool:
    value = request.get(b"x-request-id")
    if not tracing.use_request_id or value is None or not _UUID.fullmatch(value):
        return randrange(0, 10_000) < tracing.percent * 100
    nibble = value[_NIBBLE : _NIBBLE + 1].lower()
    if nibble in (b"9", b"a", b"b"):
        return True
    sampled = int(value[:8], 16) % 10_000 < tracing.percent * 100
    if sampled and nibble == b"4":
        told = value[:_NIBBLE] + b"9" + value[_NIBBLE + 1 :]
        request.headers = [(name, told if name == b"x-request-id" else said) for name, said in request.headers]
    return sampled


def _inject(span: Span, request: Request, zipkin: bool) -> None:
    had = {name for name, _ in request.headers if name in _CONTEXT}
    if had:
        request.headers = [line for line in request.headers if line[0] not in _CONTEXT]
    headers = request.headers
    trace_id, span_id, parent_id = span.trace_id.encode(), span.span_id.encode(), span.parent_id.encode()
    if not zipkin or b"traceparent" in had:
        headers.append((b"traceparent", b"00-%b-%b-%b" % (trace_id, span_id, b"01" if span.sampled else b"00")))
    said = b"1" if span.sampled else b"0"
    if b"b3" in had:
        headers.append((b"b3", b"-".join([trace_id, span_id, said, *([parent_id] if parent_id else [])])))
    if had & _B3_HEADERS or (zipkin and b"b3" not in had):
        headers += [(b"x-b3-traceid", trace_id), (b"x-b3-spanid", span_id), (b"x-b3-sampled", said)]
        if parent_id:
            headers.append((b"x-b3-parentspanid", parent_id))
