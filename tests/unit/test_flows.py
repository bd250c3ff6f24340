"""What a connection's records become: counters by Istio's names, one line at its end, and when a pod last had traffic."""

from __future__ import annotations

import logging
from dataclasses import replace

import msgspec
import pytest

from tests.kit.builders import workload
from ztunnel.dataplane.flow import Direction, FlowEnd, FlowFailure, FlowNews, FlowPath
from ztunnel.flows import MAX_KNOWN, MAX_SEEN, FlowReporter
from ztunnel.mesh.errors import Flag
from ztunnel.mesh.workloads import Workload
from ztunnel.runtime.metrics import UNKNOWN, Metrics, Series, Traffic

CLIENT = replace(workload("client", "10.0.0.1", account="client"), canonical_name="shop", canonical_revision="v2")
SERVER = replace(workload("server", "10.0.0.2", namespace="back"), workload_name="server-set")
IDENTITIES = ("spiffe://cluster.local/ns/default/sa/client", "spiffe://cluster.local/ns/back/sa/default")
PATH = FlowPath(
    Direction.OUTBOUND,
    CLIENT.uid,
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
)
END = FlowEnd(1, "10.0.0.1", 4000, up_bytes=10, down_bytes=100)
FAILURE = FlowFailure(2, "10.0.0.1", 4001, flag=Flag.DENY, error="no")
OPENED = FlowNews(PATH, 1, opened=1, changed=1, with_up=1, up_bytes=10, with_down=1, down_bytes=100)
SECURE = FlowNews(PATH, 1, opened=1, with_up=1, up_bytes=10, with_down=1, down_bytes=100, ends=(END,))
CLOSED = FlowNews(PATH, 1, changed=1, with_up=1, up_bytes=10, with_down=1, down_bytes=100, ends=(END,))
FAILED = FlowNews(PATH, 1, changed=1, with_up=1, up_bytes=10, with_down=1, down_bytes=100, failures=(FAILURE,))
PLAIN_PATH = FlowPath(Direction.INBOUND, SERVER.uid, ("10.0.0.2", 8080), "10.0.0.2:8080", mutual_tls=False)
PLAIN = FlowNews(PLAIN_PATH, 1, opened=1, changed=1)
but = msgspec.structs.replace


class Desk:
    """A reporter with its metrics and a clock that a test turns."""

    def __init__(self, max_series: int = 20_000) -> None:
        self.metrics = Metrics(max_series=max_series)
        self.now = 0.0
        self.known: dict[str, Workload] = {each.uid: each for each in (CLIENT, SERVER)}
        self.reporter = FlowReporter(self.metrics, self.known.get, lambda: self.now)

    def take(self, *news: FlowNews, worker: int = 0) -> None:
        self.reporter.take(worker, "", news, 0)


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
    desk.take(PLAIN)
    ((labels, _),) = values(desk.metrics.tcp_opened).items()
    assert labels == Traffic(reporter="destination")


def test_whom_the_mesh_names_is_a_principal_as_destination_and_not_as_source(desk: Desk) -> None:
    # Source: Istio ztunnel `proxy/metrics.rs`, with_source and with_destination.
    desk.take(but(PLAIN, path=but(PLAIN_PATH, source_uid=CLIENT.uid, destination_uid=SERVER.uid)))
    ((labels, _),) = values(desk.metrics.tcp_opened).items()
    assert (labels.source_principal, labels.destination_principal) == (UNKNOWN, str(SERVER.identity))
    assert labels.connection_security_policy == UNKNOWN


def test_a_failure_shows_in_the_flag_of_what_ends_with_it(desk: Desk) -> None:
    desk.take(OPENED, FAILED)
    assert [labels.response_flags for labels in values(desk.metrics.tcp_opened)] == ["-"]
    assert [labels.response_flags for labels in values(desk.metrics.tcp_failed)] == ["DENY"]
    assert [labels.response_flags for labels in values(desk.metrics.tcp_closed)] == ["DENY"]
    # One series of bytes for a connection, however it ends: Istio takes it when the connection begins.
    assert {labels.response_flags: value for labels, value in values(desk.metrics.tcp_received_bytes).items()} == {"-": 20}
    assert {labels.response_flags: value for labels, value in values(desk.metrics.tcp_sent_bytes).items()} == {"-": 200}


