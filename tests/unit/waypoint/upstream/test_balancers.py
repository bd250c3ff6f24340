"""Shares that balancers give, slow start, and what moves when endpoints of a ring or table leave."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest

from tests.kit.l7 import endpoint
from waypoint.upstream.balancers import Picker, picker, warmth
from waypoint.upstream.endpoints import EndpointAtWork
from waypoint.upstream.rings import RING_MAXIMUM, Maglev, Ring
from ztunnel.mesh.l7.clusters import Balancer, Warmup

LEAST, ROBIN, RANDOM = Balancer.LEAST_REQUEST, Balancer.ROUND_ROBIN, Balancer.RANDOM


def hosts(*weights: int, joined: float = 0.0) -> list[EndpointAtWork]:
    return [EndpointAtWork(endpoint(f"10.0.0.{place}", weight=weight), joined) for place, weight in enumerate(weights)]


def shares(chooser: Picker, endpoints: list[EndpointAtWork], count: int, now: float = 0.0) -> list[float]:
    chosen = Counter(chooser.pick(None, now).key for _ in range(count))
    return [round(chosen[each.key] / count, 2) for each in endpoints]


@pytest.mark.parametrize(
    ("balancer", "weights", "expected", "tolerance"),
    [
        (LEAST, [1], [1.0], 0.0),
        (LEAST, [1, 1, 1, 1], [0.25] * 4, 0.03),
        (LEAST, [3, 1], [0.75, 0.25], 0.01),
        (ROBIN, [1, 1, 1, 1], [0.25] * 4, 0.0),
        (ROBIN, [2, 1, 1], [0.5, 0.25, 0.25], 0.01),
        (ROBIN, [98, 1, 1], [0.98, 0.01, 0.01], 0.01),
        (RANDOM, [1], [1.0], 0.0),
        (RANDOM, [9, 1], [0.5, 0.5], 0.03),  # as Envoy's: it knows no weights
    ],
)
def test_shares(balancer: Balancer, weights: list[int], expected: list[float], tolerance: float) -> None:
    endpoints = hosts(*weights)
    made = shares(picker(balancer, endpoints, Random(7).randrange, None, 0.0), endpoints, 4000)
    assert made == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("randoms", [[0, 0], [1, 0]])
def test_the_less_loaded_of_two_wins(randoms: list[int]) -> None:
    endpoints = hosts(1, 1)
    endpoints[0].active = 3
    dice = iter(randoms)
    assert picker(LEAST, endpoints, lambda _: next(dice), None, 0.0).pick(None, 0.0) is endpoints[1]


def test_load_counts_against_weight() -> None:
    endpoints = hosts(4, 1)
    chooser = picker(LEAST, endpoints, Random(1).randrange, None, 0.0)
    endpoints[0].active = 7  # 4 / 8 against 1: half as often
    for _ in range(10):
        chooser.pick(None, 0.0)
    assert shares(chooser, endpoints, 300) == pytest.approx([0.33, 0.67], abs=0.02)


@pytest.mark.parametrize("balancer", [ROBIN, Balancer.LEAST_REQUEST])
def test_the_first_of_a_round_is_any(balancer: Balancer) -> None:
    firsts = {picker(balancer, hosts(2, 1, 1), Random(seed).randrange, None, 0.0).pick(None, 0.0).key for seed in range(32)}
    assert len(firsts) > 1


@pytest.mark.parametrize(
    ("warmup", "age", "expected"),
    [
        (Warmup(60.0), 0.0, 0.1),
        (Warmup(60.0), 6.0, 0.1),
        (Warmup(60.0), 30.0, 0.5),
        (Warmup(60.0), 59.0, 59 / 60),
        (Warmup(60.0), 60.0, 1.0),
        (Warmup(60.0, minimum=0.5), 6.0, 0.5),
        (Warmup(100.0, minimum=0.0), 0.2, 0.01),  # the first second counts as one
        (Warmup(100.0, minimum=0.0, aggression=2.0), 25.0, 0.5),
        (Warmup(0.5, minimum=0.0), 0.1, 1.0),
    ],
)
def test_slow_start(warmup: Warmup, age: float, expected: float) -> None:
    assert warmth(warmup, age) == pytest.approx(expected)


@pytest.mark.parametrize("balancer", [ROBIN, LEAST])
def test_a_newcomer_gets_its_share_by_and_by(balancer: Balancer) -> None:
    endpoints = [*hosts(1, 1), EndpointAtWork(endpoint("10.0.0.9"), 100.0)]
    chooser = picker(balancer, endpoints, Random(1).randrange, Warmup(60.0), 110.0)
    # 10 of 60 seconds: a sixth of the weight of the others
    assert shares(chooser, endpoints, 2600, now=110.0) == pytest.approx([6 / 13, 6 / 13, 1 / 13], abs=0.02)


RANDOM_KEYS = [Random(3).getrandbits(64) for _ in range(1)] + [number * 0x9E3779B97F4A7C15 % 2**64 for number in range(3000)]


def hashed(kind: str, endpoints: list[EndpointAtWork]) -> Picker:
    return Ring(endpoints, Random(1).randrange, 1024) if kind == "ring" else Maglev(endpoints, Random(1).randrange, 65537)


def owners(chooser: Picker) -> list[str]:
    return [chooser.pick(key, 0.0).key for key in RANDOM_KEYS]


@pytest.mark.parametrize("kind", ["ring", "maglev"])
def test_a_key_keeps_its_endpoint_and_few_move_when_one_leaves(kind: str) -> None:
    endpoints = hosts(*[1] * 10)
    before, after = owners(hashed(kind, endpoints)), owners(hashed(kind, endpoints[:-1]))
    assert owners(hashed(kind, endpoints)) == before
    gone = endpoints[-1].key
    moved = sum(one != other for one, other in zip(before, after, strict=True) if one != gone)
    assert moved <= len(before) * (0.12 if kind == "ring" else 0.06)  # a ring of nine has more places of each
    assert before.count(gone) > 0


@pytest.mark.parametrize(("kind", "tolerance"), [("ring", 0.08), ("maglev", 0.03)])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [5, 3, 1, 1]])
def test_keys_spread_by_weight(kind: str, tolerance: float, weights: list[int]) -> None:
    endpoints = hosts(*weights)
    counts = Counter(owners(hashed(kind, endpoints)))
    made = [counts[each.key] / len(RANDOM_KEYS) for each in endpoints]
    assert made == pytest.approx([weight / sum(weights) for weight in weights], abs=tolerance)
    assert len({hashed(kind, endpoints).pick(None, 0.0).key}) == 1


@pytest.mark.parametrize(("minimum", "weights", "places"), [(1024, [1], 1024), (1024, [1, 1, 1], 1026), (10, [1, 4], 10), (1, [1, 1], 2)])
def test_places_on_a_ring(minimum: int, weights: list[int], places: int) -> None:
    ring = Ring(hosts(*weights), Random(1).randrange, minimum)
    assert len(ring.hashes) == places
    assert list(ring.hashes) == sorted(ring.hashes)


def test_a_ring_is_bounded() -> None:
    assert len(Ring(hosts(1, 10**7), Random(1).randrange, 1024).hashes) <= RING_MAXIMUM


def test_a_ring_closes() -> None:
    ring = Ring(hosts(1, 1), Random(1).randrange, 8)
    assert ring.pick(2**64 - 1, 0.0) is ring.pick(0, 0.0)


def test_a_ring_is_envoys() -> None:
    """xxHash64 of `address:port_N`: the least place of this ring, computed apart with the reference implementation."""
    ring = Ring(hosts(1, 1), Random(1).randrange, 4)
    from xxhash import xxh64  # noqa: PLC0415

    expected = sorted(xxh64(f"10.0.0.{host}:8080_{place}".encode()).intdigest() for host in (0, 1) for place in (0, 1))
    assert list(ring.hashes) == expected
