"""Token buckets: rates, bursts, one for each client, and no more of them than fit."""

from __future__ import annotations

from tests.kit.l7 import client
from waypoint.http.messages import Client
from waypoint.http.rate_limit import MAX_CLIENTS, LimitAtWork, Limiter
from ztunnel.mesh.l7.routes import RateLimit

ONE, OTHER = client("shop", "one"), client("shop", "other")


def limiter(*limits: RateLimit) -> Limiter:
    return Limiter([LimitAtWork(each) for each in limits])


def taken(limiter: Limiter, count: int, now: float, by: Client = ONE) -> int:
    return sum(limiter.take(by, now) for _ in range(count))


def test_a_burst_and_then_the_rate() -> None:
    limits = limiter(RateLimit(64, 1.0, 5))
    assert taken(limits, 10, 0.0) == 5
    assert taken(limits, 10, 2 / 64) == 2
    assert taken(limits, 10, 2.5 / 64) == 0
    assert taken(limits, 10, 3 / 64) == 1  # the half of before was kept
    assert taken(limits, 10, 100.0) == 5  # no more than the bucket holds
    assert taken(limits, 10, 99.0) == 0  # a clock that goes back gives nothing


def test_a_rate_by_the_minute() -> None:
    limits = limiter(RateLimit(6, 60.0, 1))
    assert [taken(limits, 3, now) for now in (0.0, 9.9, 10.0, 20.0)] == [1, 0, 1, 1]


def test_clients_share_a_bucket_unless_each_has_one() -> None:
    shared, apart = limiter(RateLimit(1, 60.0, 2)), limiter(RateLimit(1, 60.0, 2, per_client=True))
    assert [taken(shared, 3, 0.0, each) for each in (ONE, OTHER)] == [2, 0]
    assert [taken(apart, 3, 0.0, each) for each in (ONE, OTHER)] == [2, 2]


def test_clients_without_identity_are_told_apart_by_address() -> None:
    limits = limiter(RateLimit(1, 60.0, 1, per_client=True))
    assert [taken(limits, 2, 0.0, Client(None, address)) for address in ("10.0.0.1", "10.0.0.2", "10.0.0.1")] == [1, 1, 0]


def test_a_request_takes_of_every_limit_or_of_none() -> None:
    limits = limiter(RateLimit(1, 60.0, 5), RateLimit(1, 60.0, 1, per_client=True))
    assert taken(limits, 3, 0.0, ONE) == 1
    assert taken(limits, 3, 0.0, OTHER) == 1
    assert [taken(limits, 1, 0.0, client("shop", f"{number}")) for number in range(5)] == [1, 1, 1, 0, 0]


def test_buckets_are_bounded_and_the_quietest_goes() -> None:
    limits = limiter(RateLimit(1, 3600.0, 1, per_client=True))
    assert taken(limits, 1, 0.0, ONE) == 1
    for number in range(MAX_CLIENTS - 1):
        taken(limits, 1, 0.0, Client(None, f"{number}"))
    assert taken(limits, 1, 0.0, ONE) == 0  # still known, and now the least quiet
    taken(limits, 1, 0.0, Client(None, "one more"))
    assert taken(limits, 1, 0.0, ONE) == 0
    assert taken(limits, 1, 0.0, Client(None, "0")) == 1
