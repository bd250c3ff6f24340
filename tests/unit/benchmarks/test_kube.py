"""What `scripts/bench kube` writes into the API server, and what it asks of the figures."""

from __future__ import annotations

from pathlib import Path

from scripts.benchmarks.figures import OURS, Measurement, Verdict
from scripts.benchmarks.kube import CHURN, IDLE, ROWS, SYNC, conclude, plan, pod, service, status_of
from ztunnel.mesh.derive import MeshOptions, derive
from ztunnel.mesh.manifests.parse import key, parse


def test_quick_is_a_tenth() -> None:
    assert (plan([]).pods, plan(["--quick"]).pods, plan(["--quick", "--services", "100"]).services) == (5000, 500, 10)


def test_each_service_has_its_pods() -> None:
    documents = []
    for number in range(20):
        (_, path, body), (_, _, status) = pod(number, 10)
        assert isinstance(body, dict)
        assert isinstance(status, dict)
        metadata = {**body["metadata"], "namespace": path.split("/")[4], "uid": f"uid-{number}"}
        documents.append({"apiVersion": "v1", "kind": "Pod", **body, **status, "metadata": metadata})
    for number in range(10):
        ((_, path, body),) = service(number)
        assert isinstance(body, dict)
        documents.append({"apiVersion": "v1", "kind": "Service", **body, "metadata": {**body["metadata"], "namespace": path.split("/")[4]}})
    objects = [parse(document, "test") for document in documents]
    state = derive({key(each): each for each in objects}, MeshOptions())
    assert {len(each.endpoints) for each in state.services.values()} == {2}
    assert len({address for each in state.workloads.values() for address in each.addresses}) == 20
    assert status_of(3, 10, ready=False)[1].endswith("/ns3/pods/p3/status")


def test_every_row_is_judged(tmp_path: Path) -> None:
    values = {"seconds": 10.0, "cpu": 0.1, "requests": 1.0, "bytes": 1e6, "pods": 1000.0, "changes": 100.0, "grown": 0.0}
    values |= {"p50_ms": 5.0, "p99_ms": 20.0}
    measurements = [Measurement(0, scenario, OURS, values) for scenario in (SYNC, IDLE, CHURN)]
    figures = conclude(plan(["--json", str(tmp_path / "kube.json")]), measurements)
    assert len(figures) == len(ROWS)
    assert {figure.verdict for figure in figures} == {Verdict.OK}
    assert "late-p99" in (tmp_path / "kube.json").read_text()
    assert {figure.verdict for figure in conclude(plan([]), measurements[:1])} == {Verdict.OK, Verdict.MISSING}
