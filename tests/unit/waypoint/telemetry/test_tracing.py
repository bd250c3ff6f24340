"""Traces: what comes with a request, what is decided, what the next hop and the collector are told."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from waypoint.http.messages import Client, Headers, Request
from waypoint.telemetry.recorder import MAX_SPANS, Recorder
from waypoint.telemetry.service import ServiceTelemetry
from waypoint.telemetry.spans import otlp, question, zipkin
from waypoint.telemetry.summary import Summary
from waypoint.telemetry.tracing import Span, begin, unsampled
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.telemetry import Collector, CustomTag, PeerWorkload, TelemetrySettings, Tracing
from ztunnel.rpc.protobuf import Value, read_bytes, read_fields

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
OTLP = Tracing(100.0, Collector.OTLP_HTTP, "otel:4318", "cluster", "/v1/traces", "otel")
ZIPKIN = replace(OTLP, collector=Collector.ZIPKIN, http_path="/api/v2/spans")
DICE = random.Random(7)
CLIENT = Client(SpiffeId("td", "shop", "cart"), "10.0.0.1", 4711, "shop", 80, "10.96.0.1")


def request(**headers: str) -> Request:
    return Request(b"GET", b"/a?b=c", b"reviews", [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()])


def started(asked: Request, tracing: Tracing = OTLP) -> Span:
    span = begin(tracing, asked, DICE.randrange)
    assert span is not None
    return span


def told(asked: Request) -> dict[str, str]:
    names = {b"traceparent", b"tracestate", b"b3"}
    return {name.decode(): value.decode() for name, value in asked.headers if name in names or name.startswith(b"x-b3-")}


def test_without_a_collector_headers_are_nobodys_business() -> None:
    asked = request(traceparent=f"00-{TRACE}-{PARENT}-01")
    assert begin(Tracing(), asked, DICE.randrange) is None
    assert told(asked) == {"traceparent": f"00-{TRACE}-{PARENT}-01"}


@pytest.mark.parametrize(
    ("headers", "sampled"),
    [
        ({"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "a=b"}, True),
        ({"traceparent": f"00-{TRACE}-{PARENT}-00"}, False),
        ({"traceparent": f"01-{TRACE}-{PARENT}-03-more"}, True),
        ({"b3": f"{TRACE}-{PARENT}-1"}, True),
        ({"b3": f"{TRACE}-{PARENT}-0-{PARENT}"}, False),
        ({"b3": f"{TRACE}-{PARENT}-d"}, True),
        ({"x_b3_traceid": TRACE, "x_b3_spanid": PARENT, "x_b3_sampled": "0"}, False),
        ({"x_b3_traceid": TRACE, "x_b3_spanid": PARENT, "x_b3_flags": "1"}, True),
    ],
)
@pytest.mark.parametrize("percent", [0.0, 100.0])
def test_a_decision_that_comes_with_a_request_is_kept(headers: dict[str, str], sampled: bool, percent: float) -> None:
    asked = request(**headers)
    span = started(asked, replace(OTLP, percent=percent))
    assert (span.trace_id, span.parent_id, span.sampled) == (TRACE, PARENT, sampled)
    flags = "01" if sampled else "00"
    found = told(asked)
    assert found["traceparent"] == f"00-{TRACE}-{span.span_id}-{flags}"
    assert span.span_id != PARENT
    assert span.trace_state == headers.get("tracestate", "")
    if "b3" in headers:
        assert found["b3"] == f"{TRACE}-{span.span_id}-{int(sampled)}-{PARENT}"
    if "x_b3_traceid" in headers:
        assert (found["x-b3-traceid"], found["x-b3-spanid"], found["x-b3-parentspanid"]) == (TRACE, span.span_id, PARENT)
        assert found["x-b3-sampled"] == str(int(sampled))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"traceparent": "rubbish"},
        {"traceparent": f"ff-{TRACE}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{PARENT}-01-more"},
        {"traceparent": f"00-{'0' * 32}-{PARENT}-01"},
        {"traceparent": f"00-{TRACE}-{'0' * 16}-01"},
        {"b3": "0"},
        {"x_b3_traceid": "x", "x_b3_spanid": PARENT},
    ],
)
def test_what_is_no_context_begins_a_trace(headers: dict[str, str]) -> None:
    asked = request(**headers)
    span = started(asked)
    assert (span.parent_id, span.sampled, len(span.trace_id), len(span.span_id)) == ("", True, 32, 16)
    assert told(asked)["traceparent"] == f"00-{span.trace_id}-{span.span_id}-01"
    assert not started(request(**headers), replace(OTLP, percent=0.0)).sampled


def test_zipkin_speaks_b3() -> None:
    asked = request(x_b3_traceid=TRACE[16:], x_b3_spanid=PARENT, x_b3_sampled="1")
    span = started(asked, ZIPKIN)
    assert span.trace_id == "0" * 16 + TRACE[16:]
    assert told(asked) == {
        "x-b3-traceid": span.trace_id,
        "x-b3-spanid": span.span_id,
        "x-b3-sampled": "1",
        "x-b3-parentspanid": PARENT,
    }
    both = request(traceparent=f"00-{TRACE}-{PARENT}-01")
    started(both, ZIPKIN)
    assert {"traceparent", "x-b3-traceid"} <= set(told(both))


@pytest.mark.parametrize(
    ("request_id", "percent", "sampled", "nibble"),
    [
        ("00000001-0000-4000-8000-000000000000", 100.0, True, "9"),
        ("00000001-0000-4000-8000-000000000000", 0.0, False, "4"),
        ("000003e7-0000-4000-8000-000000000000", 10.0, True, "9"),
        ("000003e8-0000-4000-8000-000000000000", 10.0, False, "4"),
        ("000003e8-0000-9000-8000-000000000000", 0.0, True, "9"),
        ("000003e8-0000-a000-8000-000000000000", 0.0, True, "a"),
    ],
)
def test_request_ids_decide_and_carry_the_decision(request_id: str, percent: float, sampled: bool, nibble: str) -> None:
    asked = request(x_request_id=request_id)
    assert started(asked, replace(OTLP, percent=percent)).sampled is sampled
    assert (asked.get(b"x-request-id") or b"")[14:15].decode() == nibble


def test_dice_decide_where_request_ids_do_not() -> None:
    tracing = replace(OTLP, percent=25.0, use_request_id=False)
    sampled = sum(started(request(x_request_id="00000001-0000-4000-8000-000000000000"), tracing).sampled for _ in range(4000))
    assert 800 < sampled < 1200


def test_propagation_and_reporting_can_be_switched_off() -> None:
    asked = request()
    span = started(asked, replace(OTLP, propagate=False))
    assert (told(asked), span.is_reported) == ({}, True)
    assert not started(request(), replace(OTLP, report=False)).is_reported
    assert not started(request(), replace(OTLP, cluster="")).is_reported


def test_copies_are_part_of_no_trace() -> None:
    asked = request(traceparent=f"00-{TRACE}-{PARENT}-01", x_b3_traceid=TRACE, x="y")
    copy = unsampled(asked)
    assert (copy.headers, copy.path) == ([(b"x", b"y"), (b"x-b3-sampled", b"0")], b"/a?b=c")
    assert len(asked.headers) == 3
    plain = request(x="y")
    assert unsampled(plain) is plain


# Spans


def finished(*tags: CustomTag, tracing: Tracing = OTLP, status: int = 200) -> Recorder:
    recorder = Recorder()
    peer = PeerWorkload("u", "cart-1", "shop", "cart", "deployment", "cart", "v1", "cart", "v1")
    recorder.update({"10.0.0.1": peer}, own={"node_id": "waypoint~w.shop"})
    asked = request(user_agent="curl", x_request_id="id", x_env="prod")
    summary = Summary(ServiceTelemetry("reviews.shop.svc", "reviews", "shop", TelemetrySettings()), asked, CLIENT, 1_800_000_000.0)
    summary.span = started(asked, replace(tracing, custom_tags=tags))
    summary.status, summary.duration, summary.bytes_in = status, 0.5, 3
    summary.shadow = (("shop/p", "DENY", "denied"),)
    recorder.request_done(summary)
    return recorder


def test_the_tags_of_a_span() -> None:
    tags = (
        CustomTag("literal", "literal", "x"),
        CustomTag("env", "environment", "SURELY_NOT_SET", "default"),
        CustomTag("header", "header", "x-env"),
        CustomTag("no-header", "header", "x-none", "d"),
        CustomTag("formatted", "formatter", "%REQ(:METHOD)%-%RESPONSE_CODE%"),
    )
    (span,) = finished(*tags).take_spans(10)
    assert (span.name, span.begun, span.ended, span.is_error) == ("reviews.shop.svc:80/*", int(1.8e18), int(1.8e18) + 500_000_000, False)
    assert {
        "component": "proxy",
        "node_id": "waypoint~w.shop",
        "guid:x-request-id": "id",
        "http.url": "http://reviews/a",
        "http.method": "GET",
        "http.protocol": "HTTP/1.1",
        "http.status_code": "200",
        "user_agent": "curl",
        "request_size": "3",
        "response_flags": "-",
        "peer.address": "10.0.0.1",
        "istio.source_workload": "cart",
        "istio.source_namespace": "shop",
        "istio.source_canonical_revision": "v1",
        "istio.authorization.dry_run.deny_policy.name": "shop/p",
        "istio.authorization.dry_run.deny_policy.result": "denied",
        "literal": "x",
        "env": "default",
        "header": "prod",
        "no-header": "d",
        "formatted": "GET-200",
    }.items() <= span.tags.items()
    assert "error" not in span.tags
    (failed,) = finished(status=503).take_spans(10)
    assert (failed.is_error, failed.tags["error"]) == (True, "true")


def fields(message: bytes) -> dict[int, list[Value]]:
    found: dict[int, list[Value]] = {}
    for number, value in read_fields(message):
        found.setdefault(number, []).append(value)
    return found


def inner(message: bytes, *path: int) -> bytes:
    for number in path:
        message = read_bytes(number, fields(message)[number][0])
    return message


def test_otlp() -> None:
    (span,) = finished(status=500).take_spans(10)
    message = otlp("w.shop", [span])
    assert fields(inner(message, 1, 1, 1)) == {1: [b"service.name"], 2: [b"\x0a\x06w.shop"]}
    found = fields(inner(message, 1, 2, 2))
    assert (found[1], found[2]) == ([bytes.fromhex(span.span.trace_id)], [bytes.fromhex(span.span.span_id)])
    assert (found[5], found[6]) == ([b"reviews.shop.svc:80/*"], [2])
    assert (found[7], found[8]) == ([span.begun.to_bytes(8, "little")], [span.ended.to_bytes(8, "little")])
    assert len(found[9]) == len(span.tags)
    assert fields(read_bytes(15, found[15][0])) == {3: [2]}


def test_zipkin() -> None:
    (span,) = finished(tracing=ZIPKIN).take_spans(10)
    (said,) = json.loads(zipkin("w.shop", [span]))
    assert (said["traceId"], said["id"], said["name"], said["kind"]) == (span.span.trace_id, span.span.span_id, span.name, "SERVER")
    assert (said["timestamp"], said["duration"], said["localEndpoint"]) == (int(1.8e15), 500_000, {"serviceName": "w.shop"})
    assert said["tags"]["http.method"] == "GET"


def test_what_collectors_are_sent() -> None:
    spans = finished().take_spans(10)
    asked, body = question(OTLP, "w", spans)
    assert (asked.method, asked.path, asked.authority, dict(asked.headers)[b"content-type"]) == (
        b"POST",
        b"/v1/traces",
        b"otel:4318",
        b"application/x-protobuf",
    )
    assert dict(asked.headers)[b"content-length"] == str(len(body)).encode()
    asked, framed = question(replace(OTLP, collector=Collector.OTLP_GRPC), "w", spans)
    assert (asked.path, framed) == (
        b"/opentelemetry.proto.collector.trace.v1.TraceService/Export",
        b"\0" + len(body).to_bytes(4, "big") + body,
    )
    asked, _ = question(ZIPKIN, "w", spans)
    assert (asked.path, dict(asked.headers)[b"content-type"]) == (b"/api/v2/spans", b"application/json")


def test_spans_that_wait_are_bounded() -> None:
    recorder = finished()
    (span,) = recorder.take_spans(1)
    summary = Summary(ServiceTelemetry("h", "n", "s", TelemetrySettings()), request(), CLIENT, 0.0)
    summary.span = span.span
    for _ in range(MAX_SPANS + 5):
        recorder.request_done(summary)
    assert recorder.dropped == 5
    assert len(recorder.take_spans(MAX_SPANS + 5)) == MAX_SPANS


VALUES = st.binary(max_size=60) | st.sampled_from([f"00-{TRACE}-{PARENT}-01".encode(), f"{TRACE}-{PARENT}-1".encode(), TRACE.encode()])
NAMES = st.sampled_from([b"traceparent", b"tracestate", b"b3", b"x-b3-traceid", b"x-b3-spanid", b"x-b3-sampled", b"x-request-id"])


@given(st.lists(st.tuples(NAMES, VALUES), max_size=5), st.sampled_from([OTLP, ZIPKIN]))
def test_hostile_headers_begin_a_trace_at_worst(headers: Headers, tracing: Tracing) -> None:
    asked = Request(b"GET", b"/", b"a", headers)
    span = started(asked, tracing)
    assert len(bytes.fromhex(span.trace_id)) == 16
    assert len(bytes.fromhex(span.span_id)) == 8
