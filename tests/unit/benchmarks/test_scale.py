"""The points of `scripts/bench scale`: what each adds to a mesh, which rows it makes, and what the command line chooses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from scripts.benchmarks import elsewhere
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import OURS, Measurement, Verdict, judge
from scripts.benchmarks.points import BASE, OBJECTS_PER_FILE, SPARE_DESCRIPTORS, Point, manifests, points, rows
from scripts.benchmarks.scale import plan
from scripts.benchmarks.table import table
from tests.kit.builders import mesh
from ztunnel.mesh.rules import Action

MANY = 65536
PRESENT = 4
ALL = {point.name: point for point in points(MANY)}


def objects(point: Point) -> list[dict[str, Any]]:
    """What the point adds to a mesh that has some workloads of its own."""
    files = [json.loads(text)["items"] for text in manifests(point, PRESENT, "server").values()]
    assert all(len(items) <= OBJECTS_PER_FILE for items in files)
    return [item for items in files for item in items]


def selected(point: Point) -> set[str]:
    """Whom its policies select."""
    return {item["spec"]["selector"]["matchLabels"]["app"] for item in objects(point) if item["kind"] == "AuthorizationPolicy"}


def measured(way: str, microseconds: float, rate: float) -> Measurement:
    return Measurement(0, "open-1000", way, {"p50_us": microseconds, "count": rate, "seconds": 1.0, "errors": 0})


@pytest.mark.parametrize("name", ["workloads-1000", "policies-100", "applying-100", "open-10000"])
def test_a_mesh_is_filled_up_to_what_the_point_says(name: str) -> None:
    state = mesh(*objects(ALL[name]))
    assert len(state.workloads) == ALL[name].workloads - PRESENT
    assert len(state.policies) == ALL[name].policies - 1


def test_many_pods_come_in_several_files_and_have_an_address_each() -> None:
    many = replace(BASE, workloads=OBJECTS_PER_FILE + PRESENT + 1)
    assert sorted(manifests(many, PRESENT, "server")) == ["pods-0.json", "pods-1.json"]
    assert len({json.dumps(elsewhere.pod(each)["status"]) for each in range(10_000)}) == 10_000


def test_half_of_the_policies_that_concern_the_server_deny_and_all_come_before_its_own() -> None:
    policies = mesh(*objects(ALL["applying-100"])).policies.values()
    actions = [policy.action for policy in policies]
    assert (actions.count(Action.ALLOW), actions.count(Action.DENY)) == (50, 49)
    assert max(policy.name for policy in policies) < "server"
    assert selected(ALL["applying-100"]) == {"server"}
    assert selected(ALL["policies-100"]) == {"elsewhere"}


def test_as_many_connections_are_open_as_there_are_descriptors_for() -> None:
    few = {point.name: point for point in points(SPARE_DESCRIPTORS + 5000)}
    assert (few["open-1000"].open, few["open-10000"].open) == (1000, 5000)
    assert few["open-10000"].title == "5,000 open connections (no descriptors for 10,000)"
    assert ALL["open-10000"].open == 10_000
    assert {point.open for point in points(200)} == {BASE.open}


def test_every_point_differs_from_the_base_in_one_thing() -> None:
    for point in ALL.values():
        sizes = [(point.workloads, BASE.workloads), (point.policies, BASE.policies), (point.open, BASE.open)]
        assert sum(size > little for size, little in sizes) == 1
        assert sum(size == little for size, little in sizes) == 2


def test_a_point_is_compared_with_the_base_beside_it() -> None:
    by_name = {row.name: row for row in rows([ALL["open-1000"]])}
    measurements = [measured(BASE.name, 500, 2000), measured(OURS, 800, 1800)]
    time, rate = (judge(by_name[name], measurements, (BASE.name,)) for name in ("open-1000", "open-1000-rate"))
    assert (time.ratio, time.verdict) == (1.6, Verdict.SHORT)
    assert (rate.ratio, rate.verdict) == (0.9, Verdict.OK)
    assert "*" not in "".join(table([time, rate], (BASE.name, OURS), None))


def test_a_connection_that_did_not_stay_open_is_an_error_of_its_point() -> None:
    (row, _) = rows([ALL["open-1000"]])
    lost = Measurement(9, "open-1000", OURS, {"errors": 3})
    figure = judge(row, [measured(BASE.name, 500, 2000), measured(OURS, 500, 2000), lost], (BASE.name,))
    assert (figure.ratio, figure.verdict, figure.errors) == (1, Verdict.ERRORS, 3)


def test_only_the_points_of_the_chosen_rows_are_built() -> None:
    asked = plan(["--only", "applying-*-rate", "--only", "workloads-1000"], MANY)
    assert [point.name for point in asked.wanted] == ["workloads-1000", "applying-100", "applying-1000"]
    assert len(asked.rows) == 3
    assert plan([], MANY).wanted == points(MANY)
    with pytest.raises(BenchError, match="open-10000"):
        _ = plan(["--only", "nonsense"], MANY).rows
