"""`scripts/bench same-node`: its rows, what they are judged against, and that the load went as the setting says."""

from __future__ import annotations

import pytest

from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.figures import Measurement, Verdict, judge
from scripts.benchmarks.rows import Against
from scripts.benchmarks.same_node import JUDGED, RIVAL, check, plan, same_node_rows
from scripts.benchmarks.table import table

ROWS = {row.name: row for row in same_node_rows()}


def bulk(way: str, megabytes: float, errors: int = 0) -> Measurement:
    return Measurement(0, "up-1", way, {"bytes": megabytes * 1e6, "seconds": 1.0, "errors": errors})


def ping(way: str, microseconds: float) -> Measurement:
    return Measurement(0, "ping", way, {"p50_us": microseconds, "p99_us": microseconds, "errors": 0})


def test_rows_are_those_in_which_the_settings_can_differ() -> None:
    speed = {"bulk-up-1", "bulk-down-1", "bulk-up-8", "bulk-down-8", "requests-32", "connections-1", "connections-16"}
    assert set(ROWS) == {*speed, "ping-p50", "ping-p99", "cpu-per-gb", "cpu-per-1000"}
    assert {row.against for row in ROWS.values()} == {Against.BASE}


@pytest.mark.parametrize(
    ("name", "floor"), [("bulk-up-1", 0.93), ("cpu-per-gb", 1.07), ("ping-p99", 1.1), ("requests-32", 0.9), ("cpu-per-1000", 1.1)]
)
def test_no_worse_allows_for_noise_and_nothing_else(name: str, floor: float) -> None:
    assert (ROWS[name].floor, ROWS[name].aim) == (floor, floor)


@pytest.mark.parametrize(("plaintext", "verdict"), [(200, Verdict.OK), (94, Verdict.OK), (92, Verdict.SHORT)])
def test_plaintext_is_judged_beside_encrypt(plaintext: float, verdict: Verdict) -> None:
    figure = judge(ROWS["bulk-up-1"], [bulk(RIVAL, 100), bulk(JUDGED, plaintext)], (RIVAL,), judged=JUDGED)
    assert figure.ratio == pytest.approx(plaintext / 100)
    assert (figure.rival, figure.verdict) == (RIVAL, verdict)
    assert "*" not in "".join(table([figure], (RIVAL, JUDGED), None))


def test_less_latency_is_better() -> None:
    assert judge(ROWS["ping-p50"], [ping(RIVAL, 100), ping(JUDGED, 60)], (RIVAL,), judged=JUDGED).verdict is Verdict.OK
    assert judge(ROWS["ping-p50"], [ping(RIVAL, 60), ping(JUDGED, 100)], (RIVAL,), judged=JUDGED).verdict is Verdict.SHORT


@pytest.mark.parametrize("failing", [RIVAL, JUDGED])
def test_errors_of_either_count(failing: str) -> None:
    measurements = [bulk(way, 100, errors=int(way == failing)) for way in (RIVAL, JUDGED)]
    assert judge(ROWS["bulk-up-1"], measurements, (RIVAL,), judged=JUDGED).verdict is Verdict.ERRORS


def test_a_load_that_goes_as_set_is_measured() -> None:
    check(RIVAL, {"HBONE"}, tunnels=True)
    check(JUDGED, {"LOCAL"}, tunnels=False)


@pytest.mark.parametrize(
    ("setting", "protocols", "tunnels", "complaint"),
    [
        (RIVAL, {"HBONE"}, False, "no tunnels"),
        (RIVAL, {"LOCAL"}, True, "went as LOCAL"),
        (JUDGED, {"LOCAL"}, True, "there are tunnels"),
        (JUDGED, {"HBONE", "LOCAL"}, False, "went as HBONE, LOCAL"),
        (JUDGED, set(), False, "nothing that the agent knows"),
    ],
)
def test_a_load_that_went_otherwise_is_refused(setting: str, protocols: set[str], tunnels: bool, complaint: str) -> None:
    with pytest.raises(BenchError, match=f"{setting}: .*{complaint}"):
        check(setting, protocols, tunnels=tunnels)


def test_rows_are_chosen_with_several_workers_too() -> None:
    assert [row.name for row in plan(["--workers", "2", "--only", "ping-*"]).rows] == ["ping-p50", "ping-p99"]
    assert plan(["--quick"]).options.rounds < plan([]).options.rounds
    with pytest.raises(BenchError, match="cpu-per-gb"):
        _ = plan(["--only", "nonsense"]).rows
