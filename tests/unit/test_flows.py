"""What a connection's records become: counters by Istio's names, one line at its end, and when a pod last had traffic."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import pytest

from tests.kit.builders import workload
from ztunnel.dataplane.flow import Direction, FlowRecord
from ztunnel.flows import MAX_SEEN, FlowReporter, log_fields
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime.logs import FLOW_FIELDS
from ztunnel.runtime.metrics import UNKNOWN, Metrics, Series, Traffic

CLIENT = replace(workload("client", "10.0.0.1", account="client"), canonical_name="shop", canonical_revision="v2")
SERVER = replace(workload("server", "10.0.0.2", namespace="back"), workload_name="server-set")
IDENTITIES = ("spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/back/sa/default")
SECURE = FlowRecord(
    "c1",
    Direction.OUTBOUND,
    CLIENT.uid,
    ("10.0.0.1", 4000),
    ("10.0.0.2", 15008),
    "10.0.0.2:8080",
    mutual_tls=True,
    source_uid=CLIENT.uid,
    destination_uid=SERVER.uid,
    source_identity=IDENTITIES[0],
    destination_identity=IDENTITIES[1],
    service="web.back.svc",
    service_name="web",
    service_namespace="back",
    trace="00-0123456789abcdef0123456789abcdef-0123456789abcdef-01",
    opened=True,
    closed=True,
    up_bytes=10,
    down_bytes=100,
    total_up_bytes=10,
    total_down_bytes=100,
    duration_seconds=1.5,
)
PLAIN = FlowRecord("c2", Direction.INBOUND, SERVER.uid, ("192.0.2.1", 1), ("10.0.0.2", 8080), "10.0.0.2:8080", mutual_tls=False)


but = msgspec.structs.replace


class Desk:
    """A reporter with its metrics and a clock that a test turns."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.now = 0.0
        self.known: dict[str, Workload] = {each.uid: each for each in (CLIENT, SERVER)}
        self.reporter = FlowReporter(self.metrics, self.known.get, lambda: self.now)

    def take(self, *records: FlowRecord, worker: int = 0, lost: int = 0) -> None:
        self.reporter.take(worker, records, lost)


@pytest.fixture(name="desk")
def fixture_desk() -> Desk:
    return Desk()


def values(series: Series) -> dict[Traffic, float]:
    return {Traffic._make(labels): value for labels, value in series._values.items()}


def test_labels_of_a_connection_that_tls_proved(desk: Desk) -> None:
    desk.take(SECURE)
    ((labels, count),) = values(desk.metrics.tcp_opened).items()
    assert count == 1
    assert labels == Traffic(
        reporter="source",
        source_workload="client",
        source_canonical_service="shop",
        source_canonical_revision="v2",
        source_workload_namespace="default",
        source_principal=IDENTITIES[0],
        source_app="shop",
        source_version="v2",
        source_cluster=CLIENT.cluster,
        destination_service="web.back.svc",
        destination_service_namespace="back",
        destination_service_name="web",
        destination_workload="server-set",
        destination_canonical_service=UNKNOWN,
        destination_canonical_revision=UNKNOWN,
        destination_workload_namespace="back",
        destination_principal=IDENTITIES[1],
        destination_app=UNKNOWN,
        destination_version=UNKNOWN,
        destination_cluster=SERVER.cluster,
        request_protocol="tcp",
        response_flags="-",
        connection_security_policy="mutual_tls",
    )
    assert values(desk.metrics.tcp_received_bytes) == {labels: 10}
    assert values(desk.metrics.tcp_sent_bytes) == {labels: 100}
    assert values(desk.metrics.tcp_closed) == {labels: 1}
    assert values(desk.metrics.tcp_failed) == {}


def test_of_strangers_nothing_is_known(desk: Desk) -> None:
    desk.take(but(PLAIN, opened=True))
    ((labels, _),) = values(desk.metrics.tcp_opened).items()
    assert labels == Traffic(reporter="destination")


def test_whom_the_mesh_names_is_a_principal_as_destination_and_not_as_source(desk: Desk) -> None:
    # Source: Istio ztunnel `proxy/metrics.rs`, with_source and with_destination.
    desk.take(but(PLAIN, opened=True, source_uid=CLIENT.uid, destination_uid=SERVER.uid))
    ((labels, _),) = values(desk.metrics.tcp_opened).items()
    assert (labels.source_principal, labels.destination_principal) == (UNKNOWN, str(SERVER.identity))
    assert labels.connection_security_policy == UNKNOWN


