"""Names and labels, spelled out, and the bound on series."""

from __future__ import annotations

from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from ztunnel.runtime.metrics import TEXT_TYPE, Metrics, Traffic

TRAFFIC = (
    "reporter source_workload source_canonical_service source_canonical_revision source_workload_namespace source_principal "
    "source_app source_version source_cluster destination_service destination_service_namespace destination_service_name "
    "destination_workload destination_canonical_service destination_canonical_revision destination_workload_namespace "
    "destination_principal destination_app destination_version destination_cluster request_protocol response_flags "
    "connection_security_policy"
)


def samples(metrics: Metrics) -> dict[str, float]:
    _, body = metrics.exposition("")
    return {
        sample.name + str(sorted(value for value in sample.labels.values() if value not in ("unknown", "-", "tcp"))): sample.value
        for family in parse_text(body.decode())
        for sample in family.samples
    }


def own(shown: dict[str, float]) -> dict[str, float]:
    """What the program counts itself: the rest is the operating system's, and moves between two readings."""
    return {name: value for name, value in shown.items() if not name.startswith("process_")}


def test_names_and_labels_are_an_interface() -> None:
    traffic = tuple(TRAFFIC.split())
    assert Metrics().names() == {
        "istio_tcp_connections_opened": traffic,
        "istio_tcp_connections_closed": traffic,
        "istio_tcp_connections_failed": traffic,
        "istio_tcp_received_bytes": traffic,
        "istio_tcp_sent_bytes": traffic,
        "istio_tcp_sockets_open": ("reporter",),
        "istio_build": ("component", "tag"),
        "ztunnel_limit_hits": ("limit",),
        "ztunnel_enrolled_pods": (),
        "ztunnel_certificates_expiry_seconds": ("identity",),
        "ztunnel_refused_manifests": (),
        "ztunnel_kubernetes_requests": ("verb", "code"),
        "ztunnel_kubernetes_events": ("kind",),
        "ztunnel_kubernetes_failures": ("kind",),
        "ztunnel_kubernetes_following": ("kind",),
        "ztunnel_redirection_repairs": (),
        "ztunnel_worker_restarts": (),
        "ztunnel_cni_requests": ("command", "answer"),
        "ztunnel_bugs": (),
    }


def test_counters_end_in_total_and_all_traffic_labels_are_there() -> None:
    metrics = Metrics("1.2")
    metrics.tcp_opened.add(2, *Traffic(reporter="source", source_workload="cart"))
    metrics.tcp_opened.add(1, *Traffic(reporter="source", source_workload="cart"))
    _, body = metrics.exposition("text/plain")
    line = next(line for line in body.decode().splitlines() if line.startswith("istio_tcp_connections_opened_total{"))
    assert line.endswith("} 3.0")
    assert line.count('="unknown"') == 19
    assert 'request_protocol="tcp"' in line
    assert 'istio_build{component="ztunnel",tag="1.2"} 1.0' in body.decode()
    assert "process_open_fds" in body.decode()
    assert "_created" not in body.decode()
    assert "ztunnel_bugs_total 0.0" in body.decode()


def test_openmetrics_when_it_is_accepted() -> None:
    metrics = Metrics()
    metrics.tcp_opened.add(1, *Traffic())
    kind, body = metrics.exposition("application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert kind.startswith("application/openmetrics-text")
    assert body.endswith(b"# EOF\n")
    assert {family.name for family in parse_openmetrics(body.decode())} >= {"istio_tcp_connections_opened", "istio_build"}  # type: ignore[no-untyped-call]  # published without types
    assert metrics.exposition("*/*")[0] == TEXT_TYPE


def test_gauges_are_set_and_watched() -> None:
    metrics = Metrics()
    metrics.enrolled_pods.set(5)
    metrics.enrolled_pods.set(3)
    metrics.tcp_sockets_open.add(2, "source")
    metrics.tcp_sockets_open.add(-1, "source")
    metrics.certificates_expiry.watch(lambda: {("spiffe://a",): 60.0})
    shown = samples(metrics)
    assert shown["ztunnel_enrolled_pods[]"] == 3
    assert shown["istio_tcp_sockets_open['source']"] == 1
    assert shown["ztunnel_certificates_expiry_seconds['spiffe://a']"] == 60


def test_series_are_bounded_and_nothing_is_lost() -> None:
    metrics = Metrics(max_series=3)
    for number in range(10):
        metrics.tcp_sockets_open.add(1, f"r{number}")
    metrics.certificates_expiry.watch(lambda: {(f"id{number}",): 1.0 for number in range(10)})
    shown = samples(metrics)
    assert shown["istio_tcp_sockets_open['overflow']"] == 7
    assert shown["istio_tcp_sockets_open['r2']"] == 1
    assert shown["ztunnel_limit_hits_total['metric_series']"] == 7
    assert len([name for name in shown if name.startswith("ztunnel_certificates")]) == 3
    assert own(samples(metrics)) == own(shown), "a second scrape sees the same"


def test_hostile_label_values_stay_in_their_quotes() -> None:
    metrics = Metrics()
    metrics.tcp_sockets_open.add(1, 'a"} 5\nforged{x="\ud800' + "y" * 5000)
    _, body = metrics.exposition("")
    lines = [line for line in body.decode().splitlines() if "sockets_open{" in line]
    assert len(lines) == 1
    assert not any(line.startswith("forged") for line in body.decode().splitlines())
    assert len(lines[0]) < 700
