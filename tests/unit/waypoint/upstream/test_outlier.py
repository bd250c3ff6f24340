"""Who is ejected, when, and for how long: Envoy's and Istio's numbers."""

from __future__ import annotations

import pytest

from tests.kit.l7 import endpoint
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.outcome import Outcome, ResetReason
from waypoint.upstream.outlier import OutlierDetector
from ztunnel.mesh.l7.clusters import Outlier


def hosts(count: int) -> list[EndpointAtWork]:
    return [EndpointAtWork(endpoint(f"10.0.0.{place}"), 0.0) for place in range(count)]


def judged(settings: Outlier, outcomes: list[Outcome]) -> list[bool]:
    """Of each outcome of the first of ten endpoints: did it eject?"""
    detector, all_hosts = OutlierDetector(settings, 0.0), hosts(10)
    return [detector.judge(all_hosts[0], outcome, all_hosts, 0.0) for outcome in outcomes]


def answers(*statuses: int) -> list[Outcome]:
    return [Outcome(status) for status in statuses]


CONNECT = Outcome(reset=ResetReason.CONNECTION_FAILURE)
TIMEOUT = Outcome(reset=ResetReason.CONNECTION_TIMEOUT)
RESET = Outcome(reset=ResetReason.REMOTE_RESET)


@pytest.mark.parametrize(
    ("settings", "outcomes", "ejects"),
    [
        (Outlier(), answers(500, 500, 500, 500, 500), [0, 0, 0, 0, 1]),
        (Outlier(), answers(500, 501, 502, 503, 599), [0, 0, 0, 0, 1]),
        (Outlier(), answers(500, 500, 500, 500, 200, 500), [0, 0, 0, 0, 0, 0]),
        (Outlier(consecutive_5xx=1), answers(499, 500), [0, 1]),
        (Outlier(consecutive_5xx=0), answers(*[500] * 9), [0] * 9),
        (Outlier(consecutive_5xx=0, consecutive_gateway=2), answers(502, 504), [0, 1]),
        (Outlier(consecutive_5xx=0, consecutive_gateway=2), answers(503, 500, 503), [0, 0, 0]),
        (Outlier(consecutive_5xx=2, consecutive_gateway=2), answers(503, 503), [0, 1]),
        (Outlier(consecutive_5xx=2, http_errors=(429,)), answers(429, 429), [0, 1]),
        (Outlier(consecutive_5xx=2, http_errors=(429,)), answers(429, 500), [0, 1]),
        # failures without an answer count as 503, 504 and 500
        (Outlier(consecutive_5xx=3), [CONNECT, TIMEOUT, RESET], [0, 0, 1]),
        (Outlier(consecutive_5xx=0, consecutive_gateway=2), [CONNECT, TIMEOUT], [0, 1]),
        (Outlier(consecutive_5xx=0, consecutive_gateway=2), [CONNECT, Outcome(reset=ResetReason.LOCAL_RESET, timed_out=True)], [0, 1]),
        (Outlier(consecutive_5xx=0, consecutive_gateway=2), [CONNECT, RESET, CONNECT], [0, 0, 0]),
        # apart: a counter of its own, which any answer puts back
        (Outlier(consecutive_5xx=2, split_local=True), [CONNECT] * 5, [0, 0, 0, 0, 1]),
        (Outlier(consecutive_5xx=2, split_local=True, consecutive_local=2), [CONNECT, *answers(500), CONNECT, CONNECT], [0, 0, 0, 1]),
        (Outlier(split_local=True, consecutive_local=0), [CONNECT] * 9, [0] * 9),
    ],
)
def test_what_ejects(settings: Outlier, outcomes: list[Outcome], ejects: list[int]) -> None:
    assert judged(settings, outcomes) == [bool(each) for each in ejects]


def test_an_ejected_endpoint_is_not_ejected_again() -> None:
    assert judged(Outlier(consecutive_5xx=1), answers(500, 500)) == [True, False]


@pytest.mark.parametrize(
    ("count", "percent", "ejected"),
    [(10, 10, 1), (11, 10, 2), (5, 10, 1), (1, 10, 1), (10, 50, 5), (3, 100, 3), (10, 0, 0)],
)
def test_not_more_than_a_share_is_ejected(count: int, percent: int, ejected: int) -> None:
    detector, all_hosts = OutlierDetector(Outlier(consecutive_5xx=1, max_ejection_percent=percent), 0.0), hosts(count)
    assert sum([detector.judge(each, Outcome(500), all_hosts, 0.0) for each in all_hosts]) == ejected


def test_an_endpoint_that_left_is_not_counted() -> None:
    assert not OutlierDetector(Outlier(consecutive_5xx=1), 0.0).judge(hosts(1)[0], Outcome(500), [], 0.0)


def test_each_ejection_in_a_row_is_longer_up_to_five_minutes() -> None:
    detector, all_hosts = OutlierDetector(Outlier(consecutive_5xx=1), 0.0), hosts(1)
    (host,), now, lengths = all_hosts, 0.0, []
    for _ in range(12):
        assert detector.judge(host, Outcome(500), all_hosts, now)
        began = now
        while host.ejected:
            now += 10.0
            detector.sweep(all_hosts, now)
        lengths.append(now - began)
    assert lengths == [30, 60, 90, 120, 150, 180, 210, 240, 270, 300, 300, 300]


def test_each_healthy_interval_takes_a_step_back() -> None:
    detector, all_hosts = OutlierDetector(Outlier(consecutive_5xx=1), 0.0), hosts(1)
    (host,) = all_hosts
    detector.judge(host, Outcome(500), all_hosts, 0.0)
    host.ejections = 3
    assert not detector.sweep(all_hosts, 89.0)
    assert not detector.sweep(all_hosts, 98.9)  # no interval has passed since
    assert detector.sweep(all_hosts, 99.0)
    steps = []
    for turn in range(1, 6):
        detector.sweep(all_hosts, 99.0 + 10.0 * turn)
        steps.append(host.ejections)
    assert steps == [2, 1, 0, 0, 0]


def test_a_base_beyond_five_minutes_is_kept() -> None:
    detector, all_hosts = OutlierDetector(Outlier(consecutive_5xx=1, base_ejection=400.0), 0.0), hosts(1)
    detector.judge(all_hosts[0], Outcome(500), all_hosts, 0.0)
    all_hosts[0].ejections = 5
    assert not detector.sweep(all_hosts, 399.0)
    assert detector.sweep(all_hosts, 409.0)
