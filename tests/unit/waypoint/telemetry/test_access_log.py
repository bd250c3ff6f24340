"""Access logs: default formats, every operator, filters, and values that try to break out."""

from __future__ import annotations

import json

import pytest

from waypoint.http.messages import Client, Request, Response
from waypoint.telemetry.access_log import AccessLogger, unknown_operators
from waypoint.telemetry.attributes import SummaryAttributes
from waypoint.telemetry.recorder import Recorder
from waypoint.telemetry.service import ServiceTelemetry
from waypoint.telemetry.summary import Flow, Summary
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.telemetry import AccessLog, TelemetrySettings

CLIENT = Client(SpiffeId("td", "shop", "cart"), "10.0.0.1", 4711, "shop", 80, "10.96.0.1", sni="a.b")
SERVICE = ServiceTelemetry("reviews.shop.svc", "reviews", "shop", TelemetrySettings())
CLUSTER = "inbound-vip|80|http|reviews.shop.svc"


def summary() -> Summary:
    headers = [(b"user-agent", b"curl"), (b"x-request-id", b"id-1"), (b"x-forwarded-for", b"1.2.3.4")]
    request = Request(b"GET", b"/a?b=c", b"reviews", headers)
    request.path = b"/rewritten"
    found = Summary(SERVICE, request, CLIENT, 1_800_000_000.123)
    found.status, found.bytes_in, found.bytes_out, found.duration = 200, 3, 20, 0.0155
    found.response = Response(200, [(b"x-envoy-upstream-service-time", b"12"), (b"x-r", b"s")])
    found.trailers = [(b"x-t", b"u")]
    found.endpoint, found.cluster, found.route = Endpoint("fd00::2", 8080), CLUSTER, "shop/route/rule-0"
    found.details, found.attempts, found.grpc_status = "via upstream", 2, 5
    return found


def line(log: AccessLog, known: Summary | Flow | None = None) -> bytes:
    known = known or summary()
    found = AccessLogger(log, "pod-1").line(known, SummaryAttributes(known, None, None))
    assert found is not None
    return found


def test_the_default_text() -> None:
    assert line(AccessLog()).decode() == (
        '[2027-01-15T08:00:00.123Z] "GET /a?b=c HTTP/1.1" 200 - via_upstream - "-" 3 20 15 12 "1.2.3.4" "curl" "id-1" "reviews" '
        f'"[fd00::2]:8080" {CLUSTER} - 10.96.0.1:80 10.0.0.1:4711 a.b shop/route/rule-0\n'
    )


def test_the_default_json() -> None:
    assert json.loads(line(AccessLog(json=True))) == {
        "start_time": "2027-01-15T08:00:00.123Z",
        "route_name": "shop/route/rule-0",
        "method": "GET",
        "path": "/a?b=c",
        "protocol": "HTTP/1.1",
        "response_code": 200,
        "response_flags": "-",
        "response_code_details": "via_upstream",
        "connection_termination_details": None,
        "bytes_received": 3,
        "bytes_sent": 20,
        "duration": 15,
        "upstream_service_time": "12",
        "x_forwarded_for": "1.2.3.4",
        "user_agent": "curl",
        "request_id": "id-1",
        "authority": "reviews",
        "upstream_host": "[fd00::2]:8080",
        "upstream_cluster": CLUSTER,
        "upstream_local_address": None,
        "downstream_local_address": "10.96.0.1:80",
        "downstream_remote_address": "10.0.0.1:4711",
        "requested_server_name": "a.b",
        "upstream_transport_failure_reason": None,
    }


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("plain 100%%", "plain 100%"),
        ("%START_TIME(%Y/%m/%d %H:%M:%S.%3f)%", "2027/01/15 08:00:00.123"),
        ("%REQ(USER-AGENT):2%", "cu"),
        ("%REQ(X-NONE?USER-AGENT)%", "curl"),
        ("%REQ(X-NONE)%", "-"),
        ("%REQ(:PATH)%", "/rewritten"),
        ("%REQ_WITHOUT_QUERY(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/a"),
        ("%PATH(NQ:ORIG)% %PATH(WQ:PATH)% %PATH%", "/a /rewritten /a?b=c"),
        ("%RESP(X-R)% %RESP(:status)% %TRAILER(X-T)%", "s 200 u"),
        ("%GRPC_STATUS% %GRPC_STATUS(SNAKE_STRING)% %GRPC_STATUS_NUMBER%", "NotFound NOT_FOUND 5"),
        ("%UPSTREAM_REQUEST_ATTEMPT_COUNT% %HOSTNAME%", "2 pod-1"),
        ("%UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %UPSTREAM_REMOTE_PORT%", "fd00::2 8080"),
        ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_REMOTE_PORT%", "10.0.0.1 4711"),
        ("%DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT% %DOWNSTREAM_LOCAL_PORT%", "10.96.0.1 80"),
        ("%DOWNSTREAM_PEER_URI_SAN%", "spiffe://td/ns/shop/sa/cart"),
        ("%CEL(request.method + string(size(request.url_path)))%", "GET2"),
        ("%CEL(request.headers['x'])%", "-"),
        ("%ENVIRONMENT(SURELY_NOT_SET)%", "-"),
        ("%NO_SUCH%", "%NO_SUCH%"),
    ],
)
def test_operators(template: str, said: str) -> None:
    assert line(AccessLog(template=template)).decode() == said + "\n"


