"""`scripts/bench waypoint`: its rows, what both waypoints are told, and what h2load says."""

from __future__ import annotations

from typing import Any

import pytest

from scripts.benchmarks import h2load
from scripts.benchmarks.envoy_waypoint import Served, waypoint
from scripts.benchmarks.figures import OURS, Measurement, Verdict, judge
from scripts.benchmarks.rows import Values
from scripts.benchmarks.waypoint import plan, way_names
from scripts.benchmarks.waypoint_manifests import Service, gateway, manifests
from scripts.benchmarks.waypoint_rows import WAYPOINT_ROWS
from scripts.benchmarks.waypoint_ways import RIVAL, SERVICES
from tests.kit.pki import FakePki
from ztunnel.mesh.manifests.parse import parse

ROWS = {row.name: row for row in WAYPOINT_ROWS}


def judged(name: str, scenario: str, ours: Values, envoys: Values) -> Verdict:
    return judge(ROWS[name], [Measurement(0, scenario, OURS, ours), Measurement(0, scenario, RIVAL, envoys)], (RIVAL,)).verdict


def test_floors_are_those_that_were_set() -> None:
    assert {name: (row.floor, row.aim) for name, row in ROWS.items() if name != "cpu-request"} == {
        "requests-32": (0.8, 1.2),
        "added-p50": (1.2, 0.9),
        "added-p99": (1.2, 0.9),
        "grpc-32": (0.5, 1.0),
        "down-body": (0.9, 1.1),
        "up-body": (0.9, 1.1),
        "many": (1.3, 1.05),
    }


@pytest.mark.parametrize(("ours", "verdict"), [(220, Verdict.OK), (221, Verdict.SHORT)])
def test_what_counts_is_what_the_waypoint_adds(ours: float, verdict: Verdict) -> None:
    plain = {"plain_p50_us": 100.0, "errors": 0.0}
    assert judged("added-p50", "single", {**plain, "p50_us": ours}, {**plain, "p50_us": 200.0}) is verdict


@pytest.mark.parametrize(("many", "verdict"), [(1.3, Verdict.OK), (1.4, Verdict.SHORT)])
def test_much_of_everything_is_compared_with_little(many: float, verdict: Verdict) -> None:
    taken = [("requests-32", 1.0), ("requests-32-many", many)]
    measurements = [Measurement(0, name, OURS, {"cpu_seconds": seconds, "count": 1000.0, "errors": 0.0}) for name, seconds in taken]
    assert judge(ROWS["many"], measurements, (RIVAL,)).verdict is verdict


def test_plan() -> None:
    assert plan([]).ways == way_names() == (RIVAL, OURS)
    assert plan(["--alone", OURS]).ways == (OURS,)
    assert [row.name for row in plan(["--only", "added-*"]).rows] == ["added-p50", "added-p99"]


def test_manifests_can_be_read_and_say_as_much_as_they_should() -> None:
    for service in SERVICES:
        documents = list(manifests(service))
        for document in documents:
            parse(document, "test")
        assert (rules(documents, "HTTPRoute"), rules(documents, "AuthorizationPolicy")) == (service.size, service.size)
    parse(gateway("10.0.0.1"), "test")


def rules(documents: list[Any], kind: str) -> int:
    return sum(len(each["spec"]["rules"]) for each in documents if each["kind"] == kind)


def test_envoy_is_told_as_much() -> None:
    pki = FakePki()
    config = waypoint(
        pki.credentials(pki.identity("w")), pki.identity("c"), pki.identity("s"), [Served("10.96.9.1:80", ("10.0.0.1", 9001), 7)]
    )
    text = str(config)
    assert text.count("'x-route'") == text.count("policy[allow]-rule") == 7


def test_a_load_asks_for_what_the_last_rule_and_route_are_for() -> None:
    service = Service("a", "10.96.9.1", 9001, 1000)
    assert (service.url, service.route) == ("http://10.96.9.1:80/p999/x", "x-route: 999")


REPORT = """
finished in 2.00s, 107776.00 req/s, 5.04MB/s
requests: 215560 total, 215584 started, 215552 done, 215540 succeeded, 12 failed, 3 errored, 1 timeout
status codes: 215540 2xx, 0 3xx, 8 4xx, 4 5xx
"""


def test_what_h2load_says() -> None:
    assert h2load.parse(REPORT) == {"count": 215540.0, "seconds": 2.0, "errors": 16.0}
    assert h2load.parse(REPORT.replace("2.00s", "250.50ms"))["seconds"] == pytest.approx(0.2505)
    with pytest.raises(h2load.UnreadableError):
        h2load.parse("Could not connect")
