"""Tables and descriptions, as kubectl's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ztunnel.lab.objects import KINDS
from ztunnel.lab.printers import Look, age, aligned, as_list, description, names, nothing_found, pod_state, table
from ztunnel.mesh.manifests.tree import Tree, put

NOW = datetime(2030, 1, 1, 12, tzinfo=UTC)


def _pod(**status: object) -> Tree:
    return {
        "kind": "Pod",
        "metadata": {
            "name": "web",
            "namespace": "shop",
            "labels": {"b": "2", "a": "1"},
            "creationTimestamp": "2030-01-01T11:59:00Z",
            "annotations": {"ambient.istio.io/redirection": "enabled"},
        },
        "spec": {"nodeName": "node-1", "containers": [{"name": "c", "image": "echo", "ports": [{"containerPort": 80}]}, {"name": "d"}]},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "containerStatuses": [{"name": "c", "ready": True, "restartCount": 2, "state": {"running": {"startedAt": "x"}}}, {"name": "d"}],
            **status,
        },
    }


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (-5, "0s"),
        (119, "119s"),
        (120, "2m"),
        (150, "2m30s"),
        (599, "9m59s"),
        (660, "11m"),
        (3 * 3600, "3h"),
        (47 * 3600, "47h"),
        (72 * 3600, "3d"),
    ],
)
def test_ages_are_rounded_as_kubectl_does(seconds: int, shown: str) -> None:
    assert age((NOW - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ"), NOW) == shown


def test_an_age_that_is_none() -> None:
    assert age("yesterday", NOW) == "<unknown>"


def test_pods_narrow_and_wide() -> None:
    assert table("Pod", [_pod()], Look(), NOW) == [["NAME", "READY", "STATUS", "RESTARTS", "AGE"], ["web", "1/2", "Running", "2", "60s"]]
    wide = table("Pod", [_pod()], Look(wide=True, namespaces=True, labels=True, headings=False), NOW)
    assert wide == [["shop", "web", "1/2", "Running", "2", "60s", "10.0.0.1,fd00::1", "node-1", "enabled", "a=1,b=2"]]


def test_a_pods_state_is_what_it_suffers_from() -> None:
    assert pod_state(_pod(containerStatuses=[{"state": {"waiting": {"reason": "CrashLoopBackOff"}}}])) == "CrashLoopBackOff"
    assert pod_state(_pod(containerStatuses=[{"state": {"terminated": {"reason": "Completed"}}}])) == "Completed"
    assert pod_state({}) == "Pending"
    deleted = _pod()
    put(deleted, "2030-01-01T00:00:00Z", "metadata", "deletionTimestamp")
    assert pod_state(deleted) == "Terminating"


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_kind_has_a_table_that_an_empty_object_fits(kind: str) -> None:
    for wide in (False, True):
        heading, row = table(kind, [{"kind": kind, "metadata": {"name": "x"}}], Look(wide=wide), NOW)
        assert len(heading) == len(row)
        assert (heading[0], row[0]) == ("NAME", "x")


def test_services() -> None:
    service: Tree = {
        "metadata": {"name": "web", "creationTimestamp": "2030-01-01T12:00:00Z"},
        "spec": {
            "type": "ClusterIP",
            "clusterIP": "10.96.0.1",
            "clusterIPs": ["10.96.0.1", "fd96::1"],
            "ports": [{"port": 80, "protocol": "TCP"}],
        },
    }
    assert table("Service", [service], Look(headings=False), NOW) == [["web", "ClusterIP", "10.96.0.1,fd96::1", "<none>", "80/TCP", "0s"]]
    headless: Tree = {"metadata": {"name": "h"}, "spec": {"clusterIP": "None", "clusterIPs": ["None"]}}
    assert table("Service", [headless], Look(headings=False), NOW)[0][2] == "None"


def test_columns_are_aligned_without_trailing_spaces() -> None:
    assert aligned([["NAME", "X"], ["longer-name", ""], ["a", "b"]]) == "NAME          X\nlonger-name\na             b"
    assert aligned([["a", "b"]], [4]) == "a      b"
    assert aligned([]) == ""


def test_a_description_shows_containers_and_events() -> None:
    shown = description(_pod(), [{"when": "2030-01-01T11:59:50Z", "reason": "Started", "message": "started container c"}], NOW)
    assert "IPs:              10.0.0.1, fd00::1" in shown
    assert "  10s     Started                 started container c" in shown
    assert "    Restart Count:  2" in shown


def test_lists_and_names() -> None:
    assert as_list([_pod()])["kind"] == "List"
    assert names([_pod()]) == "pod/web"
    assert nothing_found("Pod", "shop") == "No resources found in shop namespace."
    assert nothing_found("Pod", "") == nothing_found("Node", "shop") == "No resources found"
