"""Which of several endpoints is next: least requests, round robin, at random; weights, and the slow start of newcomers.

Source: Envoy, "Supported load balancers", "Slow start mode"; the schedule of unequal weights is earliest deadline first, as there.
Consistent hashing is in `rings.py`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from waypoint.upstream.endpoints import EndpointAtWork
from ztunnel.mesh.l7.clusters import Balancer, Warmup

Randrange = Callable[[int], int]


class Picker:
    """Chooses among endpoints that are the same for its whole life; at least one. This one: at random, whatever their weights."""

    def __init__(self, endpoints: Sequence[EndpointAtWork], randrange: Randrange) -> None:
        self.endpoints = endpoints
        self.randrange = randrange
        self.count = len(endpoints)

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        """
        Args:
            key: the request's hash, for those who know what to do with it.
        """
        return self.endpoints[self.randrange(self.count)] if self.count > 1 else self.endpoints[0]


class LeastRequest(Picker):
    """Equal weights: two at random, the one with fewer requests."""

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        count = self.count
        if count == 1:
            return self.endpoints[0]
        first = self.randrange(count)
        second = self.randrange(count - 1)
        if second >= first:
            second += 1
        one, other = self.endpoints[first], self.endpoints[second]
        return other if other.active < one.active else one


class RoundRobin(Picker):
    """Equal weights: one after the other, from anywhere."""

    def __init__(self, endpoints: Sequence[EndpointAtWork], randrange: Randrange) -> None:
        super().__init__(endpoints, randrange)
        self.at = randrange(self.count)

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        chosen = self.endpoints[self.at]
        self.at = (self.at + 1) % self.count
        return chosen


class Scheduled(Picker):
    """Unequal weights: each comes as often as its weight says (earliest deadline first)."""

    def __init__(self, endpoints: Sequence[EndpointAtWork], randrange: Randrange, warmup: Warmup | None, now: float) -> None:
        super().__init__(endpoints, randrange)
        self.warmup = warmup
        self.clock = 0.0
        self.turn = 0
        self.queue: list[tuple[float, int, EndpointAtWork]] = []
        for endpoint in endpoints:
            self.add(endpoint, now)
        for _ in range(randrange(self.count)):
            self.pick(None, now)

    def add(self, endpoint: EndpointAtWork, now: float) -> None:
        self.turn += 1
        heapq.heappush(self.queue, (self.clock + 1.0 / self.weight(endpoint, now), self.turn, endpoint))

    def weight(self, endpoint: EndpointAtWork, now: float) -> float:
        weight = float(endpoint.weight)
        return weight if self.warmup is None else weight * warmth(self.warmup, now - endpoint.joined)

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        self.clock, _, chosen = heapq.heappop(self.queue)
        self.add(chosen, now)
        return chosen


class ScheduledLeastRequest(Scheduled):
    """The same by weight / (requests + 1)."""

    def weight(self, endpoint: EndpointAtWork, now: float) -> float:
        return super().weight(endpoint, now) / (endpoint.active + 1)


def warmth(warmup: Warmup, age: float) -> float:
    """The share of its weight that an endpoint of this age gets, seconds. 1 when the window is over."""
    if age >= warmup.seconds:
        return 1.0
    share: float = (max(age, 1.0) / warmup.seconds) ** (1.0 / warmup.aggression)
    return min(1.0, max(warmup.minimum, share))


def picker(balancer: Balancer, endpoints: Sequence[EndpointAtWork], randrange: Randrange, warmup: Warmup | None, now: float) -> Picker:
    """The chooser for these endpoints.

    Args:
        warmup: None when no endpoint is new: equal weights then need no schedule.
    """
    if balancer is Balancer.RANDOM:
        return Picker(endpoints, randrange)
    equal = warmup is None and len({each.weight for each in endpoints}) == 1
    if balancer is Balancer.ROUND_ROBIN:
        return RoundRobin(endpoints, randrange) if equal else Scheduled(endpoints, randrange, warmup, now)
    return LeastRequest(endpoints, randrange) if equal else ScheduledLeastRequest(endpoints, randrange, warmup, now)
