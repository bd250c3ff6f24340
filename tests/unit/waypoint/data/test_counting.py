"""What the data path tells of requests and connections, over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.kit.waypoint import LoopbackWaypoint
from waypoint.data.channel import Counted, DryRunVerdicts, ToSupervisor
from ztunnel.dataplane.channel import Decoder, encode
from ztunnel.mesh.l7.config import PortProtocol
from ztunnel.mesh.l7.security import L7Action, L7Policy, L7Rule
from ztunnel.mesh.l7.telemetry import Metric, MetricOverride, PeerWorkload, TelemetrySettings

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabc"


@pytest.fixture(name="waypoint")
def fixture_waypoint() -> Iterator[LoopbackWaypoint]:
    waypoint = LoopbackWaypoint()
    yield waypoint
    waypoint.close()


def counted(waypoint: LoopbackWaypoint) -> dict[str, tuple[dict[str, str], float, float]]:
    """By metric: labels, count and sum of the only series; as it arrives in the supervisor."""
    message = waypoint.proxy.take_counted()
    assert message is not None
    (received,) = Decoder(to_worker=False, kinds=ToSupervisor).feed(encode(message), [])
    assert isinstance(received.message, Counted)
    assert received.message == message
    return {each.metric: (dict(each.labels), each.count, each.total) for each in message.increments}


def test_a_request_is_counted_once_it_is_over(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app().answers(OK)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve()
    peer = PeerWorkload("u", "app-1", "default", "app", app="app", canonical_service="app", identity=waypoint.pki.identity("app"))
    waypoint.update(peers={app.address[0]: peer})
    waypoint.ask(POST)
    found = counted(waypoint)
    labels, count, _ = found["REQUEST_COUNT"]
    assert count == 1
    assert {
        "reporter": "waypoint",
        "request_protocol": "http",
        "response_code": "200",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
        "source_principal": waypoint.pki.identity("client").uri,
        "destination_service": "app.default.svc.cluster.local",
        "destination_service_name": "app",
        "destination_principal": waypoint.pki.identity("app").uri,
        "destination_workload": "app",
    }.items() <= labels.items()
    assert found["REQUEST_SIZE"][2] == 3
    assert found["RESPONSE_SIZE"][2] == 5
    assert waypoint.proxy.take_counted() is None


def test_denied_requests_and_dry_runs(waypoint: LoopbackWaypoint) -> None:
    waypoint.serve()
    denies = L7Policy("deny", "default", L7Action.DENY, (L7Rule(),), (L7Rule(),))
    would = L7Policy("would", "default", L7Action.DENY, (L7Rule(),), (L7Rule(),), dry_run=True)
    services = tuple(replace(each, policies=(denies.key, would.key)) for each in waypoint.config.services)
    settings = TelemetrySettings((MetricOverride(Metric.DURATION, disabled=True),))
    waypoint.update(services=services, policies={each.key: each for each in (denies, would)}, telemetry={"": settings})
    assert waypoint.ask(POST).startswith(b"HTTP/1.1 403 ")
    message = waypoint.proxy.take_counted()
    assert message is not None
    assert message.shadow == (DryRunVerdicts("default/would", "DENY", "denied", 1),)
    codes = {dict(each.labels)["response_code"] for each in message.increments}
    assert codes == {"403"}
    assert "REQUEST_DURATION" not in {each.metric for each in message.increments}


def test_grpc_messages_and_status(waypoint: LoopbackWaypoint) -> None:
    message = b"\0\0\0\0\1a"
    answer = b"HTTP/1.1 200 OK\r\ncontent-type: application/grpc\r\ngrpc-status: 5\r\nContent-Length: 12\r\n\r\n" + message * 2
    app = waypoint.app().answers(answer)
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve()
    head = b"POST / HTTP/1.1\r\nHost: a\r\ncontent-type: application/grpc\r\nContent-Length: 6\r\nConnection: close\r\n\r\n"
    waypoint.ask(head + message)
    found = counted(waypoint)
    assert found["REQUEST_COUNT"][0]["grpc_response_status"] == "5"
    assert (found["GRPC_REQUEST_MESSAGES"][1], found["GRPC_RESPONSE_MESSAGES"][1]) == (1, 2)


def test_connections(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app()
    app.on_data = lambda end: end.send(b"hello")
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    client.send(b"abc")
    waypoint.run_until(lambda: client.data == b"hello")
    found = counted(waypoint)
    assert {name: count for name, (_, count, _) in found.items()} == {
        "TCP_OPENED_CONNECTIONS": 1,
        "TCP_RECEIVED_BYTES": 3,
        "TCP_SENT_BYTES": 5,
    }
    client.close()
    waypoint.run_until(lambda: not waypoint.proxy.connections.tcp)
    assert counted(waypoint)["TCP_CLOSED_CONNECTIONS"][0]["response_flags"] == "-"


def test_a_connection_that_cannot_be_made(waypoint: LoopbackWaypoint) -> None:
    app = waypoint.app()
    assert app.acceptor is not None
    app.acceptor.close()
    waypoint.cluster(waypoint.endpoint(app))
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    waypoint.run_until(lambda: client.is_over)
    found = counted(waypoint)
    assert found["TCP_CLOSED_CONNECTIONS"][0]["response_flags"] == "UF"
    assert found["TCP_OPENED_CONNECTIONS"][1] == 1


def test_a_connection_for_which_no_endpoint_is_ready(waypoint: LoopbackWaypoint) -> None:
    """As Envoy: UH, which is not the NR of a connection without a route."""
    waypoint.cluster()
    waypoint.serve(protocol=PortProtocol.TCP)
    client = waypoint.client()
    waypoint.run_until(lambda: client.is_over)
    assert counted(waypoint)["TCP_CLOSED_CONNECTIONS"][0]["response_flags"] == "UH"


def test_what_is_no_request_is_counted_too(waypoint: LoopbackWaypoint) -> None:
    waypoint.serve()
    waypoint.ask(b"GET / HTTP/1.1\r\nHost : a\r\n\r\n")
    labels, count, _ = counted(waypoint)["REQUEST_COUNT"]
    assert (labels["response_code"], labels["response_flags"], count) == ("400", "DPE", 1)
