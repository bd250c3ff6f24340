"""The table of the proxy's own answers: status, body, flag and details, word for word."""

from __future__ import annotations

import pytest

from waypoint.http import replies
from waypoint.http.messages import LocalReply
from waypoint.upstream.outcome import ResetReason
from ztunnel.mesh.l7.routes import DirectResponse

RESET = "upstream connect error or disconnect/reset before headers. "
BEFORE = "upstream_reset_before_response_started"


@pytest.mark.parametrize(
    ("reply", "status", "body", "flag", "details"),
    [
        (replies.no_route(), 404, "", "NR", "route_not_found"),
        (replies.no_cluster(), 503, "", "NC", "cluster_not_found"),
        (replies.no_cluster(500), 500, "", "NC", "cluster_not_found"),
        (replies.no_backends(), 500, "", "", "direct_response"),
        (replies.backend_status(500), 500, "", "", "direct_response"),
        (replies.backend_status(503), 503, "", "NC", "cluster_not_found"),
        (replies.direct(DirectResponse(418, b"tea")), 418, "tea", "", "direct_response"),
        (replies.direct(DirectResponse(204)), 204, "", "", "direct_response"),
        (replies.no_healthy_upstream(), 503, "no healthy upstream", "UH", "no_healthy_upstream"),
        (replies.overflow(), 503, RESET + "reset reason: overflow", "UO", BEFORE + "{overflow}"),
        (replies.request_timeout(), 504, "upstream request timeout", "UT", "upstream_response_timeout"),
        (replies.per_try_timeout(), 504, "upstream request timeout", "UT", "upstream_per_try_timeout"),
        (replies.per_try_timeout(exhausted=True), 504, "upstream request timeout", "UT,URX", "upstream_per_try_timeout"),
        (replies.stream_idle(), 408, "stream timeout", "SI", "stream_idle_timeout"),
        (replies.rbac_denied("none"), 403, "RBAC: access denied", "", "rbac_access_denied_matched_policy[none]"),
        (replies.fault_abort(418), 418, "fault filter abort", "FI", "fault_filter_abort"),
        (replies.rate_limited(), 429, "local_rate_limited", "RL", "local_rate_limited"),
        (replies.headers_too_large(), 431, "Request Header Fields Too Large", "DPE", "http1.headers_too_large"),
        (replies.headers_too_large(20), 431, "Request Header Fields Too Large", "DPE", "http2.headers_too_large"),
        (replies.malformed(), 400, "Bad Request", "DPE", "http1.codec_error"),
        (replies.missing_host(), 400, "", "DPE", "missing_host_header"),
        (replies.bad_path(), 400, "", "DPE", "path_normalization_failed"),
        (replies.low_version(), 426, "Upgrade Required", "DPE", "low_version"),
        (replies.upgrade_refused(), 403, "", "", "upgrade_failed"),
        (replies.too_large(), 413, "Payload Too Large", "", "request_payload_too_large"),
    ],
    ids=lambda value: value.details if isinstance(value, LocalReply) else "",
)
def test_table(reply: LocalReply, status: int, body: str, flag: str, details: str) -> None:
    assert (reply.status, reply.body.decode(), reply.flag, reply.details) == (status, body, flag, details)
    assert (replies.TEXT in reply.headers) is bool(body)
    assert ((b"x-envoy-overloaded", b"true") in reply.headers) is (flag == "UO")


@pytest.mark.parametrize(
    ("reason", "flag", "words"),
    [
        (ResetReason.CONNECTION_FAILURE, "UF", "remote connection failure"),
        (ResetReason.LOCAL_CONNECTION_FAILURE, "UF", "local connection failure"),
        (ResetReason.CONNECTION_TIMEOUT, "UF", "connection timeout"),
        (ResetReason.CONNECTION_TERMINATION, "UC", "connection termination"),
        (ResetReason.REMOTE_RESET, "UR", "remote reset"),
        (ResetReason.REFUSED_STREAM, "UR", "remote refused stream reset"),
        (ResetReason.LOCAL_RESET, "LR", "local reset"),
        (ResetReason.PROTOCOL_ERROR, "UPE", "protocol error"),
        (ResetReason.OVERLOAD, "OM", "overload manager reset"),
    ],
)
def test_resets(reason: ResetReason, flag: str, words: str) -> None:
    once = replies.upstream_reset(reason)
    assert (once.status, once.body.decode(), once.flag) == (502 if flag == "UPE" else 503, f"{RESET}reset reason: {words}", flag)
    assert once.details == f"{BEFORE}{{{words.replace(' ', '_')}}}"
    again = replies.upstream_reset(reason, retried=True, exhausted=True, transport="TLS error: no")
    assert again.body.decode() == f"{RESET}retried and the latest reset reason: {words}, transport failure reason: TLS error: no"
    assert again.flag == f"{flag},URX"
    assert again.details == f"{BEFORE}{{{words.replace(' ', '_')}|TLS_error:_no}}"


@pytest.mark.parametrize(
    ("status", "grpc"),
    [(400, 13), (401, 16), (403, 7), (404, 12), (429, 14), (502, 14), (503, 14), (504, 14), (500, 2), (418, 2), (200, 2)],
)
def test_grpc_statuses(status: int, grpc: int) -> None:
    assert replies.grpc_status_of(status) == grpc


def test_an_answer_to_a_grpc_request_is_trailers_alone() -> None:
    denied = replies.grpc_reply(replies.rbac_denied("none"))
    assert (denied.status, denied.body, denied.details) == (200, b"", "rbac_access_denied_matched_policy[none]")
    assert denied.headers == [
        (b"content-type", b"application/grpc"), (b"grpc-status", b"7"), (b"grpc-message", b"RBAC: access denied")
    ]  # fmt: skip
    assert (b"grpc-status", b"14") in replies.grpc_reply(replies.fault_abort(500, 14)).headers
    assert (b"x-envoy-overloaded", b"true") in replies.grpc_reply(replies.overflow()).headers
    assert replies.grpc_reply(replies.no_route()).headers == [(b"content-type", b"application/grpc"), (b"grpc-status", b"12")]


@pytest.mark.parametrize(("text", "encoded"), [(b"a b~", b"a b~"), (b"100%", b"100%25"), ("ä\n".encode(), b"%C3%A4%0A"), (b"", b"")])
def test_messages_are_percent_encoded(text: bytes, encoded: bytes) -> None:
    assert replies.percent_encoded(text) == encoded
