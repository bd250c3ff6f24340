"""The table that a person reads."""

from __future__ import annotations

from scripts.benchmarks.figures import OURS, Measurement, judge
from scripts.benchmarks.rows import rows
from scripts.benchmarks.table import table

ENVOYS = ("envoy", "envoy-large")
WAYS = ("direct", *ENVOYS, OURS)
BULK, PING = (row for row in rows(1) if row.name in {"bulk-up-1", "ping-p50"})


def measured(way: str, megabytes: float, microseconds: float) -> list[Measurement]:
    return [
        Measurement(0, "up-1", way, {"bytes": megabytes * 1e6, "seconds": 1}),
        Measurement(0, "ping", way, {"p50_us": microseconds, "p99_us": 0}),
    ]


def test_columns_stand_below_each_other_and_the_verdict_ends_the_line() -> None:
    measurements = (
        measured("direct", 4000, 31.5) + measured("envoy", 700, 120) + measured("envoy-large", 800, 130) + measured(OURS, 720, 100)
    )
    lines = table([judge(row, measurements, ENVOYS) for row in (BULK, PING)], WAYS, None)
    assert lines == [
        "figure                                   direct  envoy  envoy-large  ztunnel  ratio  lowest–highest   floor   aim",
        "bulk up, 1 connection, MB/s               4,000    700         800*      720   0.90       0.90–0.90  ≥ 0.95  1.25  SHORT",
        "request/response, 1 connection, p50, µs    31.5   120*          130      100   0.83       0.83–0.83  ≤ 1.05   0.9  ok",
    ]


def test_what_is_missing_is_a_dash() -> None:
    header, line = table([judge(BULK, measured("direct", 4000, 0), ENVOYS)], WAYS, None)
    assert header.split()[1:6] == [*WAYS, "ratio"]
    assert line.split()[-9:] == ["4,000", "-", "-", "-", "-", "-", "≥", "0.95", "1.25"] or line.endswith("1.25  -")


def test_a_baseline_adds_what_we_gain_over_it() -> None:
    measurements = measured("naive", 100, 500) + measured("envoy", 700, 120) + measured(OURS, 700, 100)
    lines = table([judge(row, measurements, ENVOYS, "naive") for row in (BULK, PING)], ("naive", "envoy", OURS), "naive")
    assert "× naive" in lines[0]
    assert lines[1].split()[-2:] == ["7", "ok"]
    assert lines[2].split()[-2:] == ["5", "ok"]


def test_errors_are_counted_at_the_end() -> None:
    broken = [Measurement(0, "up-1", OURS, {"bytes": 1e9, "seconds": 1, "errors": 3})]
    (_, line) = table([judge(BULK, broken + measured("envoy", 700, 1), ENVOYS)], WAYS, None)
    assert line.endswith("ERRORS 3")