def test_a_failure_shows_in_the_flag_of_what_ends_with_it(desk: Desk) -> None:
    desk.take(but(SECURE, closed=False), but(SECURE, opened=False, flag=Flag.DENY, error="no"))
    assert [labels.response_flags for labels in values(desk.metrics.tcp_opened)] == ["-"]
    assert [labels.response_flags for labels in values(desk.metrics.tcp_failed)] == ["DENY"]
    assert [labels.response_flags for labels in values(desk.metrics.tcp_closed)] == ["DENY"]
    # One series of bytes for a connection, however it ends: Istio takes it when the connection begins.
    assert {labels.response_flags: value for labels, value in values(desk.metrics.tcp_received_bytes).items()} == {"-": 20}
    assert {labels.response_flags: value for labels, value in values(desk.metrics.tcp_sent_bytes).items()} == {"-": 200}


def open_now(desk: Desk) -> dict[str, float]:
    return {labels[0]: value for labels, value in desk.metrics.tcp_sockets_open._values.items() if value}


def test_open_connections_are_counted_until_they_close_or_their_worker_dies(desk: Desk) -> None:
    opened, closed = but(SECURE, closed=False), but(SECURE, opened=False)
    for worker in (0, 1):
        desk.take(opened, opened, but(PLAIN, opened=True), worker=worker)
    assert open_now(desk) == {"source": 4, "destination": 2}
    desk.take(closed, worker=0)
    desk.take(SECURE, worker=0)
    assert open_now(desk) == {"source": 3, "destination": 2}
    desk.reporter.worker_died(0, "killed")
    assert open_now(desk) == {"source": 2, "destination": 1}
    desk.reporter.worker_died(0, "killed again")
    desk.reporter.worker_died(1, "killed")
    assert open_now(desk) == {}
    assert desk.metrics.worker_restarts._values == {(): 3.0}


def test_records_that_were_lost_are_a_limit_that_was_hit(desk: Desk) -> None:
    desk.take(lost=7)
    desk.take(lost=0)
    assert desk.metrics.limit_hits._values == {("flow_records",): 7}


def test_a_pods_last_traffic_is_remembered_until_it_is_gone_and_within_bounds(desk: Desk) -> None:
    desk.now = 5.0
    desk.take(SECURE, PLAIN)
    assert desk.reporter.last_seen == {CLIENT.uid: 5.0, SERVER.uid: 5.0}
    desk.reporter.forget([CLIENT.uid, "never seen"])
    assert list(desk.reporter.last_seen) == [SERVER.uid]
    for number in range(MAX_SEEN + 10):
        desk.take(but(PLAIN, pod_uid=f"u{number}"))
    assert len(desk.reporter.last_seen) == MAX_SEEN
    assert SERVER.uid not in desk.reporter.last_seen


# The log


def test_only_the_end_is_a_line(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        desk.take(but(SECURE, closed=False))
        assert caplog.records == []
        desk.take(but(SECURE, opened=False))
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("direction", "sent", "received"), [(Direction.OUTBOUND, 10, 100), (Direction.INBOUND, 100, 10)])
def test_the_lines_bytes_are_the_pods_own(direction: Direction, sent: int, received: int) -> None:
    line = log_fields(but(SECURE, direction=direction), CLIENT, SERVER)
    assert (line["bytes_sent"], line["bytes_recv"], line["direction"]) == (sent, received, direction.value)


def test_what_a_line_says() -> None:
    line = log_fields(but(SECURE, flag=Flag.DENY, error="no", policy="AuthorizationPolicy back/p"), CLIENT, SERVER)
    assert line == {
        "src.addr": "10.0.0.1:4000",
        "src.workload": "client",
        "src.namespace": "default",
        "src.identity": IDENTITIES[0],
        "src.cluster": CLIENT.cluster,
        "dst.addr": "10.0.0.2:15008",
        "dst.hbone_addr": "10.0.0.2:8080",
        "dst.service": "web.back.svc",
        "dst.workload": "server",
        "dst.namespace": "back",
        "dst.identity": IDENTITIES[1],
        "dst.cluster": SERVER.cluster,
        "direction": "outbound",
        "bytes_sent": 10,
        "bytes_recv": 100,
        "duration": "1500ms",
        "policy": "AuthorizationPolicy back/p",
        "flag": "DENY",
        "trace": "0123456789abcdef0123456789abcdef",
        "connection": "c1",
        "error": "no",
    }
    assert tuple(line) == FLOW_FIELDS


def test_what_a_line_does_not_know_is_empty() -> None:
    line = log_fields(but(PLAIN, destination=("", 0)), None, None)
    assert (line["src.workload"], line["dst.addr"], line["dst.hbone_addr"], line["flag"], line["trace"]) == (None, "", "", "", "")
