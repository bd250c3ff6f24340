"""Spans as collectors take them: the tags of one request, and OTLP's and Zipkin's encodings of many.

Source: Envoy's and Istio's span tags; opentelemetry-proto `trace.proto` and `trace_service.proto`, by their field numbers; Zipkin API v2.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Final

from waypoint.http.messages import Request
from waypoint.telemetry.access_log import AccessLogger
from waypoint.telemetry.attributes import SummaryAttributes
from waypoint.telemetry.summary import Summary
from waypoint.telemetry.tracing import Span
from ztunnel.mesh.l7.telemetry import AccessLog, Collector, CustomTag, PeerWorkload, Tracing
from ztunnel.rpc.protobuf import bytes_field, int_field

LONGEST_TAG: Final = 256
"""Characters of a tag's value, as Istio's max_path_tag_length and Envoy's."""
_PROTOCOLS: Final = {10: "HTTP/1.0", 11: "HTTP/1.1", 20: "HTTP/2"}
_EXPORT: Final = b"/opentelemetry.proto.collector.trace.v1.TraceService/Export"


class Finished:
    """One span, ready to be encoded. Times are nanoseconds since the epoch."""

    __slots__ = ("begun", "ended", "is_error", "name", "span", "tags")

    def __init__(self, span: Span, name: str, begun: int, ended: int, tags: dict[str, str], is_error: bool) -> None:
        self.span = span
        self.name = name
        self.begun = begun
        self.ended = ended
        self.tags = tags
        self.is_error = is_error


def finish(span: Span, summary: Summary, attributes: SummaryAttributes, own: Mapping[str, str]) -> Finished:
    """The span of a request that is over.

    Args:
        own: tags that say who this proxy is.
    """
    request, client = summary.request, summary.client
    host, port = summary.service.hostname, client.service_port
    is_error = summary.status >= 500 or summary.status == 0 or bool({"UR", "UC", "UF"} & set(summary.flags.split(",")))
    path = request.original_path.partition(b"?")[0].decode("ascii", "replace")
    tags = {
        "component": "proxy",
        "guid:x-request-id": _text(request.get(b"x-request-id")),
        "http.url": f"{_text(request.scheme)}://{_text(request.authority)}{path}",
        "http.method": _text(request.method),
        "http.protocol": _PROTOCOLS.get(request.version, ""),
        "http.status_code": str(summary.status),
        "downstream_cluster": "-",
        "user_agent": _text(request.get(b"user-agent")) or "-",
        "request_size": str(summary.bytes_in),
        "response_size": str(summary.bytes_out),
        "response_flags": summary.flags or "-",
        "upstream_cluster": summary.cluster or "-",
        "peer.address": client.address,
        **own,
    }
    if summary.grpc_status is not None:
        tags["grpc.status_code"] = str(summary.grpc_status)
    if is_error:
        tags["error"] = "true"
    _add_peer(tags, "source", attributes.source)
    _add_peer(tags, "destination", attributes.target)
    for policy, action, result in summary.shadow:
        kind = "allow" if action == "ALLOW" else "deny"
        tags[f"istio.authorization.dry_run.{kind}_policy.name"] = policy
        tags[f"istio.authorization.dry_run.{kind}_policy.result"] = result
    for tag in span.tracing.custom_tags:
        tags[tag.name] = _custom(tag, summary, attributes)
    begun = int(summary.started * 1e9)
    cut = {name: value[:LONGEST_TAG] for name, value in tags.items() if value}
    return Finished(span, f"{host}:{port}/*", begun, begun + int(summary.duration * 1e9), cut, is_error)


def _text(value: bytes | None) -> str:
    return "" if value is None else value.decode("utf-8", "replace")


