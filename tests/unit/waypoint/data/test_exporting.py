"""Spans from a request through a waypoint to a collector, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.kit.waypoint import App, LoopbackWaypoint
from ztunnel.mesh.l7.telemetry import Collector, TelemetrySettings, Tracing

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
TRACING = Tracing(100.0, Collector.ZIPKIN, "zipkin:9411", "collector", "/api/v2/spans", "zipkin")


@pytest.fixture(name="waypoint")
def fixture_waypoint() -> Iterator[LoopbackWaypoint]:
    waypoint = LoopbackWaypoint()
    yield waypoint
    waypoint.close()


def traced(waypoint: LoopbackWaypoint) -> tuple[App, App]:
    """The application, and the collector."""
    app, collector = waypoint.app().answers(OK), waypoint.app()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.cluster(waypoint.endpoint(collector), key="collector")
    waypoint.serve()
    waypoint.update(telemetry={"": TelemetrySettings(tracing=TRACING)})
    return app, collector


def received(collector: App) -> bytes:
    return b"".join(bytes(each.data) for each in collector.connections)


def test_a_sampled_request_reaches_the_collector(waypoint: LoopbackWaypoint) -> None:
    app, collector = traced(waypoint)
    waypoint.ask(GET)
    waypoint.proxy.exporter.flush()
    (head,) = app.heads
    trace_id = head.split(b"x-b3-traceid: ")[1][:32].decode()
    waypoint.run_until(lambda: received(collector).endswith(b"}]"))
    head, _, body = received(collector).partition(b"\r\n\r\n")
    assert head.startswith(b"POST /api/v2/spans HTTP/1.1\r\n")
    assert b"host: zipkin:9411" in head
    (span,) = json.loads(body)
    assert (span["traceId"], span["localEndpoint"]) == (trace_id, {"serviceName": "waypoint.default"})
    assert span["tags"]["http.status_code"] == "200"
    collector.connections[0].send(b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n")
    waypoint.run_until(lambda: not waypoint.proxy.exporter._under_way)
    assert waypoint.proxy.exporter.lost == 0


def test_spans_are_lost_where_the_collector_is_gone(waypoint: LoopbackWaypoint) -> None:
    _, collector = traced(waypoint)
    assert collector.acceptor is not None
    collector.acceptor.close()
    waypoint.ask(GET)
    waypoint.proxy.exporter.flush()
    waypoint.run_until(lambda: waypoint.proxy.exporter.lost)
    assert waypoint.proxy.take_limits() == {"spans": 1}
