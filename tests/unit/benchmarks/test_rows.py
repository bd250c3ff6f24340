"""The table's rows are all there and can be computed from what the scenarios measure."""

from __future__ import annotations

import pytest

from scripts.benchmarks import scenarios
from scripts.benchmarks.rows import Against, Better, Row, rows

VALUES = {"bytes": 2e9, "count": 4000, "seconds": 2.0, "p50_us": 50.0, "p99_us": 80.0, "cpu_seconds": 3.0}
VALUES |= {"resident_bytes": 40e6, "grown_bytes": 1e6}
ALL = [*rows(1), *rows(2)]


def name(row: Row) -> str:
    return row.name


@pytest.mark.parametrize("row", ALL, ids=name)
def test_every_row_is_made_of_scenarios_that_exist(row: Row) -> None:
    assert set(row.scenarios) <= {*scenarios.ONCE, *scenarios.EVERY_ROUND}
    assert row.value(dict.fromkeys(row.scenarios, VALUES)) > 0


def test_every_scenario_is_in_a_row() -> None:
    assert {scenario for row in rows(1) for scenario in row.scenarios} == {*scenarios.ONCE, *scenarios.EVERY_ROUND}


@pytest.mark.parametrize("row", ALL, ids=name)
def test_an_aim_is_no_easier_than_its_floor(row: Row) -> None:
    assert row.reaches(row.aim, row.floor)
    worse = row.floor - 0.01 if row.better is Better.HIGHER else row.floor + 0.01
    assert not row.reaches(worse, row.floor)


def test_units() -> None:
    values = {row.name: row.value(dict.fromkeys(row.scenarios, VALUES)) for row in rows(1)}
    assert values["bulk-up-1"] == 1000  # MB/s
    assert values["cpu-per-gb"] == 1.5
    assert values["connections-16"] == 2000
    assert values["cpu-per-1000"] == 0.75
    assert values["rss-base"] == 40
    assert values["neighbour-bulk"] == 1


def test_several_workers_are_judged_by_what_several_connections_reach() -> None:
    assert [row.name for row in rows(2)] == ["bulk-up-8", "bulk-down-8", "requests-32", "requests-256", "connections-16"]
    assert all(row.against is Against.ENVOY for row in rows(2))