def _add_peer(tags: dict[str, str], side: str, peer: PeerWorkload | None) -> None:
    if peer is None:
        return
    tags[f"istio.{side}_workload"] = peer.workload
    tags[f"istio.{side}_namespace"] = peer.namespace
    tags[f"istio.{side}_cluster_id"] = peer.cluster
    tags[f"istio.{side}_canonical_service"] = peer.canonical_service
    tags[f"istio.{side}_canonical_revision"] = peer.canonical_revision
    tags[f"istio.{side}_app"] = peer.app
    tags[f"istio.{side}_app_version"] = peer.version
    tags[f"istio.{side}_workload_type"] = peer.workload_type
    tags[f"istio.{side}_instance_name"] = peer.name


def _custom(tag: CustomTag, summary: Summary, attributes: SummaryAttributes) -> str:
    match tag.kind:
        case "environment":
            return os.environ.get(tag.value, tag.default)
        case "header":
            return _text(summary.request.get(tag.value.encode())) or tag.default
        case "formatter":
            line = AccessLogger(AccessLog(template=tag.value)).line(summary, attributes)
            return "" if line is None else line.decode("utf-8", "replace").rstrip("\n")
        case _:
            return tag.value


# Encodings.


def question(tracing: Tracing, service: str, spans: Sequence[Finished]) -> tuple[Request, bytes]:
    """What a collector is sent: a request and its body.

    Args:
        service: the name that the spans are of.
    """
    authority = tracing.authority.encode()
    if tracing.collector is Collector.ZIPKIN:
        body, kind = zipkin(service, spans), b"application/json"
    else:
        body, kind = otlp(service, spans), b"application/x-protobuf"
    if tracing.collector is Collector.OTLP_GRPC:
        headers = [(b"content-type", b"application/grpc"), (b"te", b"trailers")]
        return Request(b"POST", _EXPORT, authority, headers, version=20), b"\0" + len(body).to_bytes(4, "big") + body
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    return Request(b"POST", tracing.http_path.encode() or b"/", authority, headers), body


def otlp(service: str, spans: Sequence[Finished]) -> bytes:
    """ExportTraceServiceRequest."""
    resource = bytes_field(1, _pair("service.name", service))
    scope = bytes_field(1, bytes_field(1, "waypoint"))
    listed = b"".join([bytes_field(2, _otlp_span(span)) for span in spans])
    return bytes_field(1, bytes_field(1, resource) + bytes_field(2, scope + listed))


def _otlp_span(finished: Finished) -> bytes:
    span = finished.span
    return b"".join(
        [
            bytes_field(1, bytes.fromhex(span.trace_id)),
            bytes_field(2, bytes.fromhex(span.span_id)),
            bytes_field(3, span.trace_state) if span.trace_state else b"",
            bytes_field(4, bytes.fromhex(span.parent_id)) if span.parent_id else b"",
            bytes_field(5, finished.name),
            int_field(6, _SERVER),
            _fixed64(7, finished.begun),
            _fixed64(8, finished.ended),
            *(bytes_field(9, _pair(name, value)) for name, value in finished.tags.items()),
            bytes_field(15, int_field(3, _ERROR)) if finished.is_error else b"",
        ]
    )


_SERVER: Final = 2
_ERROR: Final = 2


def _pair(name: str, value: str) -> bytes:
    """KeyValue with a text."""
    return bytes_field(1, name.encode("utf-8", "replace")) + bytes_field(2, bytes_field(1, value.encode("utf-8", "replace")))


def _fixed64(number: int, value: int) -> bytes:
    return bytes((number << 3 | 1,)) + value.to_bytes(8, "little")


def zipkin(service: str, spans: Sequence[Finished]) -> bytes:
    """A list of spans of Zipkin's API v2."""
    listed = [
        {
            "traceId": each.span.trace_id,
            "id": each.span.span_id,
            **({"parentId": each.span.parent_id} if each.span.parent_id else {}),
            "name": each.name,
            "kind": "SERVER",
            "timestamp": each.begun // 1000,
            "duration": max(1, (each.ended - each.begun) // 1000),
            "localEndpoint": {"serviceName": service},
            "tags": each.tags,
        }
        for each in spans
    ]
    return json.dumps(listed, separators=(",", ":")).encode("utf-8", "replace")
