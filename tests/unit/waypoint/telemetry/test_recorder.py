"""What is counted of requests and connections, under which labels, and what Prometheus sees of it."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from waypoint.http.messages import Client, Headers, Request, Response
from waypoint.telemetry.exposition import RequestMetrics
from waypoint.telemetry.increments import Increment
from waypoint.telemetry.recorder import Recorder
from waypoint.telemetry.series import BOUNDS
from waypoint.telemetry.service import ServiceTelemetry
from waypoint.telemetry.summary import Flow, MessageCounter, Summary
from ztunnel.mesh.identity import SpiffeId
from ztunnel.mesh.l7.clusters import Endpoint
from ztunnel.mesh.l7.telemetry import Metric, MetricOverride, PeerWorkload, TelemetrySettings

CART, REVIEWS = SpiffeId("cluster.local", "shop", "cart"), SpiffeId("cluster.local", "shop", "reviews")
PEERS = {
    "10.0.0.1": PeerWorkload("u1", "cart-1", "shop", "cart", "deployment", "cart", "v1", "cart", "v1", "Kubernetes", CART),
    "10.0.0.2": PeerWorkload(
        "u2", "reviews-1", "shop", "reviews-v2", "deployment", "reviews", "v2", "reviews", "v2", "Kubernetes", REVIEWS
    ),
}
CLIENT = Client(CART, "10.0.0.1", 4711, "shop", 80, "10.96.0.1")
ENDPOINT = Endpoint("10.0.0.2", 8080, "u2", REVIEWS, hbone=True)


def service(*overrides: MetricOverride, metrics: bool = True) -> ServiceTelemetry:
    return ServiceTelemetry("reviews.shop.svc.cluster.local", "reviews", "shop", TelemetrySettings(overrides, metrics=metrics))


def summary(of: ServiceTelemetry | None = None, status: int = 200, headers: Headers | None = None, client: Client = CLIENT) -> Summary:
    found = Summary(of or service(), Request(b"GET", b"/", b"reviews", headers or []), client, 0.0)
    found.status, found.endpoint, found.duration, found.bytes_in, found.bytes_out = status, ENDPOINT, 0.02, 3, 2000
    return found


def recorder() -> Recorder:
    made = Recorder()
    made.update(PEERS)
    return made


def counted(increments: list[Increment]) -> dict[str, list[tuple[dict[str, str], float]]]:
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for each in increments:
        found.setdefault(each.metric, []).append((dict(each.labels), each.count))
    return found


def test_a_request_is_counted_with_every_label() -> None:
    counting = recorder()
    of = service()
    counting.request_done(summary(of))
    counting.request_done(summary(of))
    increments = counting.take()
    assert [(each.metric, each.count, each.total) for each in increments] == [
        ("REQUEST_COUNT", 2, 0),
        ("REQUEST_DURATION", 2, 40),
        ("REQUEST_SIZE", 2, 6),
        ("RESPONSE_SIZE", 2, 4000),
    ]
    assert increments[1].buckets[BOUNDS.index(25)] == 2
    assert dict(increments[0].labels) == {
        "reporter": "waypoint",
        "source_workload": "cart",
        "source_canonical_service": "cart",
        "source_canonical_revision": "v1",
        "source_workload_namespace": "shop",
        "source_principal": "spiffe://cluster.local/ns/shop/sa/cart",
        "source_app": "cart",
        "source_version": "v1",
        "source_cluster": "Kubernetes",
        "destination_workload": "reviews-v2",
        "destination_canonical_service": "reviews",
        "destination_canonical_revision": "v2",
        "destination_workload_namespace": "shop",
        "destination_principal": "spiffe://cluster.local/ns/shop/sa/reviews",
        "destination_app": "reviews",
        "destination_version": "v2",
        "destination_cluster": "Kubernetes",
        "destination_service": "reviews.shop.svc.cluster.local",
        "destination_service_name": "reviews",
        "destination_service_namespace": "shop",
        "request_protocol": "http",
        "response_code": "200",
        "response_flags": "-",
        "connection_security_policy": "mutual_tls",
    }
    assert counting.take() == []


def test_requests_that_differ_are_counted_apart() -> None:
    counting = recorder()
    of = service()
    denied = summary(of, 403)
    denied.endpoint, denied.flags = None, "UAEX"
    gone = summary(of, 0)
    gone.flags = "DC"
    stranger = summary(of, client=Client(None, "9.9.9.9", tls=False))
    for each in (denied, gone, stranger):
        counting.request_done(each)
    found = {(labels["response_code"], labels["response_flags"]): labels for labels, _ in counted(counting.take())["REQUEST_COUNT"]}
    assert set(found) == {("403", "UAEX"), ("0", "DC"), ("200", "-")}
    assert found["403", "UAEX"]["destination_workload"] == "unknown"
    assert found["403", "UAEX"]["destination_service_name"] == "reviews"
    assert (found["200", "-"]["source_principal"], found["200", "-"]["connection_security_policy"]) == ("unknown", "unknown")


def test_a_client_whose_address_belongs_to_another_identity_is_named_by_its_certificate() -> None:
    counting = recorder()
    counting.request_done(summary(client=Client(REVIEWS, "10.0.0.1", namespace="shop")))
    ((labels, _),) = counted(counting.take())["REQUEST_COUNT"]
    assert (labels["source_workload"], labels["source_workload_namespace"]) == ("unknown", "shop")
    assert labels["source_principal"] == REVIEWS.uri


@pytest.mark.parametrize(("trailers", "head"), [([(b"grpc-status", b"5")], []), ([], [(b"grpc-status", b"5")])])
def test_grpc_has_its_status_and_counts_messages(trailers: Headers, head: Headers) -> None:
    counting = recorder()
    call = summary(headers=[(b"content-type", b"application/grpc+proto")])
    call.trailers, call.response = trailers, Response(200, head)
    call.request_messages, call.response_messages = 3, 4
    counting.request_done(call)
    found = counted(counting.take())
    ((labels, _),) = found["REQUEST_COUNT"]
    assert (labels["request_protocol"], labels["grpc_response_status"]) == ("grpc", "5")
    assert (found["GRPC_REQUEST_MESSAGES"][0][1], found["GRPC_RESPONSE_MESSAGES"][0][1]) == (3, 4)


def test_mirrored_requests_are_not_told_of() -> None:
    counting = recorder()
    copy = summary()
    copy.mirrored = True
    counting.request_done(copy)
    assert counting.take() == []


def test_tags_are_changed_and_removed_and_metrics_switched_off() -> None:
    overrides = (
        MetricOverride(Metric.REQUESTS, tags=(("mine", "'test'"), ("method", "request.method"), ("source_principal", None))),
        MetricOverride(Metric.REQUESTS, tags=(("response_code", "response.code >= 200 && response.code < 300 ? 'ok' : 'bad'"),)),
        MetricOverride(Metric.RESPONSE_SIZE, disabled=True),
        MetricOverride(Metric.REQUEST_SIZE, disabled=True),
        MetricOverride(Metric.REQUEST_SIZE, disabled=False),
    )
    of = service(*overrides)
    counting = recorder()
    for method in (b"GET", b"PUT"):
        done = summary(of)
        done.request.method = method
        counting.request_done(done)
    found = counted(counting.take())
    assert sorted(found) == ["REQUEST_COUNT", "REQUEST_DURATION", "REQUEST_SIZE"]
    said = [(labels["mine"], labels["method"], labels["response_code"]) for labels, _ in found["REQUEST_COUNT"]]
    assert said == [("test", "GET", "ok"), ("test", "PUT", "ok")]
    assert "source_principal" not in found["REQUEST_COUNT"][0][0]
    assert "source_principal" in found["REQUEST_DURATION"][0][0]
    counting.request_done(summary(service(metrics=False)))
    assert counting.take() == []


def test_connections_and_their_bytes() -> None:
    counting = recorder()
    flow = Flow(service(), CLIENT, 0.0)
    flow.endpoint = ENDPOINT
    counting.tcp_opened(flow)
    flow.received, flow.sent = 10, 20
    found = counted(counting.take())
    assert {name: values[0][1] for name, values in found.items()} == {
        "TCP_OPENED_CONNECTIONS": 1,
        "TCP_RECEIVED_BYTES": 10,
        "TCP_SENT_BYTES": 20,
    }
    assert counting.take() == []
    flow.sent, flow.flags = 25, "UF"
    counting.tcp_closed(flow)
    found = counted(counting.take())
    assert (found["TCP_SENT_BYTES"][0][1], found["TCP_CLOSED_CONNECTIONS"][0][0]["response_flags"]) == (5, "UF")
    assert found["TCP_CLOSED_CONNECTIONS"][0][0]["request_protocol"] == "tcp"


def test_nothing_is_lost_where_labels_do_not_fit() -> None:
    counting = Recorder(max_children=3)
    of = service()
    for status in [*range(200, 210)] * 2:
        counting.request_done(summary(of, status))
    assert sum(count for _, count in counted(counting.take())["REQUEST_COUNT"]) == 20


def test_prometheus_sees_counters_and_histograms() -> None:
    counting, metrics = recorder(), RequestMetrics()
    of = service()
    for _ in range(2):
        counting.request_done(summary(of))
        metrics.add(counting.take())
    metrics.add_shadow({("shop/p", "DENY", "denied"): 2})
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    labels = text.split("istio_requests_total{")[1].split("}")[0]
    assert f"istio_requests_total{{{labels}}} 2.0" in text
    assert 'le="10"' in text
    assert text.count('le="3600000"') == 3
    (count,) = [line for line in text.splitlines() if line.startswith("istio_request_duration_milliseconds_count")]
    assert count.endswith(" 2.0")
    buckets = [line for line in text.splitlines() if line.startswith("istio_request_duration_milliseconds_bucket")]
    assert [line.rpartition(" ")[2] for line in buckets[:6]] == ["0.0", "0.0", "0.0", "0.0", "2.0", "2.0"]
    assert 'waypoint_authorization_dry_run_total{action="DENY",policy="shop/p",result="denied"} 2.0' in text


def test_series_are_bounded() -> None:
    metrics = RequestMetrics(max_series=2)
    metrics.add([Increment("REQUEST_COUNT", (("reporter", str(number)),), 1) for number in range(5)])
    registry = CollectorRegistry()
    registry.register(metrics)
    text = generate_latest(registry).decode()
    assert text.count("istio_requests_total{") == 3
    assert metrics.overflowed == 3
    assert any(line.endswith(" 3.0") and "overflow" in line for line in text.splitlines())


@pytest.mark.parametrize("step", [1, 2, 5, 7, 100])
def test_grpc_messages_are_counted_however_they_are_cut(step: int) -> None:
    body = b"".join(b"\0" + len(each).to_bytes(4, "big") + each for each in (b"", b"abc", b"x" * 20))
    counter = MessageCounter()
    for at in range(0, len(body), step):
        counter.feed(body[at : at + step])
    assert counter.count == 3
