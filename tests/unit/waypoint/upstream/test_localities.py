"""Priorities by locality and labels, and shares of localities, as Istio computes them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.kit.l7 import endpoint
from waypoint.upstream.localities import Place, priorities, shares
from ztunnel.mesh.l7.clusters import Locality, LocalitySettings

HERE = Place(Locality("r1", "z1", "s1"), "node-a", {"version": "v1"})
ENDPOINTS = [endpoint("10.0.0.1", locality=where) for where in ("r1/z1/s1", "r1/z1/s2", "r1/z2/s1", "r2/z1/s1", "r3/z1/s1")]


@pytest.mark.parametrize(
    ("settings", "outliers", "expected"),
    [
        (LocalitySettings(), True, [0, 1, 2, 3, 3]),
        (LocalitySettings(), False, [0, 0, 0, 0, 0]),
        (LocalitySettings(enabled=False), True, [0, 0, 0, 0, 0]),
        (LocalitySettings(failover=(("r1", "r3"),)), True, [0, 1, 2, 4, 3]),
        (LocalitySettings(failover=(("r2", "r3"),)), True, [0, 1, 2, 3, 3]),
        (LocalitySettings(distribute=(("r1", (("r1", 100),)),)), True, [0, 0, 0, 0, 0]),
        (LocalitySettings(forced="PreferClose"), False, [0, 1, 2, 3, 3]),
        (LocalitySettings(forced="PreferSameZone"), False, [0, 1, 2, 3, 3]),
        # no endpoint is on this node, so the nearest ones come first without a gap
        (LocalitySettings(forced="PreferSameNode"), False, [0, 1, 2, 3, 3]),
        (LocalitySettings(failover_priority=("topology.kubernetes.io/region",)), True, [0, 0, 0, 1, 1]),
        (LocalitySettings(failover_priority=("topology.kubernetes.io/region=r3", "topology.istio.io/subzone")), True, [1, 1, 1, 1, 0]),
        (LocalitySettings(failover_priority=("topology.kubernetes.io/zone", "topology.kubernetes.io/region")), True, [0, 0, 2, 1, 1]),
        (LocalitySettings(failover_priority=("topology.kubernetes.io/region",)), False, [0, 0, 0, 0, 0]),
    ],
)
def test_priorities(settings: LocalitySettings, outliers: bool, expected: list[int]) -> None:
    assert priorities(settings, ENDPOINTS, HERE, outliers=outliers) == expected


def test_priorities_by_labels_and_node() -> None:
    there = [
        replace(ENDPOINTS[0], labels=(("version", version),), node=node) for version, node in (("v2", "b"), ("v1", "b"), ("v1", "node-a"))
    ]
    assert priorities(LocalitySettings(failover_priority=("version",)), there, HERE, outliers=True) == [1, 0, 0]
    assert priorities(LocalitySettings(forced="PreferSameNode"), there, HERE, outliers=False) == [1, 1, 0]


def test_a_proxy_that_does_not_know_where_it_is_prefers_nobody() -> None:
    assert priorities(LocalitySettings(), ENDPOINTS, Place(Locality()), outliers=True) == [0] * 5


A, B, C = Locality("r1", "z1"), Locality("r1", "z2"), Locality("r2", "z1")


@pytest.mark.parametrize(
    ("distribute", "expected"),
    [
        ((("r1/z1/*", (("r1/z1/*", 80), ("r2/*", 20))),), {A: 80.0, C: 20.0}),
        ((("r1/*", (("r1/*", 60), ("r2/z1", 40))),), {A: 15.0, B: 45.0, C: 40.0}),  # by weight within r1: 1 of 4, 3 of 4
        ((("*", (("r1/z2", 30), ("*", 70))),), {B: 30.0, A: 35.0, C: 35.0}),
        ((("r9", (("r1", 100),)),), None),
        ((("r1/z2", (("r1", 100),)), ("r1/z1", (("r2", 100),))), {C: 100.0}),
        ((), None),
    ],
)
def test_shares(distribute: tuple[tuple[str, tuple[tuple[str, int], ...]], ...], expected: dict[Locality, float] | None) -> None:
    settings = LocalitySettings(distribute=distribute)
    assert shares(settings, [(A, 1), (B, 3), (C, 1)], HERE.locality) == expected
    assert shares(replace(settings, enabled=False), [(A, 1)], HERE.locality) is None
