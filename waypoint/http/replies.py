"""The proxy's own answers: status, body, response flag and details, in Envoy's words. Clients, dashboards and alerts know these words.

Source: Envoy's response flags and response code details; bodies as Envoy writes them, `text/plain` without a line's end.
"""

from __future__ import annotations

from waypoint.http.messages import Headers, LocalReply
from waypoint.upstream.outcome import ResetReason
from ztunnel.mesh.l7.routes import DirectResponse

TEXT: tuple[bytes, bytes] = (b"content-type", b"text/plain")


_FLAGS = {
    ResetReason.CONNECTION_FAILURE: "UF",
    ResetReason.LOCAL_CONNECTION_FAILURE: "UF",
    ResetReason.CONNECTION_TIMEOUT: "UF",
    ResetReason.CONNECTION_TERMINATION: "UC",
    ResetReason.REMOTE_RESET: "UR",
    ResetReason.REFUSED_STREAM: "UR",
    ResetReason.LOCAL_RESET: "LR",
    ResetReason.OVERFLOW: "UO",
    ResetReason.PROTOCOL_ERROR: "UPE",
    ResetReason.OVERLOAD: "OM",
}


def _text(status: int, body: str, flag: str, details: str) -> LocalReply:
    return LocalReply(status, body.encode(), [TEXT] if body else [], flag, details)


def no_route() -> LocalReply:
    """404: no route matches."""
    return _text(404, "", "NR", "route_not_found")


def no_cluster(status: int = 503) -> LocalReply:
    """The route's target does not exist: 503 (VirtualService) or 500 (Gateway API)."""
    return _text(status, "", "NC", "cluster_not_found")


def no_backends() -> LocalReply:
    """500: a route of Gateway API without any backend, or with weights of 0 only."""
    return _text(500, "", "", "direct_response")


def backend_status(status: int) -> LocalReply:
    """The answer of a backend that stands for an invalid reference: `Backend.status`."""
    return no_cluster(503) if status == 503 else _text(status, "", "", "direct_response")


def direct(response: DirectResponse) -> LocalReply:
    """A route's own answer."""
    return LocalReply(response.status, response.body, [TEXT] if response.body else [], "", "direct_response")


def no_healthy_upstream() -> LocalReply:
    """503: the cluster has no endpoint that may be used."""
    return _text(503, "no healthy upstream", "UH", "no_healthy_upstream")


def upstream_reset(reason: ResetReason, *, retried: bool = False, exhausted: bool = False, transport: str = "") -> LocalReply:
    """503: connect failed, or the answer did not begin; 502: what began was no answer.

    Args:
        retried: at least one retry was made.
        exhausted: and there was none left (flag URX beside the reason's).
        transport: what TLS or the tunnel said.
    """
    before = "retried and the latest reset reason" if retried else "reset reason"
    body = f"upstream connect error or disconnect/reset before headers. {before}: {reason.value}"
    if transport:
        body += f", transport failure reason: {transport}"
    details = (
        "upstream_reset_before_response_started{" + "_".join((f"{reason.value}|{transport}" if transport else reason.value).split()) + "}"
    )
    flag = f"{_FLAGS[reason]},URX" if exhausted else _FLAGS[reason]
    reply = _text(502 if reason is ResetReason.PROTOCOL_ERROR else 503, body, flag, details)
    if reason is ResetReason.OVERFLOW:
        reply.headers.append((b"x-envoy-overloaded", b"true"))
    return reply


def dns_failure() -> LocalReply:
    """503: the host that the request names cannot be resolved."""
    return _text(503, "", "DF", "dns_resolution_failure")


def overflow() -> LocalReply:
    """503: a circuit breaker is open."""
    return upstream_reset(ResetReason.OVERFLOW)


def request_timeout() -> LocalReply:
    """504: the route's timeout."""
    return _text(504, "upstream request timeout", "UT", "upstream_response_timeout")


def per_try_timeout(*, exhausted: bool = False) -> LocalReply:
    """504: one try's timeout, and no further try."""
    return _text(504, "upstream request timeout", "UT,URX" if exhausted else "UT", "upstream_per_try_timeout")


def stream_idle() -> LocalReply:
    """408: nothing moved for too long."""
    return _text(408, "stream timeout", "SI", "stream_idle_timeout")


def rbac_denied(policy: str) -> LocalReply:
    """403. `policy`: `ns[NS]-policy[NAME]-rule[N]`, or `none` where no ALLOW matched."""
    return _text(403, "RBAC: access denied", "", f"rbac_access_denied_matched_policy[{policy}]")


def fault_abort(status: int, grpc_status: int | None = None) -> LocalReply:
    """An injected abort."""
    reply = _text(status, "fault filter abort", "FI", "fault_filter_abort")
    reply.grpc_status = grpc_status
    return reply


def rate_limited() -> LocalReply:
    """429 of a local rate limit."""
    reply = _text(429, "local_rate_limited", "RL", "local_rate_limited")
    reply.headers.append((b"x-envoy-ratelimited", b"true"))
    return reply


def headers_too_large(version: int = 11) -> LocalReply:
    """431."""
    return _text(431, "Request Header Fields Too Large", "DPE", f"http{'2' if version == 20 else '1'}.headers_too_large")


def malformed(details: str = "http1.codec_error") -> LocalReply:
    """400: not HTTP as it should be."""
    return _text(400, "Bad Request", "DPE", details)


def missing_host() -> LocalReply:
    """400: no authority."""
    return _text(400, "", "DPE", "missing_host_header")


def bad_path() -> LocalReply:
    """400: a path that cannot be normalised."""
    return _text(400, "", "DPE", "path_normalization_failed")


def low_version() -> LocalReply:
    """426: HTTP/1.0 where it is off."""
    return _text(426, "Upgrade Required", "DPE", "low_version")


def upgrade_refused() -> LocalReply:
    """403: an Upgrade other than websocket."""
    return _text(403, "", "", "upgrade_failed")


def too_large() -> LocalReply:
    """413: a body that must be held whole is larger than the buffer."""
    return _text(413, "Payload Too Large", "", "request_payload_too_large")


GRPC_STATUS: dict[int, int] = {400: 13, 401: 16, 403: 7, 404: 12, 429: 14, 502: 14, 503: 14, 504: 14}
"""HTTP status to gRPC status; any other is UNKNOWN (2). Source: gRPC, "HTTP to gRPC Status Code Mapping"."""


def grpc_status_of(status: int) -> int:
    """The gRPC status that stands for an HTTP status."""
    return GRPC_STATUS.get(status, 2)


def grpc_reply(reply: LocalReply) -> LocalReply:
    """The same answer to a gRPC request: 200 and trailers only, which in HTTP/2 is one block of headers and no body."""
    status = reply.grpc_status if reply.grpc_status is not None else grpc_status_of(reply.status)
    headers: Headers = [(b"content-type", b"application/grpc"), (b"grpc-status", str(status).encode())]
    if reply.body:
        headers.append((b"grpc-message", percent_encoded(reply.body)))
    headers += [line for line in reply.headers if line[0] not in (b"content-type", b"content-length")]
    return LocalReply(200, b"", headers, reply.flag, reply.details, status)


def percent_encoded(text: bytes) -> bytes:
    """gRPC's message encoding: printable ASCII but `%` as it is. Source: gRPC over HTTP/2, Percent-Encoding."""
    if all(0x20 <= byte <= 0x7E and byte != 0x25 for byte in text):
        return text
    return b"".join(bytes((byte,)) if 0x20 <= byte <= 0x7E and byte != 0x25 else b"%%%02X" % byte for byte in text)