def open_now(desk: Desk) -> dict[str, float]:
    return {labels[0]: value for labels, value in desk.metrics.tcp_sockets_open._values.items() if value}


def test_open_connections_are_counted_until_they_close_or_their_worker_dies(desk: Desk) -> None:
    for worker in (0, 1):
        desk.take(OPENED, OPENED, worker=worker)
        desk.take(PLAIN, worker=worker)
    assert open_now(desk) == {"source": 4, "destination": 2}
    desk.take(CLOSED, worker=0)
    desk.take(SECURE, worker=0)
    assert open_now(desk) == {"source": 3, "destination": 2}
    desk.reporter.worker_died(0, "killed")
    assert open_now(desk) == {"source": 2, "destination": 1}
    desk.reporter.worker_died(0, "killed again")
    desk.reporter.worker_died(1, "killed")
    assert open_now(desk) == {}
    assert desk.metrics.worker_restarts._values == {(): 3.0}


def test_records_that_were_lost_are_a_limit_that_was_hit(desk: Desk) -> None:
    desk.reporter.take(0, "", [], 7)
    desk.reporter.take(0, "", [], 0)
    assert desk.metrics.limit_hits._values == {("flow_records",): 7}


def test_a_pods_last_traffic_is_remembered_until_it_is_gone_and_within_bounds(desk: Desk) -> None:
    desk.now = 5.0
    desk.take(SECURE, PLAIN)
    assert desk.reporter.last_seen == {CLIENT.uid: 5.0, SERVER.uid: 5.0}
    desk.reporter.forget([CLIENT.uid, "never seen"])
    assert list(desk.reporter.last_seen) == [SERVER.uid]
    for number in range(MAX_SEEN + 10):
        desk.take(but(PLAIN, path=but(PLAIN_PATH, pod_uid=f"u{number}")))
    assert len(desk.reporter.last_seen) == MAX_SEEN
    assert SERVER.uid not in desk.reporter.last_seen


# The log


def test_only_the_end_is_a_line(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        desk.take(OPENED)
        assert caplog.records == []
        desk.take(CLOSED)
    assert len(caplog.records) == 1


def test_a_batch_counts_as_its_records_one_by_one(desk: Desk) -> None:
    quiet = FlowNews(PATH, 1, with_up=1, up_bytes=10)
    one_by_one = [OPENED, quiet, FAILED, but(SECURE, with_up=0, up_bytes=0), but(SECURE, ends=(), failures=(FAILURE,))]
    together = FlowNews(
        PATH, 5, opened=3, changed=2, with_up=4, up_bytes=40, with_down=4, down_bytes=400, ends=(END,), failures=(FAILURE, FAILURE)
    )
    # No room for anything: what is over a bound is counted record by record too.
    crowded = Desk(max_series=0), Desk(max_series=0)
    for single, whole in ((desk, Desk()), crowded):
        for news in one_by_one:
            single.take(news)
        whole.take(together)
        own = [
            [line for line in each.metrics.exposition("")[1].splitlines() if not line.startswith((b"process_", b"#"))]
            for each in (single, whole)
        ]
        assert own[0] == own[1]
        assert single.reporter.last_seen == whole.reporter.last_seen
    assert b"overflow" in crowded[1].metrics.exposition("")[1]


def test_a_workload_that_changes_changes_the_labels(desk: Desk) -> None:
    desk.take(SECURE)
    desk.known[CLIENT.uid] = replace(CLIENT, canonical_revision="v3")
    desk.take(SECURE)
    assert {labels.source_version: count for labels, count in values(desk.metrics.tcp_opened).items()} == {"v2": 1, "v3": 1}


def test_paths_are_remembered_within_bounds(desk: Desk) -> None:
    for number in range(MAX_KNOWN + 10):
        desk.take(but(SECURE, path=but(PATH, target=f"10.0.0.2:{number}")))
    assert len(desk.reporter._known) == MAX_KNOWN
