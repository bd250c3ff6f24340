"""How much of the traffic each priority gets by its endpoints' health, and which ones are in panic.

Source: Envoy `LoadBalancerBase::recalculatePerPriorityState`, integers as there: the examples of its documentation come out to the percent.
"""

from __future__ import annotations

from collections.abc import Sequence

OVERPROVISIONING = 140
"""Percent: a priority counts as whole while 72 % of its endpoints are healthy."""
PANIC = 50
"""Percent: under it all endpoints are used, healthy or not; where outlier detection is configured, Istio's `minHealthPercent` counts."""


def loads(sizes: Sequence[tuple[int, int]], threshold: int) -> tuple[list[int], list[bool]]:
    """(percent of traffic, is it in panic) of each priority. The percentages add up to 100.

    Args:
        sizes: (healthy endpoints, all endpoints) of each priority, at least one priority.
        threshold: percent of healthy endpoints under which a priority panics; 0 never.
    """
    health = [min(100, OVERPROVISIONING * healthy // total) if total else 0 for healthy, total in sizes]
    available = min(100, sum(health))
    if available == 100:
        return _spread(health, available), [False] * len(sizes)
    panic = [(100 * healthy / total if total else 0.0) < threshold for healthy, total in sizes]
    if all(panic) and any(total for _, total in sizes):
        return _by_size([total for _, total in sizes]), panic
    if available == 0:
        return [100] + [0] * (len(sizes) - 1), panic
    return _spread(health, available), panic


def _spread(health: Sequence[int], available: int) -> list[int]:
    left = 100
    made: list[int] = []
    for each in health:
        load = min(left, each * 100 // available)
        made.append(load)
        left -= load
    if left:  # what rounding lost goes to the first that has any
        first = next(place for place, each in enumerate(health) if each)
        made[first] += left
    return made


def _by_size(totals: Sequence[int]) -> list[int]:
    whole = sum(totals)
    made = [100 * total // whole for total in totals]
    made[next(place for place, total in enumerate(totals) if total)] += 100 - sum(made)
    return made