def test_flags_in_long() -> None:
    known = summary()
    known.flags = "UF,URX"
    assert line(AccessLog(template="%RESPONSE_FLAGS% %RESPONSE_FLAGS_LONG%"), known) == (
        b"UF,URX UpstreamConnectionFailure,UpstreamRetryLimitExceeded\n"
    )


def test_json_keeps_types_and_has_null_for_what_is_missing() -> None:
    fields = (
        ("code", "%RESPONSE_CODE%"),
        ("text", "code %RESPONSE_CODE%"),
        ("none", "%REQ(X-NONE)%"),
        ("cel", "%CEL(response.code == 200)%"),
    )
    assert json.loads(line(AccessLog(json=True, fields=fields))) == {"code": 200, "text": "code 200", "none": None, "cel": True}


def test_a_connection_has_no_request() -> None:
    flow = Flow(SERVICE, CLIENT, 1_800_000_000.0)
    flow.received, flow.sent, flow.flags, flow.details = 5, 6, "UF", "upstream: refused"
    text = line(AccessLog(), flow).decode()
    assert text.startswith('[2027-01-15T08:00:00.000Z] "- - -" 0 UF upstream:_refused - "-" 5 6 0 - "-" ')


def test_nobody_breaks_out_of_a_line_or_a_field() -> None:
    known = summary()
    known.request.headers = [(b"user-agent", b'a"b\\c\x01\xff')]
    known.request.original_path = b"/" + b"x" * 60_000
    text = line(AccessLog(template='"%REQ(USER-AGENT)%"'), known)
    assert text == b'"a\\x22b\\x5cc\\x01\\x5cxff"\n'
    assert len(line(AccessLog(), known)) < 6000
    assert json.loads(line(AccessLog(json=True), known))["user_agent"] == 'a"b\\c\x01\\xff'


def test_filters() -> None:
    known = summary()
    attributes = SummaryAttributes(known, None, None)
    assert AccessLogger(AccessLog(filter="response.code >= 400")).line(known, attributes) is None
    assert AccessLogger(AccessLog(filter="request.headers['nope'] == 'x'")).line(known, attributes) is None
    assert AccessLogger(AccessLog(filter="response.code == 200 && connection.mtls")).line(known, attributes)


def test_the_recorder_keeps_lines_until_they_are_taken() -> None:
    counting = Recorder()
    known = summary()
    known.service = ServiceTelemetry(
        "h", "n", "s", TelemetrySettings(access_logs=(AccessLog(template="%METHOD%x"), AccessLog(filter="false")))
    )
    counting.request_done(known)
    counting.request_done(known)
    assert counting.take_log() == b"%METHOD%x\n%METHOD%x\n"
    assert counting.take_log() == b""


def test_operators_that_are_not_known_can_be_told() -> None:
    assert unknown_operators("%REQ(A)% %NO_SUCH(x)% %CEL(1 +)% 5%% %HOSTNAME%") == ["%NO_SUCH(x)%", "%CEL(1 +)%"]


@pytest.mark.parametrize("expression", ["source.address", "destination.address", "upstream.address", "xds.route_name", "response.flags"])
def test_attributes_of_a_request(expression: str) -> None:
    assert line(AccessLog(template=f"%CEL({expression})%")).decode().strip() in {
        "10.0.0.1:4711",
        "10.96.0.1:80",
        "fd00::2:8080",
        "shop/route/rule-0",
        "-",
    }
