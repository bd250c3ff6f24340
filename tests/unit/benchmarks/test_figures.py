"""Verdicts: medians of per-round ratios, the better Envoy, and nothing from what was not measured."""

from __future__ import annotations

import pytest

from scripts.benchmarks.figures import OURS, Measurement, Verdict, judge
from scripts.benchmarks.rows import Row, rows

ENVOYS = ("envoy", "envoy-large")
ONE = {row.name: row for row in rows(1)}
BULK, PING, MEMORY = ONE["bulk-up-1"], ONE["ping-p99"], ONE["rss-base"]


def bulk(way: str, *megabytes: float, errors: float = 0) -> list[Measurement]:
    """One measurement a round."""
    return [
        Measurement(number, "up-1", way, {"bytes": each * 1e6, "seconds": 1.0, "errors": errors}) for number, each in enumerate(megabytes)
    ]


def pings(way: str, *microseconds: float) -> list[Measurement]:
    return [Measurement(number, "ping", way, {"p99_us": each}) for number, each in enumerate(microseconds)]


def test_the_ratio_is_the_median_of_the_rounds_own() -> None:
    # The medians of the two ways would give 100 / 200; the machine was slow in rounds that were slow for both.
    figure = judge(BULK, bulk("envoy", 100, 200, 400) + bulk(OURS, 100, 220, 80), ENVOYS)
    assert figure.medians == {"envoy": 200, OURS: 100}
    assert figure.ratios == (1.0, 1.1, 0.2)
    assert figure.ratio == 1.0
    assert figure.verdict is Verdict.OK


@pytest.mark.parametrize(("row", "measure", "better"), [(BULK, bulk, 300), (PING, pings, 100)])
def test_the_better_envoy_is_the_rival(row: Row, measure: object, better: float) -> None:
    assert callable(measure)
    for rival, other in (ENVOYS, ENVOYS[::-1]):
        figure = judge(row, measure(rival, better) + measure(other, 200) + measure(OURS, 200), ENVOYS)
        assert figure.rival == rival


def test_a_floor_counts_as_reached_from_the_good_side() -> None:
    assert judge(BULK, bulk("envoy", 100) + bulk(OURS, 95), ENVOYS).verdict is Verdict.OK
    assert judge(BULK, bulk("envoy", 100) + bulk(OURS, 94), ENVOYS).verdict is Verdict.SHORT
    assert judge(PING, pings("envoy", 100) + pings(OURS, 105), ENVOYS).verdict is Verdict.OK
    assert judge(PING, pings("envoy", 100) + pings(OURS, 106), ENVOYS).verdict is Verdict.SHORT


def test_a_row_that_bounds_itself_has_no_rival() -> None:
    idle = [Measurement(0, "idle", way, {"resident_bytes": size, "grown_bytes": 0}) for way, size in (("envoy", 66e6), (OURS, 46e6))]
    figure = judge(MEMORY, idle, ENVOYS)
    assert figure.rival is None
    assert figure.ratio == 46
    assert figure.verdict is Verdict.SHORT


def test_what_was_not_measured_has_no_verdict() -> None:
    for measurements in ([], bulk("envoy", 100), bulk(OURS, 100)):
        assert judge(BULK, measurements, ENVOYS).verdict is Verdict.MISSING


def test_rounds_without_a_rival_do_not_count() -> None:
    assert judge(BULK, bulk("envoy", 100) + bulk(OURS, 100, 300), ENVOYS).ratios == (1.0,)


def test_errors_spoil_a_row_only_where_they_matter() -> None:
    assert judge(BULK, bulk("envoy", 100) + bulk(OURS, 500, errors=2), ENVOYS).verdict is Verdict.ERRORS
    assert judge(BULK, bulk("envoy", 100) + bulk("direct", 900, errors=1) + bulk(OURS, 100), ENVOYS).verdict is Verdict.OK


def test_a_way_without_proxies_has_no_figure_of_their_cpu() -> None:
    row = ONE["cpu-per-1000"]

    def shorts(way: str, cpu: dict[str, float]) -> list[Measurement]:
        return [Measurement(0, each, way, {"count": 500, "seconds": 1, **cpu}) for each in row.scenarios]

    figure = judge(row, shorts("direct", {}) + shorts("envoy", {"cpu_seconds": 0.1}) + shorts(OURS, {"cpu_seconds": 0.05}), ENVOYS)
    assert figure.medians == {"envoy": 0.2, OURS: 0.1}
    assert figure.verdict is Verdict.OK


def test_gain_over_the_baseline_is_above_one_when_we_are_better() -> None:
    assert judge(BULK, bulk("naive", 20) + bulk(OURS, 100), ENVOYS, "naive").gain == 5
    assert judge(PING, pings("naive", 500) + pings(OURS, 100), ENVOYS, "naive").gain == 5
    assert judge(BULK, bulk(OURS, 100), ENVOYS, "naive").gain is None
