"""Consistent hashing: the same key goes to the same endpoint, and when one joins or leaves few keys move.

Source: Envoy `ring_hash_lb.cc` (xxHash64 of `address:port_N`), `maglev_lb.cc`; Eisenbud et al., "Maglev: A Fast and Reliable Software
Network Load Balancer", §3.4. A request without a key goes to a random place of the ring, so weights hold for it too.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from math import ceil

from xxhash import xxh64_intdigest

from waypoint.upstream.balancers import Picker, Randrange
from waypoint.upstream.endpoints import EndpointAtWork

RING_MAXIMUM = 128 * 1024
"""Places on a ring. Envoy's own bound, 8 Mi, would hold this single-threaded worker up for seconds at each change of endpoints."""
_ANY = 2**64


class Ring(Picker):
    """Endpoints' places on a circle of hashes; a key belongs to the next one."""

    def __init__(self, endpoints: Sequence[EndpointAtWork], randrange: Randrange, minimum: int) -> None:
        super().__init__(endpoints, randrange)
        places = sorted(_places(endpoints, min(minimum, RING_MAXIMUM)))
        self.hashes = array("Q", [place[0] for place in places])
        self.owners = array("L", [place[1] for place in places])

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        if key is None:
            key = self.randrange(_ANY)
        at = bisect_left(self.hashes, key)
        return self.endpoints[self.owners[at if at < len(self.owners) else 0]]


def _places(endpoints: Sequence[EndpointAtWork], minimum: int) -> list[tuple[int, int]]:
    """(hash, index) of each place; every endpoint has as many as its weight says, the lightest at least one."""
    total = sum([each.weight for each in endpoints])
    lightest = min([each.weight for each in endpoints]) / total
    scale = min(ceil(lightest * minimum) / lightest, RING_MAXIMUM)
    places: list[tuple[int, int]] = []
    target = 0.0
    for index, endpoint in enumerate(endpoints):
        target += scale * endpoint.weight / total
        number = 0
        # places up to the running sum, so that roundings do not add up
        while len(places) < target:
            places.append((xxh64_intdigest(f"{endpoint.key}_{number}".encode()), index))
            number += 1
    return places


class Maglev(Picker):
    """A table in which each endpoint has nearly as many places as its weight says."""

    def __init__(self, endpoints: Sequence[EndpointAtWork], randrange: Randrange, size: int) -> None:
        """
        Args:
            size: of the table; a prime.
        """
        super().__init__(endpoints, randrange)
        self.size = size
        self.table = _table(endpoints, size)

    def pick(self, key: int | None, now: float) -> EndpointAtWork:
        if key is None:
            key = self.randrange(_ANY)
        return self.endpoints[self.table[key % self.size]]


def _table(endpoints: Sequence[EndpointAtWork], size: int) -> array[int]:
    offsets = [xxh64_intdigest(each.key.encode()) % size for each in endpoints]
    skips = [xxh64_intdigest(each.key.encode(), seed=1) % (size - 1) + 1 for each in endpoints]
    heaviest = max([each.weight for each in endpoints])
    weights = [each.weight / heaviest for each in endpoints]
    turns = [0.0] * len(endpoints)
    table = array("L", [0]) * size
    taken = bytearray(size)
    filled = 0
    round_ = 0
    while True:
        round_ += 1
        for index in range(len(offsets)):
            # a lighter one sits out rounds until its share of them has come
            if round_ * weights[index] < turns[index]:
                continue
            turns[index] += 1.0
            at = offsets[index]
            while taken[at]:
                at += skips[index]
                if at >= size:
                    at -= size
            taken[at] = 1
            table[at] = index
            offsets[index] = (at + skips[index]) % size
            filled += 1
            if filled == size:
                return table
