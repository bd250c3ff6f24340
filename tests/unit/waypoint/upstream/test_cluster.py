"""Which endpoint a cluster gives: health, priorities, panic, tries, changes of configuration, names and original destinations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from tests.kit.l7 import cluster, endpoint
from waypoint.upstream.cluster import ClusterAtWork, PickContext, Shortage
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.localities import Place
from waypoint.upstream.outcome import Outcome
from ztunnel.mesh.l7.clusters import (
    Balancer,
    Cluster,
    LoadBalancing,
    Locality,
    LocalitySettings,
    Outlier,
    PoolLimits,
    Resolution,
    RetryBudget,
    Warmup,
)

A, B, C = endpoint("10.0.0.1"), endpoint("10.0.0.2"), endpoint("10.0.0.3")
OUTLIER = Outlier(consecutive_5xx=1, max_ejection_percent=100)
HERE = Place(Locality("r1", "z1", "s1"))


def at_work(configured: Cluster, seed: int = 5) -> ClusterAtWork:
    return ClusterAtWork(configured, HERE, 0.0, Random(seed).randrange)


def picked(at: ClusterAtWork, context: PickContext | None = None, now: float = 0.0) -> EndpointAtWork:
    chosen = at.pick(context or PickContext(), now)
    assert isinstance(chosen, EndpointAtWork)
    return chosen


def counted(at: ClusterAtWork, count: int = 400) -> dict[str, int]:
    return dict(Counter(picked(at).endpoint.address for _ in range(count)))


def eject(at: ClusterAtWork, *addresses: str) -> None:
    for each in at.endpoints:
        if each.endpoint.address in addresses:
            at.done(each, Outcome(503), 0.0)
            assert each.ejected


def test_nobody_is_there() -> None:
    assert at_work(cluster()).pick(PickContext(), 0.0) is Shortage.NO_HEALTHY
    assert at_work(cluster(endpoint("10.0.0.1", healthy=False))).pick(PickContext(), 0.0) is Shortage.NO_HEALTHY


def test_a_refused_configuration_sends_nobody_anywhere() -> None:
    assert at_work(replace(cluster(A), refused="two TLS modes")).pick(PickContext(), 0.0) is Shortage.REFUSED


def test_what_is_not_ready_is_never_chosen() -> None:
    at = at_work(cluster(A, endpoint("10.0.0.2", healthy=False), C))
    assert set(counted(at)) == {"10.0.0.1", "10.0.0.3"}


def test_what_is_ejected_is_left_out_and_comes_back() -> None:
    at = at_work(cluster(A, B, outlier=OUTLIER))
    eject(at, "10.0.0.1")
    assert set(counted(at)) == {"10.0.0.2"}
    at.sweep(29.0)
    assert set(counted(at)) == {"10.0.0.2"}
    at.sweep(39.0)
    assert set(counted(at)) == {"10.0.0.1", "10.0.0.2"}


def test_all_ejected_without_panic() -> None:
    at = at_work(cluster(A, B, outlier=OUTLIER))
    eject(at, "10.0.0.1", "10.0.0.2")
    assert at.pick(PickContext(), 0.0) is Shortage.NO_HEALTHY


def test_panic_uses_all_that_are_ready() -> None:
    at = at_work(cluster(A, B, C, endpoint("10.0.0.4", healthy=False), outlier=replace(OUTLIER, min_health_percent=50)))
    eject(at, "10.0.0.1")
    assert set(counted(at)) == {"10.0.0.2", "10.0.0.3"}
    eject(at, "10.0.0.2")
    assert set(counted(at)) == {"10.0.0.1", "10.0.0.2", "10.0.0.3"}


NEAR = [endpoint(f"10.1.0.{place}", locality="r1/z1/s1") for place in range(4)]
FAR = [endpoint(f"10.2.0.{place}", locality="r2/z1/s1") for place in range(4)]


def test_far_endpoints_are_for_when_near_ones_fail() -> None:
    at = at_work(cluster(*NEAR, *FAR, outlier=OUTLIER))
    assert all(address.startswith("10.1.") for address in counted(at))
    eject(at, "10.1.0.0")
    assert all(address.startswith("10.1.") for address in counted(at))  # 75 % healthy is still whole
    eject(at, "10.1.0.1")
    far = sum(count for address, count in counted(at, 2000).items() if address.startswith("10.2."))
    assert far / 2000 == pytest.approx(0.30, abs=0.04)
    eject(at, "10.1.0.2", "10.1.0.3")
    assert all(address.startswith("10.2.") for address in counted(at))


def test_retries_may_go_to_far_endpoints() -> None:
    at = at_work(cluster(*NEAR, *FAR, outlier=OUTLIER))
    context = PickContext(remote=True)
    near = [each for each in at.endpoints if each.endpoint.address.startswith("10.1.")]
    context.tried = near[:1]
    assert picked(at, context).endpoint.address.startswith("10.1.")
    context.tried = near[:2]
    assert picked(at, context).endpoint.address.startswith("10.2.")
    context.tried = [*near[:2], *[each for each in at.endpoints if each not in near][:2]]
    assert picked(at, context).endpoint.address.startswith("10.1.")  # every priority was tried: as at first
    context.remote = False
    context.tried = near[:2]
    assert picked(at, context).endpoint.address.startswith("10.1.")


def test_shares_of_localities() -> None:
    settings = LocalitySettings(distribute=(("r1/*", (("r1/*", 80), ("r2/*", 20))),))
    at = at_work(cluster(*NEAR, *FAR, balancing=LoadBalancing(locality=settings), outlier=OUTLIER))
    near = sum(count for address, count in counted(at, 2000).items() if address.startswith("10.1."))
    assert near / 2000 == pytest.approx(0.8, abs=0.04)
    eject(at, "10.1.0.0", "10.1.0.1")  # half of them: 70 % of its share is left, 56 to 20
    near = sum(count for address, count in counted(at, 2000).items() if address.startswith("10.1."))
    assert near / 2000 == pytest.approx(56 / 76, abs=0.04)
    eject(at, "10.1.0.2", "10.1.0.3")
    assert all(address.startswith("10.2.") for address in counted(at))
    here_only = LocalitySettings(distribute=(("r1/*", (("r3/*", 100),)),))
    assert at_work(cluster(*NEAR, balancing=LoadBalancing(locality=here_only))).pick(PickContext(), 0.0) is Shortage.NO_HEALTHY


def test_tried_endpoints_are_avoided() -> None:
    at = at_work(cluster(A, B))
    context = PickContext()
    context.tried = [at.endpoints[0]]
    again = sum(picked(at, context) is at.endpoints[0] for _ in range(2000))
    context.avoids = False
    anew = sum(picked(at, context) is at.endpoints[0] for _ in range(2000))
    assert 900 < anew < 1100
    assert again < 100  # six choices at random all fall on it once in 64; of two endpoints, least requests rarely does


def test_a_key_is_stronger_than_what_was_tried() -> None:
    at = at_work(cluster(A, B, balancing=LoadBalancing(Balancer.RING_HASH)))
    context = PickContext(key=12345)
    first = picked(at, context)
    context.tried = [first]
    assert {picked(at, context).key for _ in range(20)} == {first.key}


@pytest.mark.parametrize("balancer", [Balancer.RING_HASH, Balancer.MAGLEV])
def test_keys_ask_the_order_of_configuration_nothing(balancer: Balancer) -> None:
    one, other = (at_work(cluster(*order, balancing=LoadBalancing(balancer))) for order in ((A, B, C), (C, A, B)))
    keys = [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(200)]
    assert [picked(one, PickContext(key)).key for key in keys] == [picked(other, PickContext(key)).key for key in keys]
    assert len({picked(one, PickContext()).key for _ in range(100)}) == 3  # without a key: anywhere


def test_a_key_keeps_its_place_over_priorities_and_localities() -> None:
    settings = LocalitySettings(distribute=(("r1/*", (("r1/*", 50), ("r2/*", 50))),))
    for locality in (settings, LocalitySettings()):
        at = at_work(cluster(*NEAR, *FAR, balancing=LoadBalancing(Balancer.RING_HASH, locality=locality), outlier=OUTLIER))
        eject(at, "10.1.0.0", "10.1.0.1")
        assert all(len({picked(at, PickContext(key)).key for _ in range(5)}) == 1 for key in (1, 2**40 + 77, 2**63 + 99))


def test_endpoints_that_stay_keep_what_is_known_of_them() -> None:
    at = at_work(cluster(A, B, outlier=OUTLIER))
    eject(at, "10.0.0.1")
    first, second = at.endpoints
    first.active = 3
    gone = at.update(cluster(replace(A, weight=5), C, outlier=OUTLIER), 1.0)
    assert gone == [second]
    assert at.endpoints[0] is first
    assert (first.active, first.ejected, first.weight) == (3, True, 5)
    first.active = 0
    at.update(cluster(A, C, outlier=OUTLIER), 1.0)
    assert set(counted(at)) == {"10.0.0.3"}
    at.update(cluster(A, C), 1.0)
    assert set(counted(at)) == {"10.0.0.1", "10.0.0.3"}


def test_new_settings_of_outlier_detection_count() -> None:
    at = at_work(cluster(A, B))
    at.update(cluster(A, B, outlier=OUTLIER), 1.0)
    eject(at, "10.0.0.1")
    assert set(counted(at)) == {"10.0.0.2"}


def test_a_newcomer_warms_up() -> None:
    warm = LoadBalancing(Balancer.ROUND_ROBIN, warmup=Warmup(60.0))
    at = at_work(cluster(A, balancing=warm))
    at.update(cluster(A, B, balancing=warm), 100.0)

    def share(now: float) -> float:
        return sum(picked(at, now=now).endpoint == B for _ in range(700)) / 700

    assert share(110.0) == pytest.approx(1 / 7, abs=0.02)
    assert share(130.0) == pytest.approx(1 / 3, abs=0.02)
    assert share(160.0) == pytest.approx(1 / 2, abs=0.02)


def test_names_that_are_resolved() -> None:
    at = at_work(replace(cluster(), resolution=Resolution.DNS, names=(("db.example.com", 5432), ("other", 80))))
    assert at.pick(PickContext(), 0.0) is Shortage.NO_HEALTHY
    assert at.resolved(("db.example.com", 5432), ("192.0.2.1", "192.0.2.2"), 0.0) == []
    at.resolved(("other", 80), ("2001:db8::1",), 0.0)
    assert {each.key for each in at.endpoints} == {"192.0.2.1:5432", "192.0.2.2:5432", "[2001:db8::1]:80"}
    (gone,) = at.resolved(("db.example.com", 5432), ("192.0.2.2",), 0.0)
    assert gone.key == "192.0.2.1:5432"
    at.update(replace(at.cluster, names=(("other", 80),)), 0.0)
    assert picked(at).key == "[2001:db8::1]:80"


@pytest.mark.parametrize(
    "configured",
    [replace(cluster(A), resolution=Resolution.ORIGINAL), cluster(A, balancing=LoadBalancing(Balancer.PASSTHROUGH))],
    ids=["ORIGINAL", "PASSTHROUGH"],
)
def test_where_the_client_dialled(configured: Cluster) -> None:
    at = at_work(configured)
    elsewhere = picked(at, PickContext(destination=("198.51.100.7", 443)))
    assert elsewhere.key == "198.51.100.7:443"
    assert picked(at, PickContext(destination=("198.51.100.7", 443))) is elsewhere
    assert picked(at, PickContext(destination=("10.0.0.1", 8080))) is at.endpoints[0]  # the mesh knows more of it
    assert at.update(configured, 1.0) == []
    assert picked(at, PickContext(destination=("198.51.100.7", 443))) is elsewhere
    known = endpoint("198.51.100.7")
    assert at.update(replace(configured, endpoints=(A, replace(known, port=443, hbone=True))), 1.0) == [elsewhere]
    assert picked(at, PickContext(destination=("198.51.100.7", 443))).endpoint.hbone
    for port in range(1, 1100):
        picked(at, PickContext(destination=("203.0.113.1", port)))
    assert picked(at, PickContext(destination=("203.0.113.1", 1099))).key == "203.0.113.1:1099"
    assert len(at._originals) == 1024


@pytest.mark.parametrize("kind", ["connection", "pending", "request", "retry"])
def test_circuit_breakers(kind: str) -> None:
    breakers = at_work(cluster(limits=PoolLimits(max_connections=2, max_pending=2, max_requests=2, max_retries=2))).breakers
    admit, release = getattr(breakers, f"admit_{kind}"), getattr(breakers, f"release_{kind}")
    assert [admit() for _ in range(3)] == [True, True, False]
    release()
    assert [admit() for _ in range(2)] == [True, False]


@pytest.mark.parametrize(("requests", "pending", "most"), [(0, 0, 3), (10, 5, 3), (10, 15, 5), (100, 0, 20)])
def test_retry_budget(requests: int, pending: int, most: int) -> None:
    at = at_work(cluster(limits=PoolLimits(max_retries=1, retry_budget=RetryBudget(0.2, 3))))
    at.breakers.requests, at.breakers.pending = requests, pending
    assert sum(at.breakers.admit_retry() for _ in range(50)) == most
